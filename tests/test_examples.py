"""The examples run as they are, and teach their models something."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from data_helpers import VOCABULARY, make_tokenizer
from families import save_tiny

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import chat_rows
import demo_lema
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


def test_the_demonstration_in_python(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tiny("llama", tmp_path / "model", vocab_size=VOCABULARY, max_position_embeddings=256, initializer_range=0.8)
    make_tokenizer().save_pretrained(tmp_path / "model")
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in chat_rows.rows(16, seed=3)), encoding="utf-8")
    loss, answer = demo_lema.main(data, tmp_path / "run", passes=2, model=str(tmp_path / "model"))
    shown = capsys.readouterr().out
    assert f"loss {loss:.4f}" in shown
    assert answer.strip() in shown
    assert (tmp_path / "run" / "final" / "adapter_model.safetensors").is_file()


def test_the_rows_to_try_with_are_the_same_each_time_and_true() -> None:
    rows = chat_rows.rows(300, seed=1)
    assert rows == chat_rows.rows(300, seed=1) != chat_rows.rows(300, seed=2)
    sums = [re.match(r"What is (\d+) (plus|minus|times) (\d+)\?", row["messages"][0]["content"]) for row in rows]
    operations = {"plus": int.__add__, "minus": int.__sub__, "times": int.__mul__}
    checked = 0
    for row, found in zip(rows, sums, strict=True):
        if found is not None:
            result = operations[found[2]](int(found[1]), int(found[3]))
            assert f" is {result:,}." in row["messages"][1]["content"]
            checked += 1
    assert checked > 30
