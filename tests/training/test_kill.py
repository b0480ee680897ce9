"""Runs killed, starved of disk and of reads at random moments, and gone on with: the same adapter every time."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from lema.storage.complete import problem_of
from lema.training.checkpoints import CheckpointFolder
from training_runs import adapter_bytes, make_model, settings_of, train, write_rows

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
KILLS = 40


def run(settings: dict[str, Any], reads: int | None = None) -> None:
    """In a process of its own: train to the end, or to the read that fails."""
    import torch

    torch.set_num_threads(1)
    if reads is not None:
        real, count = os.preadv, 0

        def failing(*args: Any) -> int:
            nonlocal count
            count += 1
            if count == reads:
                raise OSError(5, "Input/output error")
            return real(*args)

        os.preadv = failing
    with open(Path(settings["output_dir"]).parent / "said", "a") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
        train(settings, resume="auto")


class Processes:
    """Processes that begin with everything imported, so that what is killed is training."""

    def __init__(self) -> None:
        os.environ["PYTHONPATH"] = os.pathsep.join(
            [str(Path(__file__).parents[1] / "support"), str(Path(__file__).parents[2] / "src")]
        )
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["training_runs", "lema.run.training", "peft", "transformers"])

    def start(self, settings: dict[str, Any], reads: int | None = None) -> Any:
        """Begin a run."""
        process = self._context.Process(target=run, args=(settings, reads))
        process.start()
        return process


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], bytes, Processes, float]:
    """Settings, the adapter of a run never stopped, processes, and the seconds a whole run takes in one."""
    folder = tmp_path_factory.mktemp("parts")
    model, rows = make_model(folder / "model"), write_rows(folder / "rows.jsonl")
    settings = {
        **settings_of(model, rows, folder / "whole"), "save_steps": 1, "save_total_limit": 2,
        "load_best_model_at_end": False, "num_train_epochs": 3,
    }  # fmt: skip
    train(settings)
    processes = Processes()
    seconds = 0.0
    for number in range(2):  # the first one also starts the server
        started = time.monotonic()
        process = processes.start({**settings, "output_dir": str(_inside(folder / f"timed{number}"))})
        process.join()
        assert process.exitcode == 0
        seconds = time.monotonic() - started
    return settings, adapter_bytes(folder / "whole" / "final"), processes, seconds


def _inside(folder: Path) -> Path:
    folder.mkdir()
    return folder / "out"


def check_folder(out: Path) -> None:
    """What a start would accept is whole, and nothing with a checkpoint's name is not."""
    if out.is_dir():
        for path in CheckpointFolder(out).all():
            assert problem_of(path) is None, path


def test_kills_at_random_moments(parts: Any, tmp_path: Path) -> None:
    settings, expected, processes, seconds = parts
    chance = random.Random(20)
    kills, finished, while_saving = 0, 0, 0
    while kills < KILLS:
        out = _inside(tmp_path / f"run{finished}")
        while True:
            process = processes.start({**settings, "output_dir": str(out)})
            process.join(chance.uniform(0.1, 1.0) * seconds)
            if process.exitcode is None:
                process.kill()
                process.join()
                kills += 1
                while_saving += bool(list(out.glob(".*.tmp"))) if out.is_dir() else 0
                check_folder(out)
                continue
            assert process.exitcode == 0, (out.parent / "said").read_text()[-3000:]
            break
        assert adapter_bytes(out / "final") == expected
        assert not list(out.glob(".*.tmp"))
        steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        assert {line["step"] for line in steps if line["type"] == "train"} == set(range(1, 16))
        finished += 1
    print(f"{kills} kills over {finished} runs of {seconds:.1f} s, {while_saving} of them while saving")
    assert while_saving > 0


def test_read_errors_at_random_moments(parts: Any, tmp_path: Path) -> None:
    settings, expected, processes, _ = parts
    chance = random.Random(5)
    for number in range(10):
        out = _inside(tmp_path / f"run{number}")
        process = processes.start({**settings, "output_dir": str(out), "save_steps": 4}, chance.randrange(5, 90))
        process.join()
        assert process.exitcode == 1, "the read error ends the run"
        assert "Input/output error" in (out.parent / "said").read_text()
        check_folder(out)
        process = processes.start({**settings, "output_dir": str(out)})
        process.join()
        assert process.exitcode == 0, (out.parent / "said").read_text()[-3000:]
        assert adapter_bytes(out / "final") == expected


def test_full_disks_at_random_moments(parts: Any, tmp_path: Path) -> None:
    settings, expected, processes, _ = parts
    chance = random.Random(6)
    for number in range(10):
        place = tmp_path / f"disk{number}"
        place.mkdir()
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=4m", "lema-test", str(place)],
            capture_output=True,
            text=True,
            check=False,
        )
        if mounted.returncode:
            pytest.skip(f"mounting a tmpfs is not permitted: {mounted.stderr.strip()}")
        try:
            (place / "ballast").write_bytes(bytes(4 * 2**20 - chance.randrange(150_000, 500_000)))
            out = place / "out"
            process = processes.start({**settings, "output_dir": str(out)})
            process.join()
            assert process.exitcode == 1, "there is no room for two checkpoints and a third"
            assert "could not be written" in (place / "said").read_text() or "No space" in (place / "said").read_text()
            check_folder(out)
            (place / "ballast").unlink()
            process = processes.start({**settings, "output_dir": str(out)})
            process.join()
            assert process.exitcode == 0, (place / "said").read_text()[-3000:]
            assert adapter_bytes(out / "final") == expected
        finally:
            subprocess.run(["umount", str(place)], check=True)
    shutil.rmtree(tmp_path, ignore_errors=True)
