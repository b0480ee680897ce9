"""The examples and tasks run as they are, offline, and teach their models something."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from data_helpers import VOCABULARY, make_tokenizer
from families import save_tiny

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tasks"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "kaggle"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

import benchmark_logic
import benchmark_runner
import chat_rows
import common
import demo_lema
import fine_tune_llama_7b
import fine_tune_llama_7b_config
import fine_tune_smollm
import generate_dummy_gpt2
import generate_medium_gpt2
import low_level
import quickstart
import speed_benchmark

pytestmark = pytest.mark.timeout(300)


def assert_peft_reads(adapter: Path, model: Path, rank: int | None = None) -> None:
    """The adapter loads into the plain model, has learned something, and is of that rank."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model)
    loaded = PeftModel.from_pretrained(base, str(adapter))
    learned = [p for name, p in loaded.named_parameters() if "lora_B" in name]
    assert len(learned) >= 4 * 4  # layers, and matrices of each
    assert all(bool(p.any()) for p in learned)
    assert rank is None or {p.shape[1] for p in learned} == {rank}


@pytest.mark.parametrize("example", ["quickstart", "low_level"])
def test_example_learns_and_leaves_an_adapter_peft_can_read(example: str, tmp_path: Path) -> None:
    losses = quickstart.main(None, tmp_path) if example == "quickstart" else low_level.main(tmp_path)
    assert losses[-1] < losses[0] - 0.3
    assert_peft_reads(tmp_path / "adapter", tmp_path / "model")


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


@pytest.mark.parametrize("task", [fine_tune_llama_7b, fine_tune_llama_7b_config])
def test_the_tasks_of_llama_learn(task: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    losses = task.main(["--tiny", "--steps", "8", "--device", "cpu", "--output", str(tmp_path)])
    assert len(losses) == 8
    assert sum(losses[-2:]) < sum(losses[:2]) - 1
    assert capsys.readouterr().out.count("loss") == 8
    assert_peft_reads(tmp_path / "final", tmp_path / "model", rank=16)


def test_both_tasks_of_llama_begin_with_the_same_loss(tmp_path: Path) -> None:
    first = [
        task.main(["--tiny", "--steps", "1", "--device", "cpu", "--output", str(tmp_path / name)])
        for name, task in (("one", fine_tune_llama_7b), ("two", fine_tune_llama_7b_config))
    ]
    assert first[0] == pytest.approx(first[1], rel=1e-6)


def test_the_task_of_smollm_learns_and_leaves_what_a_run_leaves(tmp_path: Path) -> None:
    result = fine_tune_smollm.main(["--tiny", "--steps", "20", "--device", "cpu", "--output", str(tmp_path)])
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [line["loss"] for line in lines if line.get("type") == "train"]
    assert result.global_step == len(losses) == 20
    assert losses[-1] < losses[0] - 1
    assert result.adapter == tmp_path / "final"
    assert_peft_reads(tmp_path / "final", tmp_path / "model", rank=16)


def test_the_settings_the_tasks_promise() -> None:
    given = common.options("", [], model="hub/id", output="out", learning_rate=5e-5, tokens=128, steps=3)
    assert (given.model, given.learning_rate, given.tokens, given.tiny) == ("hub/id", 5e-5, 128, False)
    rows = common.questions()
    assert len(rows) >= 40
    assert all(row["prompt"].startswith("Question: ") and row["completion"].startswith(" ") for row in rows)


def test_a_batch_learns_the_end_token_and_no_padding() -> None:
    from lema.prepare.tiny_model import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    rows = [{"prompt": "a", "completion": " b"}, {"prompt": "long", "completion": " answer"}]
    made = common.batch(tokenizer, rows, 32)
    end = tokenizer.eos_token_id
    assert tokenizer.pad_token_id == end
    assert made["labels"][0].tolist()[:4] == [*tokenizer("a b")["input_ids"], end]
    assert set(made["labels"][0].tolist()[4:]) == {-100}
    assert made["labels"][1].tolist() == [*tokenizer("long answer")["input_ids"], end]


def test_gpt2_of_random_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from lema.storage.index import GlobalBinaryIndex

    path = generate_dummy_gpt2.main(generate_medium_gpt2.SHAPE, "unused", [str(tmp_path), "--tiny"], "")
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert [config[name] for name in ("n_layer", "n_embd", "vocab_size")] == [4, 64, 1000]
    with GlobalBinaryIndex(path) as index:
        assert {"transformer.h.3.attn.c_attn.weight", "lm_head.weight", "transformer.wte.weight"} <= set(index.keys)
        assert index.record("lm_head.weight").shape == (1000, 64)
    assert str(path) in capsys.readouterr().out


def test_the_medium_gpt2_is_the_124m_model() -> None:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(**generate_medium_gpt2.SHAPE))
    assert model.num_parameters() == 124_439_808


@pytest.mark.parametrize("kind", ["baseline", "lema"])
@pytest.mark.long
def test_peak_memory_of_one_step(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    benchmark_runner.main([kind, "--tiny", "--tokens", "32"])
    numbers = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert numbers["kind"] == kind
    assert numbers["peak_mib"] > numbers["floor_mib"] > 100
    assert 0 < numbers["above_floor_mib"] < 300
    assert numbers["median_step_seconds"] > 0
    assert numbers["loss"] == pytest.approx(math.log(1000), rel=0.05)  # of random weights


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_runner_takes_a_weights_file_of_any_name(tmp_path: Path) -> None:
    weights = generate_dummy_gpt2.generate(tmp_path, generate_dummy_gpt2.SHAPE)
    renamed = weights.rename(tmp_path / "gpt2_dummy.safetensors")
    assert benchmark_runner.main(["baseline", str(renamed), "--tokens", "32"])["loss"] > 0
    (tmp_path / "config.json").unlink()
    with pytest.raises(SystemExit, match=r"config\.json does not exist"):
        benchmark_runner.main(["lema", str(renamed)])


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("script", "column"), [(benchmark_logic, "ram_mib"), (speed_benchmark, "over_peft")])
def test_the_comparisons_with_peft(
    script: Any, column: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    from lema.prepare.tiny_model import tiny_model

    folder = tiny_model(tmp_path / "mine")
    file = tmp_path / "rows.json"
    common_options = ["--device", "cpu", "--dtype", "float32", "--steps", "2", "--tokens", "16", "--json", str(file)]
    rows = script.main([*common_options, "--models", str(folder)])
    assert [row["arm"] for row in rows] == ["LEMA", "PEFT", "PEFT+checkpointing"]
    assert all(row[column] > 0 and row["seconds"] > 0 and not row.get("failure") for row in rows)
    assert [row["loss"] for row in rows] == pytest.approx([rows[0]["loss"]] * 3, rel=0.02)
    saved = json.loads(file.read_text(encoding="utf-8"))
    assert [row["ram_mib"] for row in saved] == [row["ram_mib"] for row in rows]
    assert capsys.readouterr().out.count("| mine |") == 3


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_comparison_says_what_failed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from lema.prepare.tiny_model import tiny_model

    folder = tiny_model(tmp_path / "mine")
    (folder / "model.safetensors").unlink()
    rows = benchmark_logic.main(["--device", "cpu", "--steps", "2", "--tokens", "16", "--models", str(folder)])
    assert all("exit 1" in row["failure"] and "ram_mib" not in row for row in rows)
    assert capsys.readouterr().out.count("exit 1") == 3
    with pytest.raises(SystemExit, match="neither of gpt2"):
        benchmark_logic.main(["--models", "nothing-of-this-name"])
