"""What the last bits of a step's numbers depend on, beyond settings: where sums are cut.

It knows a plan's sizes and the process; it knows nothing of why they are so.
"""

from __future__ import annotations

from typing import Any

import torch

from ..config import LemaConfig
from ..machine.device import device_name
from ..planning.plan import MemoryPlan


def numerics(config: LemaConfig, plan: MemoryPlan, micro_batch_size: int | None) -> dict[str, Any]:
    """JSON-ready; a checkpoint keeps it, to say at a resume what has changed.

    Args:
        micro_batch_size: rows that a layer runs at once; None: all.
    """
    found: dict[str, Any] = {
        "torch": torch.__version__,
        "device": device_name(config.device),
        "threads": torch.get_num_threads(),
        "micro_batch_size": micro_batch_size,
        "loss_chunk_size": plan.loss_chunk_size,
    }
    if plan.head_rows:  # a plan without a budget says nothing of these, and checkpoints neither
        found |= {
            "head_chunked": plan.head == "chunked", "head_rows": plan.head_rows, "optimizer_place": plan.optimizer,
        }  # fmt: skip
    return found
