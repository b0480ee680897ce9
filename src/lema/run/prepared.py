"""A run from its settings: data, plan, model, trainer and folder, each made once and held against the others.

It knows what is to be there before the first step; it knows nothing of what happens in a run.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..config import CONFIG_NAME, LemaConfig
from ..coordinator import Coordinator
from ..data import Data
from ..data.load import check_all_rows
from ..engine.packing import take_over_packing
from ..engine.trainer import LemaTrainer
from ..model import LemaModel
from ..models.causal_lm import CausalLM
from ..models.transformers_adapter import TransformersAdapter
from ..planning.plan import Estimate
from ..prepare.cached import quantised
from ..prepare.job import Progress
from ..training.checkpoints import CheckpointFolder
from ..training.panel import View
from ..training.result import TrainResult
from ..training.run import RunData, check_start
from ..training.run_config import RunConfig
from ..training.start import Start, choose_start
from .planned import Planned, for_windows, make
from .training import has_batches, load_tokenizer, open_data, train_run

_BUDGETS = ("ram_budget", "vram_budget")


@contextlib.contextmanager
def begun(
    run: RunConfig, resume: str | os.PathLike[str] | None, ranks: Coordinator, look: bool = False
) -> Iterator[tuple[CheckpointFolder, Start]]:
    """The run's folder and where the run begins, which the first rank finds out for all.

    Args:
        resume: see `choose_start`.
        look: change nothing: see `CheckpointFolder.look`.
    """
    folder, start = CheckpointFolder(run.lema.output_dir), None
    try:
        if ranks.is_writer:
            cleared = folder.look() if look else folder.open()
            start = choose_start(folder, resume)
            start = replace(start, messages=[*cleared, *start.messages])
        start = ranks.broadcast("start", start)
        assert start is not None  # the first rank's
        yield folder, start
    except BaseException as error:
        ranks.fail(error)
        raise
    finally:
        folder.close()


@dataclass(frozen=True)
class Prepared:
    """Settings, start, tokenizer and rows that go together; nothing has been changed for it."""

    run: RunConfig
    start: Start
    tokenizer: Any
    data: Data | RunData

    def train_by(
        self, trainer: LemaTrainer, folder: CheckpointFolder, view: View, callbacks: Sequence[Any] = ()
    ) -> TrainResult:
        """Train in an opened folder."""
        return train_run(trainer, self.run, self.data, self.tokenizer, folder, self.start, view, callbacks)


def prepare(
    run: RunConfig, start: Start, lm: CausalLM, dataset: Any = None, eval_dataset: Any = None, tokenizer: Any = None
) -> Prepared:
    """Read and count the rows of a run.

    Args:
        lm: the run's model, whose weights need not be there.
        dataset, eval_dataset: as `open_data` takes them; None: the configuration's files.
        tokenizer: None: the dataset's, or loaded from where the model is.

    Raises:
        LemaError: settings, data, model or the checkpoint to start from do not go together.
    """
    if tokenizer is None and isinstance(dataset, Data):
        tokenizer = dataset.renderer.tokenizer
    if tokenizer is None and (not has_batches(dataset) or run.training.sample_prompts):
        tokenizer = load_tokenizer(run.lema.model_name_or_path)
    data = open_data(run, tokenizer, dataset, eval_dataset, lm)
    check_start(RunData(data.train, data.eval), run, start)
    return Prepared(run, start, tokenizer, data)


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

    def model(self) -> LemaModel:
        """The run's model, by its plan, and of the skeleton that was planned for unless it is in use."""
        adapter = self.planned.adapter
        unused = isinstance(adapter, TransformersAdapter) and not adapter.in_use
        model = LemaModel(self.config, adapter if unused else None, plan=self.planned.plan)
        take_over_packing(model.adapter.causal_lm(), adapter.causal_lm())
        return model

    def check(self) -> None:
        """Refuse what the first step, or any later one, would be refused for."""
        check_all_rows(self.data)
        with self.model() as model:
            model.get_trainer()

    def train(self, folder: CheckpointFolder, view: View, ranks: Coordinator) -> TrainResult:
        """Train in an opened folder, as one of these."""
        with self.model() as model:
            return self.prepared.train_by(model.trainer_of(LemaTrainer, coordinator=ranks), folder, view)


def plan_run(run: RunConfig, start: Start, progress: Progress | None = None) -> PlannedRun:
    """Plan, read and count what a run of files needs; raises what `prepare` does, and where nothing fits.

    Args:
        progress: told of weights that are quantised for it.
    """
    config = quantised(_kept(run.resolved().lema, run, start), progress)
    tokenizer = load_tokenizer(run.lema.model_name_or_path)
    planned = make(for_windows(config).to_dict(), to_run=True)
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
