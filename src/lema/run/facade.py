"""`lema.LemaModel` and `lema.LemaTrainer`: the engine's own, which can also train over data.

The engine knows a step; that there are runs is known here.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..engine import trainer as engine
from ..model import LemaModel as EngineModel

if TYPE_CHECKING:
    from ..data.config import DataConfig
    from ..training.config import TrainingConfig
    from ..training.result import TrainResult


class LemaTrainer(engine.LemaTrainer):
    __doc__ = engine.LemaTrainer.__doc__

    def train(
        self, dataset: Any, eval_dataset: Any = None, *, training: TrainingConfig | None = None,
        data: DataConfig | None = None, tokenizer: Any = None, callbacks: Sequence[Any] = (),
        resume: str | os.PathLike[str] | None = None, plain: bool | None = None,
    ) -> TrainResult:  # fmt: skip
        """Train as `lema train` does, into the config's `output_dir`: schedule, evaluation, samples, checkpoints,
        metrics, exact resume.

        Args:
            dataset: a path (see `DataConfig.train_file`), rows (a list of dicts, a `datasets.Dataset`), what
                `lema.data.load_data` returns, or any iterable of batches that has `steps_per_epoch`, `state_dict()`
                and `load_state_dict()`.
            eval_dataset: in the same forms, where `dataset` has none of its own.
            training: settings of the run; None: the defaults.
            data: settings of the data, for paths and rows; None: the defaults.
            tokenizer: the model's; None: loaded from where the model is.
            callbacks: `TrainerCallback`s, of LEMA or transformers.
            resume: `auto`, `none` or a checkpoint; None: anew, in a folder without checkpoints.
            plain: True: lines instead of a panel; None: a panel on a terminal.
        """
        # data and training come with it, which steps alone need none of
        from ..data.config import DataConfig
        from ..training.config import TrainingConfig
        from ..training.panel import make_view
        from ..training.run_config import RunConfig
        from .prepared import begun, prepare

        run = RunConfig(self.config, data or DataConfig(), training or TrainingConfig())
        with begun(run, resume, self.coordinator) as (folder, start):
            prepared = prepare(run, start, self.lm, dataset, eval_dataset, tokenizer)
            return prepared.train_by(self, folder, make_view(plain), callbacks)


class LemaModel(EngineModel):
    __doc__ = EngineModel.__doc__

    def get_trainer(
        self, optimizer: torch.optim.Optimizer | None = None, resume_from: str | os.PathLike[str] | None = None
    ) -> LemaTrainer:
        """A trainer for this model, by steps or over data.

        Args:
            optimizer: over `get_trainable_parameters()`; None: AdamW with the config's learning rate.
            resume_from: a directory written by `save_checkpoint`; training goes on bit for bit.
        """
        return self.trainer_of(LemaTrainer, optimizer, resume_from)
