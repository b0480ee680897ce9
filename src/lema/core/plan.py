"""The memory plan: what is kept where, decided before anything is allocated.

It knows bytes, operations and rates as numbers; it knows nothing of models, files or devices themselves.
Formulas are in docs/ARCHITECTURE.md, "The plan".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

from ..errors import ConfigError
from .budget import format_bytes
from .hardware import Hardware

_HEAD_CHUNK_BYTES = 16 << 20
_LOSS_CHUNKS = (256, 64)

CPU_OVERHEAD = 112 << 20
"""Host bytes beyond the import floor that no tensor accounts for: threads, code paged in, compiled kernels. Measured on
two models, what is left after everything counted: 107 to 120 MiB."""
_FEW_ROWS = 16
"""Rows at which half of a matmul's time goes into reading its weight; an order of magnitude, to rank plans."""
_OPTIMIZER_BYTES, _HOST_BYTES_PER_S = 28, 10e9
"""Bytes Adam reads and writes for a parameter in float32, and the rate at which a host does so, roughly."""
_BUDGET_SHARE = 0.96
"""Share of a host budget that is planned for; the rest is for what the prediction misses."""
_EQUALLY_FAST = 1e-3
"""Estimates that differ by this share or less say nothing about which plan is faster."""
DEVICE_OVERHEAD = 48 << 20
"""Device bytes beyond the tensors counted: matmul workspaces, which the caching allocator counts too."""
HEAP_SLACK = 0.7
"""Share by which a layer's resident size on the C heap exceeds its activations alive at once: holes between them.
Measured per layer on a 1.7B shape in bf16: 0.4 to 1.0."""


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """Bytes of a model's parts."""

    units: tuple[int, ...]
    """Of each streamed unit."""
    scratch: int
    """Shared by all units for parameters made from stored bytes at each use; 0 where none is."""
    head: int
    """The output embedding's weight; 0 where it is part of `rest`."""
    head_streams: bool
    """Whether the head can be streamed."""
    vocab: int
    embedding: int
    """The input embedding, of which a step touches a few rows; 0 where it is the head as well."""
    rest: int
    """Everything else that stays."""
    lora: int
    """Trainable parameters."""


@dataclass(frozen=True, slots=True)
class LayerCost:
    """What one layer takes for one micro-batch: most bytes alive at once, and floating point operations."""

    forward_peak: int
    graph: int
    """Bytes that stay alive from forward to backward where the layer is not recomputed."""
    backward_peak: int
    """Recomputation and backward together."""
    forward_flops: int
    backward_flops: int
    kernel_scratch: int
    """Bytes of a matmul kernel's own copy of a weight, on CPU."""


@dataclass(frozen=True, slots=True)
class LossCost:
    """Head and loss for one chunk of target positions."""

    peak: int
    flops: int


@dataclass(frozen=True, slots=True)
class Workload:
    """What a step on `[batch, seq]` tokens takes, by micro-batch rows and by target positions."""

    batch: int
    seq: int
    boundary: int
    """Bytes of one layer's input for the whole batch."""
    layer: Callable[[int], LayerCost]
    loss: Callable[[int], LossCost]


