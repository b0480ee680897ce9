"""The recorder of one step: its spans are what happened, in the order it had to; it leaves nothing behind."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from families import save_tiny
from helpers import lema_model, lema_step, padded_batch, recording_trainer
from lema.errors import InputError, StreamingError
from lema.streaming.timeline import COMPUTE, COPY, DISK, LANES, WAIT, Recording, Span, Timeline
from lema.streaming.weight_store import MemoryStats
from spreads import Engine, batch, spread

LAYERS = 6
SWEEPS = [f"layer {n} forward" for n in range(LAYERS)], [f"layer {n} backward" for n in reversed(range(LAYERS))]
TOLERANCE = 1e-9


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    save_tiny("llama", folder, num_hidden_layers=LAYERS, tie_word_embeddings=False)
    return folder


def lane(record: Recording, name: str) -> list[Span]:
    return [span for span in record.spans if span.lane == name]


def recorded_step(engine: Engine) -> tuple[Recording, MemoryStats]:
    """A recorded step after two that were not."""
    for _ in range(2):
        engine.trainer.train_step(batch())
    before = engine.memory.stats
    with engine.memory.timeline.recording(step=3) as record:
        engine.trainer.train_step(batch())
    return record, engine.memory.stats - before


def assert_in_order(record: Recording, arrivals: str) -> None:
    """Spans lie in the step; every arrival of a unit ends before the next use of it begins."""
    assert record.seconds > 0
    for span in record.spans:
        assert 0 <= span.start <= span.end <= record.seconds + TOLERANCE, span
    compute = lane(record, COMPUTE)
    assert [span.name for span in compute] == [*SWEEPS[0], "head and loss", *SWEEPS[1], "optimizer"]
    for before, after in pairwise(compute):
        assert before.end <= after.start + TOLERANCE, "computation of one thread overlaps"
    for arrival in lane(record, arrivals):
        uses = [span for span in compute if span.name.startswith(f"{arrival.name} ") and span.end > arrival.start]
        if uses and not arrival.cut:  # else it is for the next step, or a piece of the head
            assert arrival.end <= uses[0].start + TOLERANCE, f"{arrival.name} was used before it was there"


def test_on_the_host_every_read_use_and_wait_is_told(llama: Path) -> None:
    model = lema_model(llama)
    trainer = recording_trainer(model)
    plain_loss, _ = lema_step(model, padded_batch(), trainer)
    before = trainer.memory.stats
    with trainer.memory.timeline.recording(step=2) as record:
        loss, _ = lema_step(model, padded_batch(), trainer)
    used = trainer.memory.stats - before
    assert loss == plain_loss, "recording changed the step"
    assert_in_order(record, DISK)
    assert sum(span.nbytes for span in lane(record, DISK)) == used.bytes_read > 0
    assert not lane(record, COPY)
    waited = sum(span.end - span.start for span in lane(record, WAIT))
    assert used.wait_seconds <= waited <= used.wait_seconds + 0.05
    model.close()


@pytest.mark.parametrize("plan", [spread(), spread(on_device=(1, 5), in_ram=(0, 3), boundaries="host")])
def test_on_a_device_events_time_copies_and_layers(llama: Path, plan: Any) -> None:
    engine = Engine(llama, plan)
    record, used = recorded_step(engine)
    engine.close()
    assert_in_order(record, COPY)
    copies = lane(record, COPY)
    assert copies and sum(span.nbytes for span in copies if not span.cut) <= used.bytes_copied
    assert sum(span.nbytes for span in copies) >= used.bytes_copied
    reads = {span.name for span in lane(record, DISK)}
    assert reads and not reads & {f"layer {n}" for n in plan.in_ram}, "what stays in RAM was read again"


def test_a_head_in_pieces_is_one_span_with_transfers_of_its_own(llama: Path) -> None:
    engine = Engine(llama, spread(head="chunked", head_rows=40, loss_chunk_size=7))
    record, _ = recorded_step(engine)
    engine.close()
    assert_in_order(record, COPY)
    head = next(span for span in record.spans if span.name == "head and loss")
    pieces = [span for span in lane(record, WAIT) if span.name.startswith("head, piece ")]
    assert len(pieces) >= 3 and all(head.start <= span.start and span.end <= head.end for span in pieces)


def test_an_error_ends_the_recording_and_the_next_one_is_whole(llama: Path) -> None:
    engine = Engine(llama, spread())
    timeline = engine.memory.timeline
    with pytest.raises(InputError), timeline.recording() as lost:
        engine.trainer.train_step({**batch(), "labels": torch.full((3, 10), -100)})
    assert timeline.record is None and lost.spans == []
    with timeline.recording(), pytest.raises(StreamingError, match="already"), timeline.recording():
        pass
    record, _ = recorded_step(engine)
    assert_in_order(record, COPY)
    engine.close()


def test_a_transfer_that_crosses_an_edge_of_the_recording_is_cut_there() -> None:
    timeline = Timeline()
    early, late, off, failed = (timeline.transfer(DISK, name, 10) for name in ("early", "late", "off", "failed"))
    early.begin()
    off.begin()
    off.end(whole=True)
    with timeline.recording() as record:
        late.begin()
        failed.begin()
        early.end(whole=True)
        failed.end(whole=False)
        time.sleep(0.002)
    late.end(whole=True)
    found = {span.name: span for span in record.spans}
    assert set(found) == {"early", "late", "failed, given up"}
    assert found["early"].start == 0 and found["early"].cut and found["early"].end < record.seconds
    assert found["late"].end == record.seconds and found["late"].cut
    assert found["failed, given up"].nbytes == 0 and not found["failed, given up"].cut


def test_off_nothing_is_kept_and_no_object_is_made() -> None:
    timeline = Timeline()
    first, second = timeline.span(COMPUTE, "a"), timeline.span(WAIT, "b", 5)
    assert first is second
    with first, second:
        pass
    with timeline.recording() as record:
        pass
    assert record.spans == []


@pytest.fixture
def hurried() -> Iterator[None]:
    """Threads take turns as often as they can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def test_many_threads_lose_no_span(hurried: None) -> None:
    timeline = Timeline()

    def work(number: int) -> None:
        for turn in range(200):
            with timeline.span(COMPUTE, f"{number}.{turn}"):
                pass
            transfer = timeline.transfer(DISK, f"{number}.{turn}", 1)
            transfer.begin()
            transfer.end(whole=True)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    with timeline.recording() as record:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len({(span.lane, span.name) for span in record.spans}) == len(record.spans) == 2 * 8 * 200
    assert not any(span.cut for span in record.spans)


def test_the_file_and_the_trace_say_the_same(llama: Path, tmp_path: Path) -> None:
    engine = Engine(llama, spread())
    engine.trainer.train_step(batch())
    path = tmp_path / "timeline.json"
    with engine.memory.timeline.recorded_to(path, step=2) as record:
        engine.trainer.train_step(batch())
    engine.close()
    content = json.loads(path.read_text())
    assert [file.name for file in tmp_path.iterdir()] == ["timeline.json"]
    assert content["step"] == 2 and content["seconds"] == pytest.approx(record.seconds, abs=1e-5)
    assert [one["name"] for one in content["lanes"]] == list(LANES)
    told = sum(len(one["spans"]) for one in content["lanes"])
    assert told == len(record.spans) > 4 * LAYERS
    assert record.busy(COMPUTE) <= record.seconds


def test_a_step_that_fails_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), Timeline().recorded_to(tmp_path / "timeline.json", step=1):
        _ = 1 // 0
    assert not list(tmp_path.iterdir())


@pytest.mark.accelerator
def test_events_of_a_real_device_agree_with_its_own_clock(llama: Path) -> None:
    device = torch.accelerator.current_accelerator()
    assert device is not None
    model = lema_model(llama, device=str(device), num_slots=2, vram_buffer_size=2)
    trainer = recording_trainer(model)
    for _ in range(2):
        lema_step(model, padded_batch(), trainer)
    before = trainer.memory.stats
    with trainer.memory.timeline.recording() as record:
        lema_step(model, padded_batch(), trainer)
    used = trainer.memory.stats - before
    assert_in_order(record, COPY)
    assert sum(span.nbytes for span in lane(record, COPY)) >= used.bytes_copied > 0
    model.close()
