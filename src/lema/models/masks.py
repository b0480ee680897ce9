"""Attention masks whose padding is known on the host, so that building them waits for nothing.

It knows transformers' registry of mask functions; it knows nothing of batches or layers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS


@contextlib.contextmanager
def padding_known(host_mask: torch.Tensor | None) -> Iterator[None]:
    """Inside the block sdpa's masks of a device are made without reading the device.

    transformers reads the padding mask to find out whether it can be left out. Where its values are on the host as well
    the same is decided there. The masks are the same.

    Args:
        host_mask: the values `[batch, seq]` of the mask that the model is given; None: nothing is changed.
    """
    if host_mask is None:
        yield
        return
    padded = not bool(host_mask.all())
    registered = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]

    def sdpa_mask(*args: Any, attention_mask: Any = None, allow_is_causal_skip: bool = True, **kwargs: Any) -> Any:
        return registered(
            *args,
            attention_mask=attention_mask if padded else None,
            allow_is_causal_skip=allow_is_causal_skip and not padded,
            **kwargs,
        )

    ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] = sdpa_mask
    try:
        yield
    finally:
        del ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
