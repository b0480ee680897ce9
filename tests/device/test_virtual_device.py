"""The virtual device itself: what its tests of others rest on."""

from __future__ import annotations

import ctypes
import itertools
import os
import time
from collections.abc import Iterator

import pytest
import torch

from lema.storage.layout import PAGE
from lema.storage.views import page_aligned
from virtual_device.controls import Controls

pytestmark = [pytest.mark.accelerator, pytest.mark.timeout(60)]

LONG = 0.1
"""Seconds by which something is held up: what is not ordered after it has happened by then."""
NBYTES = 1 << 16


@pytest.fixture
def there(virtual: Controls) -> torch.device:
    return virtual.device


@pytest.fixture
def pinned(there: torch.device) -> Iterator[torch.Tensor]:
    """Registered bytes of the host, all 7."""
    driver, buffer = torch.get_device_module(there).cudart(), page_aligned(NBYTES).fill_(7)
    assert driver.cudaHostRegister(buffer.data_ptr(), NBYTES, 1) == 0
    yield buffer
    torch.accelerator.synchronize()
    driver.cudaHostUnregister(buffer.data_ptr())


def streams(device: torch.device, number: int = 2) -> list[torch.Stream]:
    return [torch.Stream(device) for _ in range(number)]


def on(stream: torch.Stream, target: torch.Tensor, source: torch.Tensor) -> None:
    before = torch.accelerator.current_stream()
    torch.accelerator.set_stream(stream)
    target.copy_(source, non_blocking=True)
    torch.accelerator.set_stream(before)


# --- what torch sees --------------------------------------------------------------------------------------


def test_torch_has_it_for_its_accelerator(there: torch.device) -> None:
    assert torch.accelerator.current_accelerator() == torch.device(there.type)
    assert torch.accelerator.device_count() == 1
    assert torch.ones(3, device=there).device == there
    with pytest.raises(RuntimeError, match="one virtual device"):
        torch.ones(3, device=f"{there.type}:1")


def test_numbers_are_the_processors(there: torch.device) -> None:
    draw = torch.Generator().manual_seed(1)
    a, b = torch.randn(37, 53, generator=draw), torch.randn(53, 41, generator=draw)
    grad, plain = a.to(there).requires_grad_(), a.clone().requires_grad_()
    for one, other in ((grad, b.to(there)), (plain, b)):
        (torch.layer_norm(one @ other, (41,)).softmax(-1) ** 2).sum().backward()
    assert torch.equal(grad.grad.cpu(), plain.grad)  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_layer_norm_convolution_and_histogram_do_not_block(
    virtual: Controls, there: torch.device, dtype: torch.dtype
) -> None:
    draw = torch.Generator().manual_seed(1)
    x, w = torch.randn(2, 6, 9, generator=draw).to(dtype), torch.randn(6, 1, 3, generator=draw).to(dtype)

    def results(device: torch.device | str) -> list[torch.Tensor]:
        inputs = [each.to(device).requires_grad_() for each in (x, w)]
        counts = torch.histc(torch.arange(9, device=device, dtype=torch.int32).float(), 4, 0, 8)
        with virtual.blocking_calls() as calls:
            out = torch.conv1d(torch.layer_norm(inputs[0], (9,)), inputs[1], padding=1, groups=6)
            out.sum().backward()
        assert not calls
        return [counts, out.detach(), *(each.grad for each in inputs)]  # type: ignore[list-item]

    for found, expected in zip(results(there), results("cpu"), strict=True):
        assert torch.equal(found.cpu(), expected)


def test_devices_do_not_mix(there: torch.device) -> None:
    with pytest.raises(RuntimeError, match="same device"):
        torch.ones(3, device=there) + torch.ones(3)
    assert torch.equal((torch.ones(3, device=there) + torch.tensor(1.0)).cpu(), torch.full((3,), 2.0))


def test_random_numbers_follow_the_state_and_reading_it_waits_for_nothing(
    virtual: Controls, there: torch.device
) -> None:
    module = torch.get_device_module(there)
    torch.manual_seed(5)
    first = torch.rand(8, device=there)
    with virtual.delays(operation=LONG), virtual.blocking_calls() as calls:
        state, clock = module.get_rng_state(), time.perf_counter()
        second = torch.rand(8, device=there)
        assert not torch.equal(module.get_rng_state(), state)
        module.set_rng_state(state)
        again = torch.rand(8, device=there)
        assert time.perf_counter() - clock < LONG and not calls
    assert torch.equal(second, again) and not torch.equal(first, second)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(8, device=there), first)


# --- streams and events -----------------------------------------------------------------------------------


