"""Sizes and budgets, free memory from made-up kernel files, machines stated and measured, and the cache between."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lema
from lema.config import LemaConfig
from lema.engine.step_report import peak_bytes
from lema.errors import ConfigError, DeviceError, ReadError, WeightsNotFoundError
from lema.machine import memory as budget
from lema.machine.cuda import CONTEXT_BYTES
from lema.machine.device import (
    check_device,
    compute_dtypes,
    default_device,
    device_memory,
    device_name,
    peak_memory,
    supports_bfloat16,
    total_device_memory,
)
from lema.machine.memory import format_bytes, free_ram, parse_bytes, resolve_budget, total_ram
from lema.planning import probe
from lema.planning.hardware import CARDS, Hardware, parse_link
from lema.planning.policy import resolve_budgets
from lema.planning.probe import disk_rate, measure, profile
from lema.storage.cache import cache_folder
from lema.storage.reader import DiskReader

pytestmark = pytest.mark.timeout(60)

MIB = 1 << 20
GB = 10**9
UNLIMITED_V1 = 9223372036854771712

CPU = Hardware("a processor", "cpu", 0, 16 * GB, 1e9, math.inf, {"float32": 1e11, "bfloat16": 4e11}, "measured")
GPU = Hardware("a card", "cuda", 24 * GB, 64 * GB, 7e9, 24e9, {"float32": 2e13, "float16": 8e13})


# -- sizes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        (0, 0), (123, 123), ("123", 123), ("123B", 123), ("4GB", 4 * GB), ("4gb", 4 * GB), (" 4 GB ", 4 * GB),
        ("3.5 GiB", 3_758_096_384), ("900MB", 900_000_000), ("1300M", 1_300_000_000), ("1300MiB", 1300 * MIB),
        ("2k", 2000), ("2KiB", 2048), ("1.5T", 1_500_000_000_000), ("1TiB", 1 << 40), ("0.1KB", 100),
        ("0.0001KB", 0), ("999999999999999TB", 999999999999999 * 10**12),
    ],
)  # fmt: skip
def test_sizes(text: int | str, nbytes: int) -> None:
    assert parse_bytes(text) == nbytes


@pytest.mark.parametrize(
    "text",
    [
        "", "GB", "4 G B", "four", "4GBB", "-1", -1, "-4GB", "1e9", "1.5", "1.5B", "1,5GB", ".5GB", "5.GB", "4Gbit",
        True, None, 4.0, [], "nan", "inf", "9" * 5000, "٤GB", "4GB/s", "0x10",
    ],
)  # fmt: skip
def test_not_sizes(text: Any) -> None:
    with pytest.raises(ConfigError, match=r"ram_budget=.* is not a size"):
        parse_bytes(text, "ram_budget")


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"), (999, "999 B"), (1000, "1 KB"), (1500, "1.5 KB"), (999_499, "999 KB"), (999_500, "1 MB"),
        (1_300_000_000, "1.3 GB"), (3_420_000_000, "3.42 GB"), (9_996_000_000, "10 GB"), (80 * GB, "80 GB"),
        (100 * GB, "100 GB"), (1 << 40, "1.1 TB"), (10**16, "10000 TB"),
    ],
)  # fmt: skip
def test_sizes_for_people(nbytes: int, text: str) -> None:
    assert format_bytes(nbytes) == text


@given(st.integers(0, 10**15 - 1))
def test_what_is_written_for_people_is_read_back(nbytes: int) -> None:
    back = parse_bytes(format_bytes(nbytes))
    assert abs(back - nbytes) <= 0.005 * nbytes
    assert format_bytes(back) == format_bytes(nbytes)
    assert parse_bytes(str(nbytes)) == nbytes


@given(st.text() | st.integers() | st.floats() | st.none())
def test_reading_a_size_ends_in_bytes_or_a_config_error(value: Any) -> None:
    with contextlib.suppress(ConfigError):
        assert parse_bytes(value) >= 0


def test_budgets() -> None:
    assert resolve_budget(None, 10 * GB) is None
    assert resolve_budget("900MB", 1) == 900_000_000
    assert resolve_budget(5, 1) == 5
    assert resolve_budget("auto", 10 * GB) == 9 * GB
    assert resolve_budget(" AUTO ", 2 * GB) == 2 * GB - budget.MARGIN_BYTES
    assert resolve_budget("auto", 100) == 0
    with pytest.raises(ConfigError, match="vram_budget='all'"):
        resolve_budget("all", GB, "vram_budget")


# -- free memory -----------------------------------------------------------------------------------


class Kernel:
    """A root folder with the files the kernel would show."""

    def __init__(self, root: Path, available: int = 8 * GB, total: int = 16 * GB) -> None:
        self.root = root
        self.write("proc/meminfo", f"MemTotal: {total // 1024} kB\nMemFree: 1 kB\nMemAvailable: {available // 1024} kB")
        self.mounts: list[str] = []

    def write(self, path: str, text: str) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")

    def member(self, *lines: str) -> None:
        self.write("proc/self/cgroup", "\n".join(lines))

    def mount(self, point: str, kind: str, options: str, mounted: str = "/", optional: str = "shared:9 ") -> None:
        self.mounts.append(f"31 23 0:28 {mounted} {point} rw,nosuid {optional}- {kind} {kind} {options}")
        self.write("proc/self/mountinfo", "22 27 0:21 / /proc rw - proc proc rw\n" + "\n".join(self.mounts))

    def v2(self, folder: str, limit: int | str, used: int, high: int | str = "max", **stat: int) -> None:
        self.write(f"{folder}/memory.max", str(limit))
        self.write(f"{folder}/memory.high", str(high))
        self.write(f"{folder}/memory.current", str(used))
        self.write(f"{folder}/memory.stat", "\n".join(f"{name} {value}" for name, value in stat.items()))

    def v1(self, folder: str, limit: int, used: int, **stat: int) -> None:
        self.write(f"{folder}/memory.limit_in_bytes", str(limit))
        self.write(f"{folder}/memory.usage_in_bytes", str(used))
        self.write(f"{folder}/memory.stat", "\n".join(f"{name} {value}" for name, value in stat.items()))


@pytest.fixture
def kernel(tmp_path: Path) -> Kernel:
    return Kernel(tmp_path)


def test_without_groups_what_is_available_is_free(kernel: Kernel) -> None:
    assert free_ram(kernel.root) == 8 * GB // 1024 * 1024
    assert total_ram(kernel.root) == 16 * GB // 1024 * 1024


def test_without_proc_pages_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0 < free_ram(tmp_path) <= total_ram(tmp_path)
    monkeypatch.setattr(os, "sysconf_names", {"SC_PHYS_PAGES": 1, "SC_PAGE_SIZE": 2})
    monkeypatch.setattr(os, "sysconf", {"SC_PHYS_PAGES": 1000, "SC_PAGE_SIZE": 4096}.__getitem__)
    assert free_ram(tmp_path) == total_ram(tmp_path) // 2 == 500 * 4096
    monkeypatch.delattr(os, "sysconf_names")
    with pytest.raises(ConfigError, match="ram_budget="):
        free_ram(tmp_path)


def test_a_v2_container_with_its_own_namespace(kernel: Kernel) -> None:
    kernel.member("0::/")
    kernel.mount("/sys/fs/cgroup", "cgroup2", "rw,nsdelegate")
    kernel.v2("sys/fs/cgroup", 4 * GB, 3 * GB, inactive_file=GB, active_file=0, file_mapped=0)
    assert free_ram(kernel.root) == 2 * GB
    assert total_ram(kernel.root) == 4 * GB


def test_v2_groups_inside_each_other_the_tightest_counts(kernel: Kernel) -> None:
    kernel.member("0::/user.slice/job.scope/inner")
    kernel.mount("/sys/fs/cgroup", "cgroup2", "rw")
    kernel.v2("sys/fs/cgroup/user.slice", 6 * GB, 5 * GB)
    kernel.v2("sys/fs/cgroup/user.slice/job.scope", 3 * GB, GB)
    kernel.v2("sys/fs/cgroup/user.slice/job.scope/inner", "max", GB)
    assert free_ram(kernel.root) == GB
    assert total_ram(kernel.root) == 3 * GB
    kernel.v2("sys/fs/cgroup/user.slice/job.scope/inner", 2 * GB, int(1.5 * GB))
    assert free_ram(kernel.root) == GB // 2
    kernel.v2("sys/fs/cgroup/user.slice/job.scope/inner", "max", GB, high=1_200_000_000)
    assert free_ram(kernel.root) == 200_000_000


def test_groups_elsewhere_do_not_count(kernel: Kernel) -> None:
    kernel.member("0::/mine")
    kernel.mount("/sys/fs/cgroup", "cgroup2", "rw")
    kernel.v2("sys/fs/cgroup/mine", "max", GB)
    kernel.v2("sys/fs/cgroup/other", 1000, 999)
    assert free_ram(kernel.root) == 8 * GB // 1024 * 1024


def test_pages_of_files_that_can_be_dropped_are_free(kernel: Kernel) -> None:
    kernel.member("0::/")
    kernel.mount("/sys/fs/cgroup", "cgroup2", "rw")
    kernel.v2("sys/fs/cgroup", 4 * GB, 4 * GB, inactive_file=GB, active_file=2 * GB, file_mapped=GB // 2)
    assert free_ram(kernel.root) == int(2.5 * GB)
    kernel.v2("sys/fs/cgroup", 4 * GB, 4 * GB, inactive_file=GB, active_file=GB, file_mapped=2 * GB)
    assert free_ram(kernel.root) == GB
    kernel.v2("sys/fs/cgroup", 4 * GB, 5 * GB)
    assert free_ram(kernel.root) == 0


@pytest.mark.parametrize("unlimited", [UNLIMITED_V1, 2**63 - 1])
def test_v1_groups(kernel: Kernel, unlimited: int) -> None:
    kernel.member("9:name=systemd:/", "4:memory:/docker/abc", "1:cpu,cpuacct:/docker/abc", "0::/")
    kernel.mount("/sys/fs/cgroup/cpu", "cgroup", "rw,cpu,cpuacct")
    kernel.mount("/sys/fs/cgroup/memory", "cgroup", "rw,memory", optional="")
    kernel.mount("/sys/fs/cgroup/unified", "cgroup2", "rw")
    kernel.v1("sys/fs/cgroup/memory", unlimited, 9 * GB)
    kernel.v1("sys/fs/cgroup/memory/docker", unlimited, 8 * GB)
    kernel.v1("sys/fs/cgroup/memory/docker/abc", unlimited, GB)
    assert free_ram(kernel.root) == 8 * GB // 1024 * 1024
    kernel.v1("sys/fs/cgroup/memory/docker/abc", 3 * GB, 2 * GB, inactive_file=1, total_inactive_file=GB // 2)
    assert free_ram(kernel.root) == int(1.5 * GB)
    kernel.v1("sys/fs/cgroup/memory/docker", 8 * GB, 8 * GB)
    assert free_ram(kernel.root) == 0


@pytest.mark.parametrize("mounted", ["/docker/abc", "/docker/other", "/../.."])
def test_a_container_that_sees_only_its_own_group(kernel: Kernel, mounted: str) -> None:
    kernel.member("4:memory:/docker/abc")
    kernel.mount("/sys/fs/cgroup/memory", "cgroup", "rw,memory", mounted=mounted)
    kernel.v1("sys/fs/cgroup/memory", 2 * GB, GB)
    assert free_ram(kernel.root) == GB


def test_a_group_outside_of_the_namespace(kernel: Kernel) -> None:
    kernel.member("0::/../elsewhere")
    kernel.mount("/sys/fs/cgroup", "cgroup2", "rw")
    kernel.v2("sys/fs/cgroup", 2 * GB, GB)
    kernel.v2("sys/fs/elsewhere", 1000, 0)
    assert free_ram(kernel.root) == GB


def test_names_with_spaces(kernel: Kernel) -> None:
    kernel.member("0::/my job:1")
    kernel.mount(r"/sys/fs/c\040group", "cgroup2", "rw")
    kernel.v2("sys/fs/c group/my job:1", 2 * GB, GB)
    assert free_ram(kernel.root) == GB


def test_limits_of_the_process(kernel: Kernel) -> None:
    kernel.write("proc/self/status", "Name: python\nVmSize: 2000000 kB\nVmData: 1000000 kB")
    lines = "Limit                     Soft Limit           Hard Limit           Units\n"
    lines += "Max data size             {data}            unlimited            bytes\n"
    lines += "Max address space         {space}            unlimited            bytes"
    kernel.write("proc/self/limits", lines.format(data="unlimited", space="unlimited"))
    assert free_ram(kernel.root) == 8 * GB // 1024 * 1024
    kernel.write("proc/self/limits", lines.format(data="unlimited", space=3 * GB))
    assert free_ram(kernel.root) == 3 * GB - 2_000_000 * 1024
    kernel.write("proc/self/limits", lines.format(data=1_500_000_000, space=3 * GB))
    assert free_ram(kernel.root) == 1_500_000_000 - 1_000_000 * 1024
    assert total_ram(kernel.root) == 1_500_000_000


def test_this_machine() -> None:
    assert 0 < free_ram() <= total_ram()
    assert device_memory("cpu").available == total_device_memory("cpu") == peak_memory("cpu") == 0


# -- a device, whichever it is ---------------------------------------------------------------------

COUNTERS = ("get_memory_info", "memory_reserved", "memory_allocated", "max_memory_allocated")


def pretend_accelerator(monkeypatch: pytest.MonkeyPatch, module: Any, count: int = 1, kind: str = "xpu") -> None:
    """A torch that has an accelerator with this module, and counts nothing itself, as torch 2.6 does."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(kind))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    for name in COUNTERS:
        monkeypatch.delattr(torch.accelerator, name, raising=False)


