"""What gathered facts mean, one small pure function a subject: memory, rates, disks and the hub.

Nothing but the facts given is looked at.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from ..machine.memory import format_bytes
from .facts import Facts, Place
from .finding import Finding, advice, ok, problem

GB = 10**9
_NETWORK = ("nfs", "cifs", "smb", "9p", "ceph", "lustre", "gpfs", "glusterfs", "fuse", "afs", "beegfs", "virtiofs")


def check_memory(facts: Facts) -> Iterator[Finding]:
    """Free host memory, and limits on it."""
    memory = facts.memory
    message = f"{format_bytes(memory.free)} of {format_bytes(memory.installed)} can be taken"
    limit = memory.group_limit
    limited = limit is not None and limit < memory.installed
    if limited and limit is not None:
        message += f", a cgroup (container, slurm, systemd) allows {format_bytes(limit)} in all"
    if memory.free < GB:
        fix = "raise the container's limit (docker run --memory)" if limited else "close other programs"
        yield problem("memory", f"{message}: importing torch and transformers alone takes half a GB", fix)
    elif memory.free < 4 * GB:
        yield advice("memory", message, "set ram_budget: auto, and see lema plan MODEL")
    else:
        yield ok("memory", message)


def check_swap(facts: Facts) -> Iterator[Finding]:
    """Whether the machine is swapping."""
    memory = facts.memory
    used = memory.swap_total - memory.swap_free
    if used > max(GB, memory.swap_total // 2):
        yield advice(
            "swap",
            f"{format_bytes(used)} of {format_bytes(memory.swap_total)} are in use: what is swapped out is slow to use",
            "close other programs, or set ram_budget below what is free",
        )
    else:
        yield ok("swap", f"{format_bytes(used)} of {format_bytes(memory.swap_total)} in use")


def check_pinning(facts: Facts) -> Iterator[Finding]:
    """Whether host memory can be pinned, where there is a device to copy to."""
    error = facts.torch.pin_error
    if error is None:
        return
    limit = facts.memory.lock_limit
    bound = "no limit on locked memory" if limit is None else f"RLIMIT_MEMLOCK is {format_bytes(limit)}"
    if error:
        yield problem(
            "pinning",
            f"64 MiB of host memory could not be pinned ({bound}): {error}; copies to the device would be slow",
            "ulimit -l unlimited (docker run --ulimit memlock=-1; memlock in /etc/security/limits.conf)",
        )
    else:
        yield ok("pinning", f"host memory can be pinned; {bound}")


def check_rates(facts: Facts) -> Iterator[Finding]:
    """How quickly weights can be streamed."""
    if facts.rates is None:
        if facts.rates_error:
            yield problem("disk", f"the machine could not be measured: {facts.rates_error}", "lema plan MODEL --probe")
        return
    disk, link = facts.rates.disk, facts.rates.link
    message = f"reads {format_bytes(int(disk))}/s"
    if disk < 0.5 * GB:
        yield advice(
            "disk",
            f"{message}: a 7B model in 16 bits takes {14 * GB / disk:.0f} s a sweep, if none of it stays in memory",
            "put the model on a local NVMe disk, raise ram_budget, or use larger batches",
        )
    else:
        yield ok("disk", message)
    if not math.isinf(link):
        message = f"{format_bytes(int(link))}/s from host to device"
        if link < 5 * GB:
            yield advice("link", message, "see that the card is in a slot with all its lanes: nvidia-smi -q -d PCIE")
        else:
            yield ok("link", message)


def check_codes(facts: Facts) -> Iterator[Finding]:
    """Whether a model's codes are decoded faster than their values could be read."""
    if facts.codes is None or facts.rates is None:
        return
    codes = facts.codes
    reading, decoding = codes.stored / facts.rates.disk, codes.values / codes.rate
    message = (
        f"layers are {format_bytes(codes.stored)} of codes, {format_bytes(codes.values)} of values, decoded at "
        f"{format_bytes(int(codes.rate))}/s: a sweep reads for {reading:.1f} s and decodes for {decoding:.1f} s"
    )
    if decoding > codes.values / facts.rates.disk:
        yield advice("codes", message, "a disk as fast as this one gains nothing by codes: take the model in 16 bits")
    else:
        yield ok("codes", message)


def check_places(facts: Facts) -> Iterator[Finding]:
    """The folders a run reads and writes."""
    for place in facts.places:
        yield from _check_model(place) if place.role == "model" else _check_written(place)


def _check_model(place: Place) -> Iterator[Finding]:
    kind = place.file_system
    if kind in ("tmpfs", "ramfs"):
        yield advice(place.role, f"{place.path} is on {kind}: it takes its size in memory", "move it to a disk")
    elif kind.startswith(_NETWORK):
        yield advice(
            place.role,
            f"{place.path} is on {kind}, a network file system: every step reads the model over the network",
            f"copy it to a local disk: cp -r {place.path} /local/disk/",
        )
    elif kind == "overlay":
        yield advice(
            place.role,
            f"{place.path} is in a container's own layers (overlay)",
            "mount a volume for models: docker run -v /models:/models",
        )
    elif place.direct == 0:
        yield advice(
            place.role,
            f"{place.path} is on {kind or 'a file system'} that grants no direct reads: they go through the page cache",
            "put it on ext4 or xfs",
        )
    else:
        direct = f", direct reads in steps of {place.direct} bytes" if place.direct else ""
        yield ok(place.role, f"{place.path} on {kind or 'an unknown file system'}{direct}")


def _check_written(place: Place) -> Iterator[Finding]:
    message = f"{place.path}: {format_bytes(place.free_bytes)} free on {place.file_system or 'its disk'}"
    setting = {
        "output": "set output_dir to another disk",
        "cache": "export LEMA_CACHE=/another/disk/lema",
        "hub cache": "export HF_HOME=/another/disk/huggingface",
    }[place.role]
    if not place.writable:
        yield problem(place.role, f"{place.path} cannot be written by this user", setting)
    elif place.free_bytes < GB // 2:
        yield problem(place.role, message, f"free some space, or {setting}")
    elif place.free_bytes < 10 * GB and place.role != "cache":
        yield advice(place.role, f"{message}, which a model or a few checkpoints will fill", setting)
    elif place.file_system in ("tmpfs", "ramfs", "overlay") and place.role == "output":
        yield advice(place.role, f"{message}: what is written there goes with the machine or container", setting)
    else:
        yield ok(place.role, message)


def check_hub(facts: Facts) -> Iterator[Finding]:
    """Token and offline flags."""
    hub = facts.hub
    if hub.offline:
        yield advice(
            "hub",
            f"{', '.join(hub.offline)} set: models come from the cache or not at all",
            f"unset {' '.join(hub.offline)}",
        )
    if hub.token_mode is not None and hub.token_mode & 0o077:
        yield advice(
            "hub", f"{hub.token} can be read by other users (mode {hub.token_mode:o})", f"chmod 600 {hub.token}"
        )
    elif hub.token:
        yield ok("hub", f"a token from {hub.token}")
    else:
        yield ok("hub", "no token: public models only (hf auth login for gated ones)")
