"""Sizes as people write them, how much memory is free now, and what a budget comes to in bytes.

The kernel's files are the source: /proc, and the memory groups around this process.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path, PurePosixPath

from ..errors import ConfigError

MARGIN_BYTES = 256 << 20
_MARGIN_SHARE = 10
_SIZE = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,15})?)\s*([a-z]*)")
_UNITS = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgt", start=1):
    _UNITS |= {_letter: 1000**_power, f"{_letter}b": 1000**_power, f"{_letter}ib": 1024**_power}


def parse_bytes(value: int | str, setting: str = "size") -> int:
    """Bytes of "4GB", "3.5 GiB", "900M" or a whole number; K, M, G, T count in thousands, KiB and so on in 1024s.

    Args:
        setting: the name to blame in the message.

    Raises:
        ConfigError: not a size, negative, or a fraction of a byte.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    match = _SIZE.fullmatch(value.strip().lower()) if isinstance(value, str) else None
    if match is not None and match[2] in _UNITS:
        unit = _UNITS[match[2]]
        if unit > 1 or "." not in match[1]:
            return int(Fraction(match[1]) * unit)
    raise ConfigError(f"{setting}={value!r} is not a size: write whole bytes, or a number and a unit as in 4GB, 3.5GiB")


def format_bytes(nbytes: int) -> str:
    """Three significant digits in the largest fitting unit of thousands: "3.42 GB"; `parse_bytes` reads it back."""
    for unit, power in (("TB", 4), ("GB", 3), ("MB", 2), ("KB", 1)):
        amount = nbytes / 1000**power
        if amount >= 0.9995:
            digits = 2 if amount < 9.995 else 1 if amount < 99.95 else 0
            text = f"{amount:.{digits}f}"
            return f"{text.rstrip('0').rstrip('.') if digits else text} {unit}"
    return f"{nbytes} B"


