"""What settings may say of a machine: the types layers are computed in, and which device `auto` is."""

from __future__ import annotations

DTYPES = ("float16", "bfloat16", "float32")


def default_device() -> str:
    """The kind of the accelerator that is there, as in 'cuda'; 'cpu' without one."""
    import torch

    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found.type if found is not None else "cpu"
