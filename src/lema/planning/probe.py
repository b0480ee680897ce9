"""Measures this machine in a few seconds: disk, link and arithmetic as streaming uses them; and remembers it.

It knows devices, directories and clocks; it knows nothing of models' contents, slots or plans.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import math
import os
import platform
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from ..errors import ConfigError, DeviceError, WeightsNotFoundError
from ..machine.device import (
    accelerator_module,
    compute_dtypes,
    device_name,
    release_unused_memory,
    total_device_memory,
)
from ..machine.memory import total_ram
from ..storage.cache import cache_folder, write_whole
from ..storage.index import TensorRecord
from ..storage.layout import PAGE, Extent
from ..storage.reader import DiskReader, ReadJob
from ..storage.views import page_aligned
from .hardware import Hardware

logger = logging.getLogger(__name__)

_VERSION = 2
"""Of the way of measuring; part of the cache's key."""
_RUN_BYTES = 32 << 20
_RUNS = 8
_DISK_SECONDS = 1.0
_TEMPORARY_BYTES = 128 << 20
_SMALLEST_FILE = 64 << 20
_MATMUL_SECONDS = 0.2
_QUICK_SECONDS = 0.08
_LONGEST_CALL = 0.5
_LINK_SECONDS = 0.2
_LINK_BYTES = 64 << 20
# [rows, in, out] of a linear layer: each says whether a type is too slow here for the next.
_SHAPES = {
    "cpu": ((64, 512, 512), (256, 1024, 1024), (512, 2048, 5632)),
    "accelerator": ((64, 512, 512), (1024, 2048, 2048), (4096, 4096, 11008)),
}


def profile(device: str = "cuda", path: str | os.PathLike[str] | None = None, refresh: bool = False) -> Hardware:
    """What `measure` says, from `~/.cache/lema` where this machine was measured before.

    The file there is a profile as `Hardware.parse` takes it. Another host, processor, number of cores or
    torch threads, torch, card or file system is measured anew; so is a file that cannot be read. How much
    RAM the process may use is asked every time.

    Args:
        path: the model's file or directory, to measure the disk it is on; None: the disk of the cache.
        refresh: measure although there is a result.

    Raises:
        DeviceError, WeightsNotFoundError, ConfigError: like `measure`.
    """
    cache = _cache_file(device, path)
    if cache is not None and not refresh:
        try:
            found = Hardware.from_json(cache.read_text(encoding="utf-8"), where=str(cache))
            if found.source == "measured" and found.device == torch.device(device).type:
                return dataclasses.replace(found, ram_bytes=total_ram())
        except FileNotFoundError:
            pass
        except (OSError, UnicodeDecodeError, ConfigError) as error:
            logger.warning("measuring this machine again: %s", error)
    measured = measure(device, path)
    logger.info("measured %s", measured)
    if cache is not None:
        write_whole(cache, lambda file: file.write(measured.to_json().encode()))
    return measured


def measure(device: str = "cuda", path: str | os.PathLike[str] | None = None) -> Hardware:
    """Probe this machine for two to three seconds.

    Args:
        device: 'cpu', or an accelerator as torch names it: 'cuda', 'cuda:1', 'xpu'.
        path: the model's file or directory, to measure the disk it is on; None: the disk of the cache.

    Raises:
        DeviceError: the device is not there, or computes nothing.
        WeightsNotFoundError: the path does not exist.
        ConfigError: nothing on that disk can be read or written.
    """
    place = torch.device(device)
    vram = total_device_memory(place)
    disk = disk_rate(path)
    link = link_rate(place)
    rates = matmul_rates(place)
    release_unused_memory(place)
    return Hardware(
        name=_device_name(place),
        device=place.type,
        vram_bytes=vram,
        ram_bytes=total_ram(),
        disk_bytes_per_s=disk,
        link_bytes_per_s=link,
        flops=rates,
        source="measured",
    )


# -- disk ----------------------------------------------------------------------------------------


