"""Calls of Kaggle's HTTP API about kernels, by the official client's own types and transport.

Layout: `kagglesdk`, which the `kaggle` package stands on, is used rather than `kaggle` itself. Importing `kaggle` looks
for credentials, may ask the network with them and may end the process; its `KaggleApi` also always talks to the
production address, while `kagglesdk` heeds `KAGGLE_API_ENVIRONMENT`. Nothing happens here before the first call.

Mechanics: every call has time-outs, is tried again as `RetryPolicy` says, and raises `KaggleError` with what to do.
Kernels are known by their reference OWNER/SLUG; notebooks' contents and files on disk are not.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import Any, TypeVar

from lema.errors import KaggleError

from .credentials import Credentials
from .extra import kaggle_extra

with kaggle_extra():
    import requests
    from kagglesdk.kernels.services.kernels_api_service import KernelsApiClient
    from kagglesdk.kernels.types import kernels_api_service as types
    from kagglesdk.security.services.oauth_service import OAuthClient
    from kagglesdk.security.types.oauth_service import IntrospectTokenRequest

from .advice import explained
from .answers import OutputFile, Pushed, Quota, Status
from .retry_policy import DROPPED, RETRIED, RetryPolicy
from .transport import Transport, unless_silent

T = TypeVar("T")
_ENVIRONMENTS = ("PROD", "LOCALHOST", "ADMIN", "STAGING", "QA", "TEST")
_END_OF_LOG = "END_OF_LOG"
_NOT_TAKEN = frozenset({429, 503})  # of a push: it did not arrive, and may be sent again as it is


class Kernels:
    """Kernels of one account.

    Args:
        credentials: see `credentials.find`.
        retry_policy: of every call.
        user: whose kernels a bare slug means; None: as the credentials say.
    """

    def __init__(
        self, credentials: Credentials, retry_policy: RetryPolicy | None = None, user: str | None = None
    ) -> None:
        if (env := os.environ.get("KAGGLE_API_ENVIRONMENT", "PROD")) not in _ENVIRONMENTS:
            raise KaggleError(f"KAGGLE_API_ENVIRONMENT={env!r}: unset it, or choose one of {', '.join(_ENVIRONMENTS)}")
        self.credentials, self.retry_policy = credentials, retry_policy or RetryPolicy()
        self._user = user or credentials.user
        self._http = Transport(username=credentials.user, password=credentials.key, api_token=credentials.token)
        self._api = KernelsApiClient(self._http)

    @property
    def user(self) -> str:
        """The account's user name; a token is asked once."""
        if self._user is None:
            request = IntrospectTokenRequest()
            request.token = self.credentials.token
            found = self._call("asking whose token this is", lambda: OAuthClient(self._http).introspect_token(request))
            if not found.active or not found.username:
                raise KaggleError(f"the token of {self.credentials.source} is no longer valid; make a new one")
            self._user = str(found.username)
        return self._user

    def ref(self, kernel: str) -> str:
        """OWNER/SLUG of what may be a bare slug."""
        return kernel if "/" in kernel else f"{self.user}/{kernel}"

    # -- what there is ---------------------------------------------------------------------------

    def status(self, kernel: str) -> Status:
        """Of the latest run."""
        request = _named(types.ApiGetKernelSessionStatusRequest(), self.ref(kernel))
        try:
            found = self._call(f"status of {kernel}", lambda: self._api.get_kernel_session_status(request))
        except KeyError as error:
            raise KaggleError(f"{kernel} has a status this version of kagglesdk does not know: {error}") from error
        return Status(found.status.name, found.failure_message or None)

    def version(self, kernel: str) -> int | None:
        """Number of the newest version; 0: there is no such kernel, None: Kaggle does not say."""
        request = _named(types.ApiGetKernelRequest(), self.ref(kernel))
        try:
            found = self._tried("looking for the kernel", lambda: self._api.get_kernel(request))
        except requests.HTTPError as error:
            if error.response is not None and error.response.status_code in (403, 404):
                return 0
            raise explained(error, f"looking for {kernel}", self.credentials.source) from error
        except requests.RequestException as error:
            raise explained(error, f"looking for {kernel}", self.credentials.source) from error
        return found.metadata.current_version_number or None if found.metadata is not None else None

    def quota(self) -> Quota | None:
        """GPU time of this week; None: Kaggle does not say."""
        request = types.ApiGetAcceleratorQuotaStatisticsRequest()
        found = self._call("quota", lambda: self._api.get_accelerator_quota_statistics(request))
        gpu = found.gpu_quota
        if gpu is None or gpu.total_time_allowed is None:
            return None
        return Quota(gpu.time_used or timedelta(), gpu.total_time_allowed, found.quota_refresh_time)

    def outputs(self, kernel: str) -> list[OutputFile]:
        """All files of the latest run, whatever number of pages they come in."""
        files, token = [], ""
        while True:
            page = self._output_page(kernel, token)
            files += [OutputFile(str(item.file_name), str(item.url)) for item in page.files or ()]
            if not (token := page.next_page_token or ""):
                return files

    def log(self, kernel: str) -> str:
        """All that the latest run wrote, as text."""
        return "".join(_texts(self._output_page(kernel, "").log or ""))

    def log_stream(self, kernel: str) -> Iterator[str]:
        """What the latest run writes, from its first line on, while it is written.

        Raises:
            requests.ReadTimeout: nothing was written for longer than the transport waits.
            requests.RequestException: anything else; not tried again here: the stream would begin anew.
        """
        with self._http.get("kernels/logs/stream", self.ref(kernel)) as response:
            if not response.headers.get("Content-Type", "").lower().startswith("text/event-stream"):
                yield from _texts(response.content.decode("utf-8", "replace"))  # of a run that is over
                return
            for raw in unless_silent(response.iter_lines()):
                line = raw.decode("utf-8", "replace")
                if not line.startswith("data:"):
                    continue
                if (payload := line[5:].lstrip()) == _END_OF_LOG:
                    return
                yield from _texts(payload)
        raise requests.ConnectionError("the log's stream ended without its end mark")

    # -- what is done ----------------------------------------------------------------------------

    def push(self, metadata: Mapping[str, Any], source: str, run_seconds: int | None = None) -> Pushed:
        """Save a new version of a notebook and run it.

        A request whose answer was lost is not simply sent again, which could start two runs: the kernel's version
        says whether it had arrived.

        Args:
            metadata: of `kernel-metadata.json`.
            source: the notebook's JSON.
            run_seconds: Kaggle ends the run then.
        """
        kernel = str(metadata["id"])
        before = self.version(kernel)
        request = save_request(metadata, source, run_seconds)

        def save() -> Any:
            """Kaggle's answer, or what shows that the request had arrived."""
            retry = self.retry_policy.retry
            try:
                return retry("push", lambda: self._api.save_kernel(request), statuses=_NOT_TAKEN, dropped=False)
            except requests.RequestException as error:
                if not _may_have_arrived(error):
                    raise
                now = self.version(kernel)
                if now is None or before is None:
                    raise KaggleError(
                        f"pushing {kernel}: the answer was lost, and Kaggle does not say whether it arrived. Look at "
                        f"https://www.kaggle.com/code/{kernel} before pushing again"
                    ) from error
                if now != before:
                    return Pushed(kernel, f"https://www.kaggle.com/code/{kernel}", now)
                raise  # it has no new version: it may be sent again

        try:
            answer = self.retry_policy.retry("push that left no new version", save, statuses=RETRIED - _NOT_TAKEN)
        except requests.RequestException as error:
            raise explained(error, f"pushing {kernel}", self.credentials.source) from error
        if isinstance(answer, Pushed):
            return answer
        _check_answer(kernel, answer)
        return Pushed(answer.ref.removeprefix("/code/") or kernel, answer.url, answer.version_number)

    # -- calls -----------------------------------------------------------------------------------

    def _output_page(self, kernel: str, token: str) -> Any:
        request = _named(types.ApiListKernelSessionOutputRequest(), self.ref(kernel))
        request.page_size = 100
        if token:
            request.page_token = token
        return self._call(f"outputs of {kernel}", lambda: self._api.list_kernel_session_output(request))

    def _tried(self, what: str, call: Callable[[], T]) -> T:
        return self.retry_policy.retry(what, call)

    def _call(self, what: str, call: Callable[[], T]) -> T:
        try:
            return self._tried(what, call)
        except requests.RequestException as error:
            raise explained(error, what, self.credentials.source) from error


