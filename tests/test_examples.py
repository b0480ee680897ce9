"""The examples run as they are, and teach their models something."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import low_level
import quickstart

pytestmark = pytest.mark.timeout(120)


@pytest.mark.parametrize("example", ["quickstart", "low_level"])
def test_example_learns_and_leaves_an_adapter_peft_can_read(example: str, tmp_path: Path) -> None:
    losses = quickstart.main(None, tmp_path) if example == "quickstart" else low_level.main(tmp_path)
    assert losses[-1] < losses[0] - 0.3
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    assert any(bool(p.any()) for name, p in loaded.named_parameters() if "lora_B" in name)
