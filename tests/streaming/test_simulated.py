"""The second tier on a device whose copies come late: right bytes, no faults, and every guard is needed.

One driver sends random accesses through files, host slots and device slots, and reads each slot in a stream of its
own, long after the access ended. It must find nothing wrong with the tier as it is, and something wrong with every
tier from which one guard was taken.
"""

from __future__ import annotations

import errno
import gc
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig

from families import save_tiny
from helpers import strategy_plan
from lema import LemaTrainer
from lema.config import LemaConfig
from lema.errors import ReadError, StreamingError
from lema.models.lora import LoRAManager
from lema.models.transformers_adapter import TransformersAdapter
from lema.storage import reader as reader_module
from lema.storage.index import GlobalBinaryIndex
from lema.streaming.device_tier import ComputeWaits, DeviceTier
from lema.streaming.schedule import Access, AccessSchedule, Phase
from lema.streaming.slot_cache import Load
from lema.streaming.weight_store import WeightStore
from simulated import SimulatedDevice, SimulatedEvent, SimulatedStream
from simulated_tiers import PAUSE, Run, Shape, drive, hold

pytestmark = pytest.mark.timeout(60)


# --- what streams and events mean -----------------------------------------------------------------------


@pytest.fixture
def streams() -> Iterator[tuple[SimulatedStream, SimulatedStream]]:
    pair = SimulatedStream("lema-sim-a", lambda: 0.0), SimulatedStream("lema-sim-b", lambda: 0.0)
    yield pair
    for stream in pair:
        stream.close()


def test_an_event_never_recorded_is_complete(streams: tuple[SimulatedStream, SimulatedStream]) -> None:
    a, _ = streams
    event, ran = SimulatedEvent(), threading.Event()
    event.synchronize()
    a.wait_event(event)
    a.enqueue(ran.set)
    assert ran.wait(10)


def test_a_wait_means_the_last_record_at_the_time_of_the_call(streams: tuple[SimulatedStream, SimulatedStream]) -> None:
    a, b = streams
    event = SimulatedEvent()
    before, first, second = (threading.Event() for _ in range(3))
    b.wait_event(event)  # nothing recorded yet: does not wait for what comes
    b.enqueue(before.set)
    gates = [hold(a)]
    a.record_event(event)
    b.wait_event(event)
    b.enqueue(first.set)
    gates.append(hold(a))
    a.record_event(event)  # recorded again: those who wait already are not held longer
    b.wait_event(event)
    b.enqueue(second.set)
    assert before.wait(10)
    assert not first.wait(0.02)
    gates[0].set()
    assert first.wait(10)
    assert not second.wait(0.02)
    gates[1].set()
    assert second.wait(10)
    event.synchronize()


def test_synchronize_waits_for_the_last_record(streams: tuple[SimulatedStream, SimulatedStream]) -> None:
    a, _ = streams
    event, passed = SimulatedEvent(), threading.Event()
    gate = hold(a)
    a.record_event(event)
    thread = threading.Thread(target=lambda: (event.synchronize(), passed.set()), daemon=True)
    thread.start()
    assert not passed.wait(0.02)
    gate.set()
    assert passed.wait(10)


def test_a_stream_runs_in_order(streams: tuple[SimulatedStream, SimulatedStream]) -> None:
    a, _ = streams
    order: list[int] = []
    for number in range(50):
        a.enqueue(lambda number=number: order.append(number))
    a.drain()
    assert order == list(range(50))


def test_a_copy_over_bytes_that_are_being_read_is_a_fault() -> None:
    device = SimulatedDevice(longest_pause=0.0, blocking=False)
    slot, host = device.device_buffer(64), torch.zeros(64, dtype=torch.uint8)
    reading, go_on = threading.Event(), threading.Event()

    def read(_: torch.Tensor) -> None:
        reading.set()
        go_on.wait(10)

    device.read(slot, read)
    assert reading.wait(10)
    device.copy(slot, host, device.copy_stream())
    device.copy_stream().drain()
    go_on.set()
    with pytest.raises(StreamingError, match="overwritten while it was read"):
        device.close()


