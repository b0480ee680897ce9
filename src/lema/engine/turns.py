"""What a step asks of its surroundings: that no other thread is in one, that gradients can be made, or are not.

It knows threads' and autograd's states; it knows nothing of what a step does.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import nn

from ..errors import UnsupportedError

_Method = TypeVar("_Method", bound=Callable[..., Any])


def in_turn(method: _Method) -> _Method:
    """A method of an object with `memory`, run by one thread at a time; in another it is a `StreamingError`."""

    @functools.wraps(method)
    def taken(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self.memory.turn.taken(method.__name__):
            return method(self, *args, **kwargs)

    return taken  # type: ignore[return-value]


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside the block a model has no dropout and makes no graph; its mode is as before afterwards."""
    training = model.training
    with torch.no_grad():
        model.eval()
        try:
            yield
        finally:
            model.train(training)


def check_gradients_on(parameters: Iterable[torch.Tensor]) -> None:
    """Raise `UnsupportedError` where autograd is off, or the parameters were made where it was."""
    for off, name in ((torch.is_inference_mode_enabled(), "inference_mode"), (not torch.is_grad_enabled(), "no_grad")):
        if off:
            raise UnsupportedError(f"nothing can be learned under torch.{name}: call train_step outside of it")
    if any(parameter.is_inference() for parameter in parameters):
        raise UnsupportedError(
            "the adapters were made under torch.inference_mode and can have no gradients: make the model outside of it"
        )
