"""Attention masks whose padding is known on the host, so that building them waits for nothing.

It knows transformers' registry of mask functions; it knows nothing of batches or layers.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

_padded: ContextVar[bool | None] = ContextVar("padded", default=None)
"""Whether the mask of the forward under way has padding; None: nobody has said."""
_changing = threading.Lock()


@contextlib.contextmanager
def padding_known(host_mask: torch.Tensor | None) -> Iterator[None]:
    """Inside the block this thread's sdpa masks of a device are made without reading the device.

    transformers reads the padding mask to find out whether it can be left out. Where its values are on the host as well
    the same is decided there. The masks are the same.

    Args:
        host_mask: the values `[batch, seq]` of the mask that the model is given; None: nothing is changed.
    """
    if host_mask is None:
        yield
        return
    _listen()
    token = _padded.set(not bool(host_mask.all()))
    try:
        yield
    finally:
        _padded.reset(token)


def _listen() -> None:
    """Let the registered mask function, whosever it is, hear of what is known; once."""
    with _changing:
        registered = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
        if not isinstance(registered, _Told):
            ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] = _Told(registered)


class _Told:
    """A mask function that need not look into the padding mask where that is known."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        functools.update_wrapper(self, function)

    def __call__(self, *args: Any, attention_mask: Any = None, allow_is_causal_skip: bool = True, **kwargs: Any) -> Any:
        if (padded := _padded.get()) is not None:
            attention_mask = attention_mask if padded else None
            allow_is_causal_skip = allow_is_causal_skip and not padded
        return self.function(*args, attention_mask=attention_mask, allow_is_causal_skip=allow_is_causal_skip, **kwargs)
