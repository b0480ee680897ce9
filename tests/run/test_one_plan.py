"""A run has one plan and one skeleton: what is said of its cost is said of the plan its model is made by."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import threading
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import lema
from lema.cli.app import app
from lema.engine import opening
from lema.errors import ConfigError, RankError
from lema.machine.memory import format_bytes
from lema.models import transformers_adapter
from lema.planning.hardware import Hardware
from lema.planning.plan import MemoryPlan
from lema.run import planned, planned_run
from lema.training.run_config import RunConfig
from lema.training.start import Start
from ranks import Group, Member
from training_runs import settings_of, train, write_rows

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
]


@pytest.mark.parametrize(
    ("settings", "streamed"),
    [
        ({"ram_budget": "none"}, True),
        ({"ram_budget": "none", "strategy": "resident"}, False),
        ({"ram_budget": "none", "micro_batch_size": "3"}, True),
        ({"ram_budget": "2GB"}, False),
        ({"ram_budget": "2GB", "ram_layers": "0", "keep_activations": "0"}, True),
    ],
    ids=str,
)
def test_what_is_said_is_the_plan_that_runs(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], streamed: bool
) -> None:
    plans: list[MemoryPlan] = []
    models: list[lema.LemaModel] = []
    skeletons: list[Any] = []
    plan_for, build = planned.plan_for, transformers_adapter.build_skeleton

    def planning(*args: Any) -> MemoryPlan:
        plans.append(plan_for(*args))
        return plans[-1]

    def building(*args: Any) -> Any:
        skeletons.append(args)
        return build(*args)

    class Watched(lema.LemaModel):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            models.append(self)

    for room in (planned, opening):
        monkeypatch.setattr(room, "plan_for", planning)
    monkeypatch.setattr(planned_run, "LemaModel", Watched)
    monkeypatch.setattr(transformers_adapter, "build_skeleton", building)
    values = settings_of(model, write_rows(tmp_path / "rows.jsonl"), tmp_path / "out", max_steps=1, sample_prompts=[])
    file = tmp_path / "run.yaml"
    file.write_text("\n".join(f"{name}: {json.dumps(value)}" for name, value in values.items()))
    chosen = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    result = CliRunner().invoke(app, ["train", str(file), "--dry-run", *chosen], env={"COLUMNS": "500"})
    assert result.exit_code == 0, result.output
    (found,), (made,) = plans, models
    plan = made.memory.plan
    for name in ("on_device", "in_ram", "from_disk", "mapped", "keep_activations", "head", "micro_batch_size"):
        assert getattr(plan, name) == getattr(found, name)
    layers = f"{len(plan.from_disk)} layers from disk" if streamed else "all layers in memory"
    assert f"host memory {format_bytes(plan.host_peak)}; {layers}" in result.output
    assert plan.host_peak > 112 << 20
    assert len(skeletons) == 1


@pytest.mark.parametrize(
    ("settings", "at_once"), [({}, 2), ({"ram_budget": "2GB"}, 4), ({"micro_batch_size": 3}, 3)], ids=str
)
def test_python_and_the_command_line_plan_the_same_window(
    model: Path, tmp_path: Path, settings: dict[str, Any], at_once: int
) -> None:
    config = RunConfig.from_dict({**settings_of(model, tmp_path / "rows.jsonl", tmp_path / "out"), **settings}).lema
    there = planned.make(config, to_run=True).plan
    with lema.LemaModel(config) as made:
        here = made.memory.plan
        trainer = made.get_trainer()
        batching = trainer.attachment.batching
        assert batching.micro_batch_size == (None if at_once != 3 else 3), "a call is a call"
        with trainer.external_loop():
            assert batching.micro_batch_size == at_once
    for plan in (there, here):
        assert (plan.batch, plan.micro_batch_size) == (4, at_once)
    assert here == dataclasses.replace(
        there, host_bytes=here.host_bytes, device_bytes=here.device_bytes, estimate=here.estimate,
        transient=here.transient, loss_bytes=here.loss_bytes,
    )  # fmt: skip


def test_a_run_with_a_budget_was_planned_for(
    model: Path, rows: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    short = {"max_steps": 1, "eval_size": 0, "sample_prompts": [], "ram_budget": "2GB"}
    with caplog.at_level(logging.WARNING, "lema"):
        train({**settings_of(model, rows, tmp_path / "out"), **short})
    assert not [record for record in caplog.messages if "larger than" in record]


class OneAtATime(Member):
    """A rank that runs while the others wait: models are made by code that is not made for threads."""

    def __init__(self, group: Group, rank: int, turn: threading.Lock) -> None:
        super().__init__(group, rank)
        self.turn = turn

    def broadcast(self, what: str, value: Any) -> Any:
        self.turn.release()
        try:
            return super().broadcast(what, value)
        finally:
            self.turn.acquire()


def test_ranks_get_the_first_ones_plan(
    model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunConfig.from_dict(
        settings_of(model, rows, tmp_path / "out", ram_budget="auto", eval_size=0, sample_prompts=[])
    )
    first = Hardware("first", "cpu", 0, 8 << 30, 1e9, math.inf, {"float32": 1e11})
    machines = {
        "rank 0": first,
        "rank 1": dataclasses.replace(first, name="second", ram_bytes=1 << 30, flops={"float32": 1e9}),
    }

    def here() -> Hardware:
        return machines[threading.current_thread().name]

    monkeypatch.setattr("lema.planning.policy.free_ram", lambda: here().ram_bytes)
    monkeypatch.setattr("lema.planning.probe.profile", lambda *_, **__: here())
    found: dict[str, Any] = {}

    def plans(name: str, ranks: OneAtATime) -> None:
        with ranks.turn:
            try:
                whole = planned_run.plan_run(run, Start(), ranks)
                with lema.LemaModel(run.lema, coordinator=ranks) as made:
                    found[name] = whole, made.memory.plan
            except BaseException as error:
                ranks.fail(error)
                raise

    def together(*names: str) -> None:
        group, turn = Group(len(names)), threading.Lock()
        threads = [
            threading.Thread(target=plans, name=name, args=(name, OneAtATime(group, rank, turn)))
            for rank, name in enumerate(names)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
            assert not thread.is_alive(), "a rank hangs"
        assert group.asked == ["plan", "plan"]

    together("rank 1")
    (alone, _) = found.pop("rank 1")
    together("rank 0", "rank 1")
    (one, one_made), (two, two_made) = found["rank 0"], found["rank 1"]
    assert one.planned.plan == two.planned.plan == one_made == two_made != alone.planned.plan
    assert one.config.ram_budget == two.config.ram_budget == one.planned.plan.ram_budget != alone.config.ram_budget
    assert one.planned.hardware == two.planned.hardware == first


def test_a_plan_that_the_first_rank_does_not_find_ends_the_others(model: Path) -> None:
    config = lema.LemaConfig(str(model), device="cpu", ram_budget="1MB")
    group = Group(2)
    with pytest.raises(ConfigError, match="does not fit"):
        lema.LemaModel(config, coordinator=Member(group, 0))
    with pytest.raises(RankError, match="rank 0 has ended: ConfigError"):
        lema.LemaModel(config, coordinator=Member(group, 1))
