"""A run from its settings: data, plan, model, trainer and folder, each made once and held against the others.

It knows what is to be there before the first step; it knows nothing of what happens in a run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..config import LemaConfig
from ..data import Data
from ..data.load import check_all_rows
from ..engine.assembly import wants_plan
from ..model import LemaModel
from ..planning.plan import Estimate
from ..prepare.cached import quantised
from ..prepare.job import Progress
from ..training.checkpoints import CheckpointFolder
from ..training.panel import View
from ..training.result import TrainResult
from ..training.run import RunData, check_start
from ..training.run_config import RunConfig
from ..training.start import Start
from .planned import Planned, make
from .training import load_rows, load_tokenizer, train_run

_BUDGETS = ("ram_budget", "vram_budget")


@dataclass(frozen=True)
class Prepared:
    """A run that nothing refuses any more but its weights; nothing has been changed for it."""

    run: RunConfig
    start: Start
    tokenizer: Any
    planned: Planned
    data: Data
    usual_step: tuple[int, Estimate | None]
    """Tokens of a long row of a usual step, and what such a step takes; memory is planned for the longest row that is
    allowed."""

    def model(self) -> LemaModel:
        """The run's model, by its plan, unless that was made of a configuration alone, the weights being elsewhere."""
        config = self.planned.sized
        handed = self.planned.weights and wants_plan(config)
        return LemaModel(config, plan=self.planned.plan if handed else None)

    def check(self) -> None:
        """Refuse what the first step, or any later one, would be refused for."""
        check_all_rows(self.data)
        with self.model() as model:
            model.get_trainer()

    def train(self, folder: CheckpointFolder, view: View, messages: Sequence[str] = ()) -> TrainResult:
        """Train in an opened folder.

        Args:
            messages: told first, at the start.
        """
        start = replace(self.start, messages=[*messages, *self.start.messages])
        with self.model() as model:
            return train_run(model.get_trainer(), self.run, self.data, self.tokenizer, folder, start, view)


def prepare(run: RunConfig, start: Start, progress: Progress | None = None) -> Prepared:
    """Read, count and plan what a run needs.

    Args:
        progress: told of weights that are quantised for it.

    Raises:
        LemaError: settings, data, model, budgets or the checkpoint to start from do not go together.
    """
    config = _kept(run.resolved().engine_config().to_dict(), run, start)
    tokenizer = load_tokenizer(run.lema.model_name_or_path)
    config = quantised(LemaConfig.from_dict(config), progress).to_dict()
    planned = make(config)
    data = load_rows(run, tokenizer, lm=planned.adapter.causal_lm())
    check_start(RunData(data.train, data.eval), run, start)
    usual = _usual_step(run, data, planned)
    return Prepared(run, start, tokenizer, replace(planned, outlook=None), data, usual)


def _usual_step(run: RunConfig, data: Data, planned: Planned) -> tuple[int, Estimate | None]:
    longest = run.lema.max_seq_length
    seen = data.summary["train"]["sample"]["length_percentiles"].get("95", longest)
    length = longest if run.data.packing else min(seen, longest)
    if length == longest or planned.outlook is None:
        return length, planned.plan.estimate
    return length, planned.outlook.step(planned.plan, length)


def _kept(config: dict[str, Any], run: RunConfig, start: Start) -> dict[str, Any]:
    """The settings, with those of the run that is resumed that say more than what is given now.

    The sizes that automatic budgets came to: free memory is another one now, and another plan would cut sums elsewhere
    and change their last bits. And where an adapter was trained further, its form is that in the checkpoint.
    """
    if start.checkpoint is None:
        return config
    before: Mapping[str, Any] = start.state["lema"]["run"]["settings"]
    saved = json.loads((start.checkpoint / "lema_config.json").read_text(encoding="utf-8"))
    kept = {name: saved.get(name) for name in _BUDGETS if before.get(name) == getattr(run.lema, name)}
    if saved.get("adapter_name_or_path") is not None:
        kept["adapter_name_or_path"] = str(start.checkpoint)
    return {**config, **kept}
