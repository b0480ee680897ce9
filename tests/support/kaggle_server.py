"""A stand-in for Kaggle's HTTP API on loopback, at the port the official client's TEST environment has; with faults."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import hashlib
import json
import os
import re
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from lema_kaggle.retry_policy import RetryPolicy

PORT = 7777
USER, KEY, TOKEN = "alice", "0123456789abcdef", "KGAT_test"
Runner = Callable[["Kernel"], None]


@dataclass
class Kernel:
    """A kernel, and what its latest run came to."""

    ref: str
    versions: list[dict[str, Any]] = field(default_factory=list)
    """The requests that saved it."""
    states: list[str] = field(default_factory=lambda: ["COMPLETE"])
    """What the status says, one after the other; the last one stays."""
    failure: str | None = None
    log: list[str] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)


class KaggleServer(ThreadingHTTPServer):
    """What was saved, and what shall go wrong.

    `faults` maps a call ("SaveKernel", "GetKernelSessionStatus", ..., "logs", "file") to what it answers, one entry a
    request: None (as usual), a status, (429, seconds) with a Retry-After, "drop" (no answer), "lost" (done, but no
    answer), "page" (of a network that wants a login), or for "file" a number of bytes as ("cut", n) after which the
    connection ends; for "logs" a number of lines, or ("silent", n) after which nothing is written for a while.
    """

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", PORT), _Handler)
        self.kernels: dict[str, Kernel] = {}
        self.faults: dict[str, list[Any]] = {}
        self.calls: list[str] = []
        self.ranges: list[str | None] = []
        self.quota: tuple[int, int] | None = (3600, 108000)
        """Seconds of this week's GPU time used and allowed."""
        self.push_error: str | None = None
        self.without_ranges = self.without_versions = False
        self.page_size = 2
        self.runner: Runner | None = None
        self.changed = threading.Event()
        self.threads: list[threading.Thread] = []

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hung up is part of the tests."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    def kernel(self, ref: str, **values: Any) -> Kernel:
        """Add a kernel."""
        self.kernels[ref] = Kernel(ref, [{}], **values)
        return self.kernels[ref]

    def start(self, kernel: Kernel) -> None:
        """Run it, as a push does."""
        if self.runner is None:
            return
        kernel.states, kernel.log, kernel.files, kernel.failure = ["QUEUED", "RUNNING"], [], {}, None
        thread = threading.Thread(target=self._run, args=(kernel, self.runner))
        self.threads.append(thread)
        thread.start()

    def _run(self, kernel: Kernel, runner: Runner) -> None:
        try:
            runner(kernel)
            kernel.states = ["COMPLETE"]
        except CellExecutionError as error:
            kernel.states, kernel.failure = ["ERROR"], "Your notebook raised an exception"
            kernel.log.append(str(error))
        finally:
            self.changed.set()


