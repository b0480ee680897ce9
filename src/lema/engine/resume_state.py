"""What a trainer keeps on disk and takes back: everything that the next step depends on.

It knows whose state there is; it knows nothing of how a step is computed or of files.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..config import LemaConfig
from ..models.causal_lm import CausalLM
from ..storage.index import GlobalBinaryIndex
from .base_config import config_facts
from .checkpoint import load_checkpoint, save_checkpoint
from .trainables import Trainables
from .window import Window


class ResumeState:
    """A trainer's state between steps, as one thing to be saved and loaded."""

    def __init__(
        self, config: LemaConfig, lm: CausalLM, gbi: GlobalBinaryIndex, trainables: Trainables, window: Window
    ) -> None:
        self._config, self._lm, self._gbi = config, lm, gbi
        self._trainables, self._window = trainables, window

    def save(
        self, directory: str | os.PathLike[str], optimizer_steps: int, trainer_state: Mapping[str, Any],
        more: Callable[[Path], None] | None = None,
    ) -> Path:  # fmt: skip
        """Write adapter, config, optimizer, counters and random state, replacing the directory in one step."""
        self._trainables.require("there is nothing to save")
        state = {
            "optimizer_steps": optimizer_steps,
            "window": self._window.state(),
            "scaler": self._trainables.loss_scale.state_dict(),
            "base_weights": self._base_weights,
            "base_config": config_facts(self._lm.module),
        }
        save_checkpoint(Path(directory), self._config, self._trainables, trainer_state, state, more)
        return Path(directory)

    def load(self, directory: str | os.PathLike[str]) -> tuple[dict[str, Any], int]:
        """Put a saved state back; the `trainer_state` it was saved with, and the optimizer steps."""
        self._trainables.require("there is nothing to resume")
        base = self._base_weights, config_facts(self._lm.module)
        trainer_state = load_checkpoint(Path(directory), self._trainables, *base, self._config.device)
        state = trainer_state["lema"]
        self._trainables.loaded(state["scaler"])
        self._window.restore(state["window"])
        steps: int = state["optimizer_steps" if "optimizer_steps" in state else "global_step"]  # of older checkpoints
        return trainer_state, steps

    @functools.cached_property
    def _base_weights(self) -> dict[str, Any]:
        """Fingerprint of the weights trained on; see `GlobalBinaryIndex.fingerprint`."""
        return self._gbi.fingerprint()
