"""How large the parts of a model are, from its index or, without weights, from its configuration.

It knows parameters' shapes and types; it knows nothing of budgets or slots' life.
"""

from __future__ import annotations

from ..models.transformers_adapter import TransformersAdapter
from ..storage.index import GlobalBinaryIndex
from ..storage.layout import SlotLayout, align_up
from .plan import ModelSizes

_PAGE = 4096


def model_sizes(adapter: TransformersAdapter, lora: int = 0, gbi: GlobalBinaryIndex | None = None) -> ModelSizes:
    """Bytes of each unit and of what is around them.

    Args:
        adapter: the model.
        lora: trainable parameters.
        gbi: weights; None: every tensor counts as stored in the type it is computed with.
    """
    if gbi is None:
        units = [align_up(sum(tensor.nbytes for tensor in unit), _PAGE) for unit in adapter.unit_tensors()]
        scratch, streams = 0, True
    else:
        layouts = [SlotLayout(unit, adapter.packs_units) for unit in adapter.unit_sources(gbi)]
        units = [layout.nbytes for layout in layouts]
        scratch = max((layout.scratch_nbytes for layout in layouts), default=0)
        streams = adapter.head_source(gbi) is not None
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
    )
