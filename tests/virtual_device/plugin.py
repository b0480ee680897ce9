"""Where tests marked `accelerator` run: on what torch sees, on the virtual device (`--virtual-device`), or not at all.

The fixture `virtual` gives the device's controls, and a test in which the device saw a fault fails.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

from . import build
from .controls import Controls
from .register import register

_COMPILED = pytest.StashKey[ModuleType]()
_MISSING = pytest.StashKey[str]()
"""Why there is no virtual device although it was asked for."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--virtual-device",
        action="store_true",
        help="run tests marked `accelerator` on a device made of threads and protected memory (tests/virtual_device)",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Before anything asks torch for an accelerator; in every process of xdist."""
    if not config.getoption("virtual_device", False):
        return
    if torch.accelerator.is_available():
        raise pytest.UsageError("--virtual-device is for machines without an accelerator, and torch sees one here")
    if reason := build.why_not():
        if os.environ.get("CI", "").lower() == "true":
            raise pytest.UsageError(f"{reason}; CI must have it")
        config.stash[_MISSING] = reason
    else:
        config.stash[_COMPILED] = register()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked `accelerator` are skipped where torch sees none."""
    if torch.accelerator.is_available():
        return
    skip = pytest.mark.skip(reason=config.stash.get(_MISSING, "needs an accelerator, and torch sees none here"))
    for item in items:
        if "accelerator" in item.keywords:
            item.add_marker(skip)


@pytest.fixture
def virtual(pytestconfig: pytest.Config) -> Controls:
    """Controls of the virtual device; the test is skipped on a real one."""
    if (compiled := pytestconfig.stash.get(_COMPILED, None)) is None:
        pytest.skip("needs the virtual device (--virtual-device)")
    return Controls(compiled)


@pytest.fixture(autouse=True)
def no_fault_on_the_virtual_device(pytestconfig: pytest.Config) -> Iterator[None]:
    compiled = pytestconfig.stash.get(_COMPILED, None)
    if compiled is None:
        yield
        return
    compiled.take_faults()
    yield
    compiled.synchronize()
    faults = compiled.take_faults()
    assert not faults, f"the virtual device saw {len(faults)} faults: {faults}"
