"""`lema.LemaModel` and `lema.LemaTrainer`: the engine's model and steps, which can also train over data.

The engine knows a step; that there are runs is known here.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..compat.trainer import OriginalTrainer
from ..config import LemaConfig
from ..coordinator import Coordinator
from ..engine.attach import Attachment, attach_parts
from ..engine.trainer import StepTrainer
from ..model import StreamedModel
from ..models.base import LemaModelAdapter
from ..models.lora import LoRAManager
from ..models.trained import Trained
from ..storage.index import GlobalBinaryIndex
from ..streaming.weight_store import WeightStore

if TYPE_CHECKING:
    from typing_extensions import Self

    from ..data.config import DataConfig
    from ..training.config import TrainingConfig
    from ..training.result import TrainResult


class LemaTrainer(OriginalTrainer, StepTrainer):
    """Trains LoRA adapters of a model whose layers are streamed, by steps or over data.

    Args:
        config: settings.
        model_adapter: the model.
        gbi: its weights.
        lora_manager: its adapters; None: nothing is trained.
        optimizer: over the adapters' parameters; None: AdamW with the config's learning rate.
        memory_manager: where its weights lie; None: laid out here, by a plan for the config.

    Raises:
        ConfigError: an optimizer that holds none of the adapters' parameters.
    """

    def __init__(
        self, config: LemaConfig, model_adapter: LemaModelAdapter, gbi: GlobalBinaryIndex,
        lora_manager: LoRAManager | None = None, optimizer: torch.optim.Optimizer | None = None,
        memory_manager: WeightStore | None = None,
    ) -> None:  # fmt: skip
        super().__init__(config, attach_parts(config, model_adapter, gbi, memory_manager), lora_manager, optimizer)

    @classmethod
    def attached(
        cls, config: LemaConfig, attachment: Attachment, trained: Trained | None,
        optimizer: torch.optim.Optimizer | None, coordinator: Coordinator,
    ) -> Self:  # fmt: skip
        """A trainer from what a `StepTrainer` is made from, where the model is attached to its weights already."""
        trainer = cls.__new__(cls)
        StepTrainer.__init__(trainer, config, attachment, trained, optimizer, coordinator)
        return trainer

    @property
    def lora_manager(self) -> LoRAManager | None:
        """The adapters; None: nothing is trained."""
        owner = self.trainables.owner
        return owner if isinstance(owner, LoRAManager) else None

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


class LemaModel(StreamedModel):
    __doc__ = StreamedModel.__doc__

    def get_trainer(
        self, optimizer: torch.optim.Optimizer | None = None, resume_from: str | os.PathLike[str] | None = None
    ) -> LemaTrainer:
        """A trainer for this model, by steps or over data.

        Args:
            optimizer: over `get_trainable_parameters()`; None: AdamW with the config's learning rate.
            resume_from: a directory written by `save_checkpoint`; training goes on bit for bit.
        """
        return self.trainer_of(LemaTrainer.attached, optimizer, resume_from)
