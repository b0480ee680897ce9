"""What an answer or silence of Kaggle means, and what to do about it."""

from __future__ import annotations

import requests

from lema.errors import KaggleError

from .credentials import SETTINGS_PAGE

_ADVICE = {
    401: "the credentials of {source} are not accepted: make a new token at " + SETTINGS_PAGE,
    403: "not allowed: check the kernel's name (OWNER/SLUG as in its address) and that it is yours or public; GPU and "
    "internet need an account whose phone number was confirmed (" + SETTINGS_PAGE + ")",
    404: "there is no such thing: check the name, OWNER/SLUG as in the kernel's address, and --user",
    429: "too many requests, still after waiting: try again in some minutes",
}


def explained(error: requests.RequestException, what: str, source: str) -> KaggleError:
    """The error to raise instead.

    Args:
        what: what was being done.
        source: of the credentials.
    """
    response = error.response
    if isinstance(error, requests.exceptions.InvalidJSONError):
        return KaggleError(
            f"{what}: the answer is not one of Kaggle's API ({_short(str(error))}). A proxy or the login page of a "
            "network may have answered instead: open https://www.kaggle.com in a browser"
        )
    if response is None:
        return KaggleError(
            f"{what}: no answer from Kaggle ({type(error).__name__}: {_short(str(error))}). Check the network and "
            "https://www.kaggle.com, then give the same command again; what was done so far is kept"
        )
    status = response.status_code
    advice = _ADVICE.get(status)
    if advice is None:
        advice = (
            "Kaggle has a fault of its own: try again later" if status >= 500 else "nothing more is known about this"
        )
    return KaggleError(f"{what}: HTTP {status}, {_short(str(error))}; {advice.format(source=source)}")


def _short(text: str) -> str:
    words = " ".join(text.split())
    return words if len(words) <= 300 else words[:297] + "..."
