"""Where a number first stopped being finite.

It knows layers' outputs and parameters' gradients; it changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..errors import NonFiniteError
from ..models.causal_lm import CausalLM
from ..streaming.randomness import RandomState
from ..streaming.recompute import StreamedLayer
from .inputs import Batch


def bad_loss(loss: float, step: int, place: str | None) -> NonFiniteError:
    """What is said of a step's loss, and of where it came from."""
    place = place or "the sum over the ranks"
    return NonFiniteError(
        f"the loss is {loss} at step {step}, first seen in the output of {place}; the "
        "optimizer was not stepped. Lower the learning rate, or use bfloat16 or float32 if this is float16"
    )


def bad_gradient(norm: float, step: int, layers: Sequence[StreamedLayer]) -> NonFiniteError:
    """What is said of a step's gradients, which are still there."""
    return NonFiniteError(
        f"the gradient norm is {norm} at step {step}, first seen in the backward at {first_bad_gradient(layers)}; "
        "the optimizer was not stepped. Lower the learning rate or look at the data of this step"
    )


def first_bad_activation(lm: CausalLM, batch: Batch, random_state: RandomState) -> str:
    """The first place of a forward sweep whose output is not finite; runs the sweep again on the same random state."""
    found: list[str] = []

    def watch(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            tensor = output if isinstance(output, torch.Tensor) else output[0]
            if found or bool(torch.isfinite(tensor).all()):
                return
            entered = next((i for i in inputs if isinstance(i, torch.Tensor)), None)
            came_in = entered is not None and not bool(torch.isfinite(entered).all())
            found.append("the embedding" if came_in else name)

        return hook

    handles = [layer.register_forward_hook(watch(f"layer {i}")) for i, layer in enumerate(lm.layers)]
    try:
        with torch.no_grad(), random_state.replayed():
            hidden = lm.hidden_states(**batch.model_inputs)
    finally:
        for handle in handles:
            handle.remove()
    if found:
        return found[0]
    return "the final norm" if not bool(torch.isfinite(hidden).all()) else "the head or the loss"


def first_bad_gradient(layers: Sequence[StreamedLayer]) -> str | None:
    """The layer whose adapter gradient was the first in the backward to be not finite; None if all are finite."""
    for layer in reversed(layers):
        for name, parameter in layer.module.named_parameters():
            if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all()):
                return f"layer {layer.unit}, {name}"
    return None
