"""A verb of `lema` in a pseudo-terminal, as somebody at a keyboard sees it."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import lema


class Terminal:
    """A chat in a pseudo-terminal."""

    def __init__(self, *words: str) -> None:
        self._seen = ""
        self.master, slave = pty.openpty()
        environment = {**os.environ, "PYTHONPATH": str(Path(lema.__file__).parents[1]), "TERM": "dumb"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "lema", *words], stdin=slave, stdout=slave, stderr=slave, env=environment,
            start_new_session=True,
            # as a terminal's shell has it; the background jobs of a script inherit that it is ignored
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        os.close(slave)

    def until(self, text: str, seconds: float = 120) -> str:
        """What is written up to this text; what comes after it is for the next call."""
        deadline = time.monotonic() + seconds
        while text not in self._seen:
            assert time.monotonic() < deadline, f"no {text!r} in {self._seen!r}"
            if select.select([self.master], [], [], 0.2)[0]:
                try:
                    self._seen += os.read(self.master, 4096).decode("utf-8", "replace")
                except OSError:
                    break
            elif self.process.poll() is not None:
                break
        before, found, self._seen = self._seen.partition(text)
        assert found, before
        return before + found

    def some(self, seconds: float = 60) -> str:
        """Whatever is written next, as soon as anything is."""
        deadline = time.monotonic() + seconds
        while not self._seen and time.monotonic() < deadline:
            if select.select([self.master], [], [], 0.2)[0]:
                self._seen += os.read(self.master, 4096).decode("utf-8", "replace")
        return self._seen

    def type(self, line: str | bytes) -> None:
        """Type a line."""
        os.write(self.master, line if isinstance(line, bytes) else f"{line}\n".encode())

    def end(self) -> int:
        """Wait for the end; its status."""
        status = self.process.wait(60)
        os.close(self.master)
        return status
