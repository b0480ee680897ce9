"""What a trainer keeps on disk and takes back: everything that the next step depends on.

It knows a trainer's optimizer, loss scale, window and masters; it knows nothing of how a step is computed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config import LemaConfig
from ..errors import ConfigError
from ..models.causal_lm import CausalLM
from ..models.lora import LoRAManager
from ..storage.index import GlobalBinaryIndex
from .base_config import config_facts
from .checkpoint import load_checkpoint, save_checkpoint
from .host_optimizer import HostMasters
from .loss_scale import LossScale
from .optimizer import keep_state_apart
from .turns import in_turn
from .window import Window


class Resumable:
    """The part of `LemaTrainer` that saves and loads."""

    config: LemaConfig
    gbi: GlobalBinaryIndex
    lora_manager: LoRAManager | None
    lm: CausalLM
    optimizer: torch.optim.Optimizer
    global_step: int
    _masters: HostMasters | None
    _loss_scale: LossScale
    _window: Window
    _state_settled = False
    _base_weights: dict[str, Any] | None = None

    @in_turn
    def save_checkpoint(
        self,
        directory: str | os.PathLike[str],
        trainer_state: Mapping[str, Any] | None = None,
        more: Callable[[Path], None] | None = None,
    ) -> Path:
        """Write adapter, config, optimizer, counters and random state, replacing the directory in one step.

        Args:
            trainer_state: of a training loop, JSON-ready.
            more: writes further files into the directory it is given.
        """
        if self.lora_manager is None:
            raise ConfigError("there is nothing to save: use_lora is off")
        state = {
            "global_step": self.global_step,
            "window": self._window.state(),
            "scaler": self._loss_scale.state_dict(),
            "base_weights": self.base_weights(),
            "base_config": config_facts(self.lm.module),
        }
        save_checkpoint(
            Path(directory), self.config, self.lora_manager, self.optimizer,
            trainer_state or {"global_step": self.global_step}, state, self._holders_of_gradients(), more,
        )  # fmt: skip
        return Path(directory)

    @in_turn
    def load_checkpoint(self, directory: str | os.PathLike[str]) -> dict[str, Any]:
        """Go on from a checkpoint as if never stopped; returns the `trainer_state` it was saved with.

        Raises:
            CheckpointError: incomplete, damaged, or of another base, adapter or optimizer.
        """
        if self.lora_manager is None:
            raise ConfigError("there is nothing to resume: use_lora is off")
        trainer_state = load_checkpoint(
            Path(directory), self.lora_manager, self.optimizer, self.base_weights(), config_facts(self.lm.module),
            self._holders_of_gradients(), torch.device(self.config.device),
        )  # fmt: skip
        state = trainer_state["lema"]
        if self._masters is not None:
            self._masters.adopt()
        self.global_step = state["global_step"]
        self._window.restore(state["window"])
        self._state_settled = False
        self._settle_state()
        if self._loss_scale.enabled and state["scaler"]:
            self._loss_scale.load_state_dict(state["scaler"])
        return trainer_state

    def load_adapter(self, directory: str | os.PathLike[str]) -> None:
        """Take the adapter of a checkpoint and nothing else."""
        if self.lora_manager is None:
            raise ConfigError("there is no adapter: use_lora is off")
        self.lora_manager.load_pretrained(directory)
        if self._masters is not None:
            self._masters.adopt()

    def base_weights(self) -> dict[str, Any]:
        """Fingerprint of the weights trained on; see `GlobalBinaryIndex.fingerprint`."""
        if self._base_weights is None:
            self._base_weights = self.gbi.fingerprint()
        return self._base_weights

    def _holders_of_gradients(self) -> dict[str, nn.Parameter]:
        """By the adapter's names, the parameters whose gradients the optimizer sees."""
        assert self.lora_manager is not None
        named = self.lora_manager.named_parameters()
        if self._masters is None:
            return dict(named)
        self._masters.arrive()
        return {name: master for (name, _), master in zip(named, self._masters.masters, strict=True)}

    def _settle_state(self) -> None:
        if not self._state_settled and self.optimizer.state:
            keep_state_apart(self.optimizer)
            self._state_settled = True
