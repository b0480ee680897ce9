"""A run has one plan and one skeleton: what is said of its cost is said of the plan its model is made by."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lema import model as engine_model
from lema.cli.app import app
from lema.machine.memory import format_bytes
from lema.models import transformers_adapter
from lema.planning.plan import MemoryPlan
from lema.run import planned, prepared
from training_runs import settings_of, write_rows

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
    models: list[engine_model.LemaModel] = []
    skeletons: list[Any] = []
    plan_for, build = planned.plan_for, transformers_adapter.build_skeleton

    def planning(*args: Any) -> MemoryPlan:
        plans.append(plan_for(*args))
        return plans[-1]

    def building(*args: Any) -> Any:
        skeletons.append(args)
        return build(*args)

    class Watched(engine_model.LemaModel):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            models.append(self)

    for room in (planned, engine_model):
        monkeypatch.setattr(room, "plan_for", planning)
    monkeypatch.setattr(prepared, "LemaModel", Watched)
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
