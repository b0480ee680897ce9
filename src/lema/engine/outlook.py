"""What is known of a run before it: a model's sizes and what its layers take, settings, a machine.

Each is found out when it is first asked for; it knows nothing of how a plan is chosen.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch

from ..config import LemaConfig
from ..errors import UnsupportedError
from ..models.transformers_adapter import TransformersAdapter
from ..planning.decoding import decode_rate, stated_rate
from ..planning.footprint import Footprint
from ..planning.hardware import Hardware
from ..planning.plain import stored_bytes
from ..planning.plan import Estimate, MemoryPlan, ModelSizes, Workload
from ..planning.policy import Budgets, resolve_budgets
from ..planning.sizes import model_sizes
from ..planning.step_time import counted, estimate
from ..storage.codecs import Placement
from ..typed import PLANNED, fields_with
from .assembly import StoredModel, lora_settings
from .dry_run import DryRun

_T = TypeVar("_T")
_FOUND: dict[str, dict[Any, Any]] = {}
"""What dry runs of this process found, by model and adapter: whoever opens a model again need not wait again."""


class Outlook:
    """What `plan_for` asks.

    Args:
        config: settings.
        model: the model; without an index sizes follow from its configuration alone.
        hardware: None: this machine, measured once and remembered. Of one that is given, nothing here is asked: it
            need not be this machine.
        probe: measure this machine anew.
    """

    def __init__(
        self, config: LemaConfig, model: StoredModel, hardware: Hardware | None = None, probe: bool = False
    ) -> None:
        self.config = config
        self._model = model
        self._given = hardware
        self._probe = probe

    @functools.cached_property
    def budgets(self) -> Budgets:
        """Bytes of RAM and of VRAM; None: no limit."""
        return resolve_budgets(self.config, self._given)

    @functools.cached_property
    def hardware(self) -> Hardware:
        """The machine."""
        if self._given is not None:
            return self._given
        from ..planning.probe import profile

        gbi = self._model.gbi
        anew = {"refresh": True} if self._probe else {}
        return profile(self.config.device, gbi.path if gbi is not None else None, **anew)

    @functools.cached_property
    def stored(self) -> tuple[Sequence[int], int]:
        """Bytes that are read for each unit, and for a head that can stream."""
        if self._model.gbi is not None:
            return stored_bytes(self._model.gbi, self._model.adapter)
        return self.sizes.units, self.sizes.head if self.sizes.head_streams else 0

    @functools.cached_property
    def codes(self) -> bool:
        """Whether layers are kept as codes, which are decoded at every use."""
        gbi = self._model.gbi
        if gbi is None:
            return bool(self.sizes.decoded)
        units = self._model.adapter.unit_sources(gbi)
        return any(not isinstance(source.codec, Placement) for unit in units for source in unit)

    @functools.cached_property
    def sizes(self) -> ModelSizes:
        """Bytes of the model's parts."""
        sizes = model_sizes(self._adapter, self._once("parameters", lambda run: run.parameters), self._model.gbi)
        return replace(sizes, decode_bytes_per_s=self._decode_rate()) if sizes.decoded else sizes

    def _decode_rate(self) -> float:
        """Bytes of values a second: of these weights on this machine, or what is taken for another one."""
        gbi, kind = self._model.gbi, torch.device(self.config.device).type
        if gbi is None or self._given is not None:
            return stated_rate(kind)
        rate = decode_rate(self._adapter.unit_sources(gbi), torch.device(self.config.device))
        return stated_rate(kind) if rate is None else rate

    def workload(self, seq: int) -> Workload:
        """What a step of `batch_size` rows of so many tokens takes."""
        adapter, batch = self._adapter, self.config.batch_size
        return Workload(
            batch=batch,
            seq=seq,
            boundary=batch * seq * adapter.hidden_size * adapter.dtype.itemsize,
            layer=lambda rows: self._once(("layer", rows, seq), lambda run: run.layer(rows, seq)),
            loss=lambda positions: self._once(("loss", positions), lambda run: run.loss(positions)),
        )

    def _once(self, what: Any, find: Callable[[DryRun], _T]) -> _T:
        if what not in self._found:
            self._found[what] = find(self._run)
        found: _T = self._found[what]
        return found

    @functools.cached_property
    def _found(self) -> dict[Any, Any]:
        adapter = self._adapter
        attention = adapter.model.config._attn_implementation
        what = (type(adapter).__name__, adapter.config.to_dict(), str(adapter.dtype), attention, self._lora)
        return _FOUND.setdefault(json.dumps(what, sort_keys=True, default=str), {})

    @functools.cached_property
    def _run(self) -> DryRun:
        return DryRun(self._adapter.apart(), self._lora)

    @property
    def _lora(self) -> dict[str, Any] | None:
        return lora_settings(self.config, self._model.adapter) if self.config.use_lora else None

    @functools.cached_property
    def _adapter(self) -> TransformersAdapter:
        adapter = self._model.adapter
        if not isinstance(adapter, TransformersAdapter):
            raise UnsupportedError(
                f"budgets need a model of transformers, {type(adapter).__name__} is an adapter of its own; leave "
                f"{', '.join(fields_with(LemaConfig, PLANNED))} unset"
            )
        adapter.configure(getattr(torch, self.config.dtype), self.config.attn_implementation)
        return adapter

    # -- of a plan that is made --------------------------------------------------------------------

    def counted(self, plan: MemoryPlan) -> MemoryPlan:
        """A plan with the bytes and seconds predicted for it, if it has none; `UnsupportedError` as for budgets."""
        if plan.host_bytes:
            return plan
        return counted(plan, self._footprint(plan.seq), self.hardware, self.config.dtype)

    def step(self, plan: MemoryPlan, seq: int) -> Estimate:
        """What a step of rows of another length takes under a plan."""
        return estimate(replace(plan, seq=seq), self._footprint(seq), self.hardware, self.config.dtype)

    def _footprint(self, seq: int) -> Footprint:
        return Footprint(self.sizes, self.workload(seq), torch.device(self.config.device).type)
