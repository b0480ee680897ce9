"""Gathering facts from this machine: the kernel's files, the package's metadata, torch, and the hub's settings.

What a fact means, `checks` and `resources` say.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import re
import resource
import shutil
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement

from ..libraries import distribution
from .facts import Codes, Device, Facts, Hub, Library, Memory, Place, Rates, Torch

_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")


def gather(model: str | None = None, output_dir: str = "output", measure: bool = True) -> Facts:
    """Look at this machine. Measuring takes two to three seconds where it was not measured before.

    Args:
        model: a path; the disk under it is measured and looked at.
        output_dir: where runs would be written.
        measure: False: leave the rates out.

    Raises:
        WeightsNotFoundError: the model's path does not exist.
    """
    from ..errors import LemaError, WeightsNotFoundError

    if model is not None and not os.path.exists(model):
        raise WeightsNotFoundError(f"{model}: no such file or directory. Give a path on this machine, or leave it out")
    found = torch_facts()
    rates, error, codes = None, "", None
    if measure:
        from ..machine.device import default_device
        from ..planning.probe import profile

        try:
            machine = profile(default_device() if found.devices else "cpu", model)
            rates = Rates(machine.disk_bytes_per_s, machine.link_bytes_per_s, machine.flops)
            codes = None if model is None else codes_of(Path(model), machine.device)
        except (LemaError, OSError, RuntimeError) as caught:  # RuntimeError: torch's word for a device that fails
            error = str(caught)
    bounds, libraries = _requirements()
    return Facts(
        python=".".join(map(str, sys.version_info[:3])),
        python_bounds=bounds,
        libraries=libraries,
        torch=found,
        memory=memory_facts(),
        hub=hub_facts(),
        places=tuple(_places(model, output_dir)),
        rates=rates,
        rates_error=error,
        codes=codes,
        nvidia_nodes=tuple(sorted(str(node) for node in Path("/dev").glob("nvidia[0-9]*"))),
        nvidia_driver=nvidia_driver(),
        amd_node=Path("/dev/kfd").exists(),
    )


def codes_of(model: Path, device: str) -> Codes | None:
    """Codes of a model's folder, and how fast they are decoded; None where its config.json names no format."""
    file = model / "config.json"
    if not file.is_file() or "quantization_config" not in file.read_text(encoding="utf-8", errors="replace"):
        return None
    import torch

    from ..config import LemaConfig
    from ..models.locate import adapter_for
    from ..models.transformers_adapter import TransformersAdapter
    from ..planning.decoding import decode_rate
    from ..planning.sizes import model_sizes
    from ..storage.index import GlobalBinaryIndex

    adapter = adapter_for(LemaConfig(str(model), device="cpu"), model)
    if not isinstance(adapter, TransformersAdapter):
        return None
    with GlobalBinaryIndex(model) as gbi:
        sizes = model_sizes(adapter, gbi=gbi)
        rate = decode_rate(adapter.unit_sources(gbi), torch.device(device))
    return None if rate is None else Codes(sum(sizes.units), sum(sizes.decoded), rate)


