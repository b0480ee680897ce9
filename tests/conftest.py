"""What every test file shares: tests marked `accelerator` are skipped where torch sees none."""

from __future__ import annotations

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.accelerator.is_available():
        return
    skip = pytest.mark.skip(reason="needs an accelerator, and torch sees none here")
    for item in items:
        if "accelerator" in item.keywords:
            item.add_marker(skip)
