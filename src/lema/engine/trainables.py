"""What is trained: parameters, their gradients, where an optimizer works on them, its state, and their files.

It knows whose parameters they are by `Trained` alone, LoRA being one; it knows nothing of layers or of losses.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn

from ..config import LemaConfig
from ..coordinator import Coordinator
from ..errors import ConfigError
from ..models.trained import Trained
from ..streaming.weight_store import WeightStore
from .host_optimizer import HostMasters
from .loss_scale import LossScale
from .optimizer import check_optimizer, default_optimizer, keep_state_apart, scale_learning_rate, set_adamw
from .update import GradientBuffer, drop_zeros, step_optimizer
from .window import Window


class Trainables:
    """A model's trained parameters between backward and the next step.

    Args:
        owner: whose parameters they are, attached to the model.
        optimizer: over some of them; None: AdamW with the config's learning rate.
        memory: its plan says whether the optimizer works in host memory.

    Raises:
        ConfigError: an optimizer that holds none of them.
    """

    def __init__(
        self, owner: Trained, optimizer: torch.optim.Optimizer | None, config: LemaConfig, memory: WeightStore
    ) -> None:
        self.owner = owner
        parameters = self.parameters
        self._own_learning_rate = None if optimizer is not None else config.learning_rate
        self.optimizer = optimizer or default_optimizer(parameters, config.learning_rate)
        check_optimizer(self.optimizer, parameters, owner.kind)
        self.loss_scale = LossScale(enabled=config.dtype == "float16" and bool(parameters))
        self.updates = 0
        """Times parameters have begun to change."""
        hosted = bool(parameters) and memory.plan.optimizer == "host"
        self.masters = HostMasters(parameters, self.optimizer, memory.backend) if hosted else None
        self._buffer = GradientBuffer(torch.device(config.device))
        self._state_placed = False

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The model's own, in its order."""
        return self.owner.get_trainable_parameters()

    def require(self, problem: str, advice: str = "") -> list[nn.Parameter]:
        """The parameters; a `ConfigError` where there are none."""
        if parameters := self.parameters:
            return parameters
        raise ConfigError(f"{problem}: {self.owner.why_none}{advice}")

    def held(self) -> list[nn.Parameter]:
        """The parameters that the optimizer sees, with the gradients so far: fp32 masters, or the model's own."""
        if self.masters is None:
            return self.parameters
        self.masters.synchronize()
        return self.masters.masters

    def held_by_name(self) -> dict[str, nn.Parameter]:
        """Those under the owner's names."""
        names = (name for name, _ in self.owner.named_parameters())
        return dict(zip(names, self.held(), strict=True))

    # -- gradients -------------------------------------------------------------------------------

    def place_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Let gradients of a new window gather in one buffer of their own, off the heap that layers use."""
        if self.masters is None and all(p.grad is None for p in parameters):
            self._buffer.place(parameters)

    def drop_gradients(self) -> None:
        """Forget what has gathered."""
        self.optimizer.zero_grad(set_to_none=True)
        if self.masters is not None:
            self.masters.drop_gradients()

    # -- the optimizer ---------------------------------------------------------------------------

    def update(self, window: Window, max_grad_norm: float | None, coordinator: Coordinator) -> float:
        """Add the ranks' gradients up, normalize, clip and step; returns their norm.

        Where that is not finite nothing was stepped; without a loss scale, which explains it, the model's parameters
        have their gradients to be looked at.
        """
        held = self.held()
        unreached = self._buffer.unreached(held)
        with self._counted():
            _add_gradients(held, coordinator)
        window.normalize_gradients(held)
        drop_zeros(unreached)
        norm = step_optimizer(self.optimizer, self.loss_scale, held, max_grad_norm, coordinator)
        self.place_state()
        if not math.isfinite(norm) and not self.loss_scale.enabled:
            self.updates -= 1
            if self.masters is not None:
                self.masters.hand_back_gradients()
        return norm

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        """An update counts from when this rank waits for the others' gradients: once it has them it is made, and no
        rank can go back any more. Where one leaves before, there is none."""
        self.updates += 1
        try:
            yield
        except BaseException:
            self.updates -= 1
            raise

    def set_optimizer(self, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
        """Settings of the optimizer that was made here; one that was given keeps its own."""
        if self._own_learning_rate is not None:
            set_adamw(self.optimizer, self._own_learning_rate, betas, eps, weight_decay)

    def set_learning_rate(self, factor: float) -> float:
        """Set every group's learning rate to its first one times a factor; returns the first group's."""
        return scale_learning_rate(self.optimizer, factor)

    def place_state(self) -> None:
        """Move the optimizer's state off the heap, once there is any."""
        if not self._state_placed and self.optimizer.state:
            keep_state_apart(self.optimizer)
            self._state_placed = True

    # -- files -----------------------------------------------------------------------------------

    def load_parameters(self, directory: str | os.PathLike[str]) -> None:
        """Take the values that a directory holds, and nothing else."""
        self.require("there is nothing to load values into")
        self.owner.load_pretrained(directory)
        if self.masters is not None:
            self.masters.copy_from_model()

    def loaded(self, scaler: Mapping[str, float]) -> None:
        """Parameters and the optimizer's state have been loaded: bring what follows from them up to date."""
        if self.masters is not None:
            self.masters.copy_from_model()
        self._state_placed = False
        self.place_state()
        if self.loss_scale.enabled and scaler:
            self.loss_scale.load_state_dict(dict(scaler))


def _add_gradients(parameters: Sequence[nn.Parameter], coordinator: Coordinator) -> None:
    """Replace gradients by their sums over the ranks; where only some ranks have one, the others add zeros."""
    there = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int64)
    coordinator.add("ranks with a gradient", [there])
    for parameter, ranks in zip(parameters, there.tolist(), strict=True):
        if ranks and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    coordinator.add("gradients", [p.grad for p in parameters if p.grad is not None])
