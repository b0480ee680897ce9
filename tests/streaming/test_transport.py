"""The second tier where no device is needed to see it: exact types, aligned weights, copies ahead, nothing kept."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from families import save_tiny
from lema.models import get_adapter
from lema.storage.codecs import Piece, Placement
from lema.storage.index import GlobalBinaryIndex, TensorRecord
from lema.storage.layout import ALIGNMENT, Move, ParameterSource, SlotLayout, whole_tensor
from lema.storage.views import page_aligned
from lema.streaming.accelerator import DeviceEvent, DeviceStream
from lema.streaming.device_tier import DeviceTier
from lema.streaming.schedule import AccessSchedule, Phase
from lema.streaming.slot_cache import Load, SlotCache
from lema.streaming.tiers import Tier
from lema.streaming.weight_store import WeightStore
from simulated import SimulatedDevice
from spreads import PLANS

pytestmark = pytest.mark.timeout(120)


# --- torch's own types ------------------------------------------------------------------------------------


def test_torch_is_handed_its_own_events_and_streams() -> None:
    """`torch.Stream` takes `torch.Event` and no subclass: 2.13 says so before it says that a CPU has no events."""
    event, stream = DeviceEvent(torch.device("cpu")), DeviceStream(torch.Stream(device="cpu"))
    assert type(event.raw) is torch.Event and type(stream.raw) is torch.Stream
    with pytest.raises(RuntimeError) as refusal:
        stream.record_event(event)
    assert "torch.Event object" not in str(refusal.value)
    stream.wait_event(event)  # never recorded: nothing to wait for


def test_streams_of_one_queue_are_equal() -> None:
    raw = torch.Stream(device="cpu")
    assert DeviceStream(raw) == DeviceStream(raw)


# --- where weights lie ------------------------------------------------------------------------------------


@given(
    start=st.integers(0, 9000),
    sizes=st.lists(st.integers(1, 700), min_size=1, max_size=9),
    gaps=st.lists(st.integers(0, 3), min_size=9, max_size=9),
)
def test_moves_bring_every_tensor_to_an_aligned_place(start: int, sizes: list[int], gaps: list[int]) -> None:
    records, offset = [], start
    for number, (size, gap) in enumerate(zip(sizes, gaps, strict=False)):
        records.append(TensorRecord(f"t{number}", Path("file"), offset, size, torch.uint8, (size,)))
        offset += size + gap
    read = SlotLayout([whole_tensor(r.name, r) for r in records])
    moved = SlotLayout([whole_tensor(r.name, r) for r in records], moved=True)
    assert moved.extents == read.extents and moved.nbytes == read.nbytes
    host = torch.randint(0, 256, (read.nbytes,), dtype=torch.uint8)
    device = torch.zeros(max(m.target + m.nbytes for m in moved.moves), dtype=torch.uint8)
    written = torch.zeros_like(device, dtype=torch.long)
    for move in moved.moves:
        device[move.target : move.target + move.nbytes] = host[move.source : move.source + move.nbytes]
        written[move.target : move.target + move.nbytes] += 1
    assert int(written.max()) == 1 and int(written.sum()) == sum(sizes)
    for there, here, size in zip(moved.direct, read.direct, sizes, strict=True):
        assert there.offset % ALIGNMENT == 0
        assert torch.equal(device[there.offset : there.offset + size], host[here.offset : here.offset + size])


def test_tensors_of_whole_lines_travel_as_one() -> None:
    records = [TensorRecord(f"t{i}", Path("f"), 4104 + 512 * i, 512, torch.uint8, (512,)) for i in range(5)]
    layout = SlotLayout([whole_tensor(r.name, r) for r in records], moved=True)
    assert layout.moves == (Move(4104 % 4096, 0, 5 * 512),)


def test_a_part_of_a_tensor_that_is_not_aligned_is_decoded() -> None:
    record = TensorRecord("qkv", Path("f"), 0, 3 * 100 * 4, torch.float32, (300,))
    parts = [
        ParameterSource(name, (100,), torch.float32, Placement((Piece(record, 100 * i, 0, 100),)))
        for i, name in enumerate("qkv")
    ]
    layout = SlotLayout(parts, moved=True)
    assert [view.source.name for view in layout.direct] == ["q"]
    assert [view.offset % ALIGNMENT for view in layout.decoded] == [0, 0]
    assert len(SlotLayout(parts).direct) == 3


def with_header_of(file: Path, remainder: int) -> None:
    """Rewrite a safetensors file so that its data begins at `remainder` modulo 16."""
    raw = file.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.dumps(json.loads(raw[8 : 8 + size])).encode()
    header += b" " * ((remainder - 8 - len(header)) % 16)
    file.write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + size :])


@pytest.mark.parametrize("family", ["llama", "gpt_oss", "gpt2"])
def test_a_header_of_8_modulo_16_leaves_every_device_parameter_aligned(tmp_path: Path, family: str) -> None:
    save_tiny(family, tmp_path, num_hidden_layers=6)
    with_header_of(tmp_path / "model.safetensors", 8)
    gbi = GlobalBinaryIndex(tmp_path)
    assert {gbi.record(name).offset % 16 for name in gbi.keys} == {8}
    adapter = get_adapter(family, json.loads((tmp_path / "config.json").read_text()))
    adapter.configure(torch.float32, "eager")
    device = SimulatedDevice(seed=3)
    memory = WeightStore(gbi, adapter, device="cpu", plan=PLANS["all three tiers"], backend=device, poison=True)
    places = set()
    for unit in range(6):
        with memory.use(unit, Phase.FORWARD):
            for tensor in adapter.bound_tensors(unit):
                places.add(tensor.storage_offset() * tensor.dtype.itemsize % ALIGNMENT)
    memory.close()
    device.close()
    assert places == {0}


# --- copies ahead -----------------------------------------------------------------------------------------


def tier_over(device: SimulatedDevice, pool: ThreadPoolExecutor, units: int, host_slots: int, slots: int) -> DeviceTier:
    host_of, slot_of = ({unit: unit % count for unit in range(units)} for count in (host_slots, slots))
    buffers = [page_aligned(64) for _ in range(host_slots)]
    plan = AccessSchedule.inference(units)

    def read(load: Load) -> None:
        buffers[load.slot][:64].fill_(load.unit)
        host.finished(load)

    host = SlotCache(host_of, plan.loads(slot_of), host_slots, lambda load: pool.submit(read, load))
    moves = {unit: [Move(0, 0, 64)] for unit in range(units)}
    return DeviceTier(device, Tier(host, buffers), slot_of, plan, slots, moves)


def test_copies_are_enqueued_behind_one_that_is_under_way() -> None:
    device = SimulatedDevice(seed=1, longest_pause=0.0, blocking=False)
    gate, enqueued, all_there = threading.Event(), [], threading.Event()
    real = device.copy

    def copy(target: torch.Tensor, source: torch.Tensor, stream: object) -> None:
        real(target, source, stream)  # type: ignore[arg-type]
        enqueued.append(int(source[0]))
        if len(enqueued) == 3:
            all_there.set()

    device.copy = copy  # type: ignore[method-assign]
    device.copy_stream().enqueue(lambda: gate.wait(30))  # the link stands still
    with ThreadPoolExecutor(2) as pool:
        tier = tier_over(device, pool, units=6, host_slots=3, slots=3)
        tier.cache.prefetch(0)
        came = all_there.wait(20)
        states = [slot.state.value for slot in tier._host.cache.slots]
        gate.set()
        tier.close()
    device.close()
    assert came and enqueued == [0, 1, 2]
    assert states == ["in use"] * 3, "a host slot is handed back only behind its copy"


def test_a_host_slot_is_asked_for_again_only_when_its_copy_has_ended() -> None:
    device = SimulatedDevice(seed=2, longest_pause=0.002, blocking=False)
    seen: list[int] = []
    with ThreadPoolExecutor(2) as pool:
        tier = tier_over(device, pool, units=5, host_slots=2, slots=4)
        for _ in range(20):
            for unit in range(5):
                slot = tier.acquire(unit, Phase.FORWARD)
                device.read(tier.buffers[slot], lambda source: seen.append(int(source[63])))
                tier.release(unit)
        tier.close()
    device.close()
    assert seen == [0, 1, 2, 3, 4] * 20


def test_waits_are_collected_without_anybody_asking() -> None:
    device = SimulatedDevice(seed=3, longest_pause=0.0)
    with ThreadPoolExecutor(1) as pool:
        tier = tier_over(device, pool, units=5, host_slots=2, slots=2)
        most = 0
        for _ in range(100):
            for unit in range(5):
                tier.acquire(unit, Phase.FORWARD)
                tier.release(unit)
                most = max(most, len(tier._waits._open) + len(tier._waits._spare))
        tier.close()
    device.close()
    assert most <= 3, "pairs of timing events gather while nobody reads the statistics"
