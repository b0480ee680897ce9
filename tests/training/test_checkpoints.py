"""Checkpoints and the folder of them: which are whole, which may go, what killed saves leave, a full disk."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from helpers import lema_model, padded_batch
from lema.errors import CheckpointError, ConfigError
from lema.storage.complete import MARKER, problem_of, write_marker
from lema.storage.index import GlobalBinaryIndex
from lema.training.checkpoints import CheckpointFolder, read_state
from lema.training.metrics import JsonLines
from lema.training.start import choose_start
from training_runs import adapter_bytes, make_model, read_lines, settings_of, train, write_rows

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
]


def made(folder: Path, name: str, state: dict[str, Any] | None = None) -> Path:
    path = folder / name
    path.mkdir(parents=True)
    (path / "weights").write_bytes(name.encode() * 100)
    (path / "trainer_state.json").write_text(json.dumps(state or {"global_step": 1, "lema": {"run": {}}}))
    write_marker(path)
    return path


def test_what_makes_a_folder_whole(tmp_path: Path) -> None:
    path = made(tmp_path, "checkpoint-1")
    assert problem_of(path) is None
    weights = path / "weights"
    before = weights.read_bytes()
    weights.write_bytes(before[:-1])
    assert "1199 bytes and was saved with 1200" in (problem_of(path, read=False) or "")
    weights.write_bytes(b"x" + before[1:])
    assert problem_of(path, read=False) is None
    assert "not those that were saved" in (problem_of(path) or "")
    weights.unlink()
    assert problem_of(path, read=False) == "weights is missing"
    for text in ("", "{", "[]", '{"files": 3}', '{"files": {"weights": 1}}', "\ud800"):
        (path / MARKER).write_bytes(text.encode("utf-8", "surrogatepass"))
        weights.write_bytes(before)
        assert "is damaged" in (problem_of(path) or ""), text
    (path / MARKER).unlink()
    assert "saving was not finished" in (problem_of(path) or "")
    assert problem_of(tmp_path / "none") == "it does not exist"


def test_the_newest_whole_one_and_what_was_passed_over(tmp_path: Path) -> None:
    for step in (2, 10, 9, 30):
        made(tmp_path, f"checkpoint-{step}")
    (tmp_path / "checkpoint-x").mkdir()
    (tmp_path / "checkpoint-30" / "weights").write_bytes(b"")
    (tmp_path / "checkpoint-10" / MARKER).unlink()
    found = CheckpointFolder(tmp_path).newest()
    assert found.path == tmp_path / "checkpoint-9"
    assert [text.split(":")[0] for text in found.passed_over] == ["checkpoint-30", "checkpoint-10"]
    start = choose_start(CheckpointFolder(tmp_path), "auto")
    assert start.checkpoint == tmp_path / "checkpoint-9"
    assert all(text.startswith("passed over checkpoint-") for text in start.messages)
    for path in tmp_path.glob("checkpoint-*/weights"):
        path.unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is whole"):
        choose_start(CheckpointFolder(tmp_path), "auto")
    with pytest.raises(CheckpointError, match="weights is missing"):
        choose_start(CheckpointFolder(tmp_path), tmp_path / "checkpoint-2")
    with pytest.raises(CheckpointError, match="train_step alone"):
        read_state(made(tmp_path, "checkpoint-99", {"global_step": 1, "lema": {}}))


def test_rotation_keeps_the_newest_whole_one_and_the_best(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)

    def left() -> list[int]:
        return sorted(int(path.name.partition("-")[2]) for path in folder.all())

    for step in (1, 2, 3, 4, 5, 6):
        made(tmp_path, f"checkpoint-{step}")
    (tmp_path / "checkpoint-6" / "weights").unlink()
    assert folder.rotate(None, None) == []
    folder.rotate(3, "elsewhere/checkpoint-1")
    assert left() == [1, 4, 5, 6], "6 is damaged, so 5 is the newest good one, and 1 the best"
    folder.rotate(1, "checkpoint-1")
    assert left() == [1, 5, 6]
    folder.rotate(1, None)
    assert left() == [5, 6]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def _state(step: int) -> dict[str, Any]:
    return {"global_step": step, "lema": {"run": {}}}


def test_the_last_save_gives_way_to_a_later_checkpoint(tmp_path: Path) -> None:
    """A run that was finished, made longer and stopped again goes on from where it was stopped."""
    folder = CheckpointFolder(tmp_path)
    made(tmp_path, "final", _state(100))
    made(tmp_path, "checkpoint-90", _state(90))
    assert choose_start(folder, "auto").checkpoint == folder.final
    made(tmp_path, "checkpoint-150", _state(150))
    assert choose_start(folder, "auto").checkpoint == folder.path(150)


def test_going_back_puts_aside_what_came_after(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    for step in (50, 100, 150):
        made(tmp_path, f"checkpoint-{step}", _state(step))
    made(tmp_path, "final", _state(160))
    chosen = choose_start(folder, folder.path(50))
    assert chosen.messages == [] and len(folder.all()) == 3, "nothing is moved by looking"
    start = chosen.put_aside(folder)
    assert start.checkpoint == folder.path(50)
    assert "checkpoint-150, checkpoint-100, final came after checkpoint-50" in start.messages[0]
    assert sorted(path.name for path in (tmp_path / "previous-1").iterdir()) == [
        "checkpoint-100", "checkpoint-150", "final",
    ]  # fmt: skip
    assert [path.name for path in folder.all()] == ["checkpoint-50"]
    made(tmp_path, "checkpoint-60", _state(60))
    assert folder.rotate(1, None, folder.path(60)) == [folder.path(50)]
    made(tmp_path, "checkpoint-70", _state(70))
    assert folder.rotate(1, None, folder.path(60)) == [folder.path(70)], "the one just written stays"


def test_leftovers_of_killed_saves(tmp_path: Path) -> None:
    (tmp_path / ".checkpoint-3.abc.tmp").mkdir()
    made(tmp_path, ".final.xyz.tmp")
    made(tmp_path, ".checkpoint-4.abc.old")
    made(tmp_path, "checkpoint-5")
    made(tmp_path, ".checkpoint-5.abc.old")
    made(tmp_path, ".checkpoint-6.1.removed")
    (tmp_path / ".hidden").mkdir()
    folder = CheckpointFolder(tmp_path)
    cleared = folder.open()
    assert len(cleared) == 5
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-4", "checkpoint-5", ".hidden", ".lock"}
    with pytest.raises(ConfigError, match="in use by another run"):
        CheckpointFolder(tmp_path).open()
    folder.close()
    again = CheckpointFolder(tmp_path)
    assert again.open() == []
    again.close()


def test_other_base_weights_are_seen(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    file = model / "model.safetensors"
    with lema_model(model) as streamed:
        trainer = streamed.get_trainer()
        trainer.train_step(padded_batch())
        trainer.save_checkpoint(tmp_path / "here")
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] += 1
    save_file(tensors, file, {"format": "pt"})
    with lema_model(model) as streamed:
        with pytest.raises(CheckpointError, match=r"other base weights: model.safetensors has other contents"):
            streamed.get_trainer(resume_from=tmp_path / "here")
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "other.safetensors")
    index = GlobalBinaryIndex(tmp_path / "other.safetensors")
    prints = index.fingerprint()
    assert list(prints) == ["other.safetensors"]
    assert GlobalBinaryIndex(tmp_path / "other.safetensors").fingerprint() == prints


def test_fingerprints_of_small_and_empty_files(tmp_path: Path) -> None:
    import torch

    for name, tensors in (("none", {}), ("scalar", {"a": torch.ones(())}), ("empty", {"a": torch.ones(0)})):
        save_file(tensors, tmp_path / f"{name}.safetensors")
        assert GlobalBinaryIndex(tmp_path / f"{name}.safetensors").fingerprint()


# -- lines -----------------------------------------------------------------------------------------


def test_lines_survive_a_kill_and_a_resume(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = JsonLines(path)
    for step in (1, 2, 3, 4):
        file.write({"type": "train", "step": step})
    file.close()
    with path.open("a") as half:
        half.write('{"type": "train", "step": 5, "lo')
    assert [line["step"] for line in read_lines(path)] == [1, 2, 3, 4]
    file = JsonLines(path)
    file.write({"type": "event", "event": "resumed", "step": 2})
    file.write({"type": "train", "step": 3})
    file.close()
    assert [(line["type"], line["step"]) for line in read_lines(path)] == [
        ("train", 1), ("train", 2), ("event", 2), ("train", 3)
    ]  # fmt: skip
    path.write_text("no line end")
    JsonLines(path).close()
    assert path.read_text() == ""


# -- a full disk -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("parts")
    return make_model(folder / "model"), write_rows(folder / "rows.jsonl")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MB."""
    place = tmp_path / "small"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=3m", "lema-test", str(place)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        pytest.skip(f"mount cannot be run: {error}")
    if done.returncode:
        pytest.skip(f"mounting a tmpfs is not permitted: {done.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


class FillDisk(TrainerCallback):
    """Somebody else takes all there is left, before a step."""

    def __init__(self, place: Path, step: int, left: int = 0) -> None:
        self.ballast, self.step, self.left = place / "ballast", step, left

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step - 1:
            free = shutil.disk_usage(self.ballast.parent).free
            self.ballast.write_bytes(bytes(max(free - self.left, 0)))


@pytest.mark.parametrize("left", [0, 60_000, 150_000])
def test_a_full_disk_stops_the_run_and_leaves_the_checkpoint_before(
    parts: tuple[Path, Path], tmp_path: Path, small_disk: Path, left: int
) -> None:
    settings = {**settings_of(*parts, tmp_path / "whole"), "save_steps": 2, "sample_prompts": []}
    train(settings)
    out = small_disk / "out"
    settings["output_dir"] = str(out)
    with pytest.raises(CheckpointError, match=r"checkpoint-6 could not be written.*checkpoint-4, stays"):
        train(settings, callbacks=[FillDisk(small_disk, 6, left)])
    assert {path.name for path in out.glob("*checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    assert all(problem_of(path) is None for path in out.glob("checkpoint-*"))
    (small_disk / "ballast").unlink()
    train(settings, resume="auto")
    assert adapter_bytes(out / "final") == adapter_bytes(tmp_path / "whole" / "final")


def test_a_full_disk_may_be_lived_with(parts: tuple[Path, Path], tmp_path: Path, small_disk: Path) -> None:
    class Room(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 8:
                with contextlib.suppress(FileNotFoundError):
                    (small_disk / "ballast").unlink()

    settings = {**settings_of(*parts, tmp_path / "whole"), "save_steps": 2, "on_save_error": "continue"}
    train(settings)
    settings["output_dir"] = str(small_disk / "out")
    result = train(settings, callbacks=[FillDisk(small_disk, 3), Room()])
    assert result.status == "finished"
    assert adapter_bytes(small_disk / "out" / "final") == adapter_bytes(tmp_path / "whole" / "final")
    lines = read_lines(small_disk / "out" / "metrics.jsonl")
    assert [line["step"] for line in lines if line.get("event") == "save_failed"] == [4, 6, 8][
        : len([line for line in lines if line.get("event") == "save_failed"])
    ]
    assert [line["step"] for line in lines if line["type"] == "train"] == list(range(1, 11)), "files catch up"
