"""What every test file shares: tests marked `accelerator` run on what torch sees, or on the virtual device; the seed of
their order is said at the end, and `--optimized` takes the asserts from the processes they start."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from virtual_device import plugin
from virtual_device.plugin import no_fault_on_the_virtual_device, virtual  # noqa: F401


def pytest_addoption(parser: pytest.Parser) -> None:
    plugin.pytest_addoption(parser)
    parser.addoption("--optimized", action="store_true", help="processes that tests start run as under python -O")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    plugin.pytest_configure(config)
    if not config.getoption("--optimized"):
        return
    os.environ["PYTHONOPTIMIZE"] = "1"  # not for this process, whose asserts are the tests
    if not __debug__ or subprocess.run([sys.executable, "-c", "assert False"]).returncode:
        raise pytest.UsageError("--optimized: a process of its own has no asserts, and this one has to have them")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    seed = config.getoption("randomly_seed", None)
    if seed is not None:
        terminalreporter.write_line(f"this order and these random numbers again: --randomly-seed={seed}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.accelerator.is_available():
        return
    reason = config.stash.get(plugin.MISSING, "needs an accelerator, and torch sees none here")
    for item in items:
        if "accelerator" in item.keywords:
            item.add_marker(pytest.mark.skip(reason=reason))