def disk_rate(path: str | os.PathLike[str] | None = None, num_readers: int = 2) -> float:
    """Bytes a second `DiskReader` gets from eight runs of 32 MiB spread over a file.

    The model's own file is read where there is a large one, for where a file lies decides its rate; else
    a temporary file beside it. Past the page cache where the system allows it; where it does not, the
    pages of those runs are dropped first. A slow disk is given one second, or what one piece takes.
    """
    reader = DiskReader(num_readers)
    buffer = page_aligned(_RUN_BYTES)
    buffer.fill_(1)
    ended = threading.Event()
    errors: list[BaseException | None] = []

    def done(error: BaseException | None) -> None:
        errors.append(error)
        ended.set()

    with _probe_file(path) as file, contextlib.ExitStack() as stack:
        stack.callback(reader.stop)
        extents = _runs(file)
        started = time.perf_counter()
        deadline = started + _DISK_SECONDS
        reader.submit(
            ReadJob(
                extents=extents,
                buffer=memoryview(buffer.numpy()),  # type: ignore[arg-type]
                cancelled=lambda: reader.bytes_read > 0 and time.perf_counter() > deadline,
                done=done,
            )
        )
        ended.wait()
        seconds = time.perf_counter() - started
    if errors[0] is not None:
        raise errors[0]
    return reader.bytes_read / seconds


