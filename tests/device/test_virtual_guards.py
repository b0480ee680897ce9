"""Every wait of the protocols between streams, taken out: with it the numbers are right, without it the device says so.

Each scenario holds up one kind of work, so that what is not ordered comes in the wrong order every time.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from device_tiers import UNITS, noise, tier_of
from lema.storage.views import page_aligned
from lema.streaming import accelerator as accelerator_module
from lema.streaming.accelerator import AcceleratorBackend, DeviceEvent, DeviceStream
from lema.streaming.boundaries import Handle, OffloadedBoundaries
from lema.streaming.schedule import AccessSchedule
from virtual_device.controls import Controls

pytestmark = [pytest.mark.accelerator, pytest.mark.timeout(60)]

HELD_UP = 0.03
"""Seconds; what needs no waiting takes a hundredth of it."""
NBYTES = 1 << 14


@pytest.fixture
def backend(virtual: Controls) -> Iterator[AcceleratorBackend]:
    backend = AcceleratorBackend(virtual.device)
    yield backend
    torch.accelerator.synchronize()
    backend.close()


@contextlib.contextmanager
def without(places: str, events: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Take the waits for some events out of functions; how often that happened is appended.

    Args:
        places: names of functions.
        events: names of attributes that hold them, of what a function's variables hold.
    """
    taken: list[int] = []

    def meant(event: object) -> bool:
        frame = sys._getframe(2)
        if frame.f_code.co_name not in places.split():
            return False
        for owner in frame.f_locals.values():
            for name in events.split():
                held = getattr(owner, name, None)
                if held is event or (isinstance(held, list) and any(each is event for each in held)):
                    taken.append(1)
                    return True
        return False

    wait, synchronize = DeviceStream.wait_event, DeviceEvent.synchronize

    def wait_event(self: DeviceStream, event: DeviceEvent) -> None:
        if not meant(event):
            wait(self, event)

    def synchronize_event(self: DeviceEvent) -> None:
        if not meant(self):
            synchronize(self)

    with monkeypatch.context() as patched:
        patched.setattr(DeviceStream, "wait_event", wait_event)
        patched.setattr(DeviceEvent, "synchronize", synchronize_event)
        yield taken


# --- weights ----------------------------------------------------------------------------------------------


def wrong_units(backend: AcceleratorBackend) -> list[int]:
    """Units of one training step that computation did not find as they are on disk."""
    contents = [noise(NBYTES + 512 * unit, unit) for unit in range(UNITS)]
    accesses = AccessSchedule.training(UNITS).accesses
    seen = [torch.empty(len(contents[access.unit]), dtype=torch.uint8, device=backend.device) for access in accesses]
    with ThreadPoolExecutor(2) as pool:
        parts = tier_of(backend, pool, contents, pin=True)
        for place, access in zip(seen, accesses, strict=True):
            slot = parts.tier.acquire(access.unit, access.phase)
            place.copy_(parts.tier.buffers[slot][: len(place)])
            parts.tier.release(access.unit)
        torch.accelerator.synchronize()
        parts.tier.cache.close()
        parts.host.close()
        parts.tier.stop()
        for buffer in parts.buffers:
            backend.unpin(buffer)
    return [v.unit for place, v in zip(seen, accesses, strict=True) if not torch.equal(place.cpu(), contents[v.unit])]


TIER = {
    "acquire -> ready": ("acquire", "_ready", {"to_device": HELD_UP}),
    "copier -> free": ("_enqueue", "_free", {"on_device": HELD_UP}),
    "host slot given back -> copied": ("_return_slots", "_copied", {"to_device": HELD_UP}),
}