def test_a_read_of_bytes_that_are_being_copied_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    device = SimulatedDevice(longest_pause=0.0, blocking=False)
    slot, host = device.device_buffer(64), torch.zeros(64, dtype=torch.uint8)
    copying, go_on = threading.Event(), threading.Event()

    def pause() -> float:
        if threading.current_thread() is device.copy_stream()._thread and device._copying:
            copying.set()
            go_on.wait(5)
        return 0.0

    monkeypatch.setattr(device, "_pause", pause)
    slot.zero_()
    device.copy(slot, host, device.copy_stream())
    assert copying.wait(10)
    seen: list[bool] = []
    device.read(slot, lambda source: seen.append(bool((source == 0xFF).all())))
    device.compute_stream().drain()
    go_on.set()
    assert seen == [True], "what is being copied holds poison until it is whole"
    with pytest.raises(StreamingError, match="before its copy had ended"):
        device.close()


def test_a_blocking_device_lets_ordinary_code_read_after_acquire() -> None:
    device = SimulatedDevice(seed=1, longest_pause=0.01)
    slot, host = device.device_buffer(64), torch.arange(64, dtype=torch.uint8)
    ready = device.event()
    for shift in range(20):
        device.copy(slot, host + shift, device.copy_stream())
        device.copy_stream().record_event(ready)
        device.compute_stream().wait_event(ready)
        device.ready_for_compute()
        assert torch.equal(slot, host + shift)
    device.close()


# --- the driver -------------------------------------------------------------------------------------------


# --- the tier as it is ------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.builds(
        Shape,
        seed=st.integers(0, 2**20),
        units=st.integers(1, 7),
        host_slots=st.integers(1, 4),
        device_slots=st.integers(1, 4),
        depth=st.integers(0, 4),
        readers=st.integers(1, 3),
        failures=st.sampled_from([0.0, 0.0, 0.1]),
    )
)
def test_every_read_of_a_slot_finds_its_unit(tmp_path_factory: pytest.TempPathFactory, shape: Shape) -> None:
    assert drive(tmp_path_factory.getbasetemp(), shape) == []


