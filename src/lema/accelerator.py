"""Which device `device: auto` is. It knows torch's answer and nothing else."""

from __future__ import annotations


def default_device() -> str:
    """The kind of the accelerator that is there, as in 'cuda'; 'cpu' without one."""
    import torch

    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found.type if found is not None else "cpu"