def resolve_budget(value: int | str | None, free: int, setting: str = "budget") -> int | None:
    """A budget in bytes. None stays None (no limit asked for), "auto" is what is free less a margin, else a size.

    The margin is a tenth of what is free, 256 MiB or more: free memory is counted before the run has
    touched all it needs outside the plan (the interpreter and its libraries, a CUDA context's host side,
    cuBLAS workspaces, the gaps an allocator leaves), and other processes of the machine go on breathing.

    Raises:
        ConfigError: not a size.
    """
    if value is None:
        return None
    if isinstance(value, str) and value.strip().lower() == "auto":
        return max(free - max(free // _MARGIN_SHARE, MARGIN_BYTES), 0)
    return parse_bytes(value, setting)


# -- memory of the host --------------------------------------------------------------------------


def free_ram(root: Path = Path("/")) -> int:
    """Bytes this process could still take without swapping or being killed.

    What the kernel calls available, lowered by every memory cgroup this process is in, up to the root
    (limit, less usage, plus file pages that can be dropped), and by the limits on address space and data.

    Args:
        root: where `/proc` and the mounts named there are looked up.

    Raises:
        ConfigError: this system does not say.
    """
    available = sizes_in(root / "proc/meminfo").get("MemAvailable")
    candidates = [available * 1024 if available is not None else _sysconf_bytes("SC_AVPHYS_PAGES")]
    candidates += [limit - max(usage - dropped, 0) for limit, usage, dropped in memory_groups(root)]
    candidates += [limit - used for limit, used in _process_limits(root)]
    return max(min(candidates), 0)


def total_ram(root: Path = Path("/")) -> int:
    """Bytes of RAM this process may use when nobody else does: installed, or the lowest limit set for it."""
    installed = sizes_in(root / "proc/meminfo").get("MemTotal")
    candidates = [installed * 1024 if installed is not None else _sysconf_bytes("SC_PHYS_PAGES")]
    candidates += [limit for limit, *_ in memory_groups(root)]
    candidates += [limit for limit, _ in _process_limits(root)]
    return min(candidates)


def _sysconf_bytes(name: str) -> int:
    """Pages by sysconf; half of the installed ones where a system (macOS) does not count the free ones."""
    names = getattr(os, "sysconf_names", {})
    if name in names:
        return os.sysconf(name) * os.sysconf("SC_PAGE_SIZE")
    if "SC_PHYS_PAGES" in names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    raise ConfigError("this system does not say how much memory it has: state a size, for example ram_budget='8GB'")


def _process_limits(root: Path) -> Iterator[tuple[int, int]]:
    """(limit, used) in bytes of RLIMIT_AS and RLIMIT_DATA where they are set."""
    used = sizes_in(root / "proc/self/status")
    for line in _lines(root / "proc/self/limits"):
        for name, key in (("Max address space", "VmSize"), ("Max data size", "VmData")):
            if line.startswith(name):
                soft = line[len(name) :].split()[0]
                if soft.isdigit():
                    yield int(soft), used.get(key, 0) * 1024


def memory_groups(root: Path) -> Iterator[tuple[int, int, int]]:
    """(limit, usage, droppable) in bytes of every memory cgroup around this process that has a limit."""
    for names, folders in _group_folders(root):
        for folder in folders:
            limits = [limit for name in names.limits if (limit := _number(folder / name)) is not None]
            if limits:
                yield min(limits), _number(folder / names.usage) or 0, _droppable(folder, names)


@dataclass(frozen=True)
class _Version:
    """What one version of the memory controller calls its files, and keys of `memory.stat`."""

    limits: tuple[str, ...]
    usage: str
    inactive: str
    active: str
    mapped: str


# Above memory.high the kernel slows a group down until it is below again: as good as a limit.
_V2 = _Version(("memory.max", "memory.high"), "memory.current", "inactive_file", "active_file", "file_mapped")
_V1 = _Version(
    ("memory.limit_in_bytes",),
    "memory.usage_in_bytes",
    "total_inactive_file",
    "total_active_file",
    "total_mapped_file",
)


def _droppable(folder: Path, names: _Version) -> int:
    """Bytes of file pages the kernel drops before it refuses memory.

    Inactive ones, and active ones nobody has mapped: a checkpoint that was downloaded and hashed is
    active, and counting it as taken would leave no budget to load it with.
    """
    stat = sizes_in(folder / "memory.stat")
    inactive, active, mapped = (stat.get(name, 0) for name in (names.inactive, names.active, names.mapped))
    return max(inactive, inactive + active - mapped)


def _group_folders(root: Path) -> Iterator[tuple[_Version, list[Path]]]:
    """For every mount of a hierarchy with a memory controller: this process's group and its ancestors."""
    paths: dict[_Version, str] = {}
    for line in _lines(root / "proc/self/cgroup"):
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            paths[_V2] = path
        elif "memory" in controllers.split(","):
            paths[_V1] = path
    for line in _lines(root / "proc/self/mountinfo"):
        # id parent device root mount-point options [optional fields] - type source super-options
        left, _, right = line.partition(" - ")
        mounted, point = (unescaped(field) for field in left.split()[3:5])
        kind, *_, options = right.split()
        version = _V2 if kind == "cgroup2" else _V1 if kind == "cgroup" and "memory" in options.split(",") else None
        if version in paths:
            below = _below(paths[version], mounted)
            base = root / point.lstrip("/")
            yield version, [base.joinpath(*below.parts[:depth]) for depth in range(len(below.parts), -1, -1)]


def _below(path: str, mounted: str) -> PurePosixPath:
    """The group's path under the mount; the mount itself where the group lies outside of what is mounted."""
    group = PurePosixPath(path)
    if group.is_relative_to(mounted) and ".." not in group.parts:
        return group.relative_to(mounted)
    return PurePosixPath()


def unescaped(field: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _number(path: Path) -> int | None:
    """The number a kernel file holds; None where there is no such file or it says "max"."""
    words = " ".join(_lines(path)).split()
    return int(words[0]) if words and words[0].isdigit() else None


def sizes_in(path: Path) -> dict[str, int]:
    """Lines of a name and a number, with or without a colon between and a unit behind."""
    words = (line.split() for line in _lines(path))
    return {word[0].rstrip(":"): int(word[1]) for word in words if len(word) > 1 and word[1].isdigit()}
