"""A run of files: read and counted, with the plan that its model is made by and the cost that is told beforehand.

It knows what `lema train` does before the first step; it knows nothing of what happens in a run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..config import CONFIG_NAME, LemaConfig
from ..coordinator import Coordinator
from ..data import Data
from ..data.load import check_all_rows
from ..engine.packing import take_over_packing
from ..models.transformers_adapter import TransformersAdapter
from ..planning.plan import Estimate
from ..prepare.cached import quantised
from ..prepare.job import Progress
from ..training.checkpoints import CheckpointFolder
from ..training.panel import View
from ..training.result import TrainResult
from ..training.run_config import RunConfig
from ..training.start import Start
from .facade import LemaModel
from .planned import Planned, make
from .prepared import Prepared, prepare
from .training import load_tokenizer

_BUDGETS = ("ram_budget", "vram_budget")


@dataclass(frozen=True)
class PlannedRun:
    """A prepared run that nothing refuses any more but its weights, and the plan its model is made by."""

    prepared: Prepared
    data: Data
    planned: Planned
    config: LemaConfig
    """The engine's settings, with what automatic budgets came to."""
    usual_step: tuple[int, Estimate | None]
    """Tokens of a long row of a usual step, and what such a step takes; memory is planned for the longest row that is
    allowed."""

    def model(self, ranks: Coordinator | None = None) -> LemaModel:
        """The run's model, by its plan, and of the skeleton that was planned for unless it is in use."""
        adapter = self.planned.adapter
        unused = isinstance(adapter, TransformersAdapter) and not adapter.in_use
        model = LemaModel(self.config, adapter if unused else None, plan=self.planned.plan, coordinator=ranks)
        take_over_packing(model.adapter.causal_lm(), adapter.causal_lm())
        return model

    def check(self) -> None:
        """Refuse what the first step, or any later one, would be refused for."""
        check_all_rows(self.data)
        with self.model() as model:
            model.get_trainer()

    def train(self, folder: CheckpointFolder, view: View, ranks: Coordinator) -> TrainResult:
        """Train in an opened folder, as one of these."""
        with self.model(ranks) as model:
            return self.prepared.train_by(model.get_trainer(), folder, view)


def plan_run(run: RunConfig, start: Start, ranks: Coordinator, progress: Progress | None = None) -> PlannedRun:
    """Plan, read and count what a run of files needs; raises what `prepare` does, and where nothing fits.

    Args:
        ranks: the run's processes, which get one plan.
        progress: told of weights that are quantised for it.
    """
    config = quantised(_kept(run.resolved().lema, run, start), progress)
    tokenizer = load_tokenizer(run.lema.model_name_or_path)
    planned = make(config, to_run=True, ranks=ranks)
    prepared = prepare(run, start, planned.adapter.causal_lm(), tokenizer=tokenizer)
    data = prepared.data
    assert isinstance(data, Data)  # of files
    usual = _usual_step(run, data, planned)
    sized = config.replace(ram_budget=planned.ram_budget, vram_budget=planned.vram_budget)
    return PlannedRun(prepared, data, replace(planned, outlook=None), sized, usual)


def _usual_step(run: RunConfig, data: Data, planned: Planned) -> tuple[int, Estimate | None]:
    longest = run.lema.max_seq_length
    seen = data.summary["train"]["sample"]["length_percentiles"].get("95", longest)
    length = longest if run.data.packing else min(seen, longest)
    if length == longest or planned.plan.estimate is None or planned.outlook is None:
        return length, planned.plan.estimate
    return length, planned.outlook.step(planned.plan, length)


def _kept(config: LemaConfig, run: RunConfig, start: Start) -> LemaConfig:
    """The settings, with those of the run that is resumed that say more than what is given now.

    The sizes that automatic budgets came to: free memory is another one now, and another plan would cut sums elsewhere
    and change their last bits. And where an adapter was trained further, its form is that in the checkpoint.
    """
    if start.checkpoint is None:
        return config
    before: Mapping[str, Any] = start.state["lema"]["run"]["settings"]
    saved = json.loads((start.checkpoint / CONFIG_NAME).read_text(encoding="utf-8"))
    kept = {name: saved.get(name) for name in _BUDGETS if before.get(name) == getattr(run.lema, name)}
    if saved.get("adapter_name_or_path") is not None:
        kept["adapter_name_or_path"] = str(start.checkpoint)
    return config.replace(**kept)
