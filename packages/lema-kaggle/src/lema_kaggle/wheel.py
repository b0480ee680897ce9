"""The installed packages as wheels, from an editable checkout or from installed wheels alike.

The layout is that of packaging.python.org's binary distribution format; the same files give the same bytes.
"""

from __future__ import annotations

import base64
import hashlib
import io
import re
import zipfile
from collections.abc import Iterable
from importlib import import_module, metadata
from pathlib import Path

from lema.errors import KaggleError
from lema.libraries import DISTRIBUTION, KAGGLE, REPLY, distribution

CARRIED = {"lema": DISTRIBUTION, "lema_reply": REPLY, "lema_kaggle": KAGGLE}
"""Packages that a notebook has inside, and what they are installed under."""
_EPOCH = (1980, 1, 1, 0, 0, 0)
_LEFT_OUT = ("__pycache__", "benchmarks", "pinned")  # the first has no use, the others are too large for every notebook


def root_of(package: str) -> Path:
    """The folder a package is imported from."""
    return Path(str(import_module(package).__file__)).parent


def package_files(package: str) -> list[tuple[str, bytes]]:
    """Path in the archive and content of every file of a package, sorted."""
    root = root_of(package)
    found = [path for path in sorted(root.rglob("*")) if path.is_file() and not _is_left_out(path.relative_to(root))]
    return [(f"{package}/{path.relative_to(root).as_posix()}", path.read_bytes()) for path in found]


def build_wheel(package: str, compressed: bool = True) -> tuple[str, bytes]:
    """File name and bytes of a wheel of the installed version.

    Args:
        package: one of `CARRIED`.
        compressed: uncompressed, a stronger compression makes less of it.

    Raises:
        KaggleError: the package was put on the path without being installed: what it needs is not known then.
    """
    name = CARRIED[package]
    try:
        installed = distribution() if name == DISTRIBUTION else metadata.distribution(name)
    except metadata.PackageNotFoundError as error:
        raise KaggleError(f"{package} is not installed, only on the path: run pip install (-e) first") from error
    version = import_module(package).__version__
    file = f"{name.replace('-', '_')}-{version}"
    info = f"{file}.dist-info"
    described = _described(installed.read_text("METADATA") or "", name, version)
    files = [*package_files(package), (f"{info}/METADATA", described.encode())]
    files.append((f"{info}/WHEEL", b"Wheel-Version: 1.0\nGenerator: lema\nRoot-Is-Purelib: true\nTag: py3-none-any\n"))
    if entry_points := installed.read_text("entry_points.txt"):
        files.append((f"{info}/entry_points.txt", entry_points.encode()))
    lines = [f"{path},sha256={_digest(content)},{len(content)}" for path, content in files]
    files.append((f"{info}/RECORD", "\n".join([*lines, f"{info}/RECORD,,", ""]).encode()))
    return f"{file}-py3-none-any.whl", zipped(files, compressed)


def zipped(files: Iterable[tuple[str, bytes]], compressed: bool = True) -> bytes:
    """A zip archive without times, so that the same files are the same bytes."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in files:
            entry = zipfile.ZipInfo(name, _EPOCH)
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, content, zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED)
    return out.getvalue()


def _is_left_out(path: Path) -> bool:
    return any(part in _LEFT_OUT or part.startswith(".") for part in path.parts) or path.suffix in (".pyc", ".pyo")


def _described(text: str, name: str, version: str) -> str:
    """An editable install keeps the name and version it was installed at; the sources may be newer."""
    text = re.sub(r"^Name: .*$", f"Name: {name}", text, count=1, flags=re.MULTILINE)
    return re.sub(r"^Version: .*$", f"Version: {version}", text, count=1, flags=re.MULTILINE)


def _digest(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
