"""Where an optimizer's state lies in host memory.

It knows state tensors by parameter; it knows nothing of update rules.
"""

from __future__ import annotations

import torch

from ..core.binding import keep_apart


def keep_state_apart(optimizer: torch.optim.Optimizer) -> None:
    """Move the state off the heap that activations use, each parameter's tensors together.

    Optimizers make their state in the first step, in the holes the backward left; there it would keep
    the heap in pieces for the rest of the run. Values do not change.
    """
    for state in optimizer.state.values():
        for key, value in state.items():
            if isinstance(value, torch.Tensor) and value.is_contiguous():
                state[key] = keep_apart(value)