def counting(**more: Any) -> SimpleNamespace:
    """A device's module that says all that is asked."""
    return SimpleNamespace(
        mem_get_info=lambda _: (5 * GB, 24 * GB), memory_reserved=lambda _: 3 * GB, memory_allocated=lambda _: GB,
        max_memory_allocated=lambda _: 2 * GB, get_rng_state=None, set_rng_state=None, **more,
    )  # fmt: skip


def without(name: str) -> SimpleNamespace:
    module = counting()
    delattr(module, name)
    return module


@pytest.mark.parametrize("kind", ["xpu", "cuda", "mtia"])
def test_any_accelerator_says_what_it_has(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    pretend_accelerator(monkeypatch, counting(get_device_name=lambda _: "a card"), kind=kind)
    assert default_device() == kind
    assert device_memory(kind).available == 7 * GB  # what the allocator holds unused is free
    assert total_device_memory(f"{kind}:0") == 24 * GB
    assert peak_memory(kind) == peak_bytes(kind) == 2 * GB
    assert device_name(kind) == "a card"
    check_device(kind)
    with pytest.raises(DeviceError, match=rf"{kind}:1.*torch sees 1"):
        check_device(f"{kind}:1")
    with pytest.raises(DeviceError, match=f"torch.* sees {kind}.*device='{kind}' or device='cpu'"):
        check_device("hpu")
    with pytest.raises(DeviceError, match=f"choose '{kind}' or 'cpu'"):
        check_device("cudda")


def test_the_common_counters_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_accelerator(monkeypatch, counting())
    monkeypatch.setattr(torch.accelerator, "get_memory_info", lambda _: (6 * GB, 16 * GB), raising=False)
    monkeypatch.setattr(torch.accelerator, "max_memory_allocated", lambda _: 5 * GB, raising=False)
    assert total_device_memory("xpu") == 16 * GB
    assert peak_memory("xpu") == 5 * GB

    def refuses(_: object) -> int:
        raise RuntimeError("Allocator for xpu is not a DeviceAllocator")

    monkeypatch.setattr(torch.accelerator, "max_memory_allocated", refuses, raising=False)
    assert peak_memory("xpu") == 2 * GB


def test_what_a_device_cannot_say_is_named_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_accelerator(monkeypatch, without("mem_get_info"))
    with pytest.raises(DeviceError, match=r"torch\.xpu\.mem_get_info.*vram_budget to a size"):
        device_memory("xpu")
    with pytest.raises(DeviceError, match="total_memory"):
        total_device_memory("xpu")
    config = LemaConfig("a model", device="xpu", vram_budget="auto")
    with pytest.raises(DeviceError, match="how much memory is free"):
        resolve_budgets(config)
    assert resolve_budgets(config.replace(vram_budget="6GB")) == (None, 6 * GB)  # a size needs no counters
    pretend_accelerator(monkeypatch, without("max_memory_allocated"))
    with pytest.raises(DeviceError, match="max_memory_allocated"):
        check_device("xpu")
    pretend_accelerator(monkeypatch, without("set_rng_state"))
    with pytest.raises(DeviceError, match=r"torch\.xpu has no set_rng_state.*dropout"):
        check_device("xpu")


def test_what_can_be_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    module = without("mem_get_info")
    module.get_device_properties = lambda _: SimpleNamespace(name="a card", total_memory=8 * GB)
    pretend_accelerator(monkeypatch, module)
    assert total_device_memory("xpu") == 8 * GB
    assert device_name("xpu") == "a card"
    for counter in ("memory_reserved", "memory_allocated"):  # one without the other says nothing
        pretend_accelerator(monkeypatch, without(counter))
        assert device_memory("xpu").available == 5 * GB
    assert device_name("xpu") == "xpu"


def test_no_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_accelerator(monkeypatch, counting(), count=0)
    assert default_device() == "cpu"
    for ask in (device_memory, measure, profile, check_device, peak_memory):
        with pytest.raises(DeviceError, match="no accelerator"):
            ask("cuda")


def test_a_budget_of_all_that_is_free_has_the_context_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan counts the context, and what a driver calls free is without it: it is there once that is asked."""
    for kind, context in (("xpu", 0), ("cuda", CONTEXT_BYTES)):
        pretend_accelerator(monkeypatch, counting(), kind=kind)
        config = LemaConfig("a model", device=kind, vram_budget="auto")
        assert resolve_budgets(config)[1] == resolve_budget("auto", 7 * GB + context)


def test_what_is_cudas_alone_is_in_one_place() -> None:
    package = Path(lema.__file__).parent
    found = {
        str(file.relative_to(package))
        for file in package.rglob("*.py")
        if re.search(r"torch\.cuda\b", file.read_text(encoding="utf-8"))
    }
    assert {name for name in found if not name.startswith("kaggle")} == {"machine/cuda.py"}


# -- machines, stated ------------------------------------------------------------------------------


@pytest.mark.parametrize("machine", [CPU, GPU], ids=["cpu", "cuda"])
def test_json_round_trip(machine: Hardware, tmp_path: Path) -> None:
    text = machine.to_json()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert Hardware.from_json(text) == machine
    file = tmp_path / "machine.json"
    file.write_text(text)
    assert Hardware.parse(file) == Hardware.parse(str(file)) == machine
    assert hash(machine) == hash(Hardware.from_json(text))


def test_a_machine_by_hand_needs_no_more_than_it_has() -> None:
    text = '{"name": "box", "device": "cpu", "ram_bytes": 8, "disk_bytes_per_s": 5e8, "flops": {"float32": 1e11}}'
    machine = Hardware.from_json(text)
    assert (machine.source, machine.vram_bytes, machine.link_bytes_per_s) == ("stated", 0, math.inf)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dvice": "cuda"}, "dvice.*did you mean 'device'"),
        ({"device": "cudda"}, "did you mean 'cuda'"),
        ({"device": ["cuda"]}, "device.*unknown"),
        ({"device": "cuda:1"}, "no kind of device"),
        ({"device": "meta"}, "no kind of device"),
        ({"device": "cpu"}, "leave both out"),
        ({"source": "guessed"}, "source 'guessed' is unknown"),
        ({"name": ""}, "name is empty"),
        ({"vram_bytes": 0}, "vram_bytes=0 must be"),
        ({"vram_bytes": 24e9}, "vram_bytes=24000000000.0 must be a whole number"),
        ({"ram_bytes": "64GB"}, "ram_bytes='64GB' must be"),
        ({"ram_bytes": True}, "ram_bytes=True must be"),
        ({"ram_bytes": -1}, "ram_bytes=-1 must be"),
        ({"disk_bytes_per_s": 0}, "disk_bytes_per_s=0 must be"),
        ({"disk_bytes_per_s": math.nan}, "disk_bytes_per_s=nan must be"),
        ({"link_bytes_per_s": None}, "link_bytes_per_s=None must be"),
        ({"link_bytes_per_s": math.inf}, "link_bytes_per_s=inf must be"),
        ({"flops": {}}, "flops={} must give"),
        ({"flops": 3}, "flops=3 must give"),
        ({"flops": {"fp16": 1e12}}, "'fp16' is unknown"),
        ({"flops": {"float16": 0}}, r"flops\['float16'\]=0 must be"),
    ],
)
def test_bad_machines(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Hardware.from_json(json.dumps(json.loads(GPU.to_json()) | change))


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", "{}", '{"device": "cpu"}', '{"a": ' + "9" * 5000 + "}"])
def test_what_is_no_machine(text: str) -> None:
    with pytest.raises(ConfigError, match=r"here\.json"):
        Hardware.from_json(text, where="here.json")


def test_words() -> None:
    machine = Hardware.parse("vram=24GB, link=pcie4, disk=7GB/s, ram=64GB, flops=80T")
    rates = {"float16": 8e13, "bfloat16": 8e13, "float32": 8e13}
    assert machine == Hardware(machine.name, "cuda", 24 * GB, 64 * GB, 7e9, 24e9, rates)
    assert machine.source == "stated"
    machine = Hardware.parse("name=shelf,RAM=16GB,disk=500MB,flops=100G,fp32=50GFLOPS")
    assert machine == Hardware(
        "shelf", "cpu", 0, 16 * GB, 5e8, math.inf, rates | dict.fromkeys(rates, 1e11) | {"float32": 5e10}
    )


@pytest.mark.parametrize("card", CARDS)
def test_cards(card: str) -> None:
    machine = Hardware.parse(f"{card},ram=64GB,disk=7GB/s")
    assert machine.device == "cuda"
    assert 8 * GB <= machine.vram_bytes <= 80 * GB
    assert machine.link_bytes_per_s == parse_link(CARDS[card].link)
    assert ("bfloat16" in machine.flops) == (card not in ("t4", "p100"))
    assert 3e12 < machine.flops["float32"] <= 2 * machine.flops["float16"] < 2e15
    assert Hardware.parse(f"disk=7GB/s,card={card.upper()},ram=64GB").flops == machine.flops


def test_settings_change_a_card() -> None:
    machine = Hardware.parse("link=pcie3x8,t4,ram=30GB,disk=1GB/s,flops=20T,vram=14GB,fp32=4T")
    assert (machine.vram_bytes, machine.link_bytes_per_s) == (14 * GB, 6e9)
    assert machine.flops == {"float16": 20e12, "float32": 4e12}


def test_words_on_top_of_a_machine() -> None:
    assert Hardware.parse("ram=8GB", CPU).flops == CPU.flops
    assert Hardware.parse("ram=8GB", CPU).ram_bytes == 8 * GB
    assert Hardware.parse("fp32=1T", CPU).flops == {"float32": 1e12, "bfloat16": 4e11}
    assert Hardware.parse("disk=3GB/s", GPU) == Hardware(
        "disk=3GB/s", "cuda", GPU.vram_bytes, GPU.ram_bytes, 3e9, GPU.link_bytes_per_s, GPU.flops
    )
    carded = Hardware.parse("rtx4060-8g", CPU)
    assert (carded.device, carded.ram_bytes, carded.link_bytes_per_s) == ("cuda", CPU.ram_bytes, 12e9)
    with pytest.raises(ConfigError, match="does not say link, flops"):
        Hardware.parse("vram=8GB", CPU)
    with pytest.raises(ConfigError, match="does not say vram, flops"):
        Hardware.parse("link=pcie4", CPU)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("rtx4090", "did you mean 'rtx4090-24g'"),
        ("t4,ram=30GB,rma=3", "did you mean 'ram'"),
        ("banana", "t4, p100"),
        ("", "does not say ram, disk, flops"),
        ("t4", "does not say ram, disk: add ram=32GB,disk=3GB/s"),
        ("t4,ram=lots,disk=1GB", "ram='lots' is not a size"),
        ("t4,ram=1GB,disk=fast", "disk='fast' is not a size"),
        ("t4,ram=1GB,disk=0", "disk_bytes_per_s=0.0 must be"),
        ("t4,ram=1GB,disk=1GB,link=pcie9", "pcie3, pcie4 or pcie5"),
        ("t4,ram=1GB,disk=1GB,link=pcie4x3", "pcie3, pcie4 or pcie5"),
        ("t4,ram=1GB,disk=1GB,flops=80", "flops='80' is not a rate"),
        ("t4,ram=1GB,disk=1GB,flops=0T", "must be a number above 0"),
        ("t4,ram=,disk=1GB", "ram='' is not a size"),
        ("no/such/file.json", "cannot be read"),
    ],
)
def test_bad_words(spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Hardware.parse(spec)


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    file = tmp_path / "machine.json"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        Hardware.parse(file)


def test_links() -> None:
    links = ("pcie3", "pcie4", "PCIe5", "pcie4x8", "12GB/s", " 12 gb/S ")
    assert [parse_link(text) for text in links] == [12e9, 24e9, 48e9, 12e9, 12e9, 12e9]


def test_rates_by_type() -> None:
    assert GPU.flops_for("float16") == 8e13
    with pytest.raises(DeviceError, match="a card does not compute in bfloat16: choose dtype=float32 or float16"):
        GPU.flops_for("bfloat16")


def test_one_line_for_people() -> None:
    assert str(GPU) == (
        "a card: 24 GB VRAM, 64 GB RAM, disk 7 GB/s, link 24 GB/s, float32 20 TFLOP/s, float16 80 TFLOP/s (stated)"
    )
    assert str(CPU) == "a processor: 16 GB RAM, disk 1 GB/s, float32 0.1 TFLOP/s, bfloat16 0.4 TFLOP/s (measured)"


# -- this machine, measured ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "answer"), [((6, 0), False), ((7, 5), False), ((8, 0), True), ((8, 9), True), ((12, 0), True)]
)
def test_bf16_by_compute_capability(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], answer: bool) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    assert supports_bfloat16("cuda") is answer
    assert ("bfloat16" in compute_dtypes("cuda:0")) is answer
    assert {"float16", "float32"} <= set(compute_dtypes("cuda"))
    assert supports_bfloat16("cpu")


def test_measure_is_quick_and_plausible(tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    started = time.perf_counter()
    machine = measure("cpu", tmp_path)
    assert time.perf_counter() - started < 15  # two seconds on an idle machine
    assert machine.source == "measured"
    assert (machine.device, machine.vram_bytes, machine.link_bytes_per_s) == ("cpu", 0, math.inf)
    assert machine.ram_bytes == total_ram()
    assert 1e6 < machine.disk_bytes_per_s < 1e12
    assert {"float32", "bfloat16"} <= set(machine.flops)
    assert all(1e7 < rate < 1e15 for rate in machine.flops.values())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert list(tmp_path.iterdir()) == []
    assert Hardware.from_json(machine.to_json()) == machine


def test_a_type_without_kernels_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def rate(device: torch.device, dtype: torch.dtype) -> float:
        if dtype in lacking:
            raise RuntimeError(f"not implemented for {dtype}")
        return 1e12

    monkeypatch.setattr(probe, "_matmul_rate", rate)
    lacking = {torch.float16}
    assert probe.matmul_rates(torch.device("cpu")) == {"float32": 1e12, "bfloat16": 1e12}
    lacking = {torch.float16, torch.float32, torch.bfloat16}
    with pytest.raises(DeviceError, match=r"computes in no type.*not implemented"):
        probe.matmul_rates(torch.device("cpu"))


@pytest.mark.parametrize(("rate", "shapes"), [(1e8, 1), (2e10, 2), (1e12, 3)])
def test_a_type_too_slow_for_the_large_shapes_is_measured_by_small_ones(
    rate: float, shapes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[tuple[int, ...]] = []

    def timed(call: Any, device: torch.device, count: int) -> float:
        x, weight = call.args
        sizes.append((*x.shape, len(weight)))
        return count * 4 * x.numel() * len(weight) / rate

    monkeypatch.setattr(probe, "_timed", timed)
    assert probe._matmul_rate(torch.device("cpu"), torch.float32) == pytest.approx(rate)
    assert set(sizes) == set(probe._SHAPES["cpu"][:shapes])


def test_the_quickest_call_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.016, 0.0001, 0.03, 0.03, 0.03])
    monkeypatch.setattr(probe, "_timed", lambda *_: next(times))
    assert probe._quickest_call(lambda: None, torch.device("cpu")) == 0.0001
    times = iter([0.3, 0.3])
    assert probe._quickest_call(lambda: None, torch.device("cpu")) == 0.3


def sparse(path: Path, nbytes: int) -> Path:
    with path.open("wb") as file:
        file.truncate(nbytes)
    return path


@pytest.fixture
def files_read(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    seen: list[Path] = []
    submit = DiskReader.submit

    def watch(self: DiskReader, job: Any) -> None:
        seen.extend(extent.file for extent in job.extents)
        submit(self, job)

    monkeypatch.setattr(DiskReader, "submit", watch)
    return seen


def test_the_models_own_file_is_read_at_several_places(tmp_path: Path, files_read: list[Path]) -> None:
    small, large = sparse(tmp_path / "a.safetensors", 3 * MIB), sparse(tmp_path / "b.safetensors", 512 * MIB + 777)
    assert disk_rate(tmp_path) > 0
    assert files_read == [large] * 8
    assert disk_rate(large) > 0
    index = tmp_path / "model.safetensors.index.json"
    index.write_text("{}")
    assert disk_rate(index) > 0
    assert files_read == [large] * 24
    extents = probe._runs(large)
    assert [extent.offset % 4096 for extent in extents] == [0] * 8
    assert extents[0].offset == 0 and 512 * MIB - 4096 <= extents[-1].offset + extents[-1].nbytes <= 512 * MIB + 777
    assert sum(extent.nbytes for extent in extents) == 256 * MIB
    assert {small, large, index} == set(tmp_path.iterdir())


@pytest.mark.parametrize("nbytes", [64 * MIB, 64 * MIB + 1, 200 * MIB])
def test_runs_stay_inside_of_the_file(tmp_path: Path, nbytes: int) -> None:
    file = sparse(tmp_path / "a.safetensors", nbytes)
    ends = [extent.offset + extent.nbytes for extent in probe._runs(file)]
    assert max(ends) <= nbytes
    assert disk_rate(file) > 0


def test_beside_a_small_file_a_temporary_one_is_read(tmp_path: Path, files_read: list[Path]) -> None:
    file = sparse(tmp_path / "model.safetensors", 5 * MIB)
    assert disk_rate(file) > 0
    assert {read.parent for read in files_read} == {tmp_path} and file not in files_read
    assert list(tmp_path.iterdir()) == [file]


def test_where_nothing_can_be_written_a_small_file_has_to_do(
    tmp_path: Path, files_read: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(folder: Path) -> Path:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(probe, "_temporary_file", refuse)
    with pytest.raises(ConfigError, match=r"cannot be measured.*Permission denied"):
        disk_rate(tmp_path)
    sparse(tmp_path / "empty.safetensors", 0)
    with pytest.raises(ConfigError, match="cannot be measured"):
        disk_rate(tmp_path)
    file = sparse(tmp_path / "model.safetensors", 5 * MIB + 1)
    assert disk_rate(tmp_path) > 0
    assert files_read == [file]


def test_a_full_disk_leaves_no_file_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match="No space left"):
        disk_rate(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_slow_disk_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_DISK_SECONDS", 0.0)
    read = DiskReader._read

    def slowly(self: DiskReader, piece: Any) -> None:
        time.sleep(0.05)
        read(self, piece)

    monkeypatch.setattr(DiskReader, "_read", slowly)
    started = time.perf_counter()
    rate = disk_rate(sparse(tmp_path / "a.safetensors", 256 * MIB))
    assert time.perf_counter() - started < 1.0  # all of it would be 0.8 s of sleep in each of two threads
    assert rate > 0


def test_a_read_error_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: DiskReader, piece: Any) -> None:
        raise ReadError("the disk is broken")

    monkeypatch.setattr(DiskReader, "_read", broken)
    with pytest.raises(ReadError, match="broken"):
        disk_rate(sparse(tmp_path / "a.safetensors", 64 * MIB))


def test_a_path_that_is_not_there(tmp_path: Path) -> None:
    for ask in (measure, profile):
        with pytest.raises(WeightsNotFoundError, match="does not exist"):
            ask("cpu", tmp_path / "nowhere")


# -- the cache -------------------------------------------------------------------------------------


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Calls of `measure`, which answers at once; and a cache of its own."""
    calls: list[str] = []

    def answer(device: str, path: object = None) -> Hardware:
        calls.append(device)
        return CPU

    monkeypatch.setattr(probe, "measure", answer)
    monkeypatch.delenv("LEMA_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    return calls


def cached(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "xdg" / "lema").iterdir())


def test_a_machine_is_measured_once(measured: list[str], tmp_path: Path) -> None:
    first, second = profile("cpu"), profile("cpu")
    assert measured == ["cpu"]
    assert first == CPU
    assert (second.flops, second.ram_bytes) == (CPU.flops, total_ram())
    (file,) = cached(tmp_path)
    assert file.name.startswith("hardware-") and file.suffix == ".json"
    assert Hardware.parse(file) == CPU
    profile("cpu", refresh=True)
    assert measured == ["cpu", "cpu"]


@pytest.mark.parametrize(
    "change",
    [
        lambda patch: patch.setattr("platform.node", lambda: "another"),
        lambda patch: patch.setattr(probe, "_processor", lambda: "another"),
        lambda patch: patch.setattr(os, "sched_getaffinity", lambda _: set(range(77)), raising=False),
        lambda patch: patch.setattr(torch, "get_num_threads", lambda: 77),
        lambda patch: patch.setattr(torch, "__version__", "77"),
        lambda patch: patch.setattr(probe, "_file_system", lambda path: 77),
        lambda patch: patch.setattr(probe, "_VERSION", 77),
    ],
    ids=["host", "processor", "cores", "threads", "torch", "file system", "version"],
)
def test_another_machine_is_measured_anew(
    measured: list[str], monkeypatch: pytest.MonkeyPatch, change: Callable[[pytest.MonkeyPatch], None], tmp_path: Path
) -> None:
    profile("cpu")
    change(monkeypatch)
    profile("cpu")
    profile("cpu")
    assert len(measured) == 2 and len(cached(tmp_path)) == 2


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="no second file system here")
def test_file_systems_are_told_apart(tmp_path: Path) -> None:
    assert probe._file_system(tmp_path) == probe._file_system(tmp_path.parent)
    assert probe._file_system(tmp_path) != probe._file_system(Path("/dev/shm"))


