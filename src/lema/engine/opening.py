"""From settings to a model whose layers stream: found, indexed, planned for and attached.

It knows the order of these; each of them is another module's.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from ..config import LemaConfig
from ..coordinator import Coordinator
from ..machine.heap import resident_bytes
from ..models.base import LemaModelAdapter
from ..models.locate import adapter_for, local_path, weights_path
from ..planning.plan import MemoryPlan
from ..planning.policy import plan_for
from ..storage.gguf_header import is_gguf
from ..storage.index import GlobalBinaryIndex
from .assembly import StoredModel, compute_dtype
from .attach import Attachment, attach
from .generation import take_end_tokens
from .outlook import Outlook


class Opened(NamedTuple):
    """A streamed model without trained parameters."""

    adapter: LemaModelAdapter
    """Its family's code."""
    gbi: GlobalBinaryIndex
    """The index of its weights."""
    attachment: Attachment
    """What its layers wait by."""


def open_streamed(
    config: LemaConfig,
    adapter: LemaModelAdapter | None = None,
    plan: MemoryPlan | None = None,
    whole_head: bool = False,
    coordinator: Coordinator | None = None,
) -> Opened:
    """Open a model as settings say.

    Args:
        adapter: the model, where it was made already, or for weights without a config.json beside them.
        plan: what to keep where; None: made here.
        whole_head: the head's weight is there at any time, for callers that read it past its module.
        coordinator: of a run of several processes, which all go by the first one's plan.

    Raises:
        WeightsError, UnsupportedError, DeviceError, ConfigError: as `LemaModel` says.
    """
    dtype = compute_dtype(config)
    path = local_path(config.model_name_or_path, "*.json")
    adapter = adapter or adapter_for(config, path)
    gbi = GlobalBinaryIndex(weights_path(config))
    floor = resident_bytes()  # making a plan leaves something behind, which the plan counts as overhead
    adapter.configure(dtype, config.attn_implementation)
    model = StoredModel(adapter, gbi)
    plan = plan or (coordinator or Coordinator()).found_by_first("plan", lambda: plan_for(Outlook(config, model)))
    if whole_head and plan.head in ("streamed", "chunked"):
        plan = replace(plan, head="mapped", head_rows=0)
    attachment = attach(
        model, plan, config.device, num_readers=config.num_readers, prefetch_depth=config.prefetch_depth, floor=floor,
        leave_out_router_loss=config.leave_out_router_loss,
    )  # fmt: skip
    if whole_head:
        with attachment.memory.use(attachment.memory.head_unit):
            pass  # a head that stays in RAM is read when it is first used
    take_end_tokens(attachment.lm.module, path if path.is_dir() or is_gguf(path) else path.parent)
    return Opened(adapter, gbi, attachment)
