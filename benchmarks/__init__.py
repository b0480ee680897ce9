"""Benchmarks: ratios of LEMA and PEFT measured side by side on this machine. `python -m benchmarks` lists them."""

import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("lema") is None:  # a checkout that was not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))
