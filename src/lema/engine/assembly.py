"""From a configuration to the parts of an engine.

It knows which setting goes where; what to keep where it leaves to the plan.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from ..config import LLAMA_TARGETS, LemaConfig, MemoryStrategy
from ..errors import DeviceError, UnsupportedError
from ..machine.device import check_device, context_bytes, device_memory, device_name, supports_bfloat16
from ..machine.heap import resident_bytes
from ..machine.memory import free_ram, resolve_budget
from ..models.base import LemaModelAdapter
from ..models.lora import LoRAManager
from ..models.transformers_adapter import TransformersAdapter
from ..planning.decoding import decode_rate, stated_rate
from ..planning.footprint import Footprint
from ..planning.hardware import Hardware
from ..planning.plain import plan_without_budget
from ..planning.plan import Choices, Estimate, MemoryPlan, ModelSizes
from ..planning.planner import make_plan
from ..planning.step_time import estimate
from ..storage.index import GlobalBinaryIndex
from ..streaming.accelerator import AcceleratorBackend
from ..streaming.memory import TripleBufferManager
from ..typed import PLANNED, fields_with
from .device_memory import explained
from .dry_run import DryRun
from .loss.head_loss import loss_chunk


def compute_dtype(config: LemaConfig) -> torch.dtype:
    """torch's type for `config.dtype`; `DeviceError` where the device cannot compute in it."""
    check_device(config.device)
    dtype: torch.dtype = getattr(torch, config.dtype)
    if dtype == torch.bfloat16 and not supports_bfloat16(config.device):
        raise DeviceError(f"{device_name(config.device)} has no bfloat16 arithmetic; choose dtype='float16'")
    return dtype


def wants_plan(config: LemaConfig) -> bool:
    """Whether a budget or a decision of the plan's was given."""
    return any(getattr(config, name) is not None for name in fields_with(LemaConfig, PLANNED))


def assemble_plan(
    config: LemaConfig, adapter: LemaModelAdapter, gbi: GlobalBinaryIndex | None, hardware: Hardware | None = None
) -> MemoryPlan:
    """The plan for a config's budgets and batch of `[batch_size, max_seq_length]`; arguments are those of `Outlook.of`.

    Raises:
        UnsupportedError: an adapter of one's own, whose layers cannot be looked into.
        ConfigError: nothing fits.
    """
    return Outlook.of(config, adapter, gbi, hardware).plan()


@dataclass(frozen=True, slots=True)
class Outlook:
    """What is known of a run before it: settings, a model's sizes and costs, a machine."""

    config: LemaConfig
    run: DryRun
    sizes: ModelSizes
    hardware: Hardware
    budgets: tuple[int | None, int | None]
    """Bytes of RAM and VRAM."""

    @classmethod
    def of(
        cls,
        config: LemaConfig,
        adapter: LemaModelAdapter,
        gbi: GlobalBinaryIndex | None,
        hardware: Hardware | None = None,
    ) -> Outlook:
        """Look into a model of transformers.

        Args:
            gbi: the weights; None: sizes follow from the configuration alone.
            hardware: None: this machine's, measured once and remembered. Of one that is given, nothing here is asked:
                it need not be this machine.

        Raises:
            UnsupportedError: an adapter of one's own, whose layers cannot be looked into.
        """
        if not isinstance(adapter, TransformersAdapter):
            raise UnsupportedError(
                f"budgets need a model of transformers, {type(adapter).__name__} is an adapter of its own; leave "
                f"{', '.join(fields_with(LemaConfig, PLANNED))} unset"
            )
        apart = TransformersAdapter(adapter.config)
        apart.configure(getattr(torch, config.dtype), config.attn_implementation)
        run = DryRun(apart, lora_settings(config, adapter) if config.use_lora else None)
        sizes = run.sizes() if gbi is None else run.sizes_in(adapter, gbi)
        budgets = resolve_budgets(config, hardware)
        if hardware is None:
            from ..planning.probe import profile

            hardware = profile(config.device, gbi.path if gbi is not None else None)
        if sizes.decoded:
            sizes = replace(sizes, decode_bytes_per_s=_decode_rate(config, adapter, gbi, hardware))
        return cls(config, run, sizes, hardware, budgets)

    def plan(self) -> MemoryPlan:
        """The best plan; `ConfigError` if nothing fits."""
        ram, vram = self.budgets
        workload = self.run.workload(self.config.batch_size, self.config.max_seq_length)
        return make_plan(
            self.sizes, workload, self.hardware, dtype=self.config.dtype, ram_budget=ram, vram_budget=vram,
            choices=self._choices(),
        )  # fmt: skip

    def step(self, plan: MemoryPlan, seq: int) -> Estimate:
        """What a step of rows of another length takes under a plan."""
        footprint = Footprint(self.sizes, self.run.workload(plan.batch, seq), self.hardware.device)
        return estimate(replace(plan, seq=seq), footprint, self.hardware, self.config.dtype)

    def _choices(self) -> Choices:
        """What the settings leave to the plan, and what they, or a budget that was not given, decide."""
        config, (ram, vram) = self.config, self.budgets
        on_cpu = self.hardware.device == "cpu"
        compute_budget = ram if on_cpu else vram
        free = compute_budget is None  # where layers are computed there is room for whatever nobody decided
        plain = ram is None and free
        resident = config.strategy is MemoryStrategy.RESIDENT
        keep = 0 if config.gradient_checkpointing or free else None
        chunk = loss_chunk(config.loss_chunk_size, config.batch_size * config.max_seq_length, self.sizes.vocab)
        planned = config.loss_chunk_size == "auto" and not plain
        return Choices(
            device_layers=_first(config.device_layers, 0 if free else None),
            ram_layers=_first(config.ram_layers, (len(self.sizes.units) if resident else 0) if ram is None else None),
            keep_activations=_first(config.keep_activations, keep),
            micro_batch_size=_first(config.micro_batch_size, config.batch_size if plain else None),
            loss_chunk_size=None if planned else chunk,
            exact_loss=chunk is None and not planned,
            head=config.head,
            boundaries=_first(config.boundaries, "device" if free else None),
            optimizer=_first(config.optimizer_place, "device" if free else None),
            host_slots=config.slots,
            device_slots=max(config.vram_buffer_size, 2),
        )


