"""How large the parts of a model are, from its index or, without weights, from its configuration.

It knows parameters' shapes and types; it knows nothing of budgets or slots' life.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ..models.quantised import stored_bits
from ..models.transformers_adapter import TransformersAdapter
from ..storage.codecs import Placement
from ..storage.index import GlobalBinaryIndex
from ..storage.layout import ALIGNMENT, SlotLayout, align_up
from .plan import ModelSizes

_PAGE = 4096


def model_sizes(adapter: TransformersAdapter, lora: int = 0, gbi: GlobalBinaryIndex | None = None) -> ModelSizes:
    """Bytes of each unit and of what is around them.

    Args:
        adapter: the model.
        lora: trainable parameters.
        gbi: weights; None: matrices count as the configuration says that they are stored, every other tensor as stored
            in the type it is computed with.
    """
    if gbi is None:
        stored, values = zip(*map(_as_configured(adapter), adapter.unit_tensors()), strict=True)
        units = [align_up(nbytes, _PAGE) for nbytes in stored]
        scratch, streams = max(values), True
        decoded = values if any(values) else ()
    else:
        sources = adapter.unit_sources(gbi)
        layouts = [SlotLayout(unit, adapter.packs_units) for unit in sources]
        units = [layout.nbytes for layout in layouts]
        scratch = max((layout.scratch_nbytes for layout in layouts), default=0)
        streams = adapter.head_source(gbi) is not None
        made = tuple(sum(s.nbytes for s in unit if not isinstance(s.codec, Placement)) for unit in sources)
        decoded = made if any(made) else ()
    head, embedding, rest = adapter.around()
    return ModelSizes(
        units=tuple(units),
        scratch=scratch,
        head=head,
        head_streams=streams and head > 0,
        vocab=adapter.causal_lm().vocab_size,
        embedding=embedding,
        rest=rest,
        lora=lora,
        decoded=decoded,
    )


def _as_configured(adapter: TransformersAdapter) -> Callable[[Sequence[torch.Tensor]], tuple[int, int]]:
    """Bytes of a unit in files, and of its values that are codes there, by what the configuration says."""
    config = adapter.config.to_dict()

    def sizes(unit: Sequence[torch.Tensor]) -> tuple[int, int]:
        stored = values = 0
        for tensor in unit:
            bits = stored_bits(config, tensor.dim())
            stored += tensor.nbytes if bits is None else int(tensor.numel() * bits / 8)
            values += 0 if bits is None else align_up(tensor.nbytes, ALIGNMENT)
        return stored, values

    return sizes
