"""Compiles the device's C++ once for this torch and these sources, however many processes ask at once."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import platform
import shutil
import sys
from pathlib import Path
from types import ModuleType

import torch
from torch.utils import cpp_extension

SOURCES = sorted(Path(__file__).parent.glob("*.cpp"))
FLAGS = ["-O1", "-Wall"]
OLDEST_TORCH = (2, 13)
"""Whose C++ interface this is written for."""


NAME = "lema_virtual_device"


def why_not() -> str:
    """What is missing for a build; empty: nothing."""
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < OLDEST_TORCH:
        return f"the virtual device is written for torch {'.'.join(map(str, OLDEST_TORCH))}, not {torch.__version__}"
    if platform.system() != "Linux":
        return "the virtual device needs Linux (memfd_create)"
    tools = () if _marker().exists() else (os.environ.get("CXX", "c++"), "ninja")
    missing = [tool for tool in tools if shutil.which(tool, path=_search_path()) is None]
    return f"the virtual device is built on demand, and there is no {' and no '.join(missing)} here" if missing else ""


def load() -> ModuleType:
    """The compiled module; takes a minute or two when it is built, nothing when it was.

    Raises:
        RuntimeError: the compiler failed; its output is in the message.
    """
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "building", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        if _marker().exists():
            return _imported(folder / f"{NAME}.so")
        (folder / "lock").unlink(missing_ok=True)  # torch's own, left behind by a process that was killed
        os.environ["PATH"] = _search_path()
        sources = [str(source) for source in SOURCES]
        module = cpp_extension.load(NAME, sources, extra_cflags=FLAGS, build_directory=str(folder))
        _marker().touch()
        return module


def cache_folder() -> Path:
    """Of this torch, this Python and these sources, wherever they lie: under $XDG_CACHE_HOME or ~/.cache."""
    key = hashlib.sha256(f"{torch.__version__} {sys.implementation.cache_tag} {FLAGS}".encode())
    for source in sorted(Path(__file__).parent.glob("*.[ch]*")):
        key.update(source.name.encode() + source.read_bytes())
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "lema-tests" / f"virtual-device-{key.hexdigest()[:16]}"


def _marker() -> Path:
    return cache_folder() / "built"


def _imported(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(NAME, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _search_path() -> str:
    """With the scripts of this Python, where ninja lies when pip brought it and nothing is activated."""
    return os.pathsep.join([os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)])
