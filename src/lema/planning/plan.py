"""What a memory plan is made from and what it says.

It knows bytes, operations and decisions as numbers; how a plan is found is `planner`'s business.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..errors import PlanError

LARGE_LOGITS = 32 << 20
"""Bytes of float32 logits from which 'auto' cuts the loss; fewer are no more than what a layer takes."""
AUTO_CHUNK = 256
"""Positions of a piece then: beside a run of the vocabulary of 16 MiB its float32 logits take 4 to 8 MiB."""
IDLE_HEAP = "heap kept between steps"
"""Name of the part of a plan's host bytes that lies idle, so that no page is faulted in twice."""


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
    decoded: tuple[int, ...] = ()
    """Of values that each unit makes of codes at every use; empty where there are no codes."""
    decode_bytes_per_s: float = math.inf
    """At which it does."""


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
    """What is kept where. Units are numbered from 0; each is in one of the three tiers, or mapped.

    Without a budget nothing is searched, and bytes and seconds are counted only for who asks; see `policy`.
    """

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
    """The batch planned for, `[batch, seq]` tokens; 0: the plan says nothing of steps yet."""
    micro_batch_size: int
    """Rows a layer runs at once."""
    loss_chunk_size: int | str | None
    """Target positions a piece of the loss; None: all at once; 'auto': as each batch asks for, see `loss_chunk`."""
    head: str
    """'resident'; 'streamed' (CPU): whole, once a step; 'chunked': by runs of vocabulary rows, once a step; 'mapped':
    with the rest of the model."""
    head_rows: int
    """Vocabulary rows of a chunk; all of them unless chunked."""
    boundaries: str
    """'device' (where layers are computed) or 'host'."""
    optimizer: str
    """'device' or 'host'."""
    mapped: tuple[int, ...] = ()
    """Units that are bound to the mapped files."""
    whole_batch: bool = False
    """`micro_batch_size` is all rows of the batch, and of a larger one as well."""
    ram_budget: int | None = None
    """Bytes the plan keeps to; None: no limit."""
    vram_budget: int | None = None
    heap_limit: int | None = None
    """Host bytes above the import floor from which on idle heap is given back between layers; None: nothing is."""
    host_bytes: Mapping[str, int] = field(default_factory=dict)
    """Predicted host peak above the import floor, by what it is for."""
    device_bytes: Mapping[str, int] = field(default_factory=dict)
    """Predicted device peak, by what it is for; empty on CPU."""
    estimate: Estimate | None = None
    transient: int = 0
    """Most bytes on the heap that one layer or the loss takes and gives back."""
    loss_bytes: int = 0
    """Most bytes of activations that head and loss have at once."""
    head_in_ram: bool = False
    """Chunks of the head cross to the device from RAM, and are read from disk once in a run."""

    @property
    def keeps_idle_heap(self) -> bool:
        """Whether there is room to leave freed memory on the heap for the next step."""
        return self.host_bytes.get(IDLE_HEAP, 0) > 0

    @property
    def host_peak(self) -> int:
        """Predicted host peak in bytes above the import floor."""
        return sum(self.host_bytes.values())

    @property
    def device_peak(self) -> int:
        """Predicted peak of device memory in bytes, this process's context among them."""
        return sum(self.device_bytes.values())

    @property
    def streamed_to_compute(self) -> tuple[int, ...]:
        """Units that share slots where layers are computed."""
        return tuple(sorted((*self.in_ram, *self.from_disk))) if self.device != "cpu" else self.from_disk

    def check(self, num_units: int, on_cpu: bool) -> None:
        """Hold the plan against the model it is to be for.

        Raises:
            PlanError: names the unit that is in no tier, in two, or not in the model, or the field that is not good.
        """
        tiers = ("on_device", "in_ram", "from_disk", "mapped")
        places: dict[int, list[str]] = {unit: [] for unit in range(num_units)}
        for name in (*tiers, "keep_activations"):
            for unit in getattr(self, name):
                if unit not in places:
                    raise PlanError(f"{name} has unit {unit}, and the model has units 0..{num_units - 1}{_MADE_FOR}")
                places[unit] += [name] if name in tiers else []
        for unit, names in places.items():
            if len(names) != 1:
                where = " and in ".join(names) if names else f"none of {', '.join(tiers)}"
                raise PlanError(f"unit {unit} is in {where}; each is in one{_MADE_FOR}")
        if on_cpu != (self.device == "cpu"):
            raise PlanError(f"device={self.device!r}, and layers are computed {_place(on_cpu)}{_MADE_FOR}")
        if on_cpu and self.on_device:
            raise PlanError(f"on_device has unit {self.on_device[0]}, and there is no device beside the CPU{_MADE_FOR}")
        for name in ("host_slots", "device_slots"):
            if (slots := getattr(self, name)) < 2:
                raise PlanError(f"{name}={slots} must be 2 or more, or nothing could overlap")
        if self.head == "chunked" and self.head_rows < 1:
            raise PlanError(f"head_rows={self.head_rows} must be 1 or more where the head is chunked")
        _check_words("head", self.head, ("resident", "streamed", "chunked", "mapped"))
        _check_words("boundaries", self.boundaries, ("device", "host"))
        _check_words("optimizer", self.optimizer, ("device", "host"))


_MADE_FOR = ": this plan was made for something else; make one for this model and device"


def _place(on_cpu: bool) -> str:
    return "on the CPU" if on_cpu else "beside it"


def _check_words(name: str, value: str, words: Sequence[str]) -> None:
    if value not in words:
        raise PlanError(f"{name}={value!r} must be one of {', '.join(words)}")


@dataclass(frozen=True, slots=True)
class Estimate:
    """Predicted time of an optimizer step, one call of `train_step` a window."""

    step_seconds: float
    compute_seconds: float
    disk_seconds: float
    link_seconds: float
    tokens_per_second: float
    bound_by: str
    """'compute', 'decoding', 'disk' or 'link'."""
    decode_seconds: float = 0.0
    """Of `compute_seconds`: making values of codes."""


def evenly(count: int, total: int) -> tuple[int, ...]:
    """`count` of `total` units, evenly spaced, the last one among them."""
    return tuple(sorted({total - 1 - (i * total) // count for i in range(count)})) if count else ()


def loss_chunk(setting: int | str | None, positions: int, vocab: int) -> int | None:
    """Target positions a piece of the loss, for a setting as `LemaConfig.loss_chunk_size`; None: all at once.

    Args:
        positions: of the whole batch.
        vocab: logits a position.
    """
    if not isinstance(setting, str):
        return setting
    return AUTO_CHUNK if positions * vocab * 4 > LARGE_LOGITS else None


def describe(plan: MemoryPlan) -> dict[str, Any]:
    """JSON-ready."""
    return asdict(plan)