@pytest.mark.parametrize("name", TIER)
def test_waits_of_the_tier(
    name: str, backend: AcceleratorBackend, virtual: Controls, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, events, held_up = TIER[name]
    with virtual.delays(**held_up):
        assert wrong_units(backend) == []
        with without(place, events, monkeypatch) as taken:
            assert wrong_units(backend) and taken


# --- boundaries -------------------------------------------------------------------------------------------


class Store:
    """A store, tensors that tell one from another, and what computation read."""

    def __init__(self, backend: AcceleratorBackend, virtual: Controls) -> None:
        self.store = OffloadedBoundaries(backend, 4)
        self.virtual = virtual
        self.inputs = [torch.full((NBYTES,), unit + 1, dtype=torch.uint8, device=backend.device) for unit in range(4)]
        self.other = torch.Stream(backend.device)
        self._read: list[tuple[int, torch.Tensor]] = []
        for unit in (3, 2):  # both stages get their size, and bytes that nothing below puts there
            self.store.put(unit, self.inputs[unit])
        torch.accelerator.synchronize()

    def put(self, *units: int) -> list[Handle]:
        return [self.store.put(unit, self.inputs[unit]) for unit in units]

    def read(self, handle: Handle, release: bool = True) -> None:
        """Get a boundary and let the compute stream read it."""
        seen = torch.empty(NBYTES, dtype=torch.uint8, device=self.inputs[0].device)
        seen.copy_(self.store.get(handle))
        self._read.append((handle.unit, seen))
        if release:
            self.store.release(handle)

    @contextlib.contextmanager
    def elsewhere(self) -> Iterator[None]:
        """Compute on another stream, as another thread would."""
        before = torch.accelerator.current_stream()
        torch.accelerator.set_stream(self.other)
        try:
            yield
        finally:
            torch.accelerator.set_stream(before)

    def wrong(self) -> list[int]:
        """Units that were read as something else."""
        torch.accelerator.synchronize()
        return [unit for unit, seen in self._read if set(seen.tolist()) != {unit + 1}]


def late_fetch(store: Store) -> None:
    handles = store.put(0, 1, 2)
    torch.accelerator.synchronize()
    with store.virtual.delays(to_device=HELD_UP):
        store.read(handles[0])


def slow_puts(store: Store) -> None:
    with store.virtual.delays(on_device=HELD_UP):
        handles = store.put(0, 1, 2)
    store.read(handles[0])


def slow_way_out(store: Store) -> None:
    with store.virtual.delays(to_host=HELD_UP):
        handles = store.put(0, 1, 2)
    store.read(handles[0])


def fetched_over_what_goes_out(store: Store) -> None:
    with store.virtual.delays(to_host=HELD_UP):
        handles = store.put(0, 1, 2)
        store.read(handles[0])
    store.read(handles[1])


def fetched_over_what_is_read(store: Store) -> None:
    handles = store.put(0, 1, 2)
    torch.accelerator.synchronize()
    with store.virtual.delays(on_device=HELD_UP):
        store.read(handles[2])
        store.read(handles[1])


def fetched_on_another_stream(store: Store) -> None:
    """The first stays in use, so that the second goes out late, from a stage that the third overwrites."""
    with store.virtual.delays(to_host=HELD_UP):
        handles = store.put(0)
        with store.elsewhere():
            store.read(handles[0], release=False)
        handles += store.put(1, 2)
        with store.elsewhere():
            store.store.release(handles[0])
            store.read(handles[1])


BOUNDARIES: dict[str, tuple[str, str, Callable[[Store], None]]] = {
    "get -> written": ("get", "written", late_fetch),
    "carry-out -> written": ("_carry_out", "written", slow_puts),
    "fill -> copied": ("_fill", "copied", slow_way_out),
    "fetch -> copied": ("_fetch", "copied", fetched_over_what_goes_out),
    "fetch -> free": ("_fetch", "free", fetched_over_what_is_read),
    "fetch -> stored": ("_fetch", "stored", fetched_on_another_stream),
}


@pytest.mark.parametrize("name", BOUNDARIES)
def test_waits_of_the_boundaries(
    name: str, backend: AcceleratorBackend, virtual: Controls, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, events, scenario = BOUNDARIES[name]
    store = Store(backend, virtual)
    scenario(store)
    assert store.wrong() == []
    store.store.close()
    store = Store(backend, virtual)
    with without(place, events, monkeypatch) as taken:
        scenario(store)
    assert store.wrong() and taken
    store.store.close()


def test_close_waits_for_boundaries_on_their_way(
    backend: AcceleratorBackend, virtual: Controls, monkeypatch: pytest.MonkeyPatch
) -> None:
    for waits in (True, False):
        store = Store(backend, virtual)
        with virtual.delays(to_host=HELD_UP):
            store.put(2, 3)
            with (
                contextlib.nullcontext([])
                if waits
                else without("empty settle", "written copied stored fetched", monkeypatch) as taken
            ):
                store.store.close()
        faults = virtual.take_faults()
        assert bool(faults) != waits and bool(taken) != waits
        assert all("unregistered while a copy uses it" in fault for fault in faults)


# --- buffers and the end ----------------------------------------------------------------------------------


@pytest.mark.parametrize("waits", [True, False])
def test_a_new_buffer_is_nobody_elses(
    backend: AcceleratorBackend, virtual: Controls, monkeypatch: pytest.MonkeyPatch, waits: bool
) -> None:
    host = page_aligned(NBYTES).fill_(7)
    assert backend.pin(host)
    torch.accelerator.empty_cache()
    original = torch.full((NBYTES,), 5, dtype=torch.uint8, device=backend.device)
    kept, place = torch.empty_like(original), original.data_ptr()
    torch.accelerator.synchronize()
    if not waits:
        monkeypatch.setattr(accelerator_module, "_reach", lambda device, stream: None)
    with virtual.delays(on_device=HELD_UP):
        kept.copy_(original)
        del original  # its memory is free when the copy was enqueued, and read later
        buffer = backend.device_buffer(NBYTES)
        assert buffer.data_ptr() == place
        backend.copy(buffer, host, backend.copy_stream())
    right = set(kept.tolist()) == {5} and set(buffer.tolist()) == {7}
    assert right == waits


@pytest.mark.parametrize("waits", [True, False])
def test_closing_the_device_waits_for_its_copies(
    virtual: Controls, monkeypatch: pytest.MonkeyPatch, waits: bool
) -> None:
    backend = AcceleratorBackend(virtual.device)
    host, there = page_aligned(NBYTES), backend.device_buffer(NBYTES)
    assert backend.pin(host)
    if not waits:
        monkeypatch.setattr(torch.accelerator, "synchronize", lambda device=None: None)
    with virtual.delays(to_device=HELD_UP):
        backend.copy(there, host, backend.copy_stream())
        backend.close()
    assert bool(virtual.take_faults()) != waits


def test_closing_the_device_waits_for_what_computation_copies(virtual: Controls) -> None:
    """Values of a host optimizer travel on the compute stream, which is not one of the device's own."""
    backend = AcceleratorBackend(virtual.device)
    host, there = page_aligned(NBYTES), backend.device_buffer(NBYTES)
    assert backend.pin(host)
    with virtual.delays(to_device=HELD_UP):
        there.copy_(host, non_blocking=True)
        backend.close()
    faults = virtual.take_faults()
    assert faults == []
