"""A device tier of the simulated device over a real file, driven at random, that says what was read wrong."""

from __future__ import annotations

import errno
import os
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from lema.errors import ReadError
from lema.storage import reader as reader_module
from lema.storage.index import TensorRecord
from lema.storage.layout import Move, SlotLayout, whole_tensor
from lema.storage.reader import DiskReader, ReadJob
from lema.storage.views import page_aligned
from lema.streaming.device_tier import DeviceTier
from lema.streaming.schedule import Access, AccessSchedule, Phase
from lema.streaming.slot_cache import Load, SlotCache
from lema.streaming.tiers import Tier
from simulated import SimulatedDevice, SimulatedStream

PAUSE = 0.0008


def hold(stream: SimulatedStream) -> threading.Event:
    """Let a stream go on only when the event is set."""
    gate = threading.Event()

    def wait() -> None:
        gate.wait(5)  # a test that failed must not wait for ever to close the stream

    stream.enqueue(wait)
    return gate


@dataclass(frozen=True)
class Shape:
    """Everything a run is drawn from; the seed draws the rest."""

    seed: int
    units: int = 5
    host_slots: int = 2
    device_slots: int = 2
    depth: int = 2
    readers: int = 2
    failures: float = 0.0


class Run:
    """Files, host slots and a device tier with a random walk through them.

    `wrong` collects whatever a reader of a slot saw that was not the unit's bytes.
    """

    def __init__(
        self,
        folder: Path,
        shape: Shape,
        device: type[SimulatedDevice] = SimulatedDevice,
        tier: type[DeviceTier] = DeviceTier,
    ) -> None:
        draw = self.draw = random.Random(shape.seed)
        self.shape = shape
        self.wrong: list[str] = []
        self.bytes: list[torch.Tensor] = []
        records, offset = [], draw.randrange(0, 5000)
        with open(folder / "weights", "wb") as stream:
            stream.write(b"\0" * offset)
            for unit in range(shape.units):
                nbytes = draw.randrange(1, 6000)
                stream.write(content := bytes([unit * 16 + draw.randrange(16)]) * nbytes)
                self.bytes.append(torch.frombuffer(bytearray(content), dtype=torch.uint8))
                records.append(TensorRecord(f"unit{unit}", folder / "weights", offset, nbytes, torch.uint8, (nbytes,)))
                offset += nbytes
        self.layouts = [SlotLayout([whole_tensor(r.name, r)]) for r in records]
        self.places = [layout.extents[0].slot_offset for layout in self.layouts]
        sizes = {unit: layout.nbytes for unit, layout in enumerate(self.layouts)}
        self.device = device(shape.seed, PAUSE, blocking=False)
        self.reader = DiskReader(shape.readers)
        self.plans = [AccessSchedule.training(shape.units), AccessSchedule.inference(shape.units), AccessSchedule(())]
        host_slot_of, slot_of = (
            {unit: unit % slots for unit in range(shape.units)} for slots in (shape.host_slots, shape.device_slots)
        )
        self.buffers = [page_aligned(max(sizes.values())) for _ in range(shape.host_slots)]
        self.host = SlotCache(host_slot_of, self.plans[0].loads(slot_of), shape.depth, self.fill)
        moves = {unit: [Move(0, 0, size)] for unit, size in sizes.items()}
        self.tier = tier(self.device, Tier(self.host, self.buffers), slot_of, self.plans[0], max(shape.depth, 1), moves)
        for name in ("release", "finished"):
            setattr(self.tier.cache, name, self.then_pause(getattr(self.tier.cache, name)))

    def then_pause(self, method: Callable[..., None]) -> Callable[..., None]:
        """Another thread may always run right after a call; here it often does."""

        def call(*args: Any) -> None:
            method(*args)
            if self.draw.random() < 0.5:
                time.sleep(self.draw.random() * PAUSE)

        return call

    def fill(self, load: Load) -> None:
        self.buffers[load.slot].fill_(0xFF)
        view = memoryview(self.buffers[load.slot].numpy())
        extents = self.layouts[load.unit].extents
        self.reader.submit(
            ReadJob(extents, view, lambda: load.cancelled, lambda error: self.host.finished(load, error))
        )

    def acquire(self, access: Access) -> None:
        """An access, tried again after every injected error; its bytes are read when the compute stream comes to it."""
        slot = None
        while slot is None:
            try:
                slot = self.tier.acquire(access.unit, access.phase)
            except ReadError as error:
                if f"'unit{access.unit}'" not in str(error):
                    self.wrong.append(f"an access of unit {access.unit} was told: {error}")
        start, expected = self.places[access.unit], self.bytes[access.unit]

        def use(source: torch.Tensor) -> None:
            if not torch.equal(source[start : start + len(expected)], expected):
                self.wrong.append(f"unit {access.unit} found other bytes in slot {slot}")

        self.device.read(self.tier.buffers[slot], use)

    def sweep(self, accesses: Sequence[Access]) -> None:
        """Accesses one after the other, sometimes two units in use at once."""
        held: list[Access] = []
        for access in accesses:
            slot = self.tier.cache.slot_of[access.unit]
            for other in list(held):
                if self.tier.cache.slot_of[other.unit] == slot or self.draw.random() < 0.7:
                    held.remove(other)
                    self.tier.release(other.unit)
            self.acquire(access)
            held.append(access)
            if self.draw.random() < 0.3:
                time.sleep(self.draw.random() * PAUSE)
        for access in held:
            self.tier.release(access.unit)

    def predict(self, plan: AccessSchedule) -> None:
        self.tier.predict(plan)

    def abort(self) -> None:
        self.tier.abort()
        self.reader.stop()

    def walk(self, sweeps: int = 3) -> None:
        for _ in range(sweeps):
            plan = self.draw.choice(self.plans)
            self.predict(plan)
            accesses = list(plan.accesses) or [Access(u, Phase.FORWARD) for u in range(self.shape.units)]
            if self.draw.random() < 0.4:
                self.draw.shuffle(accesses)
            self.sweep(accesses)
            if self.draw.random() < 0.2:
                self.abort()

    def end(self) -> list[str]:
        """Close everything; what was wrong."""
        self.tier.close()
        self.reader.stop()
        self.device.compute_stream().drain()
        for stream in (self.device.copy_stream(), self.device.compute_stream()):
            stream.close()
        return self.wrong + self.device.faults


def failing_reads(patch: pytest.MonkeyPatch, seed: int, rate: float) -> None:
    """Every read fails with this probability, after it wrote half of what it was asked for."""
    real, draw = os.preadv, random.Random(seed)

    def preadv(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        if draw.random() < rate:
            real(descriptor, [buffers[0][: len(buffers[0]) // 1024 * 512]], offset)
            raise OSError(errno.EIO, "Input/output error")
        return real(descriptor, buffers, offset)

    if rate:
        patch.setattr(reader_module.os, "preadv", preadv)


def drive(folder: Path, shape: Shape, **parts: Any) -> list[str]:
    with pytest.MonkeyPatch.context() as patch:
        failing_reads(patch, shape.seed, shape.failures)
        run = Run(folder, shape, **parts)
        try:
            run.walk()
        finally:
            wrong = run.end()
        return wrong
