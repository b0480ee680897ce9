"""Who we are at Kaggle: where a token or key is, and what is wrong with it.

Files and environment variables are looked at in the official client's order; nothing is sent.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lema.errors import KaggleError

SETTINGS_PAGE = "https://www.kaggle.com/settings"
_PLACEHOLDERS = ("your-username", "your_username", "username", "insert_slug_here", "kaggle_username", "changeme")
_HOW = (
    f"Create a token at {SETTINGS_PAGE} (API), then either\n"
    "  export KAGGLE_API_TOKEN=...                 the token, or a file that holds it\n"
    "  or put it in ~/.kaggle/access_token         and run: chmod 600 ~/.kaggle/access_token\n"
    "  or save the older kaggle.json to ~/.kaggle/ and run: chmod 600 ~/.kaggle/kaggle.json"
)


@dataclass(frozen=True)
class Credentials:
    """A token, or a user name with a key. Secrets are left out of its repr."""

    source: str
    """Where they were found, for messages."""
    user: str | None
    """None: the token has to be asked."""
    token: str | None = field(default=None, repr=False)
    key: str | None = field(default=None, repr=False)


def find(env: Mapping[str, str] | None = None, home: Path | None = None) -> Credentials:
    """The credentials there are: `KAGGLE_API_TOKEN`, `access_token`, `KAGGLE_USERNAME` and `KAGGLE_KEY`, `kaggle.json`.

    Raises:
        KaggleError: there are none, or they are readable by others, incomplete or a placeholder.
    """
    env = os.environ if env is None else env
    home = Path.home() if home is None else home
    user = env.get("KAGGLE_USERNAME") or None
    if user is not None:
        check_user(user, "KAGGLE_USERNAME")
    if given := env.get("KAGGLE_API_TOKEN", "").strip():
        if _is_file(given):
            return Credentials(f"KAGGLE_API_TOKEN ({given})", user, token=_secret_text(Path(given)))
        return Credentials("KAGGLE_API_TOKEN", user, token=given)
    for path in (home / ".kaggle" / "access_token", home / ".kaggle" / "access_token.txt"):
        if path.is_file():
            return Credentials(str(path), user, token=_secret_text(path))
    if user is not None and env.get("KAGGLE_KEY"):
        return Credentials("KAGGLE_USERNAME and KAGGLE_KEY", user, key=env["KAGGLE_KEY"])
    places = _json_places(env, home)
    for path in places:
        if path.is_file():
            return _from_json(path)
    half = "KAGGLE_USERNAME is set without KAGGLE_KEY. " if user is not None else ""
    if env.get("KAGGLE_KEY") and user is None:
        half = "KAGGLE_KEY is set without KAGGLE_USERNAME. "
    looked = ", ".join(str(place) for place in (home / ".kaggle" / "access_token", *places))
    raise KaggleError(f"no Kaggle credentials. {half}Looked at KAGGLE_API_TOKEN, KAGGLE_KEY, {looked}.\n{_HOW}")


def check_user(user: str, where: str) -> str:
    """A user name as it is in addresses; returns it.

    Raises:
        KaggleError: it is empty, has characters no user name has, or stands for one to be filled in.
    """
    name = user.strip()
    if not name or not all(c.isalnum() or c in "-_" for c in name) or name.lower() in _PLACEHOLDERS:
        raise KaggleError(
            f"{where}: {user!r} is no Kaggle user name; it is the last part of your profile's address, "
            "https://www.kaggle.com/NAME. Give it with --user NAME"
        )
    return name


def _json_places(env: Mapping[str, str], home: Path) -> list[Path]:
    if folder := env.get("KAGGLE_CONFIG_DIR"):
        return [Path(folder) / "kaggle.json"]
    config = Path(env.get("XDG_CONFIG_HOME") or home / ".config")
    return [home / ".kaggle" / "kaggle.json", config / "kaggle" / "kaggle.json"]


def _from_json(path: Path) -> Credentials:
    text = _secret_text(path)
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise KaggleError(f"{path} is not JSON ({error}); download it anew.\n{_HOW}") from error
    user = values.get("username") if isinstance(values, dict) else None
    key = values.get("key") if isinstance(values, dict) else None
    if not (isinstance(user, str) and isinstance(key, str) and user and key):
        raise KaggleError(f'{path} must be {{"username": "...", "key": "..."}}; download it anew.\n{_HOW}')
    return Credentials(str(path), check_user(user, str(path)), key=key)


def _secret_text(path: Path) -> str:
    """What a file with a secret says.

    Raises:
        KaggleError: others may read it, it cannot be read, or it is empty.
    """
    try:
        mode = path.stat().st_mode
        if os.name == "posix" and mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise KaggleError(
                f"{path} may be read by other users (mode {stat.S_IMODE(mode):03o}). Run: chmod 600 {path}; "
                f"if others use this machine, also make a new token at {SETTINGS_PAGE}"
            )
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise KaggleError(f"{path} cannot be read: {error}") from error
    if not text:
        raise KaggleError(f"{path} is empty.\n{_HOW}")
    return text


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except (OSError, ValueError):  # a token may be longer than a name can be
        return False