def _runs(file: Path) -> list[Extent]:
    """Runs at pages of the file, all into the same memory: nobody looks at what arrives there."""
    size = file.stat().st_size
    count = max(min(_RUNS, size // _RUN_BYTES), 1)
    nbytes = min(size, _RUN_BYTES)
    starts = [(size - nbytes) * i // max(count - 1, 1) // PAGE * PAGE for i in range(count)]
    record = TensorRecord("probe", file, 0, size, torch.uint8, (size,))
    _drop_cached(file, starts, nbytes)
    return [Extent(file, start, nbytes, 0, (record,)) for start in starts]


def _drop_cached(file: Path, starts: list[int], nbytes: int) -> None:
    if hasattr(os, "posix_fadvise"):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            for start in starts:
                os.posix_fadvise(descriptor, start, nbytes, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def _probe_file(path: str | os.PathLike[str] | None) -> Iterator[Path]:
    """The file itself, or the largest weights beside it, or a temporary file where none has 64 MiB."""
    where = _place(path)
    folder = where if where.is_dir() else where.parent
    files = [where] if where.is_file() else []
    if not files or where.stat().st_size < _SMALLEST_FILE:  # an index, say
        files += [file for file in folder.glob("*.safetensors") if file.is_file()]
    largest = max(files, key=lambda file: file.stat().st_size, default=None)
    size = largest.stat().st_size if largest is not None else 0
    if largest is not None and size >= _SMALLEST_FILE:
        yield largest
        return
    temporary = None
    try:
        temporary = _temporary_file(folder)
    except OSError as error:
        if largest is None or size == 0:
            raise ConfigError(
                f"{folder}: the disk cannot be measured: {error}. Give the path of a model, or state the hardware"
            ) from error
        yield largest
    else:
        yield temporary
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _temporary_file(folder: Path) -> Path:
    """A file of random bytes (a file system may compress others), written through to the disk."""
    descriptor, name = tempfile.mkstemp(prefix=".lema-probe-", dir=folder)
    try:
        with open(descriptor, "wb", buffering=0) as file:
            block = os.urandom(4 << 20)
            for _ in range(_TEMPORARY_BYTES // len(block)):
                file.write(block)
            os.fsync(file.fileno())
    except BaseException:
        os.unlink(name)
        raise
    return Path(name)


# -- link and arithmetic ---------------------------------------------------------------------------


def link_rate(device: torch.device) -> float:
    """Bytes a second from 64 MiB of pinned host memory to the device; infinite on the CPU."""
    if device.type == "cpu":
        return math.inf
    try:
        host = torch.empty(_LINK_BYTES, dtype=torch.uint8, pin_memory=True)
    except RuntimeError as error:
        logger.warning("host memory cannot be pinned here, measuring the slower copy: %s", error)
        host = torch.empty(_LINK_BYTES, dtype=torch.uint8)
    target = torch.empty_like(host, device=device, pin_memory=False)
    return _LINK_BYTES / _seconds_a_call(lambda: target.copy_(host, non_blocking=True), device, _LINK_SECONDS)


def matmul_rates(device: torch.device) -> dict[str, float]:
    """FLOP/s by type in products of the size a layer makes for a few thousand tokens (on the CPU, 512).

    Raises:
        DeviceError: the device is not there, or computes in none of the types.
    """
    if device.type != "cpu":
        accelerator_module(device)
    rates = {}
    failure: RuntimeError | None = None
    for dtype in sorted(compute_dtypes(device), reverse=True):
        try:
            rates[dtype] = _matmul_rate(device, getattr(torch, dtype))
        except RuntimeError as error:  # torch's word for no kernel of this type, or for this card
            logger.info("%s does not compute in %s: %s", device, dtype, error)
            failure = error
    if not rates:
        raise DeviceError(
            f"device={str(device)!r} ({_device_name(device)}) computes in no type with this torch "
            f"({torch.__version__}): {failure}. Install a build made for it, or choose device='cpu'"
        ) from failure
    return rates


@torch.no_grad()
def _matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the largest shape of which one call is sure to end in half a second.

    A call is a linear layer's product and that of its input's gradient, which reads the weight the other way: in a type
    that a processor has no instructions for, the second can take sixty times as long.
    """
    generator = torch.Generator(device).manual_seed(0)  # the caller's random state stays as it is
    shapes = _SHAPES["cpu" if device.type == "cpu" else "accelerator"]
    seconds_a_flop = 0.0
    for rows, width, out in shapes:
        flop = 4 * rows * width * out
        if seconds_a_flop * flop > _LONGEST_CALL:
            break
        x, weight = (
            torch.empty(count, width, device=device).uniform_(-1, 1, generator=generator).to(dtype)
            for count in (rows, out)
        )
        last = (rows, width, out) == shapes[-1]
        call = functools.partial(_there_and_back, x, weight)
        seconds = _seconds_a_call(call, device, _MATMUL_SECONDS) if last else _quickest_call(call, device)
        seconds_a_flop = seconds / flop
    return 1 / seconds_a_flop


def _there_and_back(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.linear(x, weight) @ weight


def _quickest_call(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of the quickest of a few calls: busy cores make some take many times as long."""
    times = [_timed(call, device, 1)]
    while sum(times) < _QUICK_SECONDS or (len(times) < 4 and sum(times) < _LONGEST_CALL):
        times.append(_timed(call, device, 1))
    return min(times)


def _seconds_a_call(call: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Seconds of one call among as many as take `seconds` or more together, after a first one that does not count."""
    _timed(call, device, 1)
    count = 1
    while (spent := _timed(call, device, count)) < seconds:
        count = max(2 * count, int(count * 1.1 * seconds / max(spent, 1e-6)))
    return spent / count


def _timed(call: Callable[[], object], device: torch.device, count: int) -> float:
    started = time.perf_counter()
    for _ in range(count):
        call()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() - started


# -- this machine ----------------------------------------------------------------------------------


def _device_name(device: torch.device) -> str:
    return _processor() if device.type == "cpu" else device_name(device)


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "unknown processor"


def _place(path: str | os.PathLike[str] | None) -> Path:
    if path is None:
        folder = cache_folder()
        return folder if folder is not None else Path(tempfile.gettempdir())
    if not os.path.exists(path):
        raise WeightsNotFoundError(f"{os.fspath(path)} does not exist: give the model's file or directory")
    return Path(path)


def _cache_file(device: str, path: str | os.PathLike[str] | None) -> Path | None:
    where = _place(path)
    folder = cache_folder()
    if folder is None:
        return None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    facts = [_VERSION, platform.node(), _processor(), cores, torch.get_num_threads(), torch.__version__]
    facts += [device, _device_name(torch.device(device)), _file_system(where)]
    key = hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()[:16]
    return folder / f"hardware-{key}.json"


def _file_system(path: Path) -> int:
    """A number for the file system; the file system's own where it has one, for device numbers change at boot."""
    return (os.statvfs(path).f_fsid if hasattr(os, "statvfs") else 0) or path.stat().st_dev