def test_a_stream_runs_beside_the_host_and_in_order(
    virtual: Controls, there: torch.device, pinned: torch.Tensor
) -> None:
    target, event = torch.zeros(NBYTES, dtype=torch.uint8, device=there), torch.Event(there)
    torch.accelerator.synchronize()
    with virtual.delays(to_device=LONG):
        target.copy_(pinned, non_blocking=True)
        doubled = target * 2
        torch.accelerator.current_stream().record_event(event)
        assert not event.query()
        event.synchronize()
        assert event.query()
    assert set(doubled.tolist()) == {14}


def test_a_stream_waits_only_when_told_to(virtual: Controls, there: torch.device, pinned: torch.Tensor) -> None:
    for told in (True, False):
        first, second = streams(there)
        between, seen = (torch.zeros(NBYTES, dtype=torch.uint8, device=there) for _ in range(2))
        event = torch.Event(there)
        torch.accelerator.synchronize()
        with virtual.delays(to_device=LONG):
            on(first, between, pinned)
            first.record_event(event)
            if told:
                second.wait_event(event)
            time.sleep(LONG / 4)
            on(second, seen, between)
        assert set(seen.tolist()) == {7 if told else 255}, "a copy on the way holds neither old nor new bytes"


def test_a_wait_takes_the_last_record_at_the_time_of_the_call(
    virtual: Controls, there: torch.device, pinned: torch.Tensor
) -> None:
    first, second = streams(there)
    target, event = torch.zeros(NBYTES, dtype=torch.uint8, device=there), torch.Event(there)
    torch.accelerator.synchronize()
    assert event.query(), "never recorded is complete"
    event.synchronize()
    with virtual.delays(to_device=LONG):
        second.wait_event(event)  # of nothing
        on(first, target, pinned)
        first.record_event(event)
        second.synchronize()
        assert not event.query()
        second.wait_event(event)
        second.synchronize()
        assert event.query()


def test_timing_tells_how_long_the_stream_took(virtual: Controls, there: torch.device, pinned: torch.Tensor) -> None:
    events = [torch.Event(there, enable_timing=True) for _ in range(2)]
    target, stream = torch.zeros(NBYTES, dtype=torch.uint8, device=there), torch.accelerator.current_stream()
    with virtual.delays(to_device=LONG):
        stream.record_event(events[0])
        target.copy_(pinned, non_blocking=True)
        stream.record_event(events[1])
        with pytest.raises(RuntimeError, match="completed"):
            events[0].elapsed_time(events[1])
    assert events[0].elapsed_time(events[1]) >= 1000 * LONG
    with pytest.raises((RuntimeError, ValueError), match="timing"):
        events[0].elapsed_time(torch.Event(there))


# --- memory -----------------------------------------------------------------------------------------------


def test_the_host_cannot_touch_it(there: torch.device) -> None:
    memory = torch.ones(16, dtype=torch.uint8, device=there)
    torch.accelerator.synchronize()
    readable, writable = os.pipe()
    try:
        written = ctypes.CDLL(None, use_errno=True).write(writable, ctypes.c_void_p(memory.data_ptr()), 16)
        assert written == -1 and ctypes.get_errno() == 14  # EFAULT
    finally:
        os.close(readable)
        os.close(writable)


def test_a_freed_block_is_poisoned_and_comes_again_in_its_stream(there: torch.device) -> None:
    torch.accelerator.empty_cache()
    first = torch.full((NBYTES,), 7, dtype=torch.uint8, device=there)
    kept, place = first.clone(), first.data_ptr()
    del first
    second = torch.empty(NBYTES, dtype=torch.uint8, device=there)
    assert second.data_ptr() == place
    assert set(second.tolist()) == {255} and set(kept.tolist()) == {7}
    assert torch.empty(4, device=there).isnan().all()


@pytest.mark.parametrize("recorded", [True, False])
def test_another_streams_write_into_freed_memory_is_a_fault(
    virtual: Controls, there: torch.device, pinned: torch.Tensor, recorded: bool
) -> None:
    (other,) = streams(there, 1)
    torch.accelerator.empty_cache()
    memory = torch.empty(NBYTES, dtype=torch.uint8, device=there)
    torch.accelerator.synchronize()
    with virtual.delays(to_device=LONG):
        on(other, memory, pinned)
        if recorded:
            memory.record_stream(other)
        place = memory.data_ptr()
        del memory
        assert (torch.empty(NBYTES, dtype=torch.uint8, device=there).data_ptr() == place) != recorded
        other.synchronize()
    torch.accelerator.empty_cache()
    torch.accelerator.synchronize()
    faults = virtual.take_faults()
    assert [f"{NBYTES} bytes" in fault and "after it was freed" in fault for fault in faults] == [True] * (not recorded)


