"""Libraries that results are compared with, in a folder of their own (`make venv` fills it): PEFT imports bitsandbytes
wherever it is, which takes two seconds in each of the processes that tests start."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers.utils import import_utils

FOLDER = Path(sys.prefix) / "reference"


def library(name: str) -> Any:
    """A library, in this process from now on; where it is not, tests are skipped, and in CI they fail."""
    if str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))
        importlib.invalidate_caches()
        import_utils.is_bitsandbytes_available.cache_clear()
    try:
        return importlib.import_module(name)
    except ImportError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"{error}: `make venv` installs it", allow_module_level=True)
