"""An embedding whose table stays where it is, in the file's type: only the rows asked for are fetched.

It knows a table and token ids; it knows nothing of files, devices' tiers or the layers after it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..machine.host_copies import to_device
from .host_values import HostValues
from .interceptor import Forward


def gathered_rows(
    module: nn.Embedding, table: torch.Tensor, dtype: torch.dtype, device: torch.device, host_values: HostValues
) -> Forward:
    """A forward that takes its rows from a table of another type or on the host; only the rows travel.

    The module's own forward runs, on a small table of just the rows it needs, so families that scale
    their embeddings do so as always.

    Args:
        module: the embedding; its `weight` stays an empty parameter of the full shape.
        table: `[vocab, hidden]`, in the file's type.
        dtype: type of the rows handed on.
        device: where they are wanted.
        host_values: knows ids of a device that need not be read from there.
    """
    forward = type(module).forward

    def gathered(input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        ids = host_values.of(input_ids)
        ids = input_ids.to(table.device) if ids is None else ids
        rows, places = torch.unique(ids, return_inverse=True)
        places = to_device(places, device)
        weight, padding = module._parameters["weight"], module.padding_idx
        small = to_device(table.index_select(0, rows).to(dtype), device)
        module._parameters["weight"] = nn.Parameter(small, requires_grad=False)
        module.padding_idx = None
        try:
            output: torch.Tensor = forward(module, places, *args, **kwargs)
            return output
        finally:
            module._parameters["weight"], module.padding_idx = weight, padding

    return gathered
