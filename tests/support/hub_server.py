"""A stand-in for the hub's HTTP API on loopback: repositories, LFS uploads, commits, downloads; and failures on
demand."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

_COMMIT = "a" * 40


class Hub(ThreadingHTTPServer):
    """What was uploaded, and what shall go wrong.

    `failures` maps a step ("create", "preupload", "batch", "put", "commit", "paths", "tree") to what it answers, one
    entry a request: a status, "drop" for a connection closed without an answer, or "lie" for an answer with a wrong
    checksum.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.lfs: dict[str, bytes] = {}
        self.large: set[str] = set()
        self.commits: list[list[str]] = []
        self.failures: dict[str, list[int | str]] = {}
        self.requests: list[str] = []

    @property
    def url(self) -> str:
        """The endpoint."""
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def do_POST(self) -> None:
        """Every call of the API."""
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        for step, pattern, answer in (
            ("create", r"/api/repos/create", self._create),
            ("preupload", r"/api/models/.*/preupload/", self._preupload),
            ("batch", r".*\.git/info/lfs/objects/batch", self._batch),
            ("commit", r"/api/models/.*/commit/", self._commit),
            ("paths", r"/api/models/.*/paths-info/", self._paths),
            ("yaml", r"/api/validate-yaml", lambda _: {"errors": [], "warnings": []}),
        ):
            if re.match(pattern, self.path):
                if not self._fails(step):
                    self._send(200, answer(body))
                return
        self._send(404, {"error": f"no {self.path}"})

    def do_PUT(self) -> None:
        """The bytes of a large file."""
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if not self._fails("put"):
            self.server.lfs[self.path.rpartition("/")[2]] = body
            self._send(200, {})

    def do_GET(self) -> None:
        """The list of files, what is known of a model, or one of its files."""
        files = self.server.files
        resolved = re.fullmatch(r"/[^/]+/[^/]+/resolve/[^/]+/(.+)", self.path)
        if resolved and resolved[1] in files:
            self._send_bytes(200, files[resolved[1]], {"ETag": f'"{hashlib.sha1(files[resolved[1]]).hexdigest()}"'})
        elif re.match(r"/api/models/.*/tree/", self.path):
            if not self._fails("tree"):
                listed = ((n, {"size": len(c), "oid": hashlib.sha1(c).hexdigest()}) for n, c in files.items())
                self._send(200, [{"type": "file", "path": name, **about} for name, about in listed])
        elif files and (model := re.match(r"/api/models/([^/]+/[^/?]+)", self.path)):
            self._send(200, {"id": model[1], "sha": _COMMIT, "siblings": [{"rfilename": name} for name in files]})
        else:
            self._send(404, {"error": f"no {self.path}"}, {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def _fails(self, step: str) -> bool:
        self.server.requests.append(step)
        failure = (self.server.failures.get(step) or [None]).pop(0)
        if failure == "drop":
            self.close_connection = True
            return True
        if isinstance(failure, int):
            self._send(failure, {"error": "as asked for"})
            return True
        return False

    def _send(self, status: int, values: Any, headers: dict[str, str] | None = None) -> None:
        self._send_bytes(status, json.dumps(values).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _send_bytes(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "X-Repo-Commit": _COMMIT, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _create(self, body: bytes) -> dict[str, Any]:
        asked = json.loads(body)
        owner = asked.get("organization") or "me"
        return {"url": f"{self.server.url}/{owner}/{asked['name']}", "name": f"{owner}/{asked['name']}"}

    def _preupload(self, body: bytes) -> dict[str, Any]:
        files = json.loads(body)["files"]
        modes = {f["path"]: "lfs" if f["path"].endswith(".safetensors") else "regular" for f in files}
        return {"files": [{"path": p, "uploadMode": mode, "shouldIgnore": False} for p, mode in modes.items()]}

    def _batch(self, body: bytes) -> dict[str, Any]:
        objects = []
        for asked in json.loads(body)["objects"]:
            known = asked["oid"] in self.server.lfs
            action = {"actions": {"upload": {"href": f"{self.server.url}/lfs/{asked['oid']}"}}}
            objects.append({"oid": asked["oid"], "size": asked["size"], **({} if known else action)})
        return {"transfer": "basic", "objects": objects}

    def _commit(self, body: bytes) -> dict[str, Any]:
        names = []
        for line in body.decode().splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                self.server.files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                self.server.files[value["path"]] = self.server.lfs[value["oid"]]
                self.server.large.add(value["path"])
            elif item["key"] == "deletedFile":
                del self.server.files[value["path"]]
                self.server.large.discard(value["path"])
            if "path" in value:
                names.append(value["path"])
        self.server.commits.append(names)
        oid = f"{len(self.server.commits):040x}"
        return {"success": True, "commitOid": oid, "commitUrl": f"{self.server.url}/me/repo/commit/{oid}"}

    def _paths(self, body: bytes) -> list[dict[str, Any]]:
        text = body.decode()
        asked = json.loads(text)["paths"] if text.startswith("{") else re.findall(r"paths=([^&]+)", text)
        lie = (self.server.failures.get("checksum") or [None]).pop(0) is not None
        found = []
        for name in asked:
            if (content := self.server.files.get(name)) is not None:
                digest = hashlib.sha256(content + b"x" * lie).hexdigest()
                large = (
                    {"lfs": {"oid": digest, "size": len(content), "pointerSize": 1}}
                    if name in self.server.large
                    else {}
                )
                found.append({"type": "file", "path": name, "size": len(content), "oid": "0" * 40, **large})
        return found


@contextlib.contextmanager
def running_hub(monkeypatch: pytest.MonkeyPatch, cache: Path | None = None) -> Iterator[Hub]:
    """A hub that huggingface_hub talks to in this process; waiting between its retries takes no time.

    Args:
        cache: where downloads go; None: nothing is downloaded.
    """
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    if cache is not None:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)  # LFS is the protocol spoken here
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()
