"""`StreamedModel`: a configuration in, a model that can be trained, asked and saved out.

It puts the rooms together; it computes nothing itself.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from .config import LemaConfig
from .coordinator import Coordinator
from .engine.assembly import assemble_lora, compute_dtype
from .engine.attach import Attachment
from .engine.checkpoint import check_base_of_adapter
from .engine.device_memory import explained
from .engine.generation import generate
from .engine.opening import open_streamed
from .engine.trainer import StepTrainer
from .errors import DeviceError
from .models.base import LemaModelAdapter
from .models.locate import adapter_path
from .models.lora import ADAPTER_CONFIG, LoRAManager
from .models.trained import Trained
from .planning.plan import MemoryPlan

if TYPE_CHECKING:
    from typing_extensions import Self

Kind = TypeVar("Kind", bound=StepTrainer)
TrainerParts = Callable[[LemaConfig, Attachment, Trained | None, torch.optim.Optimizer | None, Coordinator], Kind]


class StreamedModel:
    """A language model whose frozen layers stream from disk, with LoRA adapters that stay.

    Args:
        config: settings.
        adapter: the model, where it was made already, or for weights without a config.json beside them.
        plan: what to keep where, made for this configuration and these weights; None: made here.
        coordinator: the run's processes, which get the first one's plan; None: there is this one.

    Raises:
        WeightsNotFoundError, MissingTensorError, ShapeMismatchError: the files do not hold the model.
        UnsupportedError: a family LEMA cannot run rightly.
        WeightsError: `quantize` finds no room, or weights that are damaged; or see `prepare`.
        DeviceError: the device is absent or lacks the type; `DeviceMemoryError`: it has no room.
    """

    def __init__(
        self, config: LemaConfig, adapter: LemaModelAdapter | None = None, *, plan: MemoryPlan | None = None,
        coordinator: Coordinator | None = None,
    ) -> None:  # fmt: skip
        self.coordinator = coordinator or Coordinator()
        if config.quantize is not None:
            from .prepare.cached import quantised  # few runs need what it imports

            compute_dtype(config)
            config = quantised(config)
        self.config = config
        self.adapter, self.gbi, self.attachment = open_streamed(config, adapter, plan, coordinator=self.coordinator)
        """The attachment: the model and its weights, until `close`."""
        self.memory = self.attachment.memory
        self.lora_manager: LoRAManager | None = assemble_lora(config, self.adapter)
        self._has_adapter = False

    def initialize_lora(self) -> None:
        """Make the adapters' parameters; further calls do nothing."""
        if not self._has_adapter:
            with explained(self.config.device, self.memory.plan):
                self._install()
            self._has_adapter = True

    @property
    def _trained(self) -> Trained:
        return self.lora_manager or Trained()

    def _install(self) -> None:
        if self.lora_manager is not None:
            self.lora_manager.attach(self.adapter)
            if self.config.adapter_name_or_path is not None:
                folder = adapter_path(self.config.adapter_name_or_path)
                check_base_of_adapter(folder, self.gbi.fingerprint())
                self.lora_manager.load_pretrained(folder)
            peft_config = self.lora_manager.peft_model.peft_config["default"]
            peft_config.base_model_name_or_path = self.config.model_name_or_path
        self.attachment.give(self._trained).eval()

    @property
    def hf_model(self) -> nn.Module:
        """PEFT's model around transformers' own (or that one, without LoRA): call it, and `loss.backward()`."""
        self.initialize_lora()
        return self._trained.attach(self.adapter)

    def get_trainable_parameters(self) -> list[nn.Parameter]:
        """The LoRA parameters, float32; empty without LoRA."""
        self.initialize_lora()
        return self._trained.get_trainable_parameters()

    def get_trainer(
        self, optimizer: torch.optim.Optimizer | None = None, resume_from: str | os.PathLike[str] | None = None
    ) -> StepTrainer:
        """A trainer for this model.

        Args:
            optimizer: over `get_trainable_parameters()`; None: AdamW with the config's learning rate.
            resume_from: a directory written by `save_checkpoint`; training goes on bit for bit.
        """
        return self.trainer_of(StepTrainer, optimizer, resume_from)

    def trainer_of(
        self, make: TrainerParts[Kind], optimizer: torch.optim.Optimizer | None = None,
        resume_from: str | os.PathLike[str] | None = None,
    ) -> Kind:  # fmt: skip
        """As `get_trainer`, made by `make` from what a `StepTrainer` is made from."""
        self.initialize_lora()
        with explained(self.config.device, self.memory.plan):
            trainer = make(self.config, self.attachment, self.lora_manager, optimizer, self.coordinator)
        if resume_from is not None:
            trainer.load_checkpoint(resume_from)
        return trainer

    def generate(self, inputs: torch.Tensor | Mapping[str, Any], **kwargs: Any) -> Any:
        """transformers' `generate` with the adapter active and a key-value cache, layers streamed for each token.

        Args:
            inputs: ids `[batch, seq]`, or a mapping with `input_ids` and `attention_mask`.
            **kwargs: what transformers' `generate` takes.

        Returns:
            Ids `[batch, seq + new]`, or what `return_dict_in_generate` asks for.
        """
        self.initialize_lora()
        return generate(self.adapter.causal_lm(), self.hf_model, self.memory, inputs, **kwargs)

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write `lema_config.json` and PEFT's `adapter_config.json` and `adapter_model.safetensors`."""
        folder = Path(directory)
        self.config.save_pretrained(folder)
        self.initialize_lora()
        self._trained.save_pretrained(folder)

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str], **overrides: Any) -> Self:
        """A model with the settings and adapter of a directory written by `save_pretrained` or a checkpoint.

        Raises:
            FileNotFoundError: no `lema_config.json` there.
        """
        config = LemaConfig.from_pretrained(directory, **overrides)
        if config.adapter_name_or_path is not None:  # where it began; what it came to is here
            config = config.replace(adapter_name_or_path=os.fspath(directory))
        model = cls(config)
        if model.lora_manager is not None and (Path(directory) / ADAPTER_CONFIG).is_file():
            model.initialize_lora()
            model.lora_manager.load_pretrained(directory)
        return model

    def to(self, device: str | torch.device) -> Self:
        """This model, if it computes on that device; another one is a `DeviceError` that says how to get there."""
        if torch.device(device).type != torch.device(self.config.device).type:
            raise DeviceError(
                f"this model's memory was laid out for {self.config.device!r}; make a new LemaModel with "
                f"device={str(device)!r}"
            )
        return self

    def close(self) -> None:
        """End the reading threads and give the files back."""
        self.attachment.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
