"""A run from its settings: data, plan, model, trainer and folder, each made once and held against the others.

It knows what is to be there before the first step; it knows nothing of what happens in a run.
"""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy
import torch

from ..coordinator import Coordinator
from ..data import Data
from ..engine.generation import end_tokens
from ..engine.trainer import StepTrainer
from ..errors import ConfigError
from ..models.causal_lm import CausalLM
from ..training.checkpoints import CheckpointFolder
from ..training.panel import View
from ..training.result import TrainResult
from ..training.run import RunData, check_start, run_training
from ..training.run_config import RunConfig
from ..training.sampling import Sampler
from ..training.schedule import Schedule
from ..training.start import Start, choose_start
from .training import has_batches, limits_of, load_tokenizer, open_data


@contextlib.contextmanager
def begun(
    run: RunConfig, resume: str | os.PathLike[str] | None, ranks: Coordinator, look: bool = False
) -> Iterator[tuple[CheckpointFolder, Start]]:
    """The run's folder and where the run begins, which the first rank finds out for all.

    Args:
        resume: see `choose_start`.
        look: change nothing: see `CheckpointFolder.look`.
    """
    folder = CheckpointFolder(run.lema.output_dir)

    def find() -> Start:
        cleared = folder.look() if look else folder.open()
        start = choose_start(folder, resume)
        return replace(start, messages=[*cleared, *start.messages])

    try:
        yield folder, ranks.found_by_first("start", find)
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
    schedule: Schedule
    """From the first step to the last, whatever the start."""
    tokenizer: Any
    data: Data | RunData

    def train_by(
        self, trainer: StepTrainer, folder: CheckpointFolder, view: View, callbacks: Sequence[Any] = ()
    ) -> TrainResult:
        """Train in an opened folder; `ConfigError` if there is nothing to train."""
        trainer.trainables.require("nothing can be trained")
        run, data, tokenizer = self.run, self.data, self.tokenizer
        sampler = self._sampler(trainer) if run.training.sample_prompts else None
        if isinstance(data, Data):  # which may have been made elsewhere
            limits_of(trainer.lm).check_length(run.lema.max_seq_length)
        if self.start.checkpoint is None:
            _seed(run.lema.seed)
        return run_training(
            trainer, RunData(data.train, data.eval, data.summary), run, folder, self.start, self.schedule, view=view,
            sampler=sampler, write_tokenizer=None if tokenizer is None else tokenizer.save_pretrained,
            callbacks=callbacks, always={"processing_class": tokenizer, "tokenizer": tokenizer},
        )  # fmt: skip

    def _sampler(self, trainer: StepTrainer) -> Sampler:
        training, data, tokenizer = self.run.training, self.data, self.tokenizer
        ends = end_tokens(trainer.lm.module)
        ask: Callable[[str], Sequence[int]]
        if isinstance(data, Data):
            ask, ends = data.renderer.ask, ends | {*data.renderer.end_tokens}
        elif tokenizer is None:
            raise ConfigError("sample_prompts need a tokenizer: give train(..., tokenizer=...)")
        else:
            ask = lambda text: list(tokenizer(text)["input_ids"])  # noqa: E731
        return Sampler(tokenizer, ask, training.sample_prompts, training.sample_max_new_tokens, sorted(ends))


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
    schedule = check_start(RunData(data.train, data.eval), run, start)
    return Prepared(run, start, schedule, tokenizer, data)


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