def save_request(metadata: Mapping[str, Any], source: str, run_seconds: int | None) -> types.ApiSaveKernelRequest:
    """What is sent for a `kernel-metadata.json` and a notebook whose outputs are empty."""
    request = types.ApiSaveKernelRequest()
    request.slug, request.new_title = metadata["id"], metadata["title"]
    request.text = source
    for name in ("language", "kernel_type", "is_private", "enable_gpu", "enable_tpu", "enable_internet",
                 "docker_image", "docker_image_pinning_type", "machine_shape"):  # fmt: skip
        if metadata[name] is not None:
            setattr(request, name, metadata[name])
    for name in ("dataset", "competition", "kernel", "model"):
        setattr(request, f"{name}_data_sources", list(metadata[f"{name}_sources"]))
    request.category_ids = list(metadata["keywords"])
    if run_seconds is not None:
        request.session_timeout_seconds = run_seconds
    return request


def _named(request: T, ref: str) -> T:
    request.user_name, request.kernel_slug = ref.split("/")[:2]  # type: ignore[attr-defined]
    return request


def _texts(payload: str) -> Iterator[str]:
    """The texts of a log: JSON `{"stream_name", "time", "data"}`, one or a list of them, or plain text."""
    try:
        values = json.loads(payload)
    except json.JSONDecodeError:
        yield payload
        return
    for value in values if isinstance(values, list) else [values]:
        yield str(value["data"]) if isinstance(value, dict) and "data" in value else f"{value}\n"


def _may_have_arrived(error: requests.RequestException) -> bool:
    if isinstance(error, requests.HTTPError):
        return error.response is not None and error.response.status_code in RETRIED - _NOT_TAKEN
    return isinstance(error, DROPPED)


def _check_answer(kernel: str, answer: Any) -> None:
    """What a push was answered with; raises `KaggleError` where Kaggle left something out, which it says beside."""
    if answer.error:
        advice = "; a week's GPU hours and the number of GPU runs at once are limited: wait, or --accelerator none"
        limited = any(word in answer.error.lower() for word in ("quota", "maximum", "session count"))
        raise KaggleError(f"Kaggle did not take {kernel}: {answer.error}{advice if limited else ''}")
    for name in ("kernel", "dataset", "competition", "model"):
        if wrong := list(getattr(answer, f"invalid_{name}_sources") or ()):
            raise KaggleError(
                f"{kernel} was pushed and runs, but without these sources, which do not exist or are not yours: "
                f"{', '.join(wrong)}. A kernel has outputs once it has ended; check the name and push again"
            )
