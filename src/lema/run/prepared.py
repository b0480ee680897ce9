"""A run from its settings: data, plan, model, trainer and folder, each made once and held against the others.

It knows what is to be there before the first step; it knows nothing of what happens in a run.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..coordinator import Coordinator
from ..data import Data
from ..engine.trainer import StepTrainer
from ..models.causal_lm import CausalLM
from ..training.checkpoints import CheckpointFolder
from ..training.panel import View
from ..training.result import TrainResult
from ..training.run import RunData, check_start
from ..training.run_config import RunConfig
from ..training.start import Start, choose_start
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
        self, trainer: StepTrainer, folder: CheckpointFolder, view: View, callbacks: Sequence[Any] = ()
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
