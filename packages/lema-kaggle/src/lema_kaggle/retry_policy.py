"""How often and how long to wait when a service on the network fails for a while.

Decided by the answer's status and a clock, whatever is asked for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

import requests
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt

T = TypeVar("T")

RETRIED = frozenset({429, 500, 502, 503, 504})
"""Answers that another try may change."""
DROPPED = (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError)
"""How requests says that an answer never came, or not all of it."""


def _nothing(_: str) -> None:
    return None


@dataclass(frozen=True)
class RetryPolicy:
    """How long to go on. The clock is a parameter, so that tests wait for nothing."""

    tries: int = 6
    """Of one call."""
    first_wait: float = 1.0
    """Seconds; each further wait is twice the one before."""
    longest_wait: float = 60.0
    """Seconds; a `Retry-After` of the server may be longer, up to `longest_asked`."""
    longest_asked: float = 900.0
    """Seconds a server may ask to wait for; asked for more, there is no further try."""
    sleep: Callable[[float], None] = time.sleep
    now: Callable[[], float] = time.time
    """Seconds since 1970."""
    say: Callable[[str], None] = field(default=_nothing)
    """Told before every wait."""

    def wait(self, attempt: int) -> float:
        """Seconds before the try after `attempt` (0 is the first)."""
        return min(self.first_wait * 2.0**attempt, self.longest_wait)

    def retry(self, what: str, call: Callable[[], T], statuses: Collection[int] = RETRIED, dropped: bool = True) -> T:
        """Call until it works, and raise what it raised last when no try is left.

        Args:
            what: the call's name, for `say`.
            statuses: of an HTTPError that are tried again; any other is raised at once.
            dropped: whether a connection that was lost is tried again.
        """

        def again(error: BaseException) -> bool:
            if not isinstance(error, requests.HTTPError):
                return dropped and isinstance(error, DROPPED)
            asked = self._asked_by(error)
            status = None if error.response is None else error.response.status_code
            return status in statuses and (asked is None or asked <= self.longest_asked)

        def tell(state: RetryCallState) -> None:
            error = _error_of(state)
            http = isinstance(error, requests.HTTPError) and error.response is not None
            reason = f"HTTP {error.response.status_code}" if http else f"connection lost ({type(error).__name__})"
            self.say(f"{what}: {reason}, next try in {state.upcoming_sleep:.0f} s")

        return Retrying(
            stop=stop_after_attempt(self.tries), retry=retry_if_exception(again), wait=self._seconds,
            sleep=self.sleep, before_sleep=tell, reraise=True,
        )(call)  # fmt: skip

    def _seconds(self, state: RetryCallState) -> float:
        asked = self._asked_by(_error_of(state))
        return self.wait(state.attempt_number - 1) if asked is None else asked

    def _asked_by(self, error: BaseException | None) -> float | None:
        response = error.response if isinstance(error, requests.HTTPError) else None
        return None if response is None else retry_after(response, self.now())


def _error_of(state: RetryCallState) -> Any:
    assert state.outcome is not None
    return state.outcome.exception()


def retry_after(response: requests.Response, now: float) -> float | None:
    """Seconds that a `Retry-After` header (RFC 9110, 10.2.3: seconds or a date) asks for; None without one."""
    text = response.headers.get("Retry-After", "").strip()
    if text.isdigit():
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - now)
    except ValueError:
        return None