def test_capacity_and_figures(virtual: Controls, there: torch.device) -> None:
    torch.accelerator.empty_cache()
    torch.accelerator.reset_peak_memory_stats()
    before, reserved = torch.accelerator.memory_allocated(), torch.accelerator.memory_reserved()
    with virtual.capacity(reserved + (16 << 20)):
        assert torch.accelerator.get_memory_info() == (16 << 20, reserved + (16 << 20))
        big = torch.zeros(12 << 20, dtype=torch.uint8, device=there)
        assert torch.accelerator.memory_allocated() - before == 12 << 20
        with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
            torch.zeros(6 << 20, dtype=torch.uint8, device=there)
        del big
        assert torch.accelerator.memory_allocated() == before
        assert torch.accelerator.max_memory_allocated() - before == 12 << 20
        assert torch.accelerator.memory_reserved() - reserved == 12 << 20
        assert torch.accelerator.memory_stats()["allocated_bytes.all.allocated"] >= 12 << 20
        with virtual.blocking_calls() as calls:
            small = torch.zeros(6 << 20, dtype=torch.uint8, device=there)  # the cache makes room
        assert [call.kind for call in calls] == ["allocation"]
        del small
    torch.accelerator.empty_cache()
    assert torch.accelerator.memory_reserved() == reserved


# --- the host's memory ------------------------------------------------------------------------------------


def test_registered_memory_is_pinned_once(there: torch.device, pinned: torch.Tensor) -> None:
    driver = torch.get_device_module(there).cudart()
    assert pinned.is_pinned() and pinned[PAGE:].is_pinned() and not torch.empty(4).is_pinned()
    assert torch.empty(4, pin_memory=True).is_pinned()
    assert driver.cudaHostRegister(pinned.data_ptr() + PAGE, PAGE, 1) != 0
    assert driver.cudaHostUnregister(pinned.data_ptr() + PAGE) != 0
    assert driver.cudaHostUnregister(pinned.data_ptr()) == 0 and not pinned.is_pinned()


def test_unregistering_under_a_copy_is_a_fault(virtual: Controls, there: torch.device, pinned: torch.Tensor) -> None:
    driver = torch.get_device_module(there).cudart()
    target = torch.zeros(NBYTES, dtype=torch.uint8, device=there)
    torch.accelerator.synchronize()
    with virtual.delays(to_device=LONG):
        target.copy_(pinned, non_blocking=True)
        driver.cudaHostUnregister(pinned.data_ptr())
    assert virtual.take_faults() == ["host memory was unregistered while a copy uses it"]
    driver.cudaHostRegister(pinned.data_ptr(), NBYTES, 1)
    target.copy_(pinned, non_blocking=True)
    torch.accelerator.synchronize()
    driver.cudaHostUnregister(pinned.data_ptr())
    assert virtual.take_faults() == []


def test_pinned_memory_that_a_copy_reads_is_not_handed_out(virtual: Controls, there: torch.device) -> None:
    target = torch.zeros(NBYTES, dtype=torch.uint8, device=there)
    torch.accelerator.synchronize()
    with virtual.delays(to_device=LONG):
        source = torch.full((NBYTES,), 7, dtype=torch.uint8).pin_memory()
        target.copy_(source, non_blocking=True)
        del source
        torch.empty(NBYTES, dtype=torch.uint8, pin_memory=True).fill_(9)
    assert set(target.tolist()) == {7}


# --- calls that block -------------------------------------------------------------------------------------


def test_blocking_calls_are_listed_with_their_place(
    virtual: Controls, there: torch.device, pinned: torch.Tensor
) -> None:
    target = torch.zeros(NBYTES, dtype=torch.uint8, device=there)
    with virtual.blocking_calls() as calls:
        target.copy_(pinned, non_blocking=True)
        pinned.copy_(target, non_blocking=True)
        target.float().mul_(2.0).sum()
        torch.tensor([1, 2]).to(there, non_blocking=True)  # small: taken before the call returns
        assert calls == []
        target.copy_(pinned)
        target.cpu()
        target[0].item()
        target.nonzero()
        target[target > 3]
        torch.accelerator.current_stream().synchronize()
        torch.accelerator.synchronize()
    kinds = [kind for kind, _ in itertools.groupby(call.kind for call in calls)]
    assert kinds == ["copy", "item", "values", "stream", "device"] and [call.kind for call in calls].count("copy") == 2
    assert calls[0].nbytes == NBYTES and "pageable" in calls[1].name
    assert all("test_blocking_calls_are_listed" in str(call) for call in calls)


def test_failed_work_is_told_at_the_next_wait(virtual: Controls, there: torch.device) -> None:
    torch.zeros(4, device=there)[torch.tensor([9], device=there)]
    with pytest.raises(RuntimeError, match="out of bounds"):
        torch.accelerator.synchronize()
    assert len(virtual.take_faults()) == 1
    torch.accelerator.synchronize()
