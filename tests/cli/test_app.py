"""How errors leave the command line, and what a run leaves behind when it does not come to its end."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest.mock import Mock

import pytest
import typer
from typer.testing import CliRunner

import lema.cli.extensions
import lema.export.check
from lema.cli.app import app
from lema.training.checkpoints import CheckpointFolder
from training_runs import StopAfter, make_model, settings_of, train, write_rows

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
]


def process(*words: str, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "LEMA_DEBUG"}
    source = str(Path(__file__).parents[2] / "src")
    return subprocess.run(
        [sys.executable, "-m", "lema", *words], capture_output=True, text=True, encoding="latin-1", timeout=200,
        env={**environment, "PYTHONPATH": source, **more},
    )  # fmt: skip


@pytest.mark.long
def test_an_error_is_a_message_and_a_traceback_on_request(tmp_path: Path) -> None:
    words = ("train", str(tmp_path / "none.yaml"))
    plain, shown = process(*words), process(*words, LEMA_DEBUG="1")
    assert plain.returncode == shown.returncode == 1
    assert plain.stderr.startswith("error: ") and "Traceback" not in plain.stderr
    assert "Traceback" in shown.stderr and "ConfigError" in shown.stderr and "\nerror: " in shown.stderr
    assert "Traceback" not in process(*words, LEMA_DEBUG="0").stderr


def test_what_nobody_foresaw_is_one_message_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(folder: Path) -> None:
        raise KeyError("surprise\nand a second line")

    monkeypatch.setattr(lema.export.check, "check_adapter", breaks)
    monkeypatch.delenv("LEMA_DEBUG", raising=False)
    result = CliRunner().invoke(app, ["adapter", "check", str(tmp_path)])
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
    assert result.stderr.startswith("error: KeyError: ") and "LEMA_DEBUG=1" in result.stderr
    monkeypatch.setenv("LEMA_DEBUG", "1")
    assert isinstance(CliRunner().invoke(app, ["adapter", "check", str(tmp_path)]).exception, KeyError)


@pytest.mark.long
def test_output_that_has_not_all_characters(tmp_path: Path) -> None:
    name = tmp_path / "日本…é.yaml"
    done = process("train", str(name), PYTHONIOENCODING="latin-1")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "??" in done.stderr and "é.yaml" in done.stderr


def test_usage_errors_keep_their_status() -> None:
    assert CliRunner().invoke(app, ["train", "--nonsense"]).exit_code == 2
    assert CliRunner().invoke(app, ["nonsense"]).exit_code == 2
    assert CliRunner().invoke(app, ["--version"]).exit_code == 0


def without(*distributions: str) -> str:
    """A program that is `lema` where some distributions are not installed."""
    return (
        f"import importlib.metadata as m\nleft_out, every = {distributions!r}, m.entry_points\n"
        "def some(**given):\n"
        "    found = every(**given)\n"
        "    own = str(given.get('group')).startswith('lema.')\n"
        "    return m.EntryPoints(e for e in found if e.dist.name not in left_out) if own else found\n"
        "m.entry_points = some\nfrom lema.cli.app import main\nmain()"
    )


@pytest.mark.long
def test_a_verb_of_a_package_that_is_left_out_says_how_to_get_it(tmp_path: Path) -> None:
    def lema(*words: str) -> subprocess.CompletedProcess[str]:
        program = without("lema-lora-reply", "lema-lora-kaggle")
        return subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, timeout=200)

    assert lema("--help").returncode == 0 and " demo " not in lema("--help").stdout
    for words, package in (
        (("demo",), "lema-reply"), (("data", "build"), "lema-reply"), (("kaggle", "run", "proof"), "lema-kaggle"),
        (("eval", str(tmp_path), "--format", "lema-reply", "--data", "x"), "lema-reply"),
    ):  # fmt: skip
        done = lema(*words)
        said = " ".join(done.stderr.replace("│", "").split())
        assert done.returncode and "not installed" in said and f"packages/{package}" in said, done.stderr
    assert "No such command" in lema("data", "nonsense").stderr


def test_verbs_of_packages_are_there() -> None:
    for words in (("demo",), ("data", "build"), ("data", "validate"), ("kaggle", "run")):
        assert CliRunner().invoke(app, [*words, "--help"]).exit_code == 0


def test_a_verb_of_others_takes_no_name_that_is_taken_or_empty(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    app, group, other = typer.Typer(), typer.Typer(), typer.Typer()
    app.command("train")(lambda: None)
    app.add_typer(group, name="data")

    @group.command()
    def build_all() -> None:
        """A verb that has its function's name."""

    def entries(group: str) -> list[Mock]:
        names = ("", "data.", "train", "data", "data.build-all", "fresh", "fresh", "data.fresh", "nowhere.fresh")
        brought = {"fresh": Mock(return_value=build_all), "data.fresh": Mock(return_value=other)}
        made = [Mock(load=brought.get(name, Mock(return_value=build_all)), value="their.module:verb") for name in names]
        for entry, name in zip(made, names):
            entry.name, entry.dist.name = name, "somebody-elses"
        return made

    monkeypatch.setattr(lema.cli.extensions, "entry_points", entries)
    lema.cli.extensions.add_verbs({"": app, "data": group})
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 7 and all("somebody-elses (their.module:verb)" in line for line in said)
    for name, why in (("''", "no name"), ("'data.'", "no name"), ("'train'", "already"), ("'data'", "already"),
                      ("'data.build-all'", "already"), ("'fresh'", "already"),
                      ("'nowhere.fresh'", "where")):  # fmt: skip
        assert sum(f"the verb {name} of" in line and why in line for line in said) == 1, (name, said)
    assert [each.name for each in app.registered_commands] == ["train", "fresh"]
    assert [each.name for each in group.registered_groups] == ["fresh"]


def test_nothing_of_a_run_is_in_the_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    model, rows = make_model(tmp_path / "model"), write_rows(tmp_path / "rows.jsonl")
    out = tmp_path / "out"
    seen: list[Path] = []

    class Look(StopAfter):
        def on_step_end(self, args: object, state: object, control: object, **kwargs: object) -> None:
            seen.extend(out.glob(".tokenizer.*.tmp"))

    train(settings_of(model, rows, out, max_steps=1, sample_prompts=[], eval_size=0), callbacks=[Look(0)])
    assert seen == [out / f".tokenizer.{os.getpid()}.tmp"], "there while the run goes on"
    assert not list(out.glob(".*.tmp")) and not list((tmp_path / "temporary").glob("lema*"))
    assert (out / "final" / "tokenizer.json").is_file()


def test_what_a_killed_run_left_is_cleared_at_the_next_start(tmp_path: Path) -> None:
    (tmp_path / ".tokenizer.17.tmp").mkdir()
    (tmp_path / ".tokenizer.17.tmp" / "tokenizer.json").write_text("{}")
    (tmp_path / ".run.yaml.17.tmp").write_text("a: 1")
    (tmp_path / ".data_summary.json.17.tmp").write_text("{}")
    (tmp_path / ".mine.17.tmp").write_text("stays")
    folder = CheckpointFolder(tmp_path)
    assert folder.open() == []
    folder.close()
    assert {path.name for path in tmp_path.iterdir()} == {".lock", ".mine.17.tmp"}