class _Handler(BaseHTTPRequestHandler):
    server: KaggleServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def do_POST(self) -> None:
        """Every call of the API."""
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}")
        service, _, call = self.path.removeprefix("/api/v1/").partition("/")
        if service not in ("kernels.KernelsApiService", "security.OAuthService"):
            self._send(404, {"code": 404, "message": f"no {self.path}"})
            return
        if (fault := self._fault(call)) is True:
            return
        if fault == "page":
            self._send(200, None, {"Content-Type": "text/html"}, "<html>please log in</html>")
            return
        if not self._known():
            self._send(401, {"code": 401, "message": "Unauthenticated"})
            return
        status, answer = getattr(self, f"_{call}")(body)
        if fault == "lost":
            self.close_connection = True
        else:
            self._send(status, answer)

    def do_GET(self) -> None:
        """Logs as a stream, and files."""
        if match := re.fullmatch(r"/api/v1/kernels/logs/stream/([^/]+/[^/]+)", self.path):
            if self._known():
                self._stream(match[1])
            else:
                self._send(401, {"code": 401, "message": "Unauthenticated"})
        elif match := re.fullmatch(r"/files/([^/]+/[^/]+)/(.+)", self.path):
            self._file(self.server.kernels[match[1]].files[match[2]])
        else:
            self._send(404, {"code": 404, "message": f"no {self.path}"})

    # -- faults ----------------------------------------------------------------------------------

    def _fault(self, call: str) -> Any:
        """True: it was answered, or not, as asked for."""
        self.server.calls.append(call)
        fault = (self.server.faults.get(call) or [None]).pop(0)
        if fault == "drop":
            self.close_connection = True
            return True
        status, wait = fault if isinstance(fault, tuple) and fault[0] == 429 else (fault, None)
        if isinstance(status, int):
            headers = {} if wait is None else {"Retry-After": str(wait)}
            self._send(status, {"code": status, "message": "as asked for"}, headers)
            return True
        return fault

    def _known(self) -> bool:
        pair = base64.b64encode(f"{USER}:{KEY}".encode()).decode()
        return self.headers.get("Authorization") in (f"Bearer {TOKEN}", f"Basic {pair}")

    def _send(self, status: int, values: Any, headers: dict[str, str] | None = None, text: str | None = None) -> None:
        body = (json.dumps(values) if text is None else text).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    # -- calls -----------------------------------------------------------------------------------

    def _IntrospectToken(self, body: dict[str, Any]) -> tuple[int, Any]:
        return 200, {"active": True, "username": USER} if body.get("token") == TOKEN else {"active": False}

    def _SaveKernel(self, body: dict[str, Any]) -> tuple[int, Any]:
        if self.server.push_error:
            return 200, {"error": self.server.push_error}
        ref = body["slug"]
        missing = [source for source in body.get("kernelDataSources", ()) if source not in self.server.kernels]
        kernel = self.server.kernels.setdefault(ref, Kernel(ref))
        kernel.versions.append(body)
        self.server.start(kernel)
        answer = {"ref": f"/code/{ref}", "url": f"https://www.kaggle.com/code/{ref}",
                  "versionNumber": len(kernel.versions), "invalidKernelSources": missing}  # fmt: skip
        return 200, answer

    def _GetKernel(self, body: dict[str, Any]) -> tuple[int, Any]:
        kernel = self._kernel(body)
        if kernel is None:
            return 404, {"code": 404, "message": "Not found"}
        version = {} if self.server.without_versions else {"currentVersionNumber": len(kernel.versions)}
        return 200, {"metadata": {"ref": kernel.ref, **version}}

    def _GetKernelSessionStatus(self, body: dict[str, Any]) -> tuple[int, Any]:
        kernel = self._kernel(body)
        if kernel is None:
            return 403, {"code": 403, "message": "Permission 'kernels.get' was denied"}
        state = kernel.states.pop(0) if len(kernel.states) > 1 else kernel.states[0]
        return 200, {"status": state, "failureMessage": kernel.failure}

    def _ListKernelSessionOutput(self, body: dict[str, Any]) -> tuple[int, Any]:
        kernel = self._kernel(body)
        if kernel is None:
            return 403, {"code": 403, "message": "Permission 'kernels.get' was denied"}
        first = int(body.get("pageToken") or 0)
        names = sorted(kernel.files)
        shown = names[first : first + self.server.page_size]
        following = first + len(shown)
        return 200, {
            "files": [{"fileName": n, "url": f"http://localhost:{PORT}/files/{kernel.ref}/{n}"} for n in shown],
            "log": json.dumps([{"stream_name": "stdout", "time": i, "data": t} for i, t in enumerate(kernel.log)]),
            "nextPageToken": str(following) if following < len(names) else "",
        }

    def _GetAcceleratorQuotaStatistics(self, _: dict[str, Any]) -> tuple[int, Any]:
        if self.server.quota is None:
            return 200, {}
        used, allowed = self.server.quota
        quota = {"timeUsed": f"{used}s", "totalTimeAllowed": f"{allowed}s"}
        return 200, {"quotaRefreshTime": "2026-11-28T00:00:00.000Z", "gpuQuota": quota}

    def _kernel(self, body: dict[str, Any]) -> Kernel | None:
        return self.server.kernels.get(f"{body['userName']}/{body['kernelSlug']}")

    # -- streams ---------------------------------------------------------------------------------

    def _stream(self, ref: str) -> None:
        fault = self._fault("logs")
        if fault is True:
            return
        kernel = self.server.kernels[ref]
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        for number, text in enumerate(kernel.log):
            if isinstance(fault, tuple) and number == fault[1]:
                if fault[0] == "silent":
                    self.server.changed.wait(1.0)
                return
            event = {"stream_name": "stdout", "time": number, "data": text}
            self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
        self.wfile.write(b"data: END_OF_LOG\n\n")

    def _file(self, content: bytes) -> None:
        fault = self._fault("file")
        if fault is True:
            return
        tag = f'"{hashlib.md5(content).hexdigest()}"'
        asked = self.headers.get("Range")
        self.server.ranges.append(asked)
        first = 0
        if asked and not self.server.without_ranges and self.headers.get("If-Range") == tag:
            first = int(re.fullmatch(r"bytes=(\d+)-", asked)[1])  # type: ignore[index]
        if first > len(content):
            self._send(416, {})
            return
        self.send_response(206 if first else 200)
        self.send_header("ETag", tag)
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - first))
        self.end_headers()
        end = first + fault[1] if isinstance(fault, tuple) else len(content)
        self.wfile.write(content[first:end])
        if end < len(content):
            self.close_connection = True


# -- in tests --------------------------------------------------------------------------------------


@dataclass
class Clock:
    """Seconds that pass by being slept; nobody waits."""

    seconds: float = 1_800_000_000.0
    slept: list[float] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    waits_for: threading.Event | None = None
    """Where something really runs beside: a sleep lasts until this is set."""

    def sleep(self, seconds: float) -> None:
        """Pass some time."""
        self.slept.append(seconds)
        self.seconds += seconds
        if self.waits_for is not None:
            self.waits_for.wait(300)

    def retry_policy(self, **values: Any) -> RetryPolicy:
        """RetryPolicy by this clock."""
        return RetryPolicy(**{"sleep": self.sleep, "now": lambda: self.seconds, "say": self.said.append, **values})


@contextlib.contextmanager
def running_server(monkeypatch: pytest.MonkeyPatch, home: Path) -> Iterator[KaggleServer]:
    """A server the official client talks to, one at a time on this machine; no credentials but those a test makes."""
    for name in [name for name in os.environ if name.startswith("KAGGLE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("KAGGLE_API_ENVIRONMENT", "TEST")
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("NO_PROXY", "localhost,127.0.0.1")
    with (Path(tempfile.gettempdir()) / f"lema-kaggle-{PORT}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released with the file
        server = KaggleServer()
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
            for run in server.threads:
                run.join()
            server.server_close()


def execute(source: str, folder: Path, env: dict[str, str], timeout: int = 280) -> str:
    """Execute a notebook headless in a folder; returns what it printed.

    Raises:
        CellExecutionError: a cell failed.
    """
    notebook = nbformat.reads(source, as_version=4)
    client = NotebookClient(notebook, timeout=timeout, resources={"metadata": {"path": str(folder)}})
    try:
        client.execute(env={**os.environ, **env})
    finally:
        texts = [
            output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ()) if "text" in output
        ]
    return "".join(texts)
