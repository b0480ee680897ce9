"""What every test file shares: tests marked `accelerator` run on what torch sees, or on the virtual device."""

from __future__ import annotations

import pytest
import torch

from virtual_device import plugin
from virtual_device.plugin import (  # noqa: F401
    no_fault_on_the_virtual_device,
    pytest_addoption,
    pytest_configure,
    virtual,
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.accelerator.is_available():
        return
    reason = config.stash.get(plugin.MISSING, "needs an accelerator, and torch sees none here")
    for item in items:
        if "accelerator" in item.keywords:
            item.add_marker(pytest.mark.skip(reason=reason))
