"""The installed package as a wheel, from an editable checkout or from an installed wheel alike.

It knows the layout of wheels (packaging.python.org, binary distribution format); the same files give the same bytes.
"""

from __future__ import annotations

import base64
import hashlib
import io
import re
import zipfile
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import lema

from ..errors import KaggleError
from ..libraries import DISTRIBUTION, distribution

PACKAGE = "lema"
_FILE = DISTRIBUTION.replace("-", "_")
_EPOCH = (1980, 1, 1, 0, 0, 0)
_LEFT_OUT = ("__pycache__", "benchmarks")  # these only the notebook that runs them carries


def package_files() -> list[tuple[str, bytes]]:
    """Path in the archive and content of every file of the package, sorted."""
    root = Path(lema.__file__).parent
    found = [path for path in sorted(root.rglob("*")) if path.is_file() and not _is_left_out(path.relative_to(root))]
    return [(f"{PACKAGE}/{path.relative_to(root).as_posix()}", path.read_bytes()) for path in found]


def build_wheel(compressed: bool = True) -> tuple[str, bytes]:
    """File name and bytes of a wheel of the installed version.

    Args:
        compressed: uncompressed, a stronger compression makes less of it.

    Raises:
        KaggleError: the package was put on the path without being installed: what it needs is not known then.
    """
    try:
        installed = distribution()
    except metadata.PackageNotFoundError as error:
        raise KaggleError("lema is not installed, only on the path: run pip install (-e) first") from error
    version = lema.__version__
    info = f"{_FILE}-{version}.dist-info"
    described = _with_version(installed.read_text("METADATA") or "", version)
    files = [*package_files(), (f"{info}/METADATA", described.encode())]
    files.append((f"{info}/WHEEL", b"Wheel-Version: 1.0\nGenerator: lema\nRoot-Is-Purelib: true\nTag: py3-none-any\n"))
    if entry_points := installed.read_text("entry_points.txt"):
        files.append((f"{info}/entry_points.txt", entry_points.encode()))
    lines = [f"{name},sha256={_digest(content)},{len(content)}" for name, content in files]
    files.append((f"{info}/RECORD", "\n".join([*lines, f"{info}/RECORD,,", ""]).encode()))
    return f"{_FILE}-{version}-py3-none-any.whl", zipped(files, compressed)


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


def _with_version(text: str, version: str) -> str:
    """An editable install keeps the name and version it was installed at; the sources may be newer."""
    text = re.sub(r"^Name: .*$", f"Name: {DISTRIBUTION}", text, count=1, flags=re.MULTILINE)
    return re.sub(r"^Version: .*$", f"Version: {version}", text, count=1, flags=re.MULTILINE)


def _digest(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