def resolve_budgets(config: LemaConfig, hardware: Hardware | None = None) -> tuple[int | None, int | None]:
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


def _decode_rate(
    config: LemaConfig, adapter: TransformersAdapter, gbi: GlobalBinaryIndex | None, hardware: Hardware
) -> float:
    """Bytes of values a second: of these weights on this machine, or what is taken for another one."""
    if gbi is None or hardware.source != "measured":
        return stated_rate(hardware.device)
    adapter.configure(getattr(torch, config.dtype), config.attn_implementation)
    rate = decode_rate(adapter.unit_sources(gbi), torch.device(config.device))
    return stated_rate(hardware.device) if rate is None else rate


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def assemble_memory(
    config: LemaConfig, adapter: LemaModelAdapter, gbi: GlobalBinaryIndex, plan: MemoryPlan | None = None
) -> TripleBufferManager:
    """The memory manager a config asks for; `DeviceMemoryError` where the device has no room for it.

    Args:
        plan: made for this config already; None: made here.
    """
    floor = resident_bytes()  # making a plan leaves something behind, which the plan counts as overhead
    adapter.configure(compute_dtype(config), config.attn_implementation)
    if plan is None:
        plan = assemble_plan(config, adapter, gbi) if wants_plan(config) else plain_plan(config, adapter, gbi)
    backend = None if torch.device(config.device).type == "cpu" else AcceleratorBackend(config.device)
    with explained(config.device, plan):
        return TripleBufferManager(
            gbi, adapter, config.device, config.strategy, num_readers=config.num_readers,
            prefetch_depth=config.prefetch_depth, plan=plan, floor=floor, backend=backend,
        )  # fmt: skip


def plain_plan(config: LemaConfig, adapter: LemaModelAdapter, gbi: GlobalBinaryIndex) -> MemoryPlan:
    """The plan of a config that gives no budget and decides nothing."""
    plan = plan_without_budget(
        gbi, adapter, device=torch.device(config.device).type, strategy=config.strategy, host_slots=config.slots,
        device_slots=max(config.vram_buffer_size, 2),
    )  # fmt: skip
    rows = config.batch_size
    return replace(plan, batch=rows, seq=config.max_seq_length, micro_batch_size=config.micro_batch_size or rows)


def lora_settings(config: LemaConfig, adapter: LemaModelAdapter) -> dict[str, Any]:
    """The config's LoRA settings as `LoRAManager` takes them."""
    if config.adapter_name_or_path is not None:
        return {**LoRAManager.settings_from(config.adapter_name_or_path), "dropout": config.lora_dropout}
    targets = config.lora_target_modules
    if targets == list(LLAMA_TARGETS) and adapter.default_target_modules is not None:
        targets = list(adapter.default_target_modules)
    return {
        "r": config.lora_rank,
        "alpha": config.lora_alpha,
        "dropout": config.lora_dropout,
        "target_modules": targets,
        "exclude_modules": config.exclude_modules,
    }


def assemble_lora(config: LemaConfig, adapter: LemaModelAdapter) -> LoRAManager | None:
    """The LoRA manager a config asks for; None where LoRA is off."""
    if not config.use_lora:
        return None
    return LoRAManager(lora_settings(config, adapter), device=config.device, seed=config.seed)