def test_an_error_at_one_place_of_the_file_comes_to_its_unit_until_it_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path, Shape(3, units=6))
    extent = run.layouts[4].extents[0]
    bad = extent.offset + extent.nbytes // 2
    assert extent.nbytes > 2000, "so that no read of a neighbour comes there"
    real, broken = os.preadv, threading.Event()

    def preadv(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        if broken.is_set() and offset <= bad < offset + len(buffers[0]):
            raise OSError(errno.EIO, "Input/output error")
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(reader_module.os, "preadv", preadv)
    plan = AccessSchedule.inference(6)
    run.predict(plan)
    broken.set()
    for _ in range(2):
        run.sweep(plan.accesses[:4])
        for _ in range(3):
            with pytest.raises(ReadError, match="'unit4'"):
                run.tier.acquire(4, Phase.FORWARD)
        run.sweep(plan.accesses[5:])
    broken.clear()
    run.sweep(plan.accesses)
    assert run.end() == []


def test_misuse_of_the_tier_is_refused(tmp_path: Path) -> None:
    run = Run(tmp_path, Shape(1, units=4))
    with pytest.raises(StreamingError):
        run.tier.release(0)
    run.acquire(Access(0, Phase.FORWARD))
    for unit in (0, 2):
        with pytest.raises(StreamingError):
            run.tier.acquire(unit, Phase.FORWARD)
    run.tier.release(0)
    with pytest.raises(StreamingError):
        run.tier.release(0)
    assert run.end() == []
    with pytest.raises(StreamingError, match="closed"):
        run.tier.acquire(0, Phase.FORWARD)


def test_close_reaches_an_acquire_that_waits_for_a_disk_that_never_answers(tmp_path: Path) -> None:
    run = Run(tmp_path, Shape(1))
    hanging: list[Load] = []
    run.host._fill = hanging.append
    errors: list[BaseException] = []

    def ask() -> None:
        try:
            run.tier.acquire(0, Phase.FORWARD)
        except StreamingError as error:
            errors.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    while not hanging:
        time.sleep(0.001)
    run.tier.close()
    thread.join(10)
    assert not thread.is_alive() and len(errors) == 1
    assert run.end() == []


def test_stop_ends_the_copier_and_the_next_access_starts_it_again(tmp_path: Path) -> None:
    def copiers() -> set[threading.Thread]:
        return {thread for thread in threading.enumerate() if thread.name == "lema-copier"}

    before = copiers()
    run = Run(tmp_path, Shape(1))
    for _ in range(3):
        run.sweep(AccessSchedule.training(5).accesses)
        assert len(copiers() - before) == 1
        run.abort()
        assert copiers() <= before
    assert run.end() == []


def test_the_copier_can_be_stopped_from_its_own_thread(tmp_path: Path) -> None:
    """The garbage collector may end a forgotten manager in any thread."""
    stopped = threading.Event()

    class StopsInTheMiddle(SimulatedDevice):
        def copy(self, *args: Any) -> None:
            super().copy(*args)
            if not stopped.is_set():
                run.tier.stop()
                stopped.set()

    run = Run(tmp_path, Shape(1), device=StopsInTheMiddle)
    run.sweep(AccessSchedule.training(5).accesses)
    assert stopped.is_set()
    assert run.end() == []


def test_a_device_that_fails_is_told_to_who_waits_and_may_be_asked_again(tmp_path: Path) -> None:
    class FailsTwice(SimulatedDevice):
        failures = 2

        def copy(self, *args: Any) -> None:
            if self.failures:
                self.failures -= 1
                raise RuntimeError("device lost")
            super().copy(*args)

    run = Run(tmp_path, Shape(1, depth=0), device=FailsTwice)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="device lost"):
            run.tier.acquire(0, Phase.FORWARD)
    run.sweep(AccessSchedule.training(5).accesses)
    assert run.end() == []


def test_no_device_slot_is_loaded_more_often_than_the_schedule_says(tmp_path: Path) -> None:
    for shape in (Shape(1, units=6, host_slots=3), Shape(2, units=6, device_slots=3), Shape(3, units=6, depth=4)):
        run = Run(tmp_path, shape)
        plan = AccessSchedule.training(6)
        loads = []
        for _ in range(4):
            run.predict(plan)
            run.sweep(plan.accesses)
            loads.append(run.tier.cache.loads)
        assert run.end() == []
        assert {b - a for a, b in pairwise(loads[1:])} == {2 * (6 - shape.device_slots)}


# --- what the device waits ---


def test_waiting_is_what_the_device_stood_still_and_not_what_the_host_did() -> None:
    device = SimulatedDevice(longest_pause=0.0, blocking=False)
    waits, copies, busy = ComputeWaits(device), device.copy_stream(), torch.zeros(1)

    def access(computes: float, copy_takes: float) -> float:
        before, ready = waits.seconds, device.event()
        device.read(busy, lambda _: time.sleep(computes))
        copies.enqueue(lambda: time.sleep(copy_takes))
        copies.record_event(ready)
        pair = waits.begin()
        ready.synchronize()  # the host waits in any case
        device.compute_stream().wait_event(ready)
        waits.end(pair)
        device.compute_stream().drain()
        return waits.seconds - before

    assert access(computes=0.3, copy_takes=0.1) < 0.1
    assert access(computes=0.0, copy_takes=0.3) > 0.2
    device.close()


# --- every guard is needed -------------------------------------------------------------------------------


class Deaf:
    """A stream on which waiting does nothing."""

    def __init__(self, stream: SimulatedStream) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def wait_event(self, event: SimulatedEvent) -> None:
        pass