@pytest.mark.parametrize("text", [b"", b"{", b"\xff\xff", b"[]", CPU.to_json()[:-30].encode(), GPU.to_json().encode()])
def test_a_damaged_cache_is_measured_again(measured: list[str], text: bytes, tmp_path: Path) -> None:
    profile("cpu")
    (file,) = cached(tmp_path)
    file.write_bytes(text)
    assert profile("cpu") == CPU
    assert len(measured) == 2
    assert Hardware.parse(file) == CPU and cached(tmp_path) == [file]


def test_a_cache_that_cannot_be_written_does_no_harm(
    measured: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(os, "replace", full)
        assert profile("cpu") == CPU
    assert "cannot be written" in caplog.text
    assert cached(tmp_path) == []
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert profile("cpu") == CPU
    assert len(measured) == 2


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("LEMA_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/ignored")
    assert cache_folder() == tmp_path / ".cache" / "lema"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "lema"
    monkeypatch.setenv("LEMA_CACHE", "~/own")
    assert cache_folder() == tmp_path / "own"


@pytest.mark.accelerator
def test_an_accelerator(tmp_path: Path) -> None:
    found = torch.accelerator.current_accelerator()
    assert found is not None
    machine = measure(found.type, tmp_path)
    assert machine.device == found.type
    assert 0 < device_memory(found.type).available <= machine.vram_bytes
    assert 0 < machine.link_bytes_per_s < 1e12
    assert machine.flops and min(machine.flops.values()) > 0
    if found.type == "cuda":
        assert ("bfloat16" in machine.flops) == (torch.cuda.get_device_capability() >= (8, 0))
