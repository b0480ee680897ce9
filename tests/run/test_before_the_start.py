"""One truth before the start: what `lema train` would refuse, `--dry-run` and `lema data check RUN.YAML` refuse, with
file and line, whatever row it is in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from families import save_tiny
from lema.cli.app import app
from lema.data import ChatRenderer
from lema.data.encode import RowEncoder
from lema.data.limits import ModelLimits, Within
from lema.engine import packing
from lema.errors import ConfigError
from training_runs import make_model, settings_of, tiny_tokenizer, train, write_rows

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
]
DATA, DRY, TRAIN = ("data", "check"), ("train", "--dry-run"), ("train",)


def run_file(folder: Path, model: Path, rows: Path, **more: Any) -> Path:
    values = {**settings_of(model, rows, folder / "out", sample_prompts=[], eval_size=0, num_train_epochs=1), **more}
    path = folder / "run.yaml"
    path.write_text("\n".join(f"{n}: {json.dumps(v)}" for n, v in values.items() if "budget" not in n))
    return path


def said(verb: tuple[str, ...], file: Path) -> str:
    result = CliRunner().invoke(app, [*verb, str(file)], env={"COLUMNS": "500"})
    assert isinstance(result.exception, SystemExit | None), result.exception
    assert result.exit_code == 1, (verb, result.output)
    return result.output


def many(path: Path, bad: dict[str, Any], at: int = 600) -> Path:
    """Rows of which one is bad, and that one among those no sample looks at."""
    write_rows(path, 700)
    lines = path.read_text().splitlines()
    lines[at] = json.dumps(bad)
    path.write_text("\n".join(lines) + "\n")
    return path


BAD = {"messages": [{"role": "user", "content": "x"}]}


@pytest.mark.parametrize("verb", [DATA, DRY])
def test_a_bad_row_that_no_sample_meets(model: Path, tmp_path: Path, verb: tuple[str, ...]) -> None:
    file = run_file(tmp_path, model, many(tmp_path / "rows.jsonl", BAD, 601))
    assert "rows.jsonl, line 602" in said(verb, file)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb", [DATA, DRY, TRAIN])
def test_tokens_outside_the_vocabulary(tmp_path: Path, verb: tuple[str, ...]) -> None:
    model = make_model(tmp_path / "model")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["red"])  # 99, one beyond
    tokenizer.save_pretrained(model)
    rows = tmp_path / "rows.jsonl"
    good = {"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]}
    bad = {"messages": [{"role": "user", "content": "a red one"}, {"role": "assistant", "content": "two"}]}
    rows.write_text("\n".join(json.dumps(row) for row in [good, good, bad, good]))
    output = said(verb, run_file(tmp_path, model, rows))
    assert "rows.jsonl, line 3: token 4 is 99 ('red'), outside the model's vocabulary of 99 tokens (0..98)" in output


def test_padding_beyond_the_embedding_is_another_token(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<mask-me>"})
    assert tokenizer.pad_token_id == 99
    tokenizer.save_pretrained(model)
    settings = settings_of(model, write_rows(tmp_path / "rows.jsonl"), tmp_path / "out", sample_prompts=[], max_steps=1)
    assert train(settings).status == "finished"
    assert ModelLimits(99).padding((99, None, 2)) == 2
    assert ModelLimits(99).padding((99, -1)) == 0
    assert ModelLimits().padding((99, 2)) == 99


@pytest.mark.parametrize("verb", [DATA, DRY, TRAIN])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"max_seq_length": 65}, "max_seq_length=65 is more than the model's 64 positions"),
        ({"eval_strategy": "steps"}, "eval_strategy=steps needs evaluation data"),
        ({"load_best_model_at_end": True}, "need evaluation data"),
        ({"report_to": "wandb"}, "pip install 'wandb>=0.18'"),
        ({"eval_size": 22}, "holds out 22 of the 22 rows"),
        ({"too_long": "drop", "max_seq_length": 15}, "more than max_dropped=0.1"),
        ({"too_long": "error", "max_seq_length": 15}, "rows.jsonl, line"),
        ({"lora_target_modules": ["nothing"]}, "Modules of this model that can have LoRA"),
        ({"adapter_name_or_path": "./nowhere"}, "./nowhere does not exist: give an adapter's directory, or its hub id"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: tuple[str, ...], change: Any, words: str
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    file = run_file(tmp_path, model, write_rows(tmp_path / "rows.jsonl"), **change)
    assert words in " ".join(said(verb, file).split())


@pytest.mark.parametrize(
    "change", [{"lora_target_modules": ["nothing"]}, {"packing": True, "max_dropped": 0.0, "max_seq_length": 8}]
)
def test_a_dry_run_builds_the_model_and_packs_the_rows(model: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    rows = write_rows(tmp_path / "rows.jsonl")
    file = run_file(tmp_path, model, rows, **{"too_long": "drop", **change})
    assert said(DRY, file).splitlines()[-1] == said(TRAIN, file).splitlines()[-1]


@pytest.mark.parametrize("change", [{"lora_rank": 2}, {"max_steps": 1}, {"seed": 7, "data_seed": 9}])
@pytest.mark.long
def test_a_dry_run_holds_a_resume_against_its_checkpoint(model: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    rows = write_rows(tmp_path / "rows.jsonl")
    file = run_file(tmp_path, model, rows, max_steps=2)
    assert CliRunner().invoke(app, ["train", str(file)]).exit_code == 0
    run_file(tmp_path, model, rows, **{"max_steps": 2, **change})
    dry = said(("train", "--dry-run", "--resume", "auto"), file).splitlines()[-1]
    assert dry == said(("train", "--resume", "auto"), file).splitlines()[-1]
    assert dry.startswith("error: ")


def test_python_too(model: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl")
    with pytest.raises(ConfigError, match="max_seq_length=65 is more than the model's 64 positions"):
        train(settings_of(model, rows, tmp_path / "out", max_seq_length=65))


@pytest.mark.parametrize("verb", [DATA, DRY, TRAIN])
def test_a_model_that_cannot_keep_packed_rows_apart(tmp_path: Path, verb: tuple[str, ...]) -> None:
    save_tiny("bloom", tmp_path / "bloom", vocab_size=99)
    tiny_tokenizer().save_pretrained(tmp_path / "bloom")
    rows = write_rows(tmp_path / "rows.jsonl")
    assert "cannot train on packed rows" in said(verb, run_file(tmp_path, tmp_path / "bloom", rows, packing=True))


def test_a_run_is_tried_once_for_packing(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[object] = []
    fault = packing._fault
    monkeypatch.setattr(packing, "_fault", lambda lm: tried.append(lm) or fault(lm))
    file = run_file(tmp_path, model, write_rows(tmp_path / "rows.jsonl"), packing=True, max_steps=1, num_train_epochs=0)
    result = CliRunner().invoke(app, ["train", str(file)])
    assert result.exit_code == 0 and len(tried) == 1, result.output


def test_what_is_counted_depends_on_the_vocabulary_where_it_can_refuse() -> None:
    encoder = RowEncoder(ChatRenderer(tiny_tokenizer()), "text")
    known = max(encoder.renderer.tokenizer.get_vocab().values()) + 1
    keys = [Within(encoder, ModelLimits(size)).key for size in (None, known, known - 1, known - 2)]
    assert keys[0] == keys[1] == encoder.key and len(set(keys)) == 3
