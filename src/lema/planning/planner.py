"""Finds the memory plan for budgets: what is kept where, decided before anything is allocated.

It knows which decisions there are and which of two plans is better; bytes it asks of `footprint`, seconds of
`step_time`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NoReturn

from ..errors import ConfigError
from ..machine.memory import format_bytes
from .footprint import Footprint
from .hardware import Hardware
from .plan import Choices, MemoryPlan, ModelSizes, Workload, evenly
from .step_time import counted

_LOSS_CHUNKS = (256, 64)
_BUDGET_SHARE = 0.96
"""Share of a host budget that is planned for; the rest is for what the prediction misses."""
_EQUALLY_FAST = 1e-3
"""Estimates that differ by this share or less say nothing about which plan is faster."""


def make_plan(
    sizes: ModelSizes,
    workload: Workload,
    hardware: Hardware,
    *,
    dtype: str,
    ram_budget: int | None,
    vram_budget: int | None = None,
    choices: Choices | None = None,
) -> MemoryPlan:
    """The fastest plan that fits the budgets; nothing streams where everything fits. Among equally fast ones that with
    the largest micro-batches, then the fewest detours, then the smallest.

    Args:
        ram_budget: host bytes above the import floor; None: no limit.
        vram_budget: device bytes; None: no limit. Unused on CPU.

    Raises:
        ConfigError: nothing fits, or a decision of the user's does not: with the numbers and what would.
    """
    footprint = Footprint(sizes, workload, hardware.device)
    return _Planner(footprint, hardware, dtype, ram_budget, vram_budget, choices or Choices()).best()


@dataclass(slots=True)
class _Planner:
    footprint: Footprint
    hardware: Hardware
    dtype: str
    ram_budget: int | None
    vram_budget: int | None
    choices: Choices

    @property
    def sizes(self) -> ModelSizes:
        return self.footprint.sizes

    @property
    def workload(self) -> Workload:
        return self.footprint.workload

    @property
    def on_cpu(self) -> bool:
        return self.footprint.on_cpu

    def best(self) -> MemoryPlan:
        """The best of all candidates that fit."""
        self._check_head()
        return self._found() or self._refuse()

    def _found(self) -> MemoryPlan | None:
        fitting: list[MemoryPlan] = []
        for number, frame in enumerate(self._frames()):
            for plan in self._fillings(frame):
                if number == 0 and self._streams_nothing(plan):
                    return plan
                fitting.append(plan)
        limit = min(map(_seconds, fitting), default=0.0) * (1 + _EQUALLY_FAST)
        return min((plan for plan in fitting if _seconds(plan) <= limit), key=_preference, default=None)

    def _streams_nothing(self, plan: MemoryPlan) -> bool:
        """Whether every unit is loaded once in a run, recomputed only where it was decided or must be, and what is kept
        needs no new pages at each step that another plan would spare."""
        if self.on_cpu and plan.keep_activations and self.ram_budget is not None and not plan.keeps_idle_heap:
            return False
        slots = plan.host_slots if self.on_cpu else plan.device_slots
        decided = self.choices.keep_activations is not None or self.sizes.scratch > 0
        return len(plan.streamed_to_compute) <= slots and (
            decided or len(plan.keep_activations) == len(self.sizes.units)
        )

    # -- candidates ------------------------------------------------------------------------------

    def _frames(self) -> Iterator[MemoryPlan]:
        """Plans that keep nothing, those with large micro-batches first."""
        chosen, n = self.choices, len(self.sizes.units)
        rows = [chosen.micro_batch_size] if chosen.micro_batch_size else _halvings(self.workload.batch)
        positions = self.workload.batch * self.workload.seq
        if chosen.loss_chunk_size is not None or chosen.exact_loss:
            chunks: list[int | None] = [chosen.loss_chunk_size]
        else:
            chunks = [None, *(c for c in _LOSS_CHUNKS if c < positions)]
        # pieces of a chunked head are short rows, so that more positions fit at once
        pieces = [chosen.loss_chunk_size] if chosen.loss_chunk_size else sorted({min(c, positions) for c in (64, 1024)})
        heads = [chosen.head] if chosen.head else ["resident"]
        if not chosen.head and self.sizes.head_streams:
            heads += [*(["streamed"] if self.on_cpu else []), *([] if chosen.exact_loss else ["chunked"])]
        places = [chosen.boundaries] if chosen.boundaries else ["device", *([] if self.on_cpu else ["host"])]
        optimizers = [chosen.optimizer] if chosen.optimizer else ["device", *([] if self.on_cpu else ["host"])]
        for micro in rows:
            for optimizer in optimizers:
                for boundaries in places:
                    for head in heads:
                        for chunk in chunks if head != "chunked" else pieces:
                            for in_ram in (True, False) if head == "chunked" and not self.on_cpu else (False,):
                                yield MemoryPlan(
                                    device=self.hardware.device, on_device=(), in_ram=(), from_disk=tuple(range(n)),
                                    keep_activations=(), host_slots=chosen.host_slots, device_slots=chosen.device_slots,
                                    batch=self.workload.batch, seq=self.workload.seq,
                                    micro_batch_size=micro, loss_chunk_size=chunk, head=head,
                                    head_rows=self.footprint.head_rows(head), head_in_ram=in_ram,
                                    boundaries=boundaries, optimizer=optimizer, ram_budget=self.ram_budget,
                                    vram_budget=None if self.on_cpu else self.vram_budget,
                                )  # fmt: skip

    def _splits(self, frame: MemoryPlan, most: bool) -> Iterator[MemoryPlan]:
        """The frame with its weights spread over the tiers in every way; beside a device the host keeps its `most`, or
        none."""
        n, chosen = len(self.sizes.units), self.choices
        first = chosen.ram_layers if self.on_cpu else chosen.device_layers
        ram = chosen.ram_layers if chosen.ram_layers is not None else self._most_in_ram(frame) if most else 0
        for count in range(n + 1) if first is None else [min(first, n)]:
            here = evenly(count, n)
            device, in_ram = ((), here) if self.on_cpu else (here, _others(here, min(ram, n - count), n))
            kept = {*device, *in_ram}
            yield replace(frame, on_device=device, in_ram=in_ram, from_disk=tuple(u for u in range(n) if u not in kept))

    def _fillings(self, frame: MemoryPlan) -> Iterator[MemoryPlan]:
        """The frame with as much kept as fits, for every split between weights and activations."""
        limit = n = len(self.sizes.units)
        for plan in self._splits(frame, most=True):
            able = self._may_keep_activations(plan)
            if self.choices.keep_activations is not None:
                count = min(self.choices.keep_activations, n)
                if count > len(able):
                    continue
            else:  # the more weights are kept, the fewer activations fit
                count = min(limit, len(able))
                while count and not self._fits(self._keeping(plan, able, count)):
                    count -= 1
                if count < len(able):
                    limit = count
            filled = self._keeping(plan, able, count)
            if self._fits(filled):
                yield self._finished(filled)
                if (fewer := self._with_room_for_idle_heap(plan, able, count)) is not None:
                    yield self._finished(fewer)

    def _with_room_for_idle_heap(self, plan: MemoryPlan, able: Sequence[int], most: int) -> MemoryPlan | None:
        """The plan keeping as many activations as leave room for an idle heap, perhaps none; None: all it could."""
        if self.choices.keep_activations is not None or not self.on_cpu:
            return None

        def has_none(count: int) -> bool:
            return not self._idle_heap(self._keeping(plan, able, count))

        count = bisect_left(range(1, most + 1), True, key=has_none)
        return self._keeping(plan, able, count) if count < most else None

    def _may_keep_activations(self, plan: MemoryPlan) -> list[int]:
        """Units whose weights are still there in the backward: kept ones, and the last in shared slots at the turn."""
        if self.sizes.scratch:
            return []
        resident = set(plan.in_ram if self.on_cpu else plan.on_device)
        slots = plan.host_slots if self.on_cpu else plan.device_slots
        shared = [u for u in range(len(self.sizes.units)) if u not in resident]
        return sorted((*resident, *shared[-slots:]))

    @staticmethod
    def _keeping(plan: MemoryPlan, able: Sequence[int], count: int) -> MemoryPlan:
        return replace(plan, keep_activations=tuple(able[len(able) - count :]))

    def _most_in_ram(self, frame: MemoryPlan) -> int:
        """Units that fit into host memory beside everything else there."""
        n = len(self.sizes.units)
        if self.ram_budget is None:
            return n
        left = int(self.ram_budget * _BUDGET_SHARE) - sum(self.footprint.host(frame).values())
        return max(0, min(n, left // max(max(self.sizes.units, default=1), 1)))

    # -- memory ----------------------------------------------------------------------------------

    def _fits(self, plan: MemoryPlan) -> bool:
        host, device = self.footprint.host, self.footprint.on_device
        host_fits = self.ram_budget is None or sum(host(plan).values()) <= self.ram_budget * _BUDGET_SHARE
        return host_fits and (self.vram_budget is None or sum(device(plan).values()) <= self.vram_budget)

    def _finished(self, plan: MemoryPlan) -> MemoryPlan:
        plan = counted(plan, self.footprint, self.hardware, self.dtype, self._idle_heap(plan))
        return replace(plan, heap_limit=plan.host_peak - plan.transient // 4 if self.on_cpu else None)

    def _idle_heap(self, plan: MemoryPlan) -> int:
        """Bytes of a heap that keeps what is freed, where the budget has room for all of it; else 0.

        Half of it would be worse than none: what is kept then is never what is asked for next.
        """
        idle = self.footprint.idle_heap(plan)
        if self.ram_budget is None or not idle:
            return 0
        left = int(self.ram_budget * _BUDGET_SHARE) - sum(self.footprint.host(plan).values())
        return idle if idle <= left else 0

    # -- refusal ---------------------------------------------------------------------------------

    def _check_head(self) -> None:
        if self.choices.head == "streamed" and not self.on_cpu:
            raise ConfigError(
                "head='streamed' is for the CPU: beside a device the head is 'resident' or 'chunked'. Set one of "
                "these, or leave it unset"
            )
        if self.choices.head not in (None, "resident") and not self.sizes.head_streams:
            raise ConfigError(
                f"head={self.choices.head!r} is not possible: this model's head is not a plain linear layer stored in "
                "the type it is computed with, so it has to stay. Set head='resident', or leave it unset"
            )

    def _refuse(self) -> NoReturn:
        least = [self._finished(plan) for frame in self._frames() for plan in self._least(frame)]
        if not least:
            self._refuse_activations()
        plan = min(least, key=self._shortage)
        ram, vram = self._short_of(plan)
        parts = [(_, size) for short, kind in ((ram, plan.host_bytes), (vram, plan.device_bytes)) if short
                 for _, size in kind.items()]  # fmt: skip
        listed = ", ".join(f"{name} {format_bytes(size)}" for name, size in parts if size)
        needs = " and ".join(
            f"{format_bytes(peak)} of {kind}"
            for short, peak, kind in ((ram, plan.host_peak, "RAM"), (vram, plan.device_peak, "VRAM"))
            if short
        )
        wanted = [f"ram_budget to at least {_megabytes(plan.host_peak / _BUDGET_SHARE)}"] if ram else []
        wanted += [f"vram_budget to at least {_megabytes(plan.device_peak)}"] if vram else []
        kept = _kept_by_choice(self.choices)
        other = self._what_fits() if kept else None
        raise ConfigError(
            f"{kept or 'this step'} does not fit into {self._budgets()}: even with "
            f"micro_batch_size={plan.micro_batch_size}, loss_chunk_size={plan.loss_chunk_size} and the head "
            f"{plan.head} it needs {needs} ({listed}). Set {' and '.join(wanted)}, or lower "
            f"max_seq_length, batch_size or lora_rank{f'. What fits: {other}' if other else ''}"
        )

    def _least(self, frame: MemoryPlan) -> Iterator[MemoryPlan]:
        """The frame with no more kept than was decided; weights that are kept may take less than slots for them."""
        for plan in self._splits(frame, most=False):
            able = self._may_keep_activations(plan)
            keep = min(self.choices.keep_activations or 0, len(self.sizes.units))
            if keep <= len(able):
                yield self._keeping(plan, able, keep)

    def _short_of(self, plan: MemoryPlan) -> tuple[bool, bool]:
        """Whether the host's budget is too small for a plan, and whether the device's is."""
        return (
            self.ram_budget is not None and plan.host_peak > self.ram_budget * _BUDGET_SHARE,
            self.vram_budget is not None and plan.device_peak > self.vram_budget,
        )

    def _shortage(self, plan: MemoryPlan) -> tuple[int, float]:
        """Budgets that are too small, and bytes they lack."""
        ram, vram = self._short_of(plan)
        host = plan.host_peak / _BUDGET_SHARE - (self.ram_budget or 0) if ram else 0.0
        device = plan.device_peak - (self.vram_budget or 0) if vram else 0.0
        return ram + vram, host + device

    def _what_fits(self) -> str | None:
        """Other numbers of layers that would do; None where there are none."""
        free = replace(self.choices, device_layers=None, ram_layers=None, keep_activations=None)
        other = replace(self, choices=free)
        best = other._found()
        if best is None:
            return None
        device = "" if self.on_cpu else f"device_layers={len(best.on_device)}, "
        return f"{device}ram_layers={len(best.in_ram)}, keep_activations={len(best.keep_activations)}"

    def _refuse_activations(self) -> NoReturn:
        count = self.choices.keep_activations
        if self.sizes.scratch:
            raise ConfigError(
                f"keep_activations={count} is not possible: weights of this model are converted at every use, so every "
                "layer is recomputed. Set keep_activations=0, or a dtype that the file stores"
            )
        name, slots = ("ram", "num_slots") if self.on_cpu else ("device", "vram_buffer_size")
        shared = self.choices.host_slots if self.on_cpu else self.choices.device_slots
        layers = self.choices.ram_layers if self.on_cpu else self.choices.device_layers
        assert count is not None and layers is not None
        raise ConfigError(
            f"keep_activations={count} is not possible with {name}_layers={layers} and {slots}={shared}: only layers "
            f"whose weights stay until the backward can go without recomputation. Set keep_activations to at most "
            f"{min(layers + shared, len(self.sizes.units))}, or leave {name}_layers unset"
        )

    def _budgets(self) -> str:
        named = (("ram_budget", self.ram_budget), ("vram_budget", None if self.on_cpu else self.vram_budget))
        return " and ".join(f"{name} {format_bytes(value)}" for name, value in named if value is not None)


def _kept_by_choice(choices: Choices) -> str:
    names = ("device_layers", "ram_layers", "keep_activations")
    return ", ".join(f"{name}={getattr(choices, name)}" for name in names if getattr(choices, name) is not None)


def _megabytes(nbytes: float) -> str:
    return f"{int(nbytes) // 10**6 + 1}MB"


def _seconds(plan: MemoryPlan) -> float:
    assert plan.estimate is not None
    return plan.estimate.step_seconds


def _preference(plan: MemoryPlan) -> tuple[int, int, int, int]:
    """Of equally fast plans the lowest is taken: by rows at once, then by what goes somewhere else and back although it
    need not, then by size."""
    detours = (plan.optimizer == "host") + (plan.boundaries == "host") + (plan.head != "resident")
    detours += plan.head == "chunked" and plan.device != "cpu" and not plan.head_in_ram
    return (-plan.micro_batch_size, detours, plan.device_peak, plan.host_peak)


def _halvings(batch: int) -> list[int]:
    rows = [batch]
    while rows[-1] > 1:
        rows.append(-(-rows[-1] // 2))
    return rows


def _others(device: Sequence[int], count: int, total: int) -> tuple[int, ...]:
    """`count` units outside `device`, evenly spaced among those."""
    taken = set(device)
    left = [unit for unit in range(total) if unit not in taken]
    return tuple(left[i] for i in evenly(count, len(left)))
