"""What a kernel left behind, onto this disk: streamed, gone on with after a break, and never half a file in place.

A file grows as NAME.part beside its place and is moved there when whole. `.lema-pull.json` keeps what the server said
a file is (ETag or Last-Modified, and size) and whether it is whole in its place, so that bytes of two versions are
never put together (RFC 9110, 13.1.5: If-Range) and a whole file is not fetched twice.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import requests

from lema.errors import KaggleError
from lema.storage.atomic import put_in_place, write_text

from .advice import explained
from .answers import OutputFile
from .client import Kernels
from .transport import TIMEOUT

RECORD = ".lema-pull.json"
_CHUNK = 1 << 16


def pull(
    kernels: Kernels, kernel: str, folder: Path, only: str | None = None, say: Callable[[str], None] = lambda _: None
) -> list[Path]:
    """Fetch the files of a kernel's latest run, and its log as SLUG.log; returns where they are.

    Args:
        only: a regular expression that names of files have to contain.
        say: told of every file.

    Raises:
        KaggleError: the kernel left nothing that was asked for, a name leads out of `folder`, or a file could not
            be fetched; what came so far is kept and gone on with.
    """
    wanted = _compiled(only)
    listed = kernels.outputs(kernel)
    files = [file for file in listed if wanted is None or wanted.search(file.name)]
    if not files:
        which = f"none of its {len(listed)} files matches {only!r}" if listed else "it left no files"
        raise KaggleError(f"nothing to pull from {kernel}: {which}")
    targets = [_inside(folder, file.name) for file in files]
    folder.mkdir(parents=True, exist_ok=True)
    record = _Record(folder / RECORD)
    with requests.Session() as session:
        for file, target in zip(files, targets, strict=True):
            try:
                fresh = kernels.retry_policy.retry(
                    f"fetching {file.name}", partial(_fetch, session, file, target, record)
                )
            except requests.RequestException as error:
                raise explained(error, f"fetching {file.name}", kernels.credentials.source) from error
            say(f"{file.name}: {target.stat().st_size:,} bytes{'' if fresh else ', was here already'}")
    if (log := kernels.log(kernel)) and wanted is None:
        write_text(target := folder / f"{kernels.ref(kernel).split('/')[1]}.log", log)
        targets.append(target)
    return targets


def _compiled(only: str | None) -> re.Pattern[str] | None:
    try:
        return None if only is None else re.compile(only)
    except re.error as error:
        raise KaggleError(f"{only!r} is no regular expression: {error}") from error


def _inside(folder: Path, name: str) -> Path:
    path = PurePosixPath(name)
    if not name or path.is_absolute() or "\\" in name or any(part in ("..", RECORD) for part in path.parts):
        raise KaggleError(f"the kernel has a file named {name!r}, which would be written outside of {folder}: refused")
    return folder.joinpath(*path.parts)


def _fetch(session: requests.Session, file: OutputFile, target: Path, record: _Record) -> bool:
    """One try; False: the file was here already."""
    growing = target.with_name(f"{target.name}.part")
    known = record.of(file.name)
    have = growing.stat().st_size if known and growing.exists() else 0
    headers = {"Accept-Encoding": "identity"}  # sizes and ranges are of the file's own bytes
    if have:
        headers |= {"Range": f"bytes={have}-", "If-Range": known["identity"]}
    with session.get(file.url, stream=True, timeout=TIMEOUT, headers=headers) as response:
        if response.status_code == 416:  # more is here than there is
            growing.unlink(missing_ok=True)
            record.forget(file.name)
            return _fetch(session, file, target, record)
        response.raise_for_status()
        continued = response.status_code == 206 and _starts_at(response) == have
        if response.status_code == 206 and not continued:
            raise requests.ConnectionError(f"asked for bytes from {have}, got {response.headers.get('Content-Range')}")
        left = response.headers.get("Content-Length")
        size = None if left is None else int(left) + (have if continued else 0)
        now = {"identity": _identity(response), "size": size}
        whole = {**now, "whole": True}
        if now["identity"] and known == whole and target.exists() and target.stat().st_size == size:
            return False
        target.parent.mkdir(parents=True, exist_ok=True)
        record.set(file.name, now)
        with growing.open("ab" if continued else "wb") as out:
            for chunk in response.iter_content(_CHUNK):
                out.write(chunk)
        if size is not None and growing.stat().st_size != size:
            raise requests.ConnectionError(f"{growing.stat().st_size} of {size} bytes came")
    put_in_place(growing, target)
    record.set(file.name, whole)
    return True


def _identity(response: requests.Response) -> str | None:
    """What names these bytes: a strong ETag, else the date; None: they cannot be told from others."""
    tag = response.headers.get("ETag")
    return tag if tag and not tag.startswith("W/") else response.headers.get("Last-Modified")


def _starts_at(response: requests.Response) -> int | None:
    match = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    return int(match[1]) if match else None


class _Record:
    """What is known of files, by name; written after every change."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, Any] = {}
        if path.is_file():
            try:
                self._known = dict(json.loads(path.read_text(encoding="utf-8")))
            except (ValueError, TypeError):  # a record that cannot be read says nothing: files are fetched anew
                self._known = {}

    def of(self, name: str) -> Any:
        known = self._known.get(name)
        return known if isinstance(known, dict) and known.get("identity") else None

    def set(self, name: str, value: dict[str, Any]) -> None:
        self._known[name] = value
        write_text(self._path, json.dumps(self._known, indent=1, sort_keys=True))

    def forget(self, name: str) -> None:
        self._known.pop(name, None)
