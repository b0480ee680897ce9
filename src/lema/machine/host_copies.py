"""Small host tensors on their way to a device: token ids, positions, rows of the embedding.

Weights have slots and streams of their own, and do not come this way.
"""

from __future__ import annotations

import logging

import torch

logger = logging.getLogger(__name__)

_refused: set[str] = set()


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on a device, in the order of its current stream; the host goes on at once.

    A copy from ordinary memory would block until the device has come to it, so the values go through pinned memory of
    torch's caching allocator, which is not reused before the copy has ended. Where a device has none, the copy blocks.

    Args:
        tensor: of any shape and type; one that is there already is returned as it is.
    """
    if device.type == "cpu" or tensor.device.type != "cpu" or tensor.numel() == 0 or device.type in _refused:
        return tensor.to(device)
    try:
        pinned = tensor.pin_memory()
    except RuntimeError as error:
        _refused.add(device.type)
        logger.warning("no pinned memory for %s (%s): the host waits for each copy of token ids", device.type, error)
        return tensor.to(device)
    return pinned.to(device, non_blocking=True)