def _requirements() -> tuple[str, tuple[Library, ...]]:
    """Bounds on Python, and libraries, of this package as its metadata has them."""
    own = distribution()
    bounds = own.metadata["Requires-Python"] or ""
    libraries = []
    for text in own.requires or ():
        wanted = Requirement(text)
        extra = "extra" in str(wanted.marker or "")
        if extra and any(name in str(wanted.marker) for name in ("'dev'", '"dev"', "'bench'", '"bench"')):
            continue
        if not extra and wanted.marker is not None and not wanted.marker.evaluate():
            continue
        libraries.append(Library(wanted.name, str(wanted.specifier), _version(wanted.name), extra))
    return bounds, tuple(libraries)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def torch_facts() -> Torch:
    """torch's build and devices. Pins 64 MiB for a moment where there is a device."""
    import torch

    from ..errors import DeviceError
    from ..machine import cuda
    from ..machine.device import default_device, device_memory, device_name

    found = Torch(torch.__version__, torch.version.cuda, getattr(torch.version, "hip", None))
    kind, devices = default_device(), []
    if kind == "cpu":
        return dataclasses.replace(found, error=cuda.why_absent())
    try:
        for index in range(torch.accelerator.device_count()):
            place = torch.device(kind, index)
            capability = cuda.capability(place) if kind == "cuda" else None
            memory = device_memory(place)
            devices.append(Device(device_name(place), capability, memory.total, memory.free))
    except (RuntimeError, AssertionError, DeviceError) as error:
        return dataclasses.replace(found, error=str(error).strip().partition("\n")[0])
    pin_error = ""
    try:
        torch.empty(64 << 20, dtype=torch.uint8, pin_memory=True)
    except RuntimeError as error:
        pin_error = str(error).strip().partition("\n")[0]
    archs = cuda.architectures() if kind == "cuda" else ()
    return dataclasses.replace(found, archs=archs, devices=tuple(devices), pin_error=pin_error)


def memory_facts(root: Path = Path("/")) -> Memory:
    """Host memory as the kernel's files have it."""
    from ..machine.memory import free_ram, memory_groups, sizes_in, total_ram

    info = sizes_in(root / "proc/meminfo")
    limits = [limit for limit, *_ in memory_groups(root)]
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return Memory(
        installed=info.get("MemTotal", 0) * 1024 or total_ram(root),
        free=free_ram(root),
        group_limit=min(limits, default=None),
        swap_total=info.get("SwapTotal", 0) * 1024,
        swap_free=info.get("SwapFree", 0) * 1024,
        lock_limit=None if soft == resource.RLIM_INFINITY else soft,
    )


def hub_facts() -> Hub:
    """Token and flags, without a word to the hub."""
    from huggingface_hub import constants

    offline = tuple(name for name in _OFFLINE if os.environ.get(name, "").upper() in {"1", "ON", "YES", "TRUE"})
    variable = next((name for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN") if os.environ.get(name)), "")
    path = Path(constants.HF_TOKEN_PATH)
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
    except OSError:
        return Hub(variable, None, offline)
    return Hub(variable or str(path), mode, offline)


def nvidia_driver(file: Path = Path("/proc/driver/nvidia/version")) -> str:
    """Version of the loaded NVIDIA driver; empty where none is."""
    try:
        match = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)", file.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return ""
    return match[1] if match else ""


def _places(model: str | None, output_dir: str) -> Iterator[Place]:
    from huggingface_hub import constants

    from ..storage.cache import cache_folder
    from ..storage.reader import direct_alignment

    if model is not None:
        path = Path(model)
        files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
        yield place("model", path, direct_alignment(files[0]) if files else None)
    cache = cache_folder()
    yield place("cache", cache if cache is not None else Path("~/.cache/lema").expanduser())
    yield place("hub cache", Path(constants.HF_HUB_CACHE))
    yield place("output", Path(output_dir))


def place(role: str, path: Path, direct: int | None = None) -> Place:
    """A folder's disk; of one that is yet to be made, that of the nearest folder above it."""
    path = path.absolute()
    there = next(p for p in (path, *path.parents) if p.exists())
    writable = os.access(there, os.W_OK)
    return Place(role, str(path), file_system(there), shutil.disk_usage(there).free, writable, direct)


def file_system(path: Path, mounts: Path = Path("/proc/self/mountinfo")) -> str:
    """Type of the mount a path is on; empty where the system does not say."""
    from ..machine.memory import unescaped

    try:
        lines = mounts.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    where, found, depth = path.resolve(), "", -1
    for line in lines:
        left, _, right = line.partition(" - ")
        point = Path(unescaped(left.split()[4]))
        if where.is_relative_to(point) and len(point.parts) >= depth:  # of mounts on each other the last one shows
            found, depth = right.split()[0], len(point.parts)
    return found
