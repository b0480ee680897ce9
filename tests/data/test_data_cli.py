"""`lema data check`: counts, lengths, what is learned, bad rows, and its status."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from data_helpers import chat, make_tokenizer, write_jsonl
from lema.cli.app import app
from lema.cli.data import look
from lema.cli.data_table import show
from lema.data import DataConfig


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEMA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "120")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    return str(folder)


def good_rows(count: int = 12) -> list[dict[str, Any]]:
    return [{"messages": chat(f"question {i}", "answer " * (i + 1))} for i in range(count)]


def check(*arguments: Any) -> Result:
    return CliRunner().invoke(app, ["data", "check", *(str(a) for a in arguments)])


def test_good_rows(tmp_path: Path, model: str) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [*good_rows(), good_rows()[0]])
    result = check(path, "--model", model, "--max-seq-length", 30)
    assert result.exit_code == 0, result.output
    words = " ".join(result.output.split())
    assert "13 rows, read as messages" in words and "truncated to 30 tokens" in words
    assert "duplicates 1 7.7%" in words and "tokens learned" in words and "longest" in words
    assert "⟦answer <|im_end|>↵⟧" in result.output and "rows.jsonl, line 1" in words
    assert "all rows are good" in words

    (found,) = json.loads(check(path, "--model", model, "--max-seq-length", 30, "--json").output)
    assert found["rows"] == found["kept"] == 13 and found["duplicates"] == 1 and found["bad"] == 0 and found["good"]
    assert found["truncated"] > 0 and 0 < found["trained_share"] < 1 and found["end_learned_share"] == 1
    assert sum(bin["rows"] for bin in found["length_histogram"]) == 13
    assert found["fingerprint"]["rows"] == 13 and found["length_percentiles"]["100"] > 30


def test_bad_rows_are_listed_by_line_and_the_status_is_1(tmp_path: Path, model: str) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", good_rows())
    with open(path, "a", encoding="utf-8") as file:
        file.write('\n{"messages": []}\n{oops\n')
    result = check(path, "--model", model)
    assert result.exit_code == 1
    assert "line 14: messages is empty" in result.output and "line 15 is not JSON" in result.output
    assert "2 bad rows" in result.output and "⟦answer" in result.output
    (found,) = json.loads(check(path, "--model", model, "--json").output)
    assert found["bad"] == len(found["bad_rows"]) == 2 and not found["good"]
    assert check(path, "--model", model, "--limit", 3).exit_code == 0


def test_too_many_dropped_rows_are_bad_too(tmp_path: Path, model: str) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", good_rows())
    result = check(path, "--model", model, "--max-seq-length", 30, "--set", "too_long=drop")
    assert (
        result.exit_code == 1 and "more than max_dropped=0.1" in result.output and "dropped, too long" in result.output
    )
    more = ("--set", "max_dropped=0.9")
    assert check(path, "--model", model, "--max-seq-length", 30, "--set", "too_long=drop", *more).exit_code == 0


def test_the_file_of_a_run(tmp_path: Path, model: str) -> None:
    train = write_jsonl(tmp_path / "rows.jsonl", good_rows())
    held_out = write_jsonl(tmp_path / "eval.jsonl", [{"text": "one"}])
    run = tmp_path / "run.yaml"
    run.write_text(
        f"model_name_or_path: {model}\ntrain_file: {train}\neval_file: {held_out}\nmax_seq_length: 33\n",
        encoding="utf-8",
    )
    found = json.loads(check(run, "--json").output)
    assert [(one["format"], one["rows"], one["max_seq_length"]) for one in found] == [
        ("messages", 12, 33),
        ("text", 1, 33),
    ]
    (forced,) = json.loads(check(train, "--model", model, "--format", "text", "--json").output)
    assert forced["bad"] == 12


def test_what_it_cannot_do(tmp_path: Path, model: str) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", good_rows())
    assert check(path).exit_code == 2 and "--model" in check(path).output
    for arguments, words in (
        ((tmp_path / "absent.jsonl", "--model", model), "does not exist"),
        ((path, "--model", tmp_path / "nowhere"), "nowhere"),
        ((path, "--model", model, "--format", "mesages"), "did you mean 'messages'"),
        ((path, "--model", model, "--set", "max_droped=1"), "max_dropped"),
    ):
        result = check(*arguments)
        assert result.exit_code == 1 and words in result.output, result.output


def test_on_a_terminal_what_is_learned_has_a_colour(tmp_path: Path, model: str) -> None:
    (one,) = look(DataConfig(train_file=str(write_jsonl(tmp_path / "rows.jsonl", good_rows(1)))), model, 64, None)
    console = Console(file=StringIO(), force_terminal=True, color_system="standard", width=100)
    show(one, console)
    output = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\x1b[1;32manswer <|im_end|>↵\x1b[0m" in output
    assert "\x1b[2m" in output and "⟦" not in output


def test_help_shows_an_example() -> None:
    output = CliRunner().invoke(app, ["data", "check", "--help"]).output
    assert "Example: lema data check" in output