class CopiesDoNotWaitForFree(SimulatedDevice):
    def copy_stream(self, name: str = "weights") -> Any:
        return Deaf(self._copy)


class ComputeDoesNotWaitForReady(SimulatedDevice):
    def compute_stream(self) -> Any:
        return Deaf(self._compute)


class _Hasty(SimulatedEvent):
    def synchronize(self) -> None:
        pass


class HostSlotIsReleasedBeforeTheCopyEnded(SimulatedDevice):
    def event(self) -> SimulatedEvent:
        return _Hasty()


class FreeIsRecordedAfterRelease(DeviceTier):
    def release(self, unit: int) -> None:
        self.cache.release(unit)
        self._backend.compute_stream().record_event(self._free[self.cache.slot_of[unit]])


class FreeIsNeverRecorded(DeviceTier):
    def release(self, unit: int) -> None:
        self.cache.release(unit)


class ReadyIsRecordedAfterTheReport(DeviceTier):
    """The copy stream takes records down, and the report of the load is what lets them through."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.late: list[SimulatedEvent] = []
        stream = self._stream
        self._stream = LateRecords(stream, self.late)  # type: ignore[assignment,arg-type]
        report = self.cache.finished

        def finished(load: Load, error: BaseException | None = None) -> None:
            report(load, error)
            time.sleep(PAUSE / 2)
            while self.late:
                stream.record_event(self.late.pop())

        self.cache.finished = finished  # type: ignore[method-assign]


class LateRecords(Deaf):
    """A stream whose records are noted, to be made by somebody else; it still waits."""

    def __init__(self, stream: SimulatedStream, late: list[SimulatedEvent]) -> None:
        super().__init__(stream)
        self.late = late

    def wait_event(self, event: SimulatedEvent) -> None:
        self.stream.wait_event(event)

    def record_event(self, event: SimulatedEvent) -> None:
        self.late.append(event)


class ReadyIsRecordedBeforeTheCopy(SimulatedDevice):
    """The copy waits until its stream has been asked for the next record, and comes behind it."""

    def copy_stream(self, name: str = "weights") -> Any:
        return self.swapped

    def copy(self, target: torch.Tensor, source: torch.Tensor, stream: Any) -> None:
        self.swapped.behind = lambda: self._do_copy(target, source)

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.swapped = CopyBehindRecord(self._copy)


class CopyBehindRecord(Deaf):
    """A stream that runs what it was handed right after its next record; it still waits."""

    behind: Callable[[], None] | None = None

    def wait_event(self, event: SimulatedEvent) -> None:
        self.stream.wait_event(event)

    def record_event(self, event: SimulatedEvent) -> None:
        self.stream.record_event(event)
        if self.behind is not None:
            self.stream.enqueue(self.behind)
            self.behind = None


SEEDS = 25
BROKEN: list[dict[str, Any]] = [
    {"device": CopiesDoNotWaitForFree},
    {"device": ComputeDoesNotWaitForReady},
    {"device": HostSlotIsReleasedBeforeTheCopyEnded},
    {"tier": FreeIsRecordedAfterRelease},
    {"tier": FreeIsNeverRecorded},
    {"tier": ReadyIsRecordedAfterTheReport},
    {"device": ReadyIsRecordedBeforeTheCopy},
]


@pytest.mark.parametrize("broken", BROKEN, ids=lambda parts: next(iter(parts.values())).__name__)
def test_a_tier_without_this_guard_is_caught(tmp_path: Path, broken: dict[str, Any]) -> None:
    assert any(drive(tmp_path, Shape(seed), **broken) for seed in range(SEEDS))


def test_the_tier_with_all_guards_is_not_caught_by_the_same_seeds(tmp_path: Path) -> None:
    for seed in range(SEEDS):
        assert drive(tmp_path, Shape(seed)) == []


# --- a whole model ----------------------------------------------------------------------------------------

LAYERS = 5


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    save_tiny("llama", folder, num_hidden_layers=LAYERS)
    return folder


class Engine:
    """A trainer on a memory manager of our own making, slots poisoned before every load."""

    def __init__(self, folder: Path, device: SimulatedDevice | None = None, **memory: Any) -> None:
        self.device = device
        self.config = LemaConfig(
            str(folder), device="cpu", dtype="float32", lora_rank=4, lora_alpha=8, learning_rate=0.05,
            gradient_accumulation_steps=2, loss_chunk_size=5, save_steps=0, lora_target_modules=["q_proj", "down_proj"],
        )  # fmt: skip
        self.gbi = GlobalBinaryIndex(folder)
        adapter = TransformersAdapter(AutoConfig.from_pretrained(folder).to_dict())
        adapter.configure(torch.float32, "sdpa")
        plan = strategy_plan(
            self.gbi, adapter, memory.pop("mapped", ()), "cpu" if device is None else "simulated",
            memory.pop("strategy", "streaming"), host_slots=memory.pop("num_slots", 2),
            device_slots=memory.pop("device_slots", 2),
        )  # fmt: skip
        self.memory = WeightStore(
            self.gbi, adapter, plan, "cpu", backend=device, poison=True, **{"num_readers": 1, **memory}
        )
        lora = LoRAManager({"r": 4, "alpha": 8, "target_modules": ["q_proj", "down_proj"]}, device="cpu", seed=7)
        lora.attach(adapter)
        self.named = dict(lora.named_parameters())
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in self.named.values():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        optimizer = torch.optim.SGD(self.named.values(), lr=0.05)
        self.trainer = LemaTrainer(self.config, adapter, self.gbi, lora, optimizer, self.memory)
        self.draw = torch.Generator().manual_seed(3)

    def batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.randint(3, 99, (2, 7), generator=self.draw)
        return ids, ids.clone()

    def numbers(self) -> dict[str, torch.Tensor]:
        """Loss, every gradient of two calls, and weights after each of two optimizer steps, an evaluation between."""
        found: dict[str, torch.Tensor] = {}
        for step in range(2):
            for call in range(2):
                _, loss = self.trainer.train_step(*self.batch())
                found[f"{step}.{call}.loss"] = torch.tensor(loss)
                if call == 0:
                    for name, parameter in self.named.items():
                        assert parameter.grad is not None and bool(parameter.grad.any())
                        found[f"{step}.{name}.grad"] = parameter.grad.clone()
                    logits, loss = self.trainer.eval_step(*self.batch(), return_logits=True)
                    found |= {f"{step}.eval": torch.tensor(loss), f"{step}.logits": logits}
            found |= {f"{step}.{name}": parameter.detach().clone() for name, parameter in self.named.items()}
        return found

    def close(self) -> None:
        self.memory.close()
        self.gbi.close()
        if self.device is not None:
            self.device.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@pytest.fixture(scope="module")
def truth(tiny_llama: Path) -> dict[str, torch.Tensor]:
    """The numbers with every layer resident: nothing is streamed."""
    with Engine(tiny_llama, strategy="resident") as engine:
        return engine.numbers()


def assert_same_bits(found: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> None:
    assert found.keys() == truth.keys()
    different = [name for name in truth if not torch.equal(found[name], truth[name])]
    assert not different


GRID = [(slots, depth, readers) for slots in (2, 3, 4) for depth in (None, 0, 1, 3) for readers in (1, 2, 3)]
SAMPLED = random.Random(0).sample(GRID, 12)


def test_the_sample_has_every_setting() -> None:
    for position, count in ((0, 3), (1, 4), (2, 3)):
        assert len({setting[position] for setting in SAMPLED}) == count


@pytest.mark.parametrize(("slots", "depth", "readers"), SAMPLED)
def test_host_and_simulated_transport_give_the_same_bits(
    tiny_llama: Path, truth: dict[str, torch.Tensor], slots: int, depth: int | None, readers: int
) -> None:
    settings = {"num_slots": slots, "prefetch_depth": depth, "num_readers": readers}
    with Engine(tiny_llama, **settings) as engine:
        assert_same_bits(engine.numbers(), truth)
    device = SimulatedDevice(seed=slots * 100 + readers, longest_pause=PAUSE)
    with Engine(tiny_llama, device, device_slots=2 + (slots + readers) % 3, **settings) as engine:
        assert_same_bits(engine.numbers(), truth)
        assert engine.memory.stats.bytes_copied > 0


@pytest.mark.parametrize("mapped", [[0, 2, 4], [0, 1, 2, 3], [3, 4]])
def test_some_layers_mapped_and_the_rest_behind_the_device_tier(
    tiny_llama: Path, truth: dict[str, torch.Tensor], mapped: list[int]
) -> None:
    device = SimulatedDevice(seed=len(mapped), longest_pause=PAUSE)
    with Engine(tiny_llama, device, mapped=mapped) as engine:
        assert_same_bits(engine.numbers(), truth)


def test_a_read_error_in_a_step_is_raised_and_the_next_step_is_right(
    tiny_llama: Path, truth: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, broken = os.preadv, threading.Event()

    def preadv(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        if broken.is_set() and draw.random() < 0.3:
            raise OSError(errno.EIO, "Input/output error")
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(reader_module.os, "preadv", preadv)
    for device in (None, SimulatedDevice(seed=4, longest_pause=PAUSE)):
        draw = random.Random(5)
        with Engine(tiny_llama, device) as engine:
            ids, labels = torch.full((2, 7), 5), torch.full((2, 7), 6)
            errors: list[str] = []
            for _ in range(8):
                broken.set()
                try:
                    engine.trainer.train_step(ids, labels)
                except ReadError as error:
                    errors.append(str(error))
                broken.clear()
                engine.trainer.discard_window()
            assert len(errors) >= 3
            assert all("model.layers." in text and str(tiny_llama) in text for text in errors)
            engine.trainer.train_step(ids, labels)
            engine.trainer.discard_window()
            assert_same_bits(engine.numbers(), truth)


def lema_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("lema-")}


@pytest.mark.parametrize("simulated", [False, True])
def test_close_ends_every_thread_and_nothing_starts_one_again(tiny_llama: Path, simulated: bool) -> None:
    before = lema_threads()
    engine = Engine(tiny_llama, SimulatedDevice(longest_pause=PAUSE) if simulated else None)
    engine.trainer.train_step(*engine.batch())
    assert lema_threads() - before
    engine.close()
    assert lema_threads() <= before
    engine.memory.predict(AccessSchedule.inference(LAYERS))
    with pytest.raises(StreamingError, match="closed"):
        engine.memory.acquire(0)
    assert lema_threads() <= before


@pytest.mark.parametrize("simulated", [False, True])
def test_a_manager_that_is_forgotten_ends_its_threads(tiny_llama: Path, simulated: bool) -> None:
    before = lema_threads()
    device = SimulatedDevice(longest_pause=PAUSE) if simulated else None
    engine = Engine(tiny_llama, device)
    engine.trainer.train_step(*engine.batch())
    del engine
    deadline = time.monotonic() + 5
    while gc.collect() >= 0 and (left := lema_threads() - before) and time.monotonic() < deadline:
        if all(thread.name.startswith("lema-sim") for thread in left):
            break
        time.sleep(0.01)
    assert not [thread.name for thread in left if not thread.name.startswith("lema-sim")]
    if device is not None:
        device.close()


def test_a_step_loads_what_its_device_slots_cannot_keep(tiny_llama: Path) -> None:
    device = SimulatedDevice(seed=1, longest_pause=PAUSE)
    with Engine(tiny_llama, device, num_slots=3, device_slots=2) as engine:
        loads = []
        for _ in range(4):
            engine.trainer.train_step(*engine.batch())
            loads.append(engine.memory.stats.loads)
        assert {b - a for a, b in pairwise(loads[1:])} == {2 * (LAYERS - 2)}
