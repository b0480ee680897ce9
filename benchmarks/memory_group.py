"""A memory limit of the kernel (cgroup v1 or v2) around one child process.

It knows the kernel's files; it knows nothing of models or arms. Making a group usually takes root.
The group's count holds what its processes touched first: anonymous memory, page cache and kernel memory.
Pages of libraries that another process had already brought into memory are not counted to it.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import TracebackType

ROOT = Path("/sys/fs/cgroup")


class MemoryGroup:
    """A fresh group with a limit and no swap, removed at the end of the `with` block.

    Raises:
        OSError: there is no memory controller here, or this user may not use it.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.version = 1 if (ROOT / "memory" / "memory.limit_in_bytes").exists() else 2
        if self.version == 2 and "memory" not in _words(ROOT / "cgroup.subtree_control"):
            raise OSError("no memory controller is enabled for groups under /sys/fs/cgroup")
        self._path = (ROOT / "memory" if self.version == 1 else ROOT) / f"lema-benchmark-{os.getpid()}"

    def __enter__(self) -> MemoryGroup:
        self._path.mkdir()
        try:
            if self.version == 1:
                self._write("memory.limit_in_bytes", self.limit_bytes)
                if (self._path / "memory.memsw.limit_in_bytes").exists():
                    self._write("memory.memsw.limit_in_bytes", self.limit_bytes)
            else:
                self._write("memory.max", self.limit_bytes)
                if (self._path / "memory.swap.max").exists():
                    self._write("memory.swap.max", 0)
        except OSError:
            self._path.rmdir()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for _ in range(50):  # a killed process leaves its group a moment later
            try:
                self._path.rmdir()
                return
            except OSError:
                time.sleep(0.1)

    def join(self) -> None:
        """Move the calling process in; meant for `preexec_fn`, so that everything after exec is counted."""
        self._write("cgroup.procs", os.getpid())

    def facts(self) -> dict[str, int | None]:
        """Limit, peak, and how many processes the kernel killed for it; None where it does not say."""
        if self.version == 1:
            peak = self._number("memory.max_usage_in_bytes")
            kills = self._number("memory.oom_control", "oom_kill")
        else:
            peak = self._number("memory.peak")
            kills = self._number("memory.events", "oom_kill")
        return {
            "version": self.version,
            "limit_bytes": self.limit_bytes,
            "peak_bytes": peak,
            "out_of_memory_kills": kills,
        }

    def _write(self, name: str, value: int) -> None:
        (self._path / name).write_text(str(value))

    def _number(self, name: str, key: str | None = None) -> int | None:
        words = _words(self._path / name)
        if key is None:
            return int(words[0]) if words else None
        return next((int(number) for word, number in zip(words[::2], words[1::2]) if word == key), None)


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []
