"""From handmade files into slots: extents, direct and buffered reads, errors; then placement and views of the bytes."""

from __future__ import annotations

import errno
import gc
import itertools
import json
import math
import os
import random
import struct
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lema.errors import BindingError, LemaError, ReadError, WeightsError
from lema.storage import reader as reader_module
from lema.storage.codecs import Piece, Placement
from lema.storage.index import GlobalBinaryIndex, TensorRecord
from lema.storage.layout import PAGE, ParameterSource, SlotLayout, align_up, whole_tensor
from lema.storage.placement import PlacedTensor, chunk, concatenate, stack
from lema.storage.reader import DiskReader, ReadJob, direct_alignment
from lema.storage.views import Decoder, materialize, page_aligned, typed_view

pytestmark = pytest.mark.timeout(60)

linux = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="looks into /proc")
SHM = Path("/dev/shm")
FOLDERS = ["disk", pytest.param("shm", marks=pytest.mark.skipif(not SHM.is_dir(), reason="no tmpfs here"))]
POISON = 0xFF


@pytest.fixture(params=FOLDERS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    if request.param == "disk":
        yield tmp_path
        return
    path = SHM / f"lema-{os.getpid()}-{random.randrange(1 << 40)}"
    path.mkdir()
    yield path
    for file in path.iterdir():
        file.unlink()
    path.rmdir()


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(reader_module, "PIECE_BYTES", 2 * PAGE)
    return 2 * PAGE


@pytest.fixture(params=[None, False], ids=["direct", "buffered"])
def reader(request: pytest.FixtureRequest) -> Iterator[DiskReader]:
    reader = DiskReader(2, request.param)
    yield reader
    reader.stop()


def write(path: Path, nbytes: int, seed: int = 0) -> bytes:
    """A file of random bytes, none of them the poison."""
    data = bytes(byte % POISON for byte in random.Random(seed).randbytes(nbytes))
    path.write_bytes(data)
    return data


def record(file: Path, offset: int, nbytes: int, name: str = "", dtype: torch.dtype = torch.uint8) -> TensorRecord:
    return TensorRecord(name or f"t{offset}", file, offset, nbytes, dtype, (nbytes // dtype.itemsize,))


def layout_of(*records: TensorRecord) -> SlotLayout:
    return SlotLayout([whole_tensor(r.name, r) for r in records])


class Reading:
    """A job that was submitted: its slot, and every report of its end."""

    def __init__(self, reader: DiskReader, layout: SlotLayout, cancelled: Callable[[], bool] = lambda: False) -> None:
        self.layout = layout
        self.slot = page_aligned(layout.nbytes + PAGE)
        self.slot.fill_(POISON)
        self.reports: SimpleQueue[BaseException | None] = SimpleQueue()
        view = memoryview(self.slot.numpy())
        reader.submit(ReadJob(layout.extents, view, cancelled, self.reports.put))

    def error(self) -> BaseException | None:
        return self.reports.get(timeout=20)

    def reported_once(self) -> bool:
        """Only after `stop`, when no reader is left that could report again."""
        try:
            self.reports.get(timeout=0.001)
        except Empty:
            return True
        return False

    def check(self) -> None:
        assert self.error() is None
        for extent in self.layout.extents:
            data = extent.file.read_bytes()
            for r in extent.records:
                start = extent.slot_offset + r.offset - extent.offset
                assert bytes(self.slot[start : start + r.nbytes].numpy()) == data[r.offset : r.end], r.name
        assert bool((self.slot[self.layout.nbytes :] == POISON).all()), "written behind the unit's own pages"


def reader_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("lema-reader")}


def is_direct(file: Path) -> bool:
    descriptor, alignment = reader_module._open_direct(file)
    os.close(descriptor)
    return alignment > 0


class Preadv:
    """`os.preadv` with the requests written down; `act` may answer in its place by returning a count."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, act: Callable[..., int | None] = lambda *_: None) -> None:
        self.real = os.preadv
        self.act = act
        self.requests: list[tuple[int, int, int]] = []
        """(offset, length, address) of each."""
        monkeypatch.setattr(reader_module.os, "preadv", self)

    def __call__(self, descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        (buffer,) = buffers
        address = torch.frombuffer(buffer, dtype=torch.uint8).data_ptr() if len(buffer) else 0
        self.requests.append((offset, len(buffer), address))
        answer = self.act(descriptor, buffer, offset)
        return self.real(descriptor, buffers, offset) if answer is None else answer


# --- extents ------------------------------------------------------------------------------------------


def test_tensors_that_touch_are_one_extent(tmp_path: Path) -> None:
    a, b, c = record(tmp_path / "a", 100, 33), record(tmp_path / "a", 133, 7), record(tmp_path / "a", 141, 5)
    d = record(tmp_path / "b", 146, 1)
    layout = layout_of(d, c, b, a, b)
    assert [(e.file.name, e.offset, e.nbytes, e.records) for e in layout.extents] == [
        ("a", 100, 40, (a, b)),
        ("a", 141, 5, (c,)),
        ("b", 146, 1, (d,)),
    ]
    assert layout.read_bytes == 46


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3 * PAGE), st.integers(1, 3 * PAGE)), min_size=1, max_size=8), st.randoms())
def test_every_extent_has_pages_of_its_own_and_the_files_offset_in_them(
    gaps: list[tuple[int, int]], shuffle: random.Random
) -> None:
    records, end = [], 0
    for number, (gap, nbytes) in enumerate(gaps):
        records.append(record(Path(f"{number % 2}"), end + gap, nbytes, f"t{number}"))
        end += gap + nbytes
    shuffle.shuffle(records)
    layout = layout_of(*records)
    pages: list[tuple[int, int]] = []
    for extent in layout.extents:
        assert extent.slot_offset % PAGE == extent.offset % PAGE
        pages.append((extent.slot_offset // PAGE, -(-(extent.slot_offset + extent.nbytes) // PAGE)))
    assert all(end <= start for (_, end), (start, _) in zip(sorted(pages), sorted(pages)[1:]))
    assert layout.nbytes == max(end for _, end in pages) * PAGE
    assert layout.read_bytes == sum(r.nbytes for r in records)
    assert {v.source.name: v.offset % PAGE for v in layout.direct} == {r.name: r.offset % PAGE for r in records}


def test_a_tensor_without_elements_needs_no_bytes(tmp_path: Path) -> None:
    write(tmp_path / "f", 64)
    nothing = record(tmp_path / "f", 10, 0, "nothing", torch.float32)
    for layout in (layout_of(nothing), layout_of(record(tmp_path / "f", 8, 8, "something"), nothing)):
        assert all(e.nbytes for e in layout.extents)
        places = {v.source.name: v.offset for v in (*layout.direct, *layout.decoded)}
        assert "nothing" in places


# --- reading what is there --------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0, 1, 511, 512, 513, PAGE - 1, PAGE, 3 * PAGE + 77])
def test_extents_at_odd_offsets_that_cross_pieces(
    folder: Path, reader: DiskReader, small_pieces: int, offset: int
) -> None:
    write(folder / "f", 20 * PAGE)
    for nbytes in (1, 2, 511, 513, small_pieces - offset % PAGE, small_pieces + 1, 5 * small_pieces + 3):
        Reading(reader, layout_of(record(folder / "f", offset, nbytes))).check()


@pytest.mark.parametrize("size", [1, 511, 513, PAGE + 1, 4 * PAGE - 1, 4 * PAGE, 5 * PAGE + 513])
@pytest.mark.usefixtures("small_pieces")
def test_extents_at_the_end_of_the_file(folder: Path, reader: DiskReader, size: int) -> None:
    write(folder / "f", size)
    Reading(reader, layout_of(record(folder / "f", 0, size))).check()
    Reading(reader, layout_of(record(folder / "f", size - 1, 1))).check()


def test_a_unit_in_several_files_and_several_jobs_at_once(folder: Path, small_pieces: int) -> None:
    for number in range(3):
        write(folder / str(number), 9 * PAGE + 5, number)
    with_direct = DiskReader(3)
    layouts = [
        layout_of(*(record(folder / str(f), shift + f * 1000, 3 * small_pieces // 2, f"{f}") for f in range(3)))
        for shift in range(5)
    ]
    for reading in [Reading(with_direct, layout) for layout in layouts]:
        reading.check()
    with_direct.stop()
    assert with_direct.bytes_read == sum(layout.read_bytes for layout in layouts)
    assert with_direct.read_seconds > 0


def test_a_unit_without_bytes_is_done(reader: DiskReader) -> None:
    assert Reading(reader, layout_of()).error() is None


runs = st.lists(st.tuples(st.sampled_from([0, 0, 1, 3, 511, 4096]), st.integers(1, 3 * PAGE)), min_size=1, max_size=6)


@settings(max_examples=80, deadline=None)
@given(st.lists(runs, min_size=1, max_size=2), st.integers(1, 4), st.sampled_from([None, False]), st.data())
def test_the_bytes_in_the_slot_are_the_files(
    tmp_path_factory: pytest.TempPathFactory,
    files: list[list[tuple[int, int]]],
    num_readers: int,
    direct: bool | None,
    data: st.DataObject,
) -> None:
    folder = tmp_path_factory.getbasetemp()
    records: list[TensorRecord] = []
    for number, tensors in enumerate(files):
        end = data.draw(st.integers(0, 2 * PAGE))
        for gap, nbytes in tensors:
            records.append(record(folder / f"f{number}", end + gap, nbytes, f"{number}.{end}"))
            end += gap + nbytes
        write(folder / f"f{number}", end + data.draw(st.sampled_from([0, 1, 511, PAGE])), number)
    records = data.draw(st.permutations(records))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reader_module, "PIECE_BYTES", data.draw(st.integers(1, 3)) * PAGE)
        reader = DiskReader(num_readers, direct)
        cut = data.draw(st.integers(0, len(records)))
        readings = [Reading(reader, layout_of(*part)) for part in (records[:cut], records[cut:])]
        for reading in readings:
            reading.check()
        reader.stop()
    assert all(reading.reported_once() for reading in readings)
    assert reader.bytes_read == sum(r.nbytes for r in records)


# --- how it is read ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_pieces")
def test_direct_requests_are_aligned_in_file_length_and_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "f", 12 * PAGE + 77)
    if not is_direct(tmp_path / "f"):
        pytest.skip("no direct reads on this file system")
    alignment = direct_alignment(tmp_path / "f")
    assert alignment >= 512
    preadv = Preadv(monkeypatch)
    reader = DiskReader(1)
    Reading(reader, layout_of(record(tmp_path / "f", 1001, 9 * PAGE), record(tmp_path / "f", 12 * PAGE, 77))).check()
    assert all(number % alignment == 0 for request in preadv.requests for number in request), preadv.requests
    flags = [Path(f"/proc/self/fdinfo/{fd}").read_text() for fd, _ in reader._files.values()]
    assert all(int(text.split("flags:")[1].split()[0], 8) & os.O_DIRECT for text in flags)
    reader.stop()


def test_buffered_requests_are_the_bytes_and_no_more(
    folder: Path, monkeypatch: pytest.MonkeyPatch, small_pieces: int
) -> None:
    write(folder / "f", 12 * PAGE)
    preadv = Preadv(monkeypatch)
    reader = DiskReader(1, direct=False)
    Reading(reader, layout_of(record(folder / "f", 1001, 5000))).check()
    reader.stop()
    assert [(offset, length) for offset, length, _ in preadv.requests] == [(1001, 5000)]
    del preadv.requests[:]
    Reading(reader, layout_of(record(folder / "f", 1001, small_pieces))).check()
    reader.stop()
    assert [(offset, length) for offset, length, _ in preadv.requests] == [
        (1001, small_pieces - 1001),
        (small_pieces, 1001),
    ]


def test_large_extents_are_read_in_pieces_of_8_mib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert reader_module.PIECE_BYTES == 8 << 20
    (tmp_path / "f").touch()
    os.truncate(tmp_path / "f", 20 << 20)
    preadv = Preadv(monkeypatch, lambda fd, buffer, offset: len(buffer))
    reader = DiskReader(2, direct=False)
    slot = memoryview(bytearray(20 << 20))
    done: SimpleQueue[Any] = SimpleQueue()
    reader.submit(ReadJob(layout_of(record(tmp_path / "f", 100, 19 << 20)).extents, slot, lambda: False, done.put))
    assert done.get(timeout=20) is None
    reader.stop()
    assert sorted((offset, length) for offset, length, _ in preadv.requests) == [
        (100, (8 << 20) - 100),
        (8 << 20, 8 << 20),
        (16 << 20, (3 << 20) + 100),
    ]


@pytest.mark.usefixtures("small_pieces")
def test_short_reads_are_continued(folder: Path, reader: DiskReader, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write(folder / "f", 9 * PAGE + 321)
    grain = direct_alignment(folder / "f") if reader._direct is None else 100

    def short(descriptor: int, buffer: memoryview, offset: int) -> int | None:
        if len(buffer) <= grain:
            return None
        count = len(data[offset : offset + grain])
        buffer[:count] = data[offset : offset + count]
        return count

    preadv = Preadv(monkeypatch, short)
    Reading(reader, layout_of(record(folder / "f", 77, 9 * PAGE + 244))).check()
    assert len(preadv.requests) > 9


def test_a_direct_read_that_ends_off_the_grid_is_taken_for_the_files_end(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No direct read could go on from there, and nothing but the end of a file makes one stop there."""
    write(folder / "f", 4 * PAGE)
    if not is_direct(folder / "f"):
        pytest.skip("no direct reads on this file system")
    preadv = Preadv(monkeypatch, lambda *_: 700)
    reader = DiskReader(1)
    fails(Reading(reader, layout_of(record(folder / "f", 0, 3 * PAGE, "w"))), "'w'", "the file ends at byte 700")
    assert len(preadv.requests) == 1
    reader.stop()


@pytest.mark.parametrize("granted", [0, 3 * PAGE, 1000])
def test_an_alignment_a_slot_cannot_keep_means_buffered_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, granted: int
) -> None:
    write(tmp_path / "f", 5000)
    monkeypatch.setattr(reader_module, "direct_alignment", lambda path: granted)
    preadv = Preadv(monkeypatch)
    reader = DiskReader(1)
    Reading(reader, layout_of(record(tmp_path / "f", 3, 4000))).check()
    reader.stop()
    assert [(offset, length) for offset, length, _ in preadv.requests] == [(3, 4000)]


def test_a_file_system_that_refuses_direct_files_is_read_buffered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "f", 5000)
    real = os.open

    def refuse(path: Path, flags: int) -> int:
        if flags & getattr(os, "O_DIRECT", 0):
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags)

    monkeypatch.setattr(reader_module.os, "open", refuse)
    reader = DiskReader(1)
    Reading(reader, layout_of(record(tmp_path / "f", 3, 4000))).check()
    reader.stop()


# --- errors -----------------------------------------------------------------------------------------------


def fails(reading: Reading, *words: str) -> ReadError:
    error = reading.error()
    assert isinstance(error, ReadError), error
    assert isinstance(error, LemaError) and isinstance(error, WeightsError) and isinstance(error, OSError)
    for word in words:
        assert word in str(error)
    return error


@pytest.mark.parametrize("open_before", [False, True])
@pytest.mark.parametrize("size", [0, 100, 1024, PAGE, PAGE + 1, 2 * PAGE, 5 * PAGE, 5 * PAGE + 1, 6 * PAGE + 98])
@pytest.mark.usefixtures("small_pieces")
def test_a_truncated_file_names_itself_and_the_tensor_cut_short(
    folder: Path, reader: DiskReader, size: int, open_before: bool
) -> None:
    file = folder / "model.safetensors"
    write(file, 7 * PAGE)
    first, second = record(file, 99, PAGE, "first.weight"), record(file, PAGE + 99, 5 * PAGE, "second.weight")
    layout = layout_of(first, second)
    if open_before:
        Reading(reader, layout).check()
    os.truncate(file, size)
    reading = Reading(reader, layout)
    error = fails(reading, str(file))
    assert "'second.weight'" in str(error) or (size < PAGE + 99 and "'first.weight'" in str(error))
    reader.stop()
    assert reading.reported_once()


@pytest.mark.parametrize("size", [6 * PAGE + 99, 6 * PAGE + 100])
def test_a_file_cut_behind_what_is_needed_is_no_error(folder: Path, reader: DiskReader, size: int) -> None:
    write(folder / "f", 7 * PAGE)
    os.truncate(folder / "f", size)
    Reading(reader, layout_of(record(folder / "f", 99, 6 * PAGE))).check()


def test_one_reader_names_the_very_tensor_the_file_ends_in(folder: Path) -> None:
    for direct in (None, False):
        reader = DiskReader(1, direct)
        for size, name in ((512, "a"), (1024, "b"), (1500, "b"), (PAGE, "c"), (PAGE + 5, "c")):
            write(folder / "f", size)
            records = [record(folder / "f", *place) for place in ((0, 600, "a"), (600, 1000, "b"), (1600, PAGE, "c"))]
            words = (f"'{name}'", f"the file ends at byte {size}", str(folder / "f"))
            fails(Reading(reader, layout_of(*records)), *words)
            reader.stop()


def test_a_missing_file_is_named(folder: Path, reader: DiskReader) -> None:
    fails(Reading(reader, layout_of(record(folder / "gone", 5, 10, "w"))), str(folder / "gone"), "'w'")


def test_a_file_removed_while_open_is_still_read_and_missing_after_stop(folder: Path, reader: DiskReader) -> None:
    file = folder / "f"
    data = write(file, 3 * PAGE)
    layout = layout_of(record(file, 5, 2 * PAGE, "w"))
    Reading(reader, layout).check()
    file.unlink()
    reading = Reading(reader, layout)
    assert reading.error() is None
    assert bytes(reading.slot[5 : 5 + 2 * PAGE].numpy()) == data[5 : 5 + 2 * PAGE]
    reader.stop()
    fails(Reading(reader, layout), str(file), "'w'")
    write(file, 3 * PAGE, 1)
    Reading(reader, layout).check()


@pytest.mark.parametrize("num_readers", [1, 2, 4])
@pytest.mark.usefixtures("small_pieces")
def test_an_error_in_one_piece_is_reported_once_and_other_jobs_go_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch, num_readers: int
) -> None:
    write(folder / "bad", 12 * PAGE)
    write(folder / "good", 12 * PAGE)
    reader = DiskReader(num_readers)

    def broken(descriptor: int, buffer: memoryview, offset: int) -> int | None:
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith("bad") and offset // PAGE in (4, 5, 8, 9):
            raise OSError(errno.EIO, "Input/output error")
        return None

    Preadv(monkeypatch, broken)
    parts = [record(folder / "bad", 10 + i * PAGE, PAGE, f"part{i}") for i in range(11)]
    bad = Reading(reader, layout_of(*parts))
    good = [Reading(reader, layout_of(record(folder / "good", 7, 11 * PAGE))) for _ in range(3)]
    error = fails(bad, "Input/output error", str(folder / "bad"))
    assert isinstance(error.__cause__ or error.__context__, OSError), "the system's error is kept"
    assert any(f"'part{i}'" in str(error) for i in (3, 4, 7, 8))
    for reading in good:
        reading.check()
    reader.stop()
    assert bad.reported_once() and all(reading.reported_once() for reading in good)


def test_an_error_behind_a_short_read_names_the_tensor_it_happened_in(
    folder: Path, reader: DiskReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bad sector ends one read early, and the next one fails: the place is known, though inside a piece."""
    write(folder / "f", 4 * PAGE)

    def bad_sector(descriptor: int, buffer: memoryview, offset: int) -> int | None:
        if offset >= 2 * PAGE:
            raise OSError(errno.EIO, "Input/output error")
        return preadv.real(descriptor, [buffer[: 2 * PAGE - offset]], offset)

    preadv = Preadv(monkeypatch, bad_sector)
    records = [record(folder / "f", i * PAGE, PAGE, f"part{i}") for i in range(4)]
    fails(Reading(reader, layout_of(*records)), "'part2'", f"byte {2 * PAGE}")


def test_after_an_error_the_same_reader_reads_again(
    folder: Path, reader: DiskReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(folder / "f", 4 * PAGE)
    failures = iter([OSError(errno.EIO, "Input/output error")])

    def once(*_: object) -> None:
        for failure in failures:
            raise failure

    Preadv(monkeypatch, once)
    layout = layout_of(record(folder / "f", 1, 3 * PAGE))
    fails(Reading(reader, layout))
    Reading(reader, layout).check()


@pytest.mark.usefixtures("small_pieces")
def test_after_an_error_the_rest_of_the_job_is_not_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(folder / "f", 32 * PAGE)

    def broken(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    preadv = Preadv(monkeypatch, broken)
    reader = DiskReader(1)
    fails(Reading(reader, layout_of(record(folder / "f", 1, 30 * PAGE))))
    reader.stop()
    assert len(preadv.requests) == 1


# --- cancellation, threads, counters ---------------------------------------------------------------------------


def test_a_job_cancelled_before_it_begins_is_reported_and_not_read(
    folder: Path, reader: DiskReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(folder / "f", 4 * PAGE)
    preadv = Preadv(monkeypatch)
    reading = Reading(reader, layout_of(record(folder / "f", 1, 3 * PAGE)), cancelled=lambda: True)
    assert reading.error() is None
    reader.stop()
    assert reading.reported_once()
    assert not preadv.requests and reader.bytes_read == 0
    missing = Reading(reader, layout_of(record(folder / "gone", 1, PAGE)), cancelled=lambda: True)
    assert missing.error() is None, "not even opened"


@pytest.mark.parametrize("num_readers", [1, 3])
def test_a_job_cancelled_in_the_middle_stops_soon(
    folder: Path, monkeypatch: pytest.MonkeyPatch, small_pieces: int, num_readers: int
) -> None:
    write(folder / "f", 64 * PAGE)
    cancelled = threading.Event()

    def third(*_: object) -> None:
        if len(preadv.requests) >= 3:
            cancelled.set()

    preadv = Preadv(monkeypatch, third)
    reader = DiskReader(num_readers)
    reading = Reading(reader, layout_of(record(folder / "f", 1, 63 * PAGE)), cancelled.is_set)
    assert reading.error() is None
    reader.stop()
    assert reading.reported_once()
    assert len(preadv.requests) <= 3 + num_readers
    assert reader.bytes_read <= (3 + num_readers) * small_pieces


def test_a_job_cancelled_between_short_reads_of_a_piece_stops(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(folder / "f", 4 * PAGE)
    cancelled = threading.Event()

    def short(descriptor: int, buffer: memoryview, offset: int) -> int:
        cancelled.set()
        return preadv.real(descriptor, [buffer[:PAGE]], offset)

    preadv = Preadv(monkeypatch, short)
    reader = DiskReader(1)
    assert Reading(reader, layout_of(record(folder / "f", 0, 4 * PAGE)), cancelled.is_set).error() is None
    reader.stop()
    assert len(preadv.requests) == 1


@linux
def test_stop_ends_every_thread_and_closes_every_file(folder: Path, reader: DiskReader) -> None:
    def open_files() -> list[str]:
        links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
        return [os.readlink(link) for link in links if os.path.lexists(link) and str(folder) in os.readlink(link)]

    write(folder / "f", 4 * PAGE)
    before = reader_threads()
    for _ in range(3):
        reading = Reading(reader, layout_of(record(folder / "f", 1, 3 * PAGE)))
        reading.check()
        assert len(reader_threads() - before) == 2 and open_files() == [str(folder / "f")]
        reader.stop()
        assert reader_threads() <= before and not open_files()
    reader.stop()
    DiskReader(2).stop()


@pytest.mark.parametrize("num_readers", [1, 2, 5])
def test_there_are_as_many_threads_as_asked_for(folder: Path, num_readers: int) -> None:
    write(folder / "f", PAGE)
    before = reader_threads()
    reader = DiskReader(num_readers)
    assert reader_threads() <= before, "a reader without jobs has no threads"
    for _ in range(4):
        Reading(reader, layout_of(record(folder / "f", 1, 100))).check()
    assert len(reader_threads() - before) == num_readers
    reader.stop()


def test_what_is_queued_before_stop_is_read(folder: Path, small_pieces: int) -> None:
    write(folder / "f", 40 * PAGE)
    reader = DiskReader(2)
    readings = [Reading(reader, layout_of(record(folder / "f", i, 30 * PAGE))) for i in range(6)]
    reader.stop()
    for reading in readings:
        reading.check()


def test_a_reader_can_be_stopped_from_a_report(folder: Path) -> None:
    write(folder / "f", PAGE)
    reader = DiskReader(2)
    stopped = threading.Event()

    def done(error: BaseException | None) -> None:
        reader.stop()
        stopped.set()

    layout = layout_of(record(folder / "f", 1, 100))
    slot = page_aligned(layout.nbytes)
    reader.submit(ReadJob(layout.extents, memoryview(slot.numpy()), lambda: False, done))
    assert stopped.wait(20)


def test_an_idle_reader_keeps_no_job_alive(folder: Path) -> None:
    """A job's report belongs to the memory manager; a reader that kept it would keep the manager from its end."""
    write(folder / "f", PAGE)
    reader = DiskReader(2)

    class Owner:
        def __init__(self) -> None:
            self.ended = threading.Event()

        def report(self, error: BaseException | None) -> None:
            self.ended.set()

    layout = layout_of(record(folder / "f", 1, 100))
    slot = page_aligned(layout.nbytes)
    owner = Owner()
    ended, gone = owner.ended, threading.Event()
    weakref.finalize(owner, gone.set)
    reader.submit(ReadJob(layout.extents, memoryview(slot.numpy()), lambda: False, owner.report))
    assert ended.wait(20)
    del owner
    gc.collect()
    assert gone.wait(2)
    reader.stop()


def test_bytes_read_counts_what_was_needed(folder: Path, reader: DiskReader, small_pieces: int) -> None:
    write(folder / "f", 30 * PAGE)
    total = 0
    for nbytes in (1, 513, small_pieces + 1, 20 * PAGE + 3):
        Reading(reader, layout_of(record(folder / "f", 777, nbytes))).check()
        total += nbytes
        assert reader.bytes_read == total


# --- placement: the runs of elements against torch's own operations -----------------------------------------


class Universe:
    """File tensors whose elements are all different, so that an element in the wrong place is seen."""

    def __init__(self) -> None:
        self.stored: dict[TensorRecord, torch.Tensor] = {}

    def tensor(self, shape: Sequence[int]) -> tuple[PlacedTensor, torch.Tensor]:
        count, start = math.prod(shape), sum(t.numel() for t in self.stored.values())
        values = torch.arange(start, start + count)
        r = TensorRecord(f"t{len(self.stored)}", Path("f"), 8 * start, 8 * count, torch.int64, tuple(shape))
        self.stored[r] = values
        return PlacedTensor.whole(r), values.view(tuple(shape))

    def assemble(self, placed: PlacedTensor) -> torch.Tensor:
        """The tensor the pieces make, by hand; every element is placed once."""
        result = torch.full((math.prod(placed.shape),), -1)
        for piece in placed.parts:
            target = result[piece.target : piece.target + piece.count]
            assert len(target) == piece.count > 0 and bool((target == -1).all())
            source = self.stored[piece.tensor][piece.source : piece.source + piece.count]
            assert len(source) == piece.count
            target.copy_(source)
        assert not bool((result == -1).any())
        return result.view(placed.shape)


shapes = st.lists(st.integers(1, 4), min_size=1, max_size=3)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_stack_concatenate_and_chunk_are_torchs(data: st.DataObject) -> None:
    universe = Universe()
    placed, real = universe.tensor(data.draw(shapes))
    for _ in range(data.draw(st.integers(1, 4))):
        kind = data.draw(st.sampled_from(["stack", "concatenate", "chunk"]))
        count = data.draw(st.integers(1, 3))
        if kind == "stack":
            dim = data.draw(st.integers(0, real.dim()))
            others = [universe.tensor(real.shape) for _ in range(count - 1)]
            at = data.draw(st.integers(0, count - 1))
            pairs = [*others[:at], (placed, real), *others[at:]]
            placed, real = stack([p for p, _ in pairs], dim), torch.stack([t for _, t in pairs], dim)
        elif kind == "concatenate":
            dim = data.draw(st.integers(0, real.dim() - 1))
            sizes = data.draw(st.lists(st.integers(1, 3), max_size=2))
            others = [universe.tensor([*real.shape[:dim], n, *real.shape[dim + 1 :]]) for n in sizes]
            at = data.draw(st.integers(0, len(others)))
            pairs = [*others[:at], (placed, real), *others[at:]]
            placed, real = concatenate([p for p, _ in pairs], dim), torch.cat([t for _, t in pairs], dim)
        else:
            dim = data.draw(st.integers(0, real.dim() - 1))
            parts = [n for n in (1, 2, 3) if real.shape[dim] % n == 0]
            count = data.draw(st.sampled_from(parts))
            made, expected = chunk(placed, count, dim), torch.chunk(real, count, dim)
            for part, tensor in zip(made, expected, strict=True):
                assert torch.equal(universe.assemble(part), tensor)
            chosen = data.draw(st.integers(0, count - 1))
            placed, real = made[chosen], expected[chosen]
        assert placed.shape == tuple(real.shape)
        assert torch.equal(universe.assemble(placed), real)


def test_experts_gate_and_up_are_one_run_each_and_come_apart_again() -> None:
    """The case that transformers' mixtures of experts need: stacked experts, gate and up rows one after the other."""
    universe = Universe()
    gates = [universe.tensor((3, 4)) for _ in range(2)]
    ups = [universe.tensor((3, 4)) for _ in range(2)]
    fused = concatenate([stack([p for p, _ in group], 0) for group in (gates, ups)], 1)
    order = [gates[0], ups[0], gates[1], ups[1]]
    assert fused.shape == (2, 6, 4)
    assert [(p.tensor, p.source, p.target, p.count) for p in fused.parts] == [
        (part.parts[0].tensor, 0, 12 * i, 12) for i, (part, _) in enumerate(order)
    ]
    gate, up = chunk(fused, 2, 1)
    assert torch.equal(universe.assemble(gate), torch.stack([t for _, t in gates]))
    assert torch.equal(universe.assemble(up), torch.stack([t for _, t in ups]))


def test_what_was_cut_and_put_together_again_is_whole() -> None:
    universe = Universe()
    placed, _ = universe.tensor((4, 6))
    for dim in (0, 1):
        assert concatenate(chunk(placed, 2, dim), dim) == placed


def test_scalars_and_vectors_stack() -> None:
    universe = Universe()
    pairs = [universe.tensor(()) for _ in range(3)]
    assert torch.equal(universe.assemble(stack([p for p, _ in pairs], 0)), torch.stack([t for _, t in pairs]))


# --- binding: views of the slot and what is decoded -----------------------------------------------------------


def test_slots_are_zeroed_whole_pages() -> None:
    for nbytes in (0, 1, PAGE, PAGE + 1):
        buffer = page_aligned(nbytes)
        assert buffer.data_ptr() % PAGE == 0 and buffer.numel() == max(align_up(nbytes, PAGE), PAGE)
        assert buffer.dtype == torch.uint8 and not buffer.any()


def test_a_typed_view_shares_the_bytes_at_its_offset() -> None:
    buffer = page_aligned(PAGE)
    view = typed_view(buffer, 24, torch.float32, (2, 3))
    view.copy_(torch.arange(6.0).view(2, 3))
    assert view.is_contiguous() and view.data_ptr() == buffer.data_ptr() + 24
    assert torch.equal(buffer[24:48].view(torch.float32), torch.arange(6.0))
    within = typed_view(buffer[16:], 8, torch.float32, (6,))
    assert within.data_ptr() == view.data_ptr()
    assert typed_view(buffer, 8, torch.float64, ()).shape == ()
    assert typed_view(buffer, 8, torch.bfloat16, (0, 3)).shape == (0, 3)


def test_a_typed_view_at_an_odd_offset_is_refused() -> None:
    with pytest.raises(BindingError, match="must start at a multiple of"):
        typed_view(page_aligned(PAGE), 6, torch.float32, (1,))
    with pytest.raises(BindingError, match="must start at a multiple of"):
        typed_view(page_aligned(PAGE)[1:], 4, torch.float32, (1,))


def test_every_typed_view_has_a_version_counter_of_its_own() -> None:
    buffer = page_aligned(PAGE)
    one, two = (typed_view(buffer, offset, torch.float32, (4,)) for offset in (0, 16))
    versions = one._version, two._version, buffer._version
    one.add_(1)
    assert one._version > versions[0]
    assert (two._version, buffer._version) == versions[1:]
    buffer.fill_(0)
    assert two._version == versions[1]
    sliced = [buffer[i : i + 16].view(torch.float32) for i in (0, 16)]
    sliced[0].add_(1)
    assert sliced[0]._version == sliced[1]._version, "the reason for set_: views by slicing share one counter"


def test_autograd_sees_the_overwriting_of_one_view_and_not_of_its_neighbour() -> None:
    buffer = page_aligned(PAGE)
    weight, neighbour = (typed_view(buffer, offset, torch.float32, (4,)) for offset in (0, 16))
    for touched in (neighbour, weight):
        x = torch.ones(4, requires_grad=True)
        loss = (x * weight).sum()
        torch.autograd.graph.increment_version([touched])
        if touched is neighbour:
            loss.backward()
        else:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()


def write_safetensors(path: Path, tensors: dict[str, torch.Tensor], shift: int) -> None:
    """A valid file whose data begin `shift` bytes after a multiple of 8: the format allows it, nobody writes it."""
    entries, end = {}, 0
    names = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint8: "U8", torch.int64: "I64"}
    for name, tensor in tensors.items():
        nbytes = tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [end, end + nbytes]}
        end += nbytes
    header = json.dumps(entries).encode()
    header += b" " * (align_up(len(header), 8) - len(header) + shift)
    data = b"".join(t.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for t in tensors.values())
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)


FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def decoded(gbi: GlobalBinaryIndex, sources: Sequence[ParameterSource], packed: bool) -> dict[str, torch.Tensor]:
    """Every parameter as a unit's user sees it: read into a slot, viewed there or decoded into scratch."""
    layout = SlotLayout(sources, packed)
    reader = DiskReader(2)
    reading = Reading(reader, layout)
    assert reading.error() is None
    reader.stop()
    scratch = page_aligned(layout.scratch_nbytes)
    scratch.fill_(POISON)
    found = {
        view.source.name: typed_view(memory, view.offset, view.source.dtype, view.source.shape)
        for memory, views in ((reading.slot, layout.direct), (scratch, layout.decoded))
        for view in views
    }
    Decoder(reading.slot, scratch, layout.decoded)()
    return found


def assert_decoded(
    folder: Path, tensors: dict[str, torch.Tensor], sources: Callable[[GlobalBinaryIndex], list[Any]], packed: bool
) -> None:
    with GlobalBinaryIndex(folder) as gbi:
        made = sources(gbi)
        found = decoded(gbi, [source for source, _ in made], packed)
        for source, expected in made:
            assert found[source.name].dtype == expected.dtype and found[source.name].shape == expected.shape
            assert torch.equal(found[source.name], expected), source.name
            assert torch.equal(materialize(gbi, source), expected), source.name


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(FLOATS), st.lists(st.integers(1, 5), max_size=3)), min_size=1, max_size=6),
    st.booleans(),
    st.data(),
)
def test_parameters_are_the_tensors_whatever_type_and_place(
    tmp_path_factory: pytest.TempPathFactory, made: list[tuple[torch.dtype, list[int]]], packed: bool, data: Any
) -> None:
    """Stored types and wanted types mixed; offsets divisible by the item size or the same type wanted."""
    path = tmp_path_factory.getbasetemp() / "w.safetensors"
    tensors = {f"t{i}": torch.randn(shape).to(dtype) for i, (dtype, shape) in enumerate(made)}
    mixed = data.draw(st.booleans())
    wanted = data.draw(st.lists(st.sampled_from(FLOATS), min_size=len(made), max_size=len(made)))
    if packed:
        wanted = wanted[:1] * len(made)
    write_safetensors(path, tensors, 0 if mixed else data.draw(st.integers(0, 7)))

    def sources(gbi: GlobalBinaryIndex) -> list[Any]:
        pairs = []
        for (name, tensor), dtype in zip(tensors.items(), wanted, strict=True):
            r = gbi.record(name)
            if r.offset % r.dtype.itemsize and not packed:
                dtype = r.dtype
            pairs.append((whole_tensor(name, r, dtype), tensor.to(dtype)))
        return pairs

    if packed and any(o % t.element_size() for o, t in _offsets(path, tensors)):
        return  # an odd offset and a cast at once: see the test below
    assert_decoded(path, tensors, sources, packed)


def _offsets(path: Path, tensors: dict[str, torch.Tensor]) -> list[tuple[int, torch.Tensor]]:
    with GlobalBinaryIndex(path) as gbi:
        return [(gbi.record(name).offset, tensor) for name, tensor in tensors.items()]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
def test_parameters_of_several_pieces_in_another_type(tmp_path: Path, dtype: torch.dtype, packed: bool) -> None:
    tensors = {name: torch.randn(4, 6).to(torch.bfloat16) for name in ("gate0", "up0", "gate1", "up1")}
    tensors["norm"] = torch.randn(5)
    write_safetensors(tmp_path / "w.safetensors", tensors, 0)

    def sources(gbi: GlobalBinaryIndex) -> list[Any]:
        whole = {name: PlacedTensor.whole(gbi.record(name)) for name in tensors}
        gate, up = (stack([whole[f"{kind}{i}"] for i in range(2)], 0) for kind in ("gate", "up"))
        real = {kind: torch.stack([tensors[f"{kind}{i}"] for i in range(2)]) for kind in ("gate", "up")}
        fused, expected = concatenate([gate, up], 1), torch.cat([real["gate"], real["up"]], 1)
        half, half_expected = chunk(whole["up1"], 2, 1)[1], torch.chunk(tensors["up1"], 2, 1)[1]
        return [
            (ParameterSource("fused", fused.shape, dtype, fused.codec), expected.to(dtype)),
            (ParameterSource("half", half.shape, dtype, half.codec), half_expected.to(dtype)),
            (whole_tensor("norm", gbi.record("norm"), dtype), tensors["norm"].to(dtype)),
        ]

    assert_decoded(tmp_path, tensors, sources, packed)


def at_odd_offset(folder: Path, stored: torch.dtype, wanted: torch.dtype, shift: int) -> None:
    tensors = {"a": torch.randn(3, 5).to(stored), "b": torch.randn(7).to(stored)}
    write_safetensors(folder / "w.safetensors", tensors, shift)

    def sources(gbi: GlobalBinaryIndex) -> list[Any]:
        return [(whole_tensor(name, gbi.record(name), wanted), t.to(wanted)) for name, t in tensors.items()]

    assert_decoded(folder, tensors, sources, packed=False)


@pytest.mark.parametrize("shift", range(8))
def test_an_odd_offset_in_the_file(tmp_path: Path, shift: int) -> None:
    for dtype in FLOATS:
        at_odd_offset(tmp_path, dtype, dtype, shift)
    for stored, wanted in itertools.permutations(FLOATS, 2):
        if shift % stored.itemsize == 0:
            at_odd_offset(tmp_path, stored, wanted, shift)


@pytest.mark.parametrize(("stored", "wanted"), list(itertools.permutations(FLOATS, 2)))
def test_an_odd_offset_and_another_type(tmp_path: Path, stored: torch.dtype, wanted: torch.dtype) -> None:
    at_odd_offset(tmp_path, stored, wanted, 1)


def test_what_is_wanted_as_it_is_stored_is_a_view_and_costs_no_scratch(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 5), "b": torch.randn(7)}
    write_safetensors(tmp_path / "w.safetensors", tensors, 0)
    with GlobalBinaryIndex(tmp_path) as gbi:
        sources = [whole_tensor(name, gbi.record(name)) for name in tensors]
        rows = ParameterSource("rows", (2, 5), torch.float32, Placement((Piece(gbi.record("a"), 5, 0, 10),)))
        layout = SlotLayout([*sources, rows])
        assert len(layout.direct) == 3 and layout.scratch_nbytes == 0
        assert torch.equal(decoded(gbi, [*sources, rows], False)["rows"], tensors["a"][1:])
        packed = SlotLayout(sources, packed=True)
        assert not packed.direct and packed.scratch_nbytes == 4 * 22


def test_decoding_again_gives_what_the_slot_holds_now(tmp_path: Path) -> None:
    r = record(tmp_path / "f", 0, 8, "w", torch.bfloat16)
    layout = SlotLayout([whole_tensor("w", r, torch.float32)])
    slot, scratch = page_aligned(layout.nbytes), page_aligned(layout.scratch_nbytes)
    decode = Decoder(slot, scratch, layout.decoded)
    parameter = typed_view(scratch, 0, torch.float32, (4,))
    for number in (1.5, -2.0):
        slot[:8].view(torch.bfloat16).fill_(number)
        decode()
        assert parameter.tolist() == [number] * 4
