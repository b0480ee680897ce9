"""Until a kernel ends: its status and its log as they change.

States, waits and texts of a run; the calls are the client's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import requests

from lema.errors import KaggleError

from .advice import explained
from .answers import Status
from .client import Kernels
from .retry_policy import DROPPED, RETRIED

SETTLE = 60.0
"""Seconds after a push in which an end may still be that of the run before."""
FIRST_POLL, LONGEST_POLL = 5.0, 60.0
"""Seconds between two looks at the status; each wait is half as long again as the one before."""
_LOG_TAIL = 25
_NOT_YET = RETRIED | {404, 409}
"""Answers of the log's stream while a run is queued, or later."""


def wait_for_end(kernels: Kernels, kernel: str, *, pushed: bool = False, say: Callable[[str], None]) -> Status:
    """Look at the status, less and less often, until the run has ended.

    Args:
        pushed: the run was only just asked for.
        say: told of every change.
    """
    retry_policy = kernels.retry_policy
    began, wait, last, alive = retry_policy.now(), FIRST_POLL, None, not pushed
    patient = _more_patient(kernels)
    while True:
        status = patient.status(kernel)
        alive |= not status.ended
        if status.state != last and (alive or not status.ended):
            minutes = (retry_policy.now() - began) / 60
            say(f"{kernel}: {status.state.lower().replace('_', ' ')} after {minutes:.0f} min")
            last, wait = status.state, FIRST_POLL
        if status.ended and (alive or retry_policy.now() - began >= SETTLE):
            return status
        retry_policy.sleep(wait)
        wait = min(wait * 1.5, LONGEST_POLL)


def wait_for_start(kernels: Kernels, kernel: str) -> None:
    """Until a run that was just asked for is seen, or `SETTLE` is over; till then the log may be an older run's."""
    retry_policy = kernels.retry_policy
    began = retry_policy.now()
    while kernels.status(kernel).ended and retry_policy.now() - began < SETTLE:
        retry_policy.sleep(FIRST_POLL)


def follow_log(kernels: Kernels, kernel: str, write: Callable[[str], None]) -> Status:
    """Write the log as it grows, until the run has ended; a stream that breaks off is taken up where it was.

    Raises:
        KaggleError: the stream broke off again and again without anything new.
    """
    retry_policy, seen, failures = kernels.retry_policy, 0, 0
    while True:
        try:
            for number, text in enumerate(kernels.log_stream(kernel), 1):
                if number > seen:
                    seen, failures = number, 0
                    write(text)
        except requests.ReadTimeout:  # nothing was written for a while, which is no fault
            if (status := kernels.status(kernel)).ended:
                return status
            continue
        except requests.RequestException as error:
            answered = error.response is not None and error.response.status_code in _NOT_YET
            if not (answered or isinstance(error, DROPPED)):
                raise explained(error, f"log of {kernel}", kernels.credentials.source) from error
            queued = answered and kernels.status(kernel).state in ("QUEUED", "NEW_SCRIPT")
            failures += not queued
            if failures > retry_policy.tries:
                raise explained(error, f"log of {kernel}", kernels.credentials.source) from error
        else:
            if (status := kernels.status(kernel)).ended:
                return status
        retry_policy.sleep(LONGEST_POLL if failures == 0 else retry_policy.wait(failures))


def check_end(kernels: Kernels, kernel: str, status: Status) -> None:
    """Nothing, for a run that ended well.

    Raises:
        KaggleError: it failed, with the end of its log, or it was cancelled or ran out of quota.
    """
    if status.state == "COMPLETE":
        return
    reason = f": {status.failure}" if status.failure else ""
    if "quota" in (status.failure or "").lower():
        raise KaggleError(
            f"{kernel} was ended for want of accelerator quota{reason}. `lema kaggle status --quota` says when there "
            "is more; then go on with: lema kaggle run ... --resume-from " + kernel
        )
    if status.state == "CANCEL_ACKNOWLEDGED":
        raise KaggleError(
            f"{kernel} was cancelled{reason}; a cancelled run may leave no outputs. What it left: "
            f"lema kaggle pull {kernel} --any-state"
        )
    if not status.ended:
        raise KaggleError(f"{kernel} has not ended, it is {status.state.lower()}: lema kaggle status {kernel}")
    tail = kernels.log(kernel).splitlines()[-_LOG_TAIL:]
    shown = "\n".join(f"  {line}" for line in tail) or "  (the log is empty)"
    raise KaggleError(
        f"{kernel} failed{reason}. The end of its log:\n{shown}\nAll of it: lema kaggle logs {kernel}\n"
        f"What it left, if anything: lema kaggle pull {kernel} --any-state"
    )


def _more_patient(kernels: Kernels) -> Kernels:
    """A watch of hours outlasts an outage of minutes."""
    retry_policy = dataclasses.replace(kernels.retry_policy, tries=2 * kernels.retry_policy.tries)
    return Kernels(kernels.credentials, retry_policy, kernels.user)
