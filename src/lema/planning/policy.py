"""Settings to a plan, whichever policy they ask for: `plan_for`, of which a run has one answer and asks once.

It knows which setting decides what; of the model and the machine it asks no more than a plan needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch

from ..config import LemaConfig, MemoryStrategy
from ..machine.device import context_bytes, device_memory
from ..machine.memory import free_ram, resolve_budget
from ..typed import PLANNED, fields_with
from .hardware import Hardware
from .plain import plan_without_budget
from .plan import Choices, MemoryPlan, ModelSizes, Workload, loss_chunk
from .planner import make_plan

Budgets = tuple[int | None, int | None]


class RunFacts(Protocol):
    """What can be known of a run before it; each part is found out when it is asked for."""

    config: LemaConfig

    @property
    def stored(self) -> tuple[Sequence[int], int]:
        """Bytes that are read for each unit, and for a head that can stream."""

    @property
    def codes(self) -> bool:
        """Whether layers are kept as codes, which are decoded at every use."""

    @property
    def budgets(self) -> Budgets:
        """Bytes of RAM and of VRAM; None: no limit."""

    @property
    def sizes(self) -> ModelSizes:
        """Bytes of the model's parts."""

    @property
    def hardware(self) -> Hardware:
        """The machine."""

    def workload(self, seq: int) -> Workload:
        """What a step of `batch_size` rows of so many tokens takes."""


def plan_for(facts: RunFacts) -> MemoryPlan:
    """The plan of a run. Without a budget, or a decision that is the plan's, it is the strategy's own: nothing is
    searched, so the model is not looked into and the machine not measured; else it is the fastest that fits.

    Raises:
        ConfigError: nothing fits.
        UnsupportedError: budgets for an adapter of one's own, whose layers cannot be looked into.
    """
    config = facts.config
    kind = torch.device(config.device).type
    decisions = {*fields_with(LemaConfig, PLANNED)} - ({"vram_budget"} if kind == "cpu" else set())
    if all(getattr(config, name) is None for name in decisions):
        return with_steps(
            plan_without_budget(
                *facts.stored, device=kind, strategy=config.strategy, host_slots=config.slots,
                device_slots=_device_slots(config), codes=facts.codes,
            ),
            config,
        )  # fmt: skip
    ram, vram = facts.budgets  # before anything is measured: what measuring takes is given back, but not at once
    workload = facts.workload(config.max_seq_length)
    plan = make_plan(
        facts.sizes, workload, facts.hardware, dtype=config.dtype, ram_budget=ram, vram_budget=vram,
        choices=_choices(config, facts.sizes, facts.hardware.device == "cpu", (ram, vram)),
    )  # fmt: skip
    return replace(plan, whole_batch=config.micro_batch_size is None and plan.micro_batch_size == plan.batch)


def with_steps(plan: MemoryPlan, config: LemaConfig) -> MemoryPlan:
    """A plan with what settings say of steps, where it says nothing of them; `micro_batch_size` holds in any case."""
    micro = config.micro_batch_size
    if not plan.batch:
        rows, length = config.batch_size, config.max_seq_length
        plan = replace(plan, batch=rows, seq=length, micro_batch_size=rows, loss_chunk_size=config.loss_chunk_size)
    return plan if micro is None else replace(plan, micro_batch_size=micro, whole_batch=False)


def _choices(config: LemaConfig, sizes: ModelSizes, on_cpu: bool, budgets: Budgets) -> Choices:
    """What the settings leave to the plan, and what they, or a budget that was not given, decide."""
    ram, vram = budgets
    free = (ram if on_cpu else vram) is None  # where layers are computed there is room for whatever nobody decided
    plain = ram is None and free
    resident = config.strategy is MemoryStrategy.RESIDENT
    keep = 0 if config.gradient_checkpointing or free else None
    chunk = loss_chunk(config.loss_chunk_size, config.batch_size * config.max_seq_length, sizes.vocab)
    planned = config.loss_chunk_size == "auto" and not plain
    return Choices(
        device_layers=_first(config.device_layers, 0 if free else None),
        ram_layers=_first(config.ram_layers, (len(sizes.units) if resident else 0) if ram is None else None),
        keep_activations=_first(config.keep_activations, keep),
        micro_batch_size=_first(config.micro_batch_size, config.batch_size if plain else None),
        loss_chunk_size=None if planned else chunk,
        exact_loss=chunk is None and not planned,
        head=config.head,
        boundaries=_first(config.boundaries, "device" if free else None),
        optimizer=_first(config.optimizer_place, "device" if free else None),
        host_slots=config.slots,
        device_slots=_device_slots(config),
    )


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _device_slots(config: LemaConfig) -> int:
    return max(config.vram_buffer_size, 2)


def resolve_budgets(config: LemaConfig, hardware: Hardware | None = None) -> Budgets:
    """Bytes of both budgets; 'auto' is what is free now less a margin, of given hardware all it has less the same."""
    ram: int | None = None
    if config.ram_budget is not None:
        ram = resolve_budget(config.ram_budget, free_ram() if hardware is None else hardware.ram_bytes, "ram_budget")
    if config.vram_budget is None or torch.device(config.device).type == "cpu":
        return ram, None
    return ram, resolve_budget(config.vram_budget, _device_bytes(config, hardware), "vram_budget")


def _device_bytes(config: LemaConfig, hardware: Hardware | None) -> int:
    """Device memory that 'auto' stands for; on this machine what can be had and this process's context, which is there
    once that is asked."""
    if hardware is not None:
        return hardware.vram_bytes
    if str(config.vram_budget).strip().lower() != "auto":  # a size needs no counters
        return 0
    memory = device_memory(config.device)
    return min(memory.available + context_bytes(torch.device(config.device).type), memory.total)