@dataclass(frozen=True, slots=True)
class Choices:
    """Decisions taken by the user; None leaves one to the plan."""

    device_layers: int | None = None
    ram_layers: int | None = None
    keep_activations: int | None = None
    micro_batch_size: int | None = None
    loss_chunk_size: int | None = None
    exact_loss: bool = False
    """The loss stays in one piece."""
    head: str | None = None
    boundaries: str | None = None
    optimizer: str | None = None
    host_slots: int = 2
    device_slots: int = 2


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What is kept where. Units are numbered from 0; a unit is in exactly one of the three tiers."""

    device: str
    on_device: tuple[int, ...]
    in_ram: tuple[int, ...]
    from_disk: tuple[int, ...]
    keep_activations: tuple[int, ...]
    """Units that are not recomputed in the backward."""
    host_slots: int
    device_slots: int
    batch: int
    seq: int
    """The batch planned for, `[batch, seq]` tokens."""
    micro_batch_size: int
    loss_chunk_size: int | None
    head: str
    """'resident'; 'streamed': whole, once a step; 'chunked': by runs of vocabulary rows, once a step."""
    head_rows: int
    """Vocabulary rows of a chunk; all of them unless chunked."""
    boundaries: str
    """'device' (where layers are computed) or 'host'."""
    optimizer: str
    """'device' or 'host'."""
    host_bytes: Mapping[str, int] = field(default_factory=dict)
    """Predicted host peak above the import floor, by what it is for."""
    device_bytes: Mapping[str, int] = field(default_factory=dict)
    """Predicted device peak, by what it is for; empty on CPU."""
    estimate: Estimate | None = None
    transient: int = 0
    """Most bytes on the heap that one layer or the loss takes and gives back."""

    @property
    def host_peak(self) -> int:
        """Predicted host peak in bytes above the import floor."""
        return sum(self.host_bytes.values())

    @property
    def device_peak(self) -> int:
        """Predicted peak of allocated device memory in bytes."""
        return sum(self.device_bytes.values())

    @property
    def streamed_to_compute(self) -> tuple[int, ...]:
        """Units that share slots where layers are computed."""
        return tuple(sorted((*self.in_ram, *self.from_disk))) if self.device != "cpu" else self.from_disk


@dataclass(frozen=True, slots=True)
class Estimate:
    """Predicted time of an optimizer step, one call of `train_step` a window."""

    step_seconds: float
    compute_seconds: float
    disk_seconds: float
    link_seconds: float
    tokens_per_second: float
    bound_by: str
    """'compute', 'disk' or 'link'."""


def evenly(count: int, total: int) -> tuple[int, ...]:
    """`count` of `total` units, evenly spaced, the last one among them."""
    return tuple(sorted({total - 1 - (i * total) // count for i in range(count)})) if count else ()


def make_plan(
    sizes: ModelSizes,
    workload: Workload,
    hardware: Hardware,
    *,
    dtype: str,
    ram_budget: int | None,
    vram_budget: int | None = None,
    choices: Choices = Choices(),
) -> MemoryPlan:
    """The fastest plan that fits the budgets; nothing streams where everything fits. Among equally fast ones that with
    the largest micro-batches, then the fewest detours, then the smallest.

    Args:
        ram_budget: host bytes above the import floor; None: no limit.
        vram_budget: device bytes; None: no limit. Unused on CPU.

    Raises:
        ConfigError: nothing fits, or a decision of the user's does not: with the numbers and what would.
    """
    return _Planner(sizes, workload, hardware, dtype, ram_budget, vram_budget, choices).best()


@dataclass(slots=True)
class _Planner:
    sizes: ModelSizes
    workload: Workload
    hardware: Hardware
    dtype: str
    ram_budget: int | None
    vram_budget: int | None
    choices: Choices

    @property
    def on_cpu(self) -> bool:
        return self.hardware.device == "cpu"

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
        """Whether every unit is loaded once in a run, and recomputed only where it was decided or must be."""
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
                            yield MemoryPlan(
                                device=self.hardware.device, on_device=(), in_ram=(), from_disk=tuple(range(n)),
                                keep_activations=(), host_slots=chosen.host_slots, device_slots=chosen.device_slots,
                                batch=self.workload.batch, seq=self.workload.seq,
                                micro_batch_size=micro, loss_chunk_size=chunk, head=head,
                                head_rows=self._head_rows(head), boundaries=boundaries, optimizer=optimizer,
                            )  # fmt: skip

    def _head_rows(self, head: str) -> int:
        if head != "chunked" or not self.sizes.head:
            return self.sizes.vocab
        return max(1, min(self.sizes.vocab, _HEAD_CHUNK_BYTES * self.sizes.vocab // self.sizes.head))

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

    def _may_keep_activations(self, plan: MemoryPlan) -> list[int]:
        """Units whose weights are still there in the backward: kept ones, and the last in shared slots at the turn."""
        if self.sizes.scratch:
            return []
        resident = set(plan.in_ram if self.on_cpu else plan.on_device)
        slots = plan.host_slots if self.on_cpu else plan.device_slots
        shared = [u for u in range(len(self.sizes.units)) if u not in resident]
        return sorted((*resident, *shared[-slots:]))

    def _layer(self, rows: int) -> LayerCost:
        return self.workload.layer(min(rows, self.workload.batch))

    def _cuts(self, plan: MemoryPlan) -> list[tuple[int, int]]:
        """How many micro-batches of how many rows."""
        whole, rest = divmod(self.workload.batch, plan.micro_batch_size)
        return [(count, rows) for count, rows in ((whole, plan.micro_batch_size), (1, rest)) if count and rows]

    @staticmethod
    def _keeping(plan: MemoryPlan, able: Sequence[int], count: int) -> MemoryPlan:
        return replace(plan, keep_activations=tuple(able[len(able) - count :]))

    def _most_in_ram(self, frame: MemoryPlan) -> int:
        """Units that fit into host memory beside everything else there."""
        n = len(self.sizes.units)
        if self.ram_budget is None:
            return n
        left = int(self.ram_budget * _BUDGET_SHARE) - sum(self._host(frame).values())
        return max(0, min(n, left // max(max(self.sizes.units, default=1), 1)))

    # -- memory ----------------------------------------------------------------------------------

    def _fits(self, plan: MemoryPlan) -> bool:
        host_fits = self.ram_budget is None or sum(self._host(plan).values()) <= self.ram_budget * _BUDGET_SHARE
        return host_fits and (self.vram_budget is None or sum(self._device(plan).values()) <= self.vram_budget)

    def _host(self, plan: MemoryPlan) -> dict[str, int]:
        sizes, work = self.sizes, self.workload
        disk = [sizes.units[u] for u in plan.from_disk]
        passing = disk if self.on_cpu else [sizes.units[u] for u in (*plan.from_disk, *plan.on_device)]
        parts = {
            "overhead": CPU_OVERHEAD,
            "slots": min(plan.host_slots, len(passing)) * max(passing, default=0)
            + (sizes.scratch if self.on_cpu else 0),
            "layers kept in RAM": sum(sizes.units[u] for u in plan.in_ram),
            "embedding rows": min(sizes.embedding, work.batch * work.seq * 4096),
        }
        if self.on_cpu:
            parts.update(self._compute_place(plan))
        else:
            if plan.head != "resident":
                parts["head"] = self._head_bytes(plan)
            if plan.boundaries == "host":
                parts["boundaries"] = max(len(sizes.units) - len(plan.keep_activations), 1) * work.boundary
            if plan.optimizer == "host":
                parts["optimizer"] = sizes.lora * 16
        return parts

    def _device(self, plan: MemoryPlan) -> dict[str, int]:
        if self.on_cpu:
            return {}
        sizes = self.sizes
        shared = [sizes.units[u] for u in plan.streamed_to_compute]
        return {
            "overhead": DEVICE_OVERHEAD,
            "slots": min(plan.device_slots, len(shared)) * max(shared, default=0) + sizes.scratch,
            "layers kept on the device": sum(sizes.units[u] for u in plan.on_device),
            **self._compute_place(plan),
        }

    def _compute_place(self, plan: MemoryPlan) -> dict[str, int]:
        """What lies where layers are computed, whichever memory that is."""
        sizes, work = self.sizes, self.workload
        kept = plan.keep_activations
        layer = self._layer(plan.micro_batch_size)
        graph = sum(count * self._layer(rows).graph for count, rows in self._cuts(plan))
        loss = self._loss_peak(plan)
        head = self._head_bytes(plan)
        comes_and_goes = plan.head == "streamed" and self.on_cpu  # on a device a whole head stays
        held = sizes.rest + (0 if comes_and_goes else head)
        offloaded = plan.boundaries == "host" and not self.on_cpu
        waiting = 2 if offloaded else len(sizes.units) - len(kept)
        bound = (waiting + self._inputs_in_no_graph(plan)) * work.boundary
        # the sweep's phases: most bytes at once beside what is always there
        graphs = len(kept) * graph
        head_then = head if comes_and_goes else 0
        slack = 1 + (HEAP_SLACK if self.on_cpu else 0)
        scratch = layer.kernel_scratch if self.on_cpu else 0
        turn = graphs + int(loss * slack) + 2 * work.boundary + head_then
        forward = graphs + int(layer.forward_peak * slack) + scratch + work.boundary
        backward = max(graphs - graph, 0) + int(layer.backward_peak * slack) + scratch + 2 * work.boundary
        activations = max(turn, forward, backward)
        return {
            "rest of the model": held,
            "adapters": sizes.lora * (16 if plan.optimizer == "device" or self.on_cpu else 8),
            "boundaries": bound,
            "activations": activations,
        }

    def _inputs_in_no_graph(self, plan: MemoryPlan) -> int:
        """Layers with their graph kept whose input is not the output in another such graph, or not in one piece."""
        kept = set(plan.keep_activations)
        cut = plan.micro_batch_size < self.workload.batch
        return sum(cut or unit - 1 not in kept for unit in kept)

    def _loss_peak(self, plan: MemoryPlan) -> int:
        work = self.workload
        peak = work.loss(min(plan.loss_chunk_size or work.batch * work.seq, work.batch * work.seq)).peak
        rows = plan.head_rows
        if plan.head != "chunked" and plan.loss_chunk_size is not None and self.sizes.head:
            rows = self._head_rows("chunked")
        if rows < self.sizes.vocab:  # float32 sums of the hidden states' size beside one chunk's logits
            peak = peak * rows // self.sizes.vocab + 4 * work.boundary
        return peak

    def _head_bytes(self, plan: MemoryPlan) -> int:
        if plan.head == "chunked":
            return min(2 * plan.head_rows * self.sizes.head // max(self.sizes.vocab, 1), self.sizes.head)
        return self.sizes.head

    # -- time ------------------------------------------------------------------------------------

    def _finished(self, plan: MemoryPlan) -> MemoryPlan:
        layer = self._layer(plan.micro_batch_size)
        loss = self._loss_peak(plan)
        transient = int(max(layer.forward_peak, layer.backward_peak, loss) * (1 + HEAP_SLACK)) + layer.kernel_scratch
        return replace(
            plan,
            transient=transient,
            host_bytes=self._host(plan),
            device_bytes=self._device(plan),
            estimate=self._estimate(plan),
        )

    def _estimate(self, plan: MemoryPlan) -> Estimate:
        sizes, work, hardware = self.sizes, self.workload, self.hardware
        rate = hardware.flops_for(self.dtype)
        n = len(sizes.units)
        recomputed = n - len(plan.keep_activations)
        total, seq = work.batch * work.seq, work.seq
        # few rows at once leave a matmul waiting for its weight
        parts = [(count * (1 + _FEW_ROWS / (rows * seq)), self._layer(rows)) for count, rows in self._cuts(plan)]
        forward = n * sum(count * layer.forward_flops for count, layer in parts) / rate
        backward = n * sum(count * layer.backward_flops for count, layer in parts) / rate + forward * recomputed / n
        positions = min(plan.loss_chunk_size or total, total)
        head = work.loss(positions).flops * (total / positions) / rate * (1 + _FEW_ROWS / positions)
        shared = plan.streamed_to_compute
        slots = plan.host_slots if self.on_cpu else plan.device_slots
        # in the steady state the units last in the slots at a turn are found there
        passing = max(1 - slots / len(shared), 0.0) if shared else 0.0
        disk = sum(sizes.units[u] for u in plan.from_disk) * passing / hardware.disk_bytes_per_s
        disk_head = (sizes.head if plan.head != "resident" else 0) / hardware.disk_bytes_per_s
        link = optimizer = 0.0
        if not self.on_cpu:
            carried = sum(sizes.units[u] for u in shared) * passing
            carried += recomputed * work.boundary if plan.boundaries == "host" else 0
            link = carried / hardware.link_bytes_per_s
            if plan.head != "resident":
                head = max(head, sizes.head / hardware.link_bytes_per_s)
            if plan.optimizer == "host":
                optimizer = sizes.lora * (_OPTIMIZER_BYTES / _HOST_BYTES_PER_S + 8 / hardware.link_bytes_per_s)
        phases = [
            {"compute": forward, "disk": disk + disk_head, "link": link},
            {"compute": head + optimizer},
            {"compute": backward, "disk": disk, "link": link},
        ]
        step = sum(max(phase.values()) for phase in phases)
        bound: dict[str, float] = {}
        for phase in phases:
            longest = max(phase, key=lambda name: phase[name])
            bound[longest] = bound.get(longest, 0.0) + phase[longest]
        return Estimate(
            step_seconds=step,
            compute_seconds=forward + head + optimizer + backward,
            disk_seconds=2 * disk + disk_head,
            link_seconds=2 * link,
            tokens_per_second=total / step if step else 0.0,
            bound_by=max(bound, key=lambda name: bound[name]),
        )

    # -- refusal ---------------------------------------------------------------------------------

    def _check_head(self) -> None:
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
        other = _Planner(self.sizes, self.workload, self.hardware, self.dtype, self.ram_budget, self.vram_budget, free)
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


def describe(plan: MemoryPlan) -> dict[str, Any]:
    """JSON-ready."""
    import dataclasses

    return dataclasses.asdict(plan)
