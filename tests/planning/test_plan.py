"""The memory plan as arithmetic: made-up models, loads and machines, no tensors."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lema.errors import ConfigError
from lema.machine.cuda import CONTEXT_BYTES
from lema.planning.footprint import Footprint
from lema.planning.hardware import Hardware
from lema.planning.plan import Choices, LayerCost, LossCost, MemoryPlan, ModelSizes, Workload, describe, evenly
from lema.planning.planner import make_plan
from lema.planning.step_time import _FAULT_BYTES_PER_S, CPU_EFFICIENCY
from lema.streaming.tiers import place

pytestmark = pytest.mark.timeout(120)

MB, GB = 10**6, 10**9
Planned = Callable[..., MemoryPlan]
SHARE = 0.96
"""Of a host budget that is planned for."""
EQUAL = 1 + 1e-3
"""Estimates closer than this count as equal."""


def model(
    units: tuple[int, ...] | int = 8,
    unit: int = 100 * MB,
    scratch: int = 0,
    head: int = 200 * MB,
    head_streams: bool = True,
    vocab: int = 32_000,
) -> ModelSizes:
    """A model of a few equal layers."""
    return ModelSizes(
        units=units if isinstance(units, tuple) else (unit,) * units,
        scratch=scratch,
        head=head,
        head_streams=head_streams and head > 0,
        vocab=vocab,
        embedding=head,
        rest=2 * MB,
        lora=2 * MB,
    )


def load(
    batch: int = 4,
    seq: int = 256,
    width: int = 2048,
    parameters: int = 50 * MB,
    vocab: int = 32_000,
    temporary: int = 1,
) -> Workload:
    """Costs that grow with tokens, in the proportions of a real layer; `temporary` times as much lives shortly."""

    def layer(rows: int) -> LayerCost:
        tokens = rows * seq
        return LayerCost(
            forward_peak=8 * tokens * width * temporary,
            graph=20 * tokens * width,
            backward_peak=30 * tokens * width * temporary,
            forward_flops=2 * parameters * tokens,
            backward_flops=2 * parameters * tokens,
            kernel_scratch=parameters // 10,
        )

    def loss(positions: int) -> LossCost:
        return LossCost(peak=10 * positions * vocab, flops=4 * positions * vocab * width)

    return Workload(batch, seq, 2 * batch * seq * width, layer, loss)


def cpu(disk: float = 2 * GB, flops: float = 2e11) -> Hardware:
    """A machine without a device."""
    return Hardware("made up", "cpu", 0, 64 * GB, disk, math.inf, {"bfloat16": flops})


def gpu(disk: float = 2 * GB, flops: float = 5e13, link: float = 20 * GB) -> Hardware:
    """A machine with one."""
    return Hardware("made up", "cuda", 24 * GB, 64 * GB, disk, link, {"bfloat16": flops})


def plan_for(
    ram: float | None,
    vram: float | None = None,
    *,
    sizes: ModelSizes | None = None,
    work: Workload | None = None,
    machine: Hardware | None = None,
    **choices: Any,
) -> MemoryPlan:
    """A plan, with all left out made up."""
    return make_plan(
        sizes or model(),
        work or load(),
        machine or (cpu() if vram is None else gpu()),
        dtype="bfloat16",
        ram_budget=None if ram is None else int(ram),
        vram_budget=None if vram is None else int(vram),
        choices=Choices(**choices),
    )


def seconds(plan: MemoryPlan) -> float:
    """Of a step."""
    assert plan.estimate is not None
    return plan.estimate.step_seconds


def check_tiers(plan: MemoryPlan, sizes: ModelSizes) -> None:
    """A unit is in exactly one tier, and only what stays where it is computed has its graph kept."""
    tiers = [*plan.on_device, *plan.in_ram, *plan.from_disk]
    assert sorted(tiers) == list(range(len(sizes.units)))
    assert all(tuple(sorted(tier)) == tier for tier in (plan.on_device, plan.in_ram, plan.from_disk))
    stays, slots = (plan.in_ram, plan.host_slots) if plan.device == "cpu" else (plan.on_device, plan.device_slots)
    shared = [unit for unit in range(len(sizes.units)) if unit not in stays]
    assert set(plan.keep_activations) <= {*stays, *shared[-slots:]}
    if plan.device == "cpu":
        assert plan.on_device == ()
        assert plan.streamed_to_compute == plan.from_disk
    else:
        assert plan.streamed_to_compute == tuple(shared)


def keeps_everything(plan: MemoryPlan, sizes: ModelSizes, work: Workload) -> bool:
    """Plain PEFT: nothing moves after the first step and nothing is cut."""
    slots = plan.host_slots if plan.device == "cpu" else plan.device_slots
    return (
        len(plan.streamed_to_compute) <= slots
        and len(plan.keep_activations) == (0 if sizes.scratch else len(sizes.units))
        and (plan.head, plan.loss_chunk_size, plan.micro_batch_size) == ("resident", None, work.batch)
        and (plan.boundaries, plan.optimizer) == ("device", "device")
    )


def budgets_in(message: str) -> dict[str, int]:
    """Budgets a refusal asks for, in bytes."""
    return {name: int(size) * MB for name, size in re.findall(r"(r?v?ram)_budget to at least (\d+)MB", message)}


# -- made-up worlds ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class World:
    """A model, a load and a machine."""

    sizes: ModelSizes
    work: Workload
    machine: Hardware
    slots: int

    def plan(self, ram: float | None, vram: float | None = None, **choices: Any) -> MemoryPlan:
        """Its plan."""
        choices = {"host_slots": self.slots, "device_slots": self.slots, **choices}
        return plan_for(ram, vram, sizes=self.sizes, work=self.work, machine=self.machine, **choices)

    def budgets(self, ram: float, vram: float = 0.0, **choices: Any) -> tuple[int, int | None]:
        """From the least that works, at 0, to more than enough, at 1."""
        with pytest.raises(ConfigError) as caught:
            self.plan(0, 0 if self.machine.device == "cuda" else None, **choices)
        least = budgets_in(str(caught.value))
        found = {
            name: int(n + share**4 * (self.everything - n)) for (name, n), share in zip(least.items(), (ram, vram))
        }
        return found["ram"], found.get("vram")

    @property
    def everything(self) -> int:
        """More bytes than all of it can take."""
        costs = self.work.layer(self.work.batch)
        layers = len(self.sizes.units) * (costs.graph + self.work.boundary) + 4 * costs.backward_peak
        loss = 4 * self.work.loss(self.work.batch * self.work.seq).peak + 2 * self.sizes.head
        weights = sum(self.sizes.units) + 8 * max(self.sizes.units) + 2 * self.sizes.scratch + self.sizes.rest
        return 2 * (layers + loss + weights + 16 * self.sizes.lora) + 2 * GB


@st.composite
def worlds(draw: st.DrawFn, device: str = "cpu", equal: bool = False) -> World:
    """Small ones, in which every decision can matter."""
    size = st.integers(1, 400).map(lambda n: n * MB)
    count = draw(st.integers(1, 9))
    units = (draw(size),) * count if equal else tuple(draw(st.lists(size, min_size=count, max_size=count)))
    head = draw(st.one_of(st.just(0), size))
    sizes = ModelSizes(
        units=units,
        scratch=draw(st.one_of(st.just(0), size)),
        head=head,
        head_streams=draw(st.booleans()) and head > 0,
        vocab=draw(st.integers(200, 200_000)),
        embedding=draw(st.one_of(st.just(0), size)),
        rest=draw(size),
        lora=draw(st.integers(0, 20)) * MB,
    )
    work = load(
        batch=draw(st.integers(1, 9)),
        seq=draw(st.sampled_from((16, 100, 512))),
        width=draw(st.sampled_from((256, 2048))),
        parameters=draw(st.integers(1, 200)) * MB,
        vocab=sizes.vocab,
    )
    disk, flops = draw(st.sampled_from((GB // 10, 2 * GB, 20 * GB))), draw(st.sampled_from((1e11, 3e12, 1e14)))
    machine = cpu(disk, flops) if device == "cpu" else gpu(disk, flops, draw(st.sampled_from((2 * GB, 20 * GB))))
    return World(sizes, work, machine, draw(st.integers(2, 4)))


shares = st.floats(0.0, 1.0)


# -- even spacing and slots --------------------------------------------------------------------------


def test_evenly_is_even_and_ends_with_the_last() -> None:
    for total in range(1, 60):
        assert evenly(0, total) == ()
        for count in range(1, total + 1):
            chosen = evenly(count, total)
            assert len(chosen) == count
            assert list(chosen) == sorted(set(chosen))
            assert chosen[0] >= 0
            assert chosen[-1] == total - 1
            gaps = {b - a for a, b in zip((-1, *chosen), chosen, strict=False)}
            assert gaps <= {total // count, -(-total // count)}


@given(
    total=st.integers(0, 20),
    own=st.sets(st.integers(0, 19)),
    last=st.sets(st.integers(0, 19)),
    shared=st.integers(2, 5),
)
def test_units_of_their_own_have_slots_of_their_own(total: int, own: set[int], last: set[int], shared: int) -> None:
    units = list(range(total))
    own, last = own & set(units), last & set(units)
    slot_of, count = place(units, own, shared, last)
    passing = [unit for unit in units if unit not in own]
    assert set(slot_of) == set(units)
    assert count == min(shared, len(passing))
    assert {slot_of[unit] for unit in passing} == set(range(count))
    alone = [slot_of[unit] for unit in units if unit in own]
    assert sorted(alone) == list(range(count, count + len(own)))
    ranked = sorted(passing, key=lambda unit: (unit in last, unit))
    assert [slot_of[unit] for unit in ranked] == [rank % max(count, 1) for rank in range(len(ranked))]


# -- what every plan must be -------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(world=worlds(), share=shares)
def test_a_plan_stays_within_its_budget(world: World, share: float) -> None:
    budget, _ = world.budgets(share)
    plan = world.plan(budget)
    check_tiers(plan, world.sizes)
    assert plan.host_peak == sum(plan.host_bytes.values()) <= SHARE * budget
    assert plan.device_peak == 0
    assert min(plan.host_bytes.values()) >= 0
    held = sum(world.sizes.units[unit] for unit in plan.in_ram)
    assert plan.host_bytes["layers kept in RAM"] == held
    assert plan.host_bytes["activations"] >= len(plan.keep_activations) * world.work.layer(plan.micro_batch_size).graph
    assert 1 <= plan.micro_batch_size <= world.work.batch
    assert plan.head_rows <= world.sizes.vocab
    if not world.sizes.head_streams:
        assert plan.head == "resident"
    if world.sizes.scratch:
        assert plan.keep_activations == ()


@settings(max_examples=80, deadline=None)
@given(world=worlds(), first=shares, second=shares)
def test_more_memory_is_never_slower(world: World, first: float, second: float) -> None:
    low, high = (world.budgets(share)[0] for share in sorted((first, second)))
    small, large = world.plan(low), world.plan(high)
    assert seconds(large) <= seconds(small) * EQUAL


@settings(max_examples=60, deadline=None)
@given(world=worlds(equal=True), first=shares, second=shares)
def test_more_memory_never_keeps_fewer_weights(world: World, first: float, second: float) -> None:
    """With all else decided; a step that waits for nothing may keep none at all."""
    rest = {"micro_batch_size": 1, "loss_chunk_size": 64, "head": "resident", "keep_activations": 0}
    low, high = (world.budgets(share, **rest)[0] for share in sorted((first, second)))
    small, large = world.plan(low, **rest), world.plan(high, **rest)
    assert len(large.in_ram) >= len(small.in_ram)


@settings(max_examples=60, deadline=None)
@given(world=worlds("cuda"), ram=shares, vram=shares)
def test_a_plan_for_a_device_stays_within_both_budgets(world: World, ram: float, vram: float) -> None:
    host, device = world.budgets(ram, vram)
    plan = world.plan(host, device)
    check_tiers(plan, world.sizes)
    assert device is not None
    assert plan.host_peak <= SHARE * host
    assert plan.device_peak == sum(plan.device_bytes.values()) <= device
    held = sum(world.sizes.units[unit] for unit in plan.on_device)
    assert plan.device_bytes["layers kept on the device"] == held


@settings(max_examples=40, deadline=None)
@given(world=worlds("cuda", equal=True), ram=st.tuples(shares, shares), vram=st.tuples(shares, shares))
def test_more_of_either_memory_is_never_slower(
    world: World, ram: tuple[float, float], vram: tuple[float, float]
) -> None:
    budgets = [world.budgets(*pair) for pair in zip(sorted(ram), sorted(vram), strict=True)]
    (little, few), (much, many) = budgets
    small = world.plan(little, few)
    for more in ((much, few), (little, many), (much, many)):
        assert seconds(world.plan(*more)) <= seconds(small) * EQUAL


@settings(max_examples=40, deadline=None)
@given(world=st.one_of(worlds(), worlds("cuda")), finite=st.booleans())
def test_where_everything_fits_nothing_streams(world: World, finite: bool) -> None:
    """Also where streaming would be as fast."""
    budget = world.everything if finite else None
    plan = world.plan(budget, budget if world.machine.device == "cuda" else None)
    assert keeps_everything(plan, world.sizes, world.work)
    assert plan.estimate is not None
    assert plan.estimate.disk_seconds == plan.estimate.link_seconds == 0


# -- decisions of the user's -------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [None, 4 * GB, 2 * GB, 1200 * MB, 800 * MB])
@pytest.mark.parametrize(
    "choices",
    [
        *({"ram_layers": count} for count in (0, 3, 8)),
        *({"keep_activations": count} for count in (0, 2, 5, 8)),
        {"ram_layers": 3, "keep_activations": 5},
        {"ram_layers": 5, "keep_activations": 3},
        *({"micro_batch_size": rows} for rows in (1, 3, 4)),
        *({"loss_chunk_size": positions} for positions in (1, 100)),
        *({"head": head} for head in ("resident", "streamed", "chunked")),
        {"head": "chunked", "loss_chunk_size": 7},
        {"exact_loss": True},
        {"host_slots": 4},
        {"boundaries": "host", "optimizer": "host"},
    ],
    ids=str,
)
def test_a_decision_is_honoured_or_refused(choices: dict[str, Any], budget: int | None) -> None:
    if budget is not None:
        refused = _refusal(budget, **choices)
        if refused is not None:
            assert "does not fit into ram_budget" in refused
            return
    plan = plan_for(budget, **choices)
    counts = {"ram_layers": len(plan.in_ram), "keep_activations": len(plan.keep_activations)}
    for name, value in choices.items():
        if name == "exact_loss":
            assert plan.loss_chunk_size is None
            assert plan.head != "chunked"
        else:
            assert counts.get(name, getattr(plan, name, None)) == value


def _refusal(ram: int, **choices: Any) -> str | None:
    try:
        plan_for(ram, **choices)
    except ConfigError as error:
        return str(error)
    return None


@pytest.mark.parametrize("name", ["ram_layers", "keep_activations", "device_layers"])
def test_more_layers_than_there_are_means_all(name: str) -> None:
    for vram in (None, 100 * GB):
        plan = plan_for(100 * GB, vram, **{name: 99})
        kept = {"ram_layers": plan.in_ram, "device_layers": plan.on_device, "keep_activations": plan.keep_activations}
        if (vram is None) == (name == "ram_layers") or name == "keep_activations":
            assert len(kept[name]) == 8


def test_on_a_device_a_head_stays_or_comes_in_chunks() -> None:
    """As a whole it is streamed for the CPU only."""
    for vram in (None, 20 * GB, 2 * GB, *(CONTEXT_BYTES + n * MB for n in (820, 520, 440))):
        plan = plan_for(None, vram, machine=gpu())
        assert plan.head != "streamed"
        held = {"resident": model().head, "chunked": 2 * plan.head_rows * model().head // model().vocab}[plan.head]
        assert plan.device_bytes["rest of the model"] == model().rest + held
    assert plan.head == "chunked"
    with pytest.raises(ConfigError, match="beside a device the head is 'resident' or 'chunked'"):
        plan_for(None, 20 * GB, head="streamed")


def test_a_device_has_room_for_its_context_and_two_workspaces_of_the_largest_cards() -> None:
    parts = plan_for(None, 20 * GB, machine=gpu()).device_bytes
    assert parts["overhead"] >= 2 * 32 * 2**20
    assert parts["context"] == CONTEXT_BYTES >= 426 * 2**20
    assert plan_for(None, 20 * GB, machine=dataclasses.replace(gpu(), device="xpu")).device_bytes["context"] == 0


def test_a_head_in_chunks_comes_from_ram_where_there_is_room() -> None:
    rest: dict[str, Any] = {"machine": gpu(disk=GB // 10, link=2 * GB), "head": "chunked"}
    roomy, tight = (plan_for(ram, CONTEXT_BYTES + 440 * MB, **rest) for ram in (20 * GB, 400 * MB))
    assert roomy.head_in_ram
    assert roomy.host_bytes["head"] == model().head
    assert not tight.head_in_ram
    assert tight.host_bytes["head"] < model().head
    assert roomy.estimate is not None
    assert tight.estimate is not None
    assert tight.estimate.disk_seconds - roomy.estimate.disk_seconds >= model().head / (GB // 10) * 0.99


@pytest.mark.parametrize("budget", [None, 50 * GB, 2 * GB, GB, 700 * MB])
def test_an_exact_loss_stays_in_one_piece(budget: int | None) -> None:
    for vram in (None, 2 * GB, CONTEXT_BYTES + 720 * MB):
        try:
            plan = plan_for(budget, vram, exact_loss=True)
        except ConfigError:
            continue
        assert plan.loss_chunk_size is None
        assert plan.head in ("resident", "streamed")
    with pytest.raises(ConfigError):
        plan_for(600 * MB, exact_loss=True)
    assert plan_for(600 * MB).loss_chunk_size is not None, "cut, it fits"


def test_activations_are_not_kept_where_weights_are_converted_at_each_use() -> None:
    sizes = model(scratch=50 * MB)
    for ram, vram in ((None, None), (10 * GB, None), (10 * GB, 10 * GB)):
        assert plan_for(ram, vram, sizes=sizes).keep_activations == ()
    with pytest.raises(ConfigError, match=r"keep_activations=3 .*converted at every use.*keep_activations=0") as caught:
        plan_for(10 * GB, sizes=sizes, keep_activations=3)
    assert "dtype" in str(caught.value)
    assert plan_for(10 * GB, sizes=sizes, keep_activations=0).keep_activations == ()


@pytest.mark.parametrize("vram", [None, 100 * GB], ids=["cpu", "cuda"])
def test_more_kept_activations_than_kept_weights_are_refused(vram: int | None) -> None:
    name = "ram_layers" if vram is None else "device_layers"
    with pytest.raises(ConfigError, match=rf"keep_activations=6 .*{name}=2 and \w+=3: ") as caught:
        plan_for(100 * GB, vram, keep_activations=6, host_slots=3, device_slots=3, **{name: 2})
    most = re.search(r"keep_activations to at most (\d+), or leave (\w+) unset", str(caught.value))
    assert most is not None
    assert most[2] == name
    for keep, layers in ((int(most[1]), 2), (6, None)):
        plan = plan_for(100 * GB, vram, keep_activations=keep, host_slots=3, device_slots=3, **{name: layers})
        assert len(plan.keep_activations) == keep
    with pytest.raises(ConfigError):
        plan_for(None, vram, keep_activations=int(most[1]) + 1, host_slots=3, device_slots=3, **{name: 2})


@pytest.mark.parametrize("sizes", [model(head_streams=False), model(head=0)], ids=["stored otherwise", "no head"])
def test_a_head_that_cannot_stream_stays(sizes: ModelSizes) -> None:
    for budget in (None, 4 * GB, 1200 * MB, 900 * MB):
        assert plan_for(budget, sizes=sizes).head == "resident"
    for head in ("streamed", "chunked"):
        with pytest.raises(ConfigError, match=rf"head='{head}' .*Set head='resident'"):
            plan_for(4 * GB, sizes=sizes, head=head)
    assert plan_for(4 * GB, sizes=sizes, head="resident").head == "resident"
    assert plan_for(600 * MB).head == "chunked", "a head that can stream does, where memory is short"


def test_on_cpu_boundaries_and_optimizer_of_the_host_take_as_much() -> None:
    chosen = [plan_for(None, keep_activations=0, boundaries=where, optimizer=where) for where in ("device", "host")]
    assert chosen[0].host_peak == chosen[1].host_peak
    assert chosen[0].host_bytes["boundaries"] == 8 * load().boundary


def test_inputs_of_layers_are_counted_once() -> None:
    """A recomputed layer's own; and a kept graph's, unless that is the output in the graph before."""
    work = load()
    rest: dict[str, Any] = {"work": work, "ram_layers": 4}  # 1, 3, 5, 7 beside two slots, 4 and 6
    for keep, kept, inputs in ((0, (), 8), (1, (7,), 8), (4, (4, 5, 6, 7), 5), (6, (1, 3, 4, 5, 6, 7), 4)):
        plan = plan_for(None, keep_activations=keep, **rest)
        assert plan.keep_activations == kept
        assert plan.host_bytes["boundaries"] == inputs * work.boundary
        cut = plan_for(None, keep_activations=keep, micro_batch_size=1, **rest)
        assert cut.host_bytes["boundaries"] == 8 * work.boundary, "put together from pieces, it is another tensor"
    away = plan_for(None, 20 * GB, work=work, device_layers=4, keep_activations=6, boundaries="host")
    assert away.device_bytes["boundaries"] == (2 + 2) * work.boundary


def test_a_micro_batch_larger_than_the_batch_is_the_batch() -> None:
    large, whole = (plan_for(None, micro_batch_size=rows, keep_activations=0) for rows in (64, 4))
    assert (large.micro_batch_size, large.host_peak) == (64, whole.host_peak)
    assert seconds(large) == seconds(whole)


# -- refusals ----------------------------------------------------------------------------------------


def choices_in(message: str) -> dict[str, int] | None:
    """Decisions that a refusal says fit."""
    found = re.search(r"\. What fits: ((?:\w+=\d+(?:, |$))+)", message)
    return {name: int(value) for name, value in re.findall(r"(\w+)=(\d+)", found[1])} if found else None


def parts_in(message: str) -> float:
    """Sum of the parts a refusal lists, in bytes."""
    units = {"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
    listed = message.split("(")[1].split(")")[0]
    return sum(float(size) * units[unit] for size, unit in re.findall(r"([\d.]+) ([KMGT]?B)", listed))


def check_refusal(error: ConfigError, plan: Planned, ram: int, vram: int | None, **choices: Any) -> None:
    """What a refusal advises works."""
    message = str(error)
    assert f"ram_budget {_said(ram)}" in message
    assert vram is None or f"vram_budget {_said(vram)}" in message
    asked = budgets_in(message)
    assert asked
    more = {"ram": ram, "vram": vram, **asked}
    assert more["ram"] >= ram
    fits = plan(more["ram"], more["vram"], **choices)
    for name, value in asked.items():
        less = {**more, name: int(value * 0.98) - 2 * MB}
        if len(asked) == 1 and not choices:
            with pytest.raises(ConfigError):
                plan(less["ram"], less["vram"], **choices)
    assert fits is not None
    needs = [float(n) * {"MB": MB, "GB": GB}[unit] for n, unit in re.findall(r"([\d.]+) ([MG]B) of V?RAM", message)]
    assert parts_in(message) == pytest.approx(sum(needs), rel=0.02)
    others = choices_in(message)
    if others is None:
        assert "max_seq_length, batch_size or lora_rank" in message
    else:
        assert plan(ram, vram, **{**choices, **others}) is not None
        for name in choices.keys() & others.keys():
            alone = {**dict.fromkeys(choices.keys() & others.keys()), name: others[name]}
            assert plan(ram, vram, **{**choices, **alone}) is not None


def _said(nbytes: int) -> str:
    from lema.machine.memory import format_bytes

    return format_bytes(nbytes)


@pytest.mark.parametrize("budget", [0, 1, 100 * MB, 300 * MB])
@pytest.mark.parametrize("choices", [{}, {"micro_batch_size": 4}, {"head": "resident"}, {"exact_loss": True}], ids=str)
def test_nothing_fits(budget: int, choices: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="this step does not fit") as caught:
        plan_for(budget, **choices)
    check_refusal(caught.value, plan_for, budget, None, **choices)
    assert choices_in(str(caught.value)) is None


def test_the_least_is_what_a_step_takes_without_anything_kept() -> None:
    with pytest.raises(ConfigError) as caught:
        plan_for(100 * MB, sizes=model(vocab=1000), work=load(batch=8, seq=1024, vocab=1000, temporary=4), host_slots=3)
    message = str(caught.value)
    for part in ("micro_batch_size=1", "the head streamed", "slots 300 MB", "overhead 117 MB"):
        assert part in message
    assert "layers kept in RAM" not in message


@pytest.mark.parametrize(
    ("ram", "choices"),
    [
        (900 * MB, {"ram_layers": 8}),
        (900 * MB, {"keep_activations": 8}),
        (900 * MB, {"ram_layers": 8, "keep_activations": 8}),
        (900 * MB, {"ram_layers": 8, "micro_batch_size": 4}),
        (100 * MB, {"ram_layers": 8}),
        (100 * MB, {"ram_layers": 8, "keep_activations": 2, "head": "resident"}),
    ],
    ids=str,
)
def test_layers_that_do_not_fit(ram: int, choices: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        plan_for(ram, **choices)
    kept = ", ".join(f"{n}={v}" for n, v in choices.items() if n in ("ram_layers", "keep_activations"))
    assert str(caught.value).startswith(f"{kept} does not fit into ram_budget")
    check_refusal(caught.value, plan_for, ram, None, **choices)
    assert (choices_in(str(caught.value)) is None) == (ram == 100 * MB)


@pytest.mark.parametrize(
    ("ram", "vram", "asked"),
    [
        (100 * MB, 20 * GB, {"ram"}),
        (20 * GB, 100 * MB, {"vram"}),
        (100 * MB, 100 * MB, {"ram", "vram"}),
    ],
)
@pytest.mark.parametrize("choices", [{}, {"device_layers": 4}, {"optimizer": "host", "boundaries": "host"}], ids=str)
def test_nothing_fits_on_a_device(ram: int, vram: int, asked: set[str], choices: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        plan_for(ram, vram, **choices)
    assert budgets_in(str(caught.value)).keys() == asked
    check_refusal(caught.value, plan_for, ram, vram, **choices)


@settings(max_examples=60, deadline=None)
@given(
    world=st.one_of(worlds(), worlds("cuda", equal=True)),
    ram=shares,
    vram=shares,
    kept=st.fixed_dictionaries(
        {}, optional={name: st.integers(0, 9) for name in ("ram_layers", "device_layers", "keep_activations")}
    ),
)
def test_what_a_refusal_advises_works(world: World, ram: float, vram: float, kept: dict[str, int]) -> None:
    on_cpu = world.machine.device == "cpu"
    budgets = (int(ram**2 * world.everything), None if on_cpu else int(vram**2 * world.everything))
    if on_cpu:
        kept.pop("device_layers", None)
    try:
        world.plan(*budgets, **kept)
    except ConfigError as error:
        if "is not possible" in str(error):
            assert kept["keep_activations"] > 0
            return
        check_refusal(error, world.plan, *budgets, **kept)


# -- micro-batches -----------------------------------------------------------------------------------


@pytest.mark.parametrize("vram", [None, 1], ids=["cpu", "cuda"])
def test_the_micro_batch_halves_until_it_fits(vram: int | None) -> None:
    """With nothing else to decide, it is the largest that fits."""
    work = load(batch=8, seq=1024, temporary=4)
    rest = {"head": "resident", "loss_chunk_size": 64, "boundaries": "device", "optimizer": "device"}
    rest |= {"ram_layers": 0, "device_layers": 0, "keep_activations": 0}
    seen = set()
    for budget in range(600 * MB, 6000 * MB, 100 * MB):
        budgets = (budget, None) if vram is None else (100 * GB, budget)
        try:
            plan = plan_for(*budgets, work=work, **rest)
        except ConfigError:
            assert not seen
            continue
        seen.add(plan.micro_batch_size)
        if plan.micro_batch_size < 8:
            with pytest.raises(ConfigError):
                plan_for(*budgets, work=work, micro_batch_size=2 * plan.micro_batch_size, **rest)
    assert seen == {1, 2, 4, 8}


def test_uneven_micro_batches_do_no_more_work() -> None:
    work = load(batch=5)
    plans = [plan_for(None, work=work, micro_batch_size=rows, loss_chunk_size=64) for rows in (5, 3, 1)]
    whole, cut, single = plans
    assert whole.estimate is not None
    assert cut.estimate is not None
    assert cut.estimate.compute_seconds == pytest.approx(whole.estimate.compute_seconds, rel=0.05)
    assert seconds(whole) < seconds(cut) < seconds(single), "it is only less efficient"
    assert len(cut.keep_activations) == len(whole.keep_activations) == 8
    fewer = plan_for(None, work=work, micro_batch_size=3, loss_chunk_size=64, keep_activations=7)
    graph = cut.host_bytes["activations"] - fewer.host_bytes["activations"]
    assert graph == work.layer(5).graph, "of five rows, however cut"


def test_a_smaller_micro_batch_is_taken_where_it_saves_time() -> None:
    """Its activations leave room for weights that would otherwise be read at every step."""
    work, slow = load(batch=8, seq=1024, parameters=MB), cpu(disk=GB // 10)
    rest: dict[str, Any] = {"head": "resident", "loss_chunk_size": 64, "keep_activations": 0}
    large = plan_for(1900 * MB, work=work, machine=slow, micro_batch_size=8, **rest)
    free = plan_for(1900 * MB, work=work, machine=slow, **rest)
    assert free.micro_batch_size < 8
    assert len(free.in_ram) > len(large.in_ram)
    assert seconds(free) < seconds(large)


# -- a device ----------------------------------------------------------------------------------------


def test_boundaries_and_optimizer_go_to_the_host_where_the_device_is_short() -> None:
    sizes, work = dataclasses.replace(model(), lora=20 * MB), load(batch=8, seq=512)
    short_of = 620 * MB + CONTEXT_BYTES
    plans = [plan_for(20 * GB, vram, sizes=sizes, work=work) for vram in (20 * GB, 920 * MB + CONTEXT_BYTES, short_of)]
    places = [(plan.boundaries, plan.optimizer) for plan in plans]
    assert places[0] == ("device", "device")
    assert places[-1] == ("host", "host")
    short = plans[-1]
    assert short.device_bytes["boundaries"] == 2 * work.boundary
    assert short.host_bytes["boundaries"] == (8 - len(short.keep_activations)) * work.boundary
    assert short.device_bytes["adapters"] == 8 * sizes.lora
    assert short.host_bytes["optimizer"] == 16 * sizes.lora
    assert "boundaries" not in plans[0].host_bytes
    for name in ("boundaries", "optimizer"):
        with pytest.raises(ConfigError):
            plan_for(20 * GB, short_of, sizes=sizes, work=work, **{name: "device"})


def test_the_device_comes_first_then_ram() -> None:
    """What does not fit on the device stays in RAM, and the disk gets the rest."""
    rest: dict[str, Any] = {"keep_activations": 0, "machine": gpu(disk=GB // 10, link=2 * GB)}
    vram = CONTEXT_BYTES + 820 * MB
    plan = plan_for(600 * MB, vram, **rest)
    assert plan.on_device
    assert plan.in_ram or plan.head_in_ram
    assert plan.from_disk
    assert plan_for(2 * GB, vram, **rest).from_disk == ()
    assert set(plan_for(2 * GB, vram, device_layers=2, **rest).on_device) == {3, 7}
    chosen = plan_for(2 * GB, vram, device_layers=2, ram_layers=3, **rest)
    assert (len(chosen.on_device), len(chosen.in_ram), len(chosen.from_disk)) == (2, 3, 3)


# -- time --------------------------------------------------------------------------------------------


def test_the_estimate_is_the_formula() -> None:
    """step = max(forward, disk + head's disk) + head + max(recomputation and backward, disk)."""
    work = Workload(
        batch=2,
        seq=10,
        boundary=1000,
        layer=lambda rows: LayerCost(10, 2000, 3000, 10**9 * rows, 3 * 10**9 * rows, 0),
        loss=lambda positions: LossCost(10, 10**8 * positions),
    )
    sizes = model(units=5, unit=3 * GB, head=GB)
    machine = Hardware("made up", "cpu", 0, GB, 1.0 * GB, math.inf, {"bfloat16": 1e9 / CPU_EFFICIENCY})
    rest: dict[str, Any] = {"ram_layers": 2, "keep_activations": 1, "head": "streamed"}
    plan = plan_for(None, sizes=sizes, work=work, machine=machine, **rest)
    # 5 layers, two of them in RAM and two in the slots at each turn: one is read twice; one is not recomputed
    assert plan.from_disk == (0, 1, 3)
    assert plan.estimate is not None
    assert plan.estimate.disk_seconds == pytest.approx(2 * 3 + 1)
    few = 1 + 16 / 20  # matmuls of 20 rows are less efficient
    assert plan.estimate.compute_seconds == pytest.approx(few * (10 + 2 + 30 + 8))
    assert seconds(plan) == pytest.approx(few * (10 + 2 + 38))
    assert plan.estimate.bound_by == "compute"
    slow = dataclasses.replace(machine, disk_bytes_per_s=0.1 * GB)
    plan = plan_for(None, sizes=sizes, work=work, machine=slow, **rest)
    assert seconds(plan) == pytest.approx((30 + 10) + few * (2 + 38))
    slower = dataclasses.replace(machine, disk_bytes_per_s=0.01 * GB)
    plan = plan_for(None, sizes=sizes, work=work, machine=slower, **rest)
    assert seconds(plan) == pytest.approx((300 + 100) + few * 2 + 300)
    assert plan.estimate is not None
    assert plan.estimate.bound_by == "disk"
    assert plan.estimate.tokens_per_second == pytest.approx(20 / seconds(plan))


def test_the_estimate_on_a_device_counts_the_link() -> None:
    work = Workload(2, 10, 4 * GB, lambda rows: LayerCost(1, 9 * GB, 2, 10**9 * rows, 10**9 * rows, 0),
                    lambda positions: LossCost(10, 0))  # fmt: skip
    sizes = dataclasses.replace(model(units=6, unit=3 * GB), lora=GB)
    machine = Hardware("made up", "cuda", GB, GB, 3.0 * GB, 1.0 * GB, {"bfloat16": 1e9})
    rest: dict[str, Any] = {"device_layers": 1, "ram_layers": 5, "keep_activations": 2, "head": "resident"}
    plan = plan_for(None, sizes=sizes, work=work, machine=machine, **rest)
    # three layers cross the link twice; four are recomputed
    assert plan.estimate is not None
    assert plan.estimate.link_seconds == pytest.approx(18)
    few = 1 + 16 / 20
    assert seconds(plan) == pytest.approx(few * (12 + 12 + 8))
    away = plan_for(None, sizes=sizes, work=work, machine=machine, boundaries="host", optimizer="host", **rest)
    assert away.estimate is not None
    assert away.estimate.link_seconds == pytest.approx(2 * (9 + 16)), "with the inputs of four layers each way"
    adam = 28 / 10 + 8  # its own traffic in RAM; gradients one way, values the other
    assert seconds(away) == pytest.approx(max(few * 12, 25) + adam + max(few * 20, 25))
    read = plan_for(None, sizes=sizes, work=work, machine=machine, **{**rest, "ram_layers": 0})
    assert read.estimate is not None
    assert read.estimate.disk_seconds == pytest.approx(2 * 3)
    pieces = plan_for(None, sizes=sizes, work=work, machine=machine, **{**rest, "head": "chunked"})
    assert seconds(pieces) - seconds(plan) == pytest.approx(0.2), "the head crosses the link as well"


def test_kept_activations_cost_their_pages_unless_the_heap_keeps_them() -> None:
    rest: dict[str, Any] = {"ram_layers": 6, "keep_activations": 4, "loss_chunk_size": 64, "head": "resident"}
    graphs = 4 * load().layer(4).graph
    given_back, kept = plan_for(None, micro_batch_size=4, **rest), plan_for(60 * GB, micro_batch_size=4, **rest)
    assert (given_back.keeps_idle_heap, kept.keeps_idle_heap) == (False, True)
    assert seconds(given_back) - seconds(kept) == pytest.approx(graphs / _FAULT_BYTES_PER_S)
    fast = cpu(disk=50 * GB, flops=2e13)  # recomputing is cheaper than new pages
    plans = [plan_for(size, machine=fast) for size in range(GB, 5 * GB, GB // 4)]
    assert any(plan.keep_activations for plan in plans)
    assert all(plan.keeps_idle_heap for plan in plans if plan.keep_activations)
    assert all(later <= earlier * 1.002 for earlier, later in itertools.pairwise(map(seconds, plans)))


@pytest.mark.long
def test_shapes_of_seventy_billion_are_planned_in_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A moment is a number of looks at a plan's bytes, which take some tens of microseconds each on any machine."""
    looked = 0
    real = Footprint.host

    def host(self: Footprint, plan: MemoryPlan) -> dict[str, int]:
        nonlocal looked
        looked += 1
        return real(self, plan)

    monkeypatch.setattr(Footprint, "host", host)
    sizes = ModelSizes((1712 * MB,) * 80, 0, 2100 * MB, True, 128_256, 2100 * MB, MB, 200 * MB)
    work = load(batch=16, seq=1024, width=8192, parameters=856 * MB, vocab=128_256)
    for machine, ram, vram in (
        (cpu(), 64 * GB, None),
        (gpu(), 64 * GB, 80 * GB),
        (gpu(), 64 * GB, 24 * GB),
        (gpu(), 16 * GB, 4 * GB),
    ):
        looked = 0
        if vram == 4 * GB:
            with pytest.raises(ConfigError):
                plan_for(ram, vram, sizes=sizes, work=work, machine=machine)
        else:
            check_tiers(plan_for(ram, vram, sizes=sizes, work=work, machine=machine), sizes)
        assert 0 < looked <= 500 * len(sizes.units)


def test_a_plan_can_be_written_down() -> None:
    written = json.loads(json.dumps(describe(plan_for(2 * GB))))
    assert written["device"] == "cpu"
    assert written["host_bytes"]["overhead"] == 112 << 20
    assert written["estimate"]["step_seconds"] > 0


def test_a_plan_knows_what_the_loss_takes() -> None:
    """Without it a device that is full would never be told of loss_chunk_size."""
    plan = plan_for(64 * GB, 8 * GB)
    assert 0 < plan.loss_bytes <= plan.device_bytes["activations"]
