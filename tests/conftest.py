"""What every test file shares: tests marked `accelerator` run on what torch sees, or on the virtual device; the seed of
their order is said at the end, and `--optimized` takes the asserts from the processes they start."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import tempfile

import pytest

pytest_plugins = ["virtual_device.plugin", "shared_fixtures"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--optimized", action="store_true", help="processes that tests start run as under python -O")


def pytest_configure(config: pytest.Config) -> None:
    hands_on = config.getoption("numprocesses", None) and not hasattr(config, "workerinput")
    if not config.getoption("--optimized") or hands_on:  # the processes that run tests have asserts, too
        return
    os.environ["PYTHONOPTIMIZE"] = "1"  # not for this process, whose asserts are the tests
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ["PYTHONPYCACHEPREFIX"] = os.path.join(tempfile.gettempdir(), f"lema-compiled-{os.getuid()}")
    if not __debug__ or subprocess.run([sys.executable, "-c", "assert False"]).returncode:
        raise pytest.UsageError("--optimized: a process of its own has no asserts, and this one has to have them")


def pytest_collection_finish() -> None:
    """What imports made stays; looking through it at each collection took a tenth of the time of all tests."""
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    seed = config.getoption("randomly_seed", None)
    if seed is not None:
        terminalreporter.write_line(f"this order and these random numbers again: --randomly-seed={seed}")
