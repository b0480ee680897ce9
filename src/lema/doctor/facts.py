"""What the doctor looks at, as plain values; `machine` finds them out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Library:
    """One requirement in the package's metadata."""

    name: str
    bounds: str
    """As in ">=2.6,<3"; empty: any version."""
    installed: str | None
    optional: bool = False


@dataclass(frozen=True)
class Device:
    """One accelerator as torch sees it."""

    name: str
    capability: tuple[int, int] | None
    """CUDA's compute capability; None: another kind of accelerator."""
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True)
class Torch:
    """The build of torch, and what it finds."""

    version: str
    cuda: str | None = None
    """CUDA version it was built with; None: without."""
    hip: str | None = None
    archs: tuple[str, ...] = ()
    """Kernels in it: sm_80, compute_90 …"""
    devices: tuple[Device, ...] = ()
    error: str = ""
    """What torch said when its devices were asked for."""
    pin_error: str | None = None
    """Why 64 MiB could not be pinned; empty: they could; None: not tried, there is no device."""


@dataclass(frozen=True)
class Memory:
    """Host memory in bytes."""

    installed: int
    free: int
    """What this process could take: available, less every limit around it."""
    group_limit: int | None = None
    """Lowest limit of the memory cgroups around this process; None: none has one."""
    swap_total: int = 0
    swap_free: int = 0
    lock_limit: int | None = None
    """RLIMIT_MEMLOCK; None: no limit."""


@dataclass(frozen=True)
class Place:
    """A folder a run reads or writes."""

    role: str
    """'model', 'cache', 'hub cache' or 'output'."""
    path: str
    file_system: str
    """Type of its mount: ext4, tmpfs, nfs4 …; empty where the system does not say."""
    free_bytes: int
    writable: bool
    direct: int | None = None
    """Alignment of direct reads; 0: not granted; None: not asked."""


@dataclass(frozen=True)
class Rates:
    """Measured bytes a second, and FLOP/s by type."""

    disk: float
    link: float
    """Infinite on the CPU."""
    flops: Mapping[str, float]


@dataclass(frozen=True)
class Codes:
    """Weights of the model that are kept as codes."""

    stored: int
    """Bytes of all layers in the files."""
    values: int
    """Bytes of what they are decoded to, twice a step."""
    rate: float
    """Bytes of values a second, measured where layers are computed."""


@dataclass(frozen=True)
class Hub:
    """The Hugging Face hub, as this user has it set up."""

    token: str = ""
    """Where a token was found: a variable's name or a path; empty: none."""
    token_mode: int | None = None
    """Permission bits of the token's file."""
    offline: tuple[str, ...] = ()
    """Variables set that forbid the network."""


@dataclass(frozen=True)
class Facts:
    """Everything the doctor looks at."""

    python: str
    python_bounds: str
    libraries: tuple[Library, ...]
    torch: Torch
    memory: Memory
    hub: Hub = Hub()
    places: tuple[Place, ...] = ()
    rates: Rates | None = None
    rates_error: str = ""
    codes: Codes | None = None
    """None: no model was given, its weights are plain, or nothing was measured."""
    nvidia_nodes: tuple[str, ...] = ()
    """Device files of NVIDIA cards."""
    nvidia_driver: str = ""
    """Version of the loaded driver; empty: none."""
    amd_node: bool = False
