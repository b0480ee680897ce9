"""`lema doctor`: judgements on imagined machines, and what is gathered from this one and from imagined files."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lema.cli.app import app
from lema.doctor import Facts, Finding, Level, checks, examine, gather, machine
from lema.doctor.facts import Codes, Device, Hub, Library, Memory, Place, Rates, Torch
from lema.errors import WeightsNotFoundError

A100 = Device("NVIDIA A100", (8, 0), 40 * 10**9, 39 * 10**9)
T4 = Device("Tesla T4", (7, 5), 15 * 10**9, 15 * 10**9)
P100 = Device("Tesla P100", (6, 0), 16 * 10**9, 16 * 10**9)
ARCHS = ("sm_75", "sm_80", "sm_86", "sm_90", "compute_90")
GOOD = Facts(
    python="3.11.7",
    python_bounds=">=3.10",
    libraries=(Library("torch", ">=2.6", "2.13.0+cu126"), Library("peft", ">=0.18", "0.21.2")),
    torch=Torch("2.13.0+cu126", "12.6", None, ARCHS, (A100,), "", ""),
    memory=Memory(64 * 10**9, 50 * 10**9),
    places=(Place("model", "/models/m", "ext4", 10**12, True, 512), Place("output", "/out", "xfs", 10**12, True)),
    rates=Rates(3e9, 20e9, {"float32": 15e12, "bfloat16": 200e12}),
    nvidia_nodes=("/dev/nvidia0",),
    nvidia_driver="550.54.15",
)


def with_torch(**changes: Any) -> Facts:
    return replace(GOOD, torch=replace(GOOD.torch, **changes))


def with_memory(**changes: Any) -> Facts:
    return replace(GOOD, memory=replace(GOOD.memory, **changes))


def worst(found: Facts, topic: str) -> Finding:
    """The gravest finding of a topic."""
    order = list(Level)
    return max((f for f in examine(found) if f.topic == topic), key=lambda f: order.index(f.level))


def test_a_good_machine_has_nothing_to_mend() -> None:
    findings = examine(GOOD)
    assert {finding.level for finding in findings} == {Level.OK}
    assert {f.topic for f in findings} == {
        "python", "libraries", "device", "dtype", "memory", "swap", "pinning", "disk", "link", "model", "output", "hub",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("found", "topic", "level", "message", "fix"),
    [
        (
            replace(GOOD, codes=Codes(4 * 10**9, 14 * 10**9, 20e9)),
            "codes", "ok", "4 GB of codes, 14 GB of values, decoded at 20 GB/s", "",
        ),
        (
            replace(GOOD, codes=Codes(4 * 10**9, 14 * 10**9, 2e9)),
            "codes", "advice", "reads for 1.3 s and decodes for 7.0 s", "take the model in 16 bits",
        ),
        (replace(GOOD, python="3.9.1"), "python", "problem", "3.9.1, and LEMA needs >=3.10", "new environment"),
        (
            replace(GOOD, libraries=(Library("peft", ">=0.18,<1", "0.9.0"),)),
            "libraries", "problem", "peft 0.9.0 is installed", "pip install 'peft>=0.18,<1'",
        ),
        (
            replace(GOOD, libraries=(Library("peft", ">=0.18", None),)),
            "libraries", "problem", "peft is not installed", "pip install 'peft>=0.18'",
        ),
        (
            replace(GOOD, libraries=(Library("gguf", ">=0.10", "0.1", optional=True),)),
            "libraries", "advice", "gguf 0.1", "pip install",
        ),
        # torch and the card
        (
            with_torch(version="2.13.0+cpu", cuda=None, archs=(), devices=(), pin_error=None),
            "device", "problem", r"built without CUDA, and this machine has an NVIDIA card (/dev/nvidia0)", "whl/cu126",
        ),
        (
            replace(with_torch(cuda=None, archs=(), devices=(), pin_error=None), nvidia_driver="580.65"),
            "device", "problem", "without CUDA", "whl/cu130",
        ),
        (
            with_torch(version="2.13.0+cu130", cuda="13.0", devices=(), error="driver is too old", pin_error=None),
            "device", "problem", "needs driver 580 or newer, and 550.54.15 is loaded: driver is too old", "whl/cu126",
        ),
        (
            replace(with_torch(devices=(), pin_error=None), nvidia_driver=""),
            "device", "problem", "no driver loaded", "modprobe nvidia",
        ),
        (
            with_torch(devices=(), error="No CUDA GPUs are available", pin_error=None),
            "device", "problem", "does not see the card", "CUDA_VISIBLE_DEVICES",
        ),
        (
            replace(with_torch(devices=(), error="Found no NVIDIA driver", pin_error=None), nvidia_nodes=(),
                    nvidia_driver=""),
            "device", "advice", "there is no NVIDIA driver", "device: cpu",
        ),
        (
            replace(with_torch(cuda=None, devices=(), pin_error=None), nvidia_nodes=()),
            "device", "advice", "no accelerator", "device: cpu",
        ),
        (
            replace(with_torch(cuda=None, devices=(), pin_error=None), nvidia_nodes=(), amd_node=True),
            "device", "problem", "without ROCm", "rocm",
        ),
        (with_torch(devices=(P100,)), "device", "problem", "is sm_60, and torch", "'torch<2.15' --index-url"),
        (with_torch(devices=(T4,)), "dtype", "advice", "Tesla T4 (compute capability 7.5) has no bf", "dtype: float16"),
        (with_torch(devices=(P100,)), "dtype", "advice", "capability 6.0", "dtype: float16"),
        # memory
        (with_memory(free=5 * 10**8), "memory", "problem", "500 MB of 64 GB", "close other programs"),
        (
            with_memory(free=5 * 10**8, group_limit=10**9),
            "memory", "problem", "a cgroup (container, slurm, systemd) allows 1 GB", "docker run --memory",
        ),
        (with_memory(free=2 * 10**9), "memory", "advice", "2 GB of", "ram_budget: auto"),
        (with_memory(swap_total=8 * 10**9, swap_free=10**9), "swap", "advice", "7 GB of 8 GB", "ram_budget"),
        (
            replace(with_torch(pin_error="out of memory"), memory=replace(GOOD.memory, lock_limit=65536)),
            "pinning", "problem", "RLIMIT_MEMLOCK is 65.5 KB): out of memory", "ulimit -l unlimited",
        ),
        # rates
        (
            replace(GOOD, rates=Rates(1e8, 20e9, {"float32": 1e12})),
            "disk", "advice", "100 MB/s: a 7B model in 16 bits takes 140 s", "NVMe",
        ),
        (replace(GOOD, rates=Rates(3e9, 1e9, {"float32": 1e12})), "link", "advice", "1 GB/s", "PCIE"),
        (replace(GOOD, rates=None, rates_error="no room"), "disk", "problem", "no room", "--probe"),
        # places
        (replace(GOOD, places=(Place("model", "/m", "tmpfs", 1, True, 0),)), "model", "advice", "memory", "to a disk"),
        (replace(GOOD, places=(Place("model", "/m", "nfs4", 1, True, 512),)), "model", "advice", "network", "cp -r"),
        (replace(GOOD, places=(Place("model", "/m", "fuse.sshfs", 1, True, 0),)), "model", "advice", "network", "cp"),
        (replace(GOOD, places=(Place("model", "/m", "overlay", 1, True, 512),)), "model", "advice", "own layers", "-v"),
        (
            replace(GOOD, places=(Place("model", "/m", "zfs", 1, True, 0),)),
            "model", "advice", "on zfs that grants no direct reads", "ext4",
        ),
        (
            replace(GOOD, places=(Place("output", "/out", "ext4", 10**12, False),)),
            "output", "problem", "cannot be written", "output_dir",
        ),
        (
            replace(GOOD, places=(Place("hub cache", "/c", "ext4", 10**8, True),)),
            "hub cache", "problem", "100 MB free", "HF_HOME",
        ),
        (
            replace(GOOD, places=(Place("output", "/out", "ext4", 5 * 10**9, True),)),
            "output", "advice", "5 GB free", "output_dir",
        ),
        (
            replace(GOOD, places=(Place("output", "/out", "overlay", 10**12, True),)),
            "output", "advice", "goes with the machine", "output_dir",
        ),
        # hub
        (
            replace(GOOD, hub=Hub("/home/me/token", 0o644)),
            "hub", "advice", "read by other users (mode 644)", "chmod 600 /home/me/token",
        ),
        (
            replace(GOOD, hub=Hub(offline=("HF_HUB_OFFLINE",))),
            "hub", "advice", "HF_HUB_OFFLINE set", "unset HF_HUB_OFFLINE",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_is_found_with_its_fix(found: Facts, topic: str, level: str, message: str, fix: str) -> None:
    finding = worst(found, topic)
    assert finding.level.value == level
    assert message in finding.message
    assert fix in finding.fix


@pytest.mark.parametrize(
    ("archs", "capability", "runs"),
    [
        (("sm_80",), (8, 6), True),
        (("sm_86",), (8, 0), False),
        (("sm_80",), (9, 0), False),
        (("sm_80", "compute_80"), (9, 0), True),
        (("compute_90",), (8, 0), False),
        (("sm_100a", "sm_120"), (12, 0), True),
        (("sm_100",), (10, 3), True),
        (("sm_50", "sm_60"), (6, 1), True),
    ],
)
def test_kernels_for_a_card(archs: tuple[str, ...], capability: tuple[int, int], runs: bool) -> None:
    assert checks._has_kernels(archs, capability) is runs


def test_a_processor_is_told_its_fastest_type() -> None:
    alone = replace(with_torch(cuda=None, devices=(), pin_error=None), nvidia_nodes=())

    def advised(**rates: float) -> str:
        return worst(replace(alone, rates=Rates(1e9, math.inf, rates)), "dtype").fix

    assert advised(float32=174e9, float16=53e9, bfloat16=788e9) == "set dtype: bfloat16"
    assert advised(float32=174e9, float16=53e9, bfloat16=20e9) == "set dtype: float32"


# --- gathering ------------------------------------------------------------------------------------


def test_this_machine(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 4096)
    found = gather(str(tmp_path), str(tmp_path / "runs" / "new"), measure=False)
    assert found.python.startswith(f"{sys.version_info.major}.{sys.version_info.minor}")
    libraries = {library.name: library for library in found.libraries}
    assert libraries["torch"].installed and libraries["torch"].bounds.startswith(">=")
    assert "pytest" not in libraries  # a developer's
    assert 0 < found.memory.free <= found.memory.installed
    places = {place.role: place for place in found.places}
    assert places["model"].direct is not None and places["model"].file_system
    assert places["output"].writable and places["output"].free_bytes > 0
    assert not (tmp_path / "runs").exists()
    assert all(finding.message for finding in examine(found))
    with pytest.raises(WeightsNotFoundError, match="no such file"):
        gather(str(tmp_path / "absent"))


def test_file_systems_by_mount(tmp_path: Path) -> None:
    (tmp_path / "data set").mkdir()
    escaped = str(tmp_path / "data set").replace(" ", "\\040")
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/root rw\n"
        f"30 22 0:40 / {escaped} rw - tmpfs tmpfs rw\n"
        f"31 22 0:41 / {escaped} rw shared:2 master:1 - nfs4 server:/x rw,vers=4.2\n"
    )
    assert machine.file_system(tmp_path, mounts) == "ext4"
    assert machine.file_system(tmp_path / "data set", mounts) == "nfs4"
    assert machine.file_system(tmp_path, tmp_path / "absent") == ""


def test_memory_from_the_kernels_files(tmp_path: Path) -> None:
    def write(name: str, text: str) -> None:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)

    write("proc/meminfo", "MemTotal: 8000000 kB\nMemAvailable: 6000000 kB\nSwapTotal: 1000 kB\nSwapFree: 400 kB\n")
    assert machine.memory_facts(tmp_path).group_limit is None
    write("proc/self/cgroup", "0::/box\n")
    write("proc/self/mountinfo", "30 22 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n")
    write("sys/fs/cgroup/box/memory.max", "2000000000\n")
    write("sys/fs/cgroup/box/memory.current", "500000000\n")
    found = machine.memory_facts(tmp_path)
    assert (found.installed, found.free, found.group_limit) == (8_192_000_000, 1_500_000_000, 2_000_000_000)
    assert found.swap_total - found.swap_free == 600 * 1024
    write("proc/self/cgroup", "5:memory:/old\n")
    write("proc/self/mountinfo", "30 22 0:26 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n")
    write("sys/fs/cgroup/memory/old/memory.limit_in_bytes", "1000000000\n")
    assert machine.memory_facts(tmp_path).group_limit == 1_000_000_000


def test_the_loaded_driver(tmp_path: Path) -> None:
    file = tmp_path / "version"
    assert machine.nvidia_driver(file) == ""
    file.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\nGCC 12\n")
    assert machine.nvidia_driver(file) == "550.54.15"
    file.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\n")
    assert machine.nvidia_driver(file) == "580.65.06"


def test_the_token_and_the_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", *machine._OFFLINE):
        monkeypatch.delenv(name, raising=False)
    token = tmp_path / "token"
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(token))
    assert machine.hub_facts() == Hub()
    token.write_text("secret")
    token.chmod(0o640)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TRANSFORMERS_OFFLINE", "0")
    assert machine.hub_facts() == Hub(str(token), 0o640, ("HF_HUB_OFFLINE",))
    monkeypatch.setenv("HF_TOKEN", "another")
    found = examine(replace(GOOD, hub=machine.hub_facts()))
    assert not any("another" in f.message + f.fix or "secret" in f.message + f.fix for f in found)


# --- the command ----------------------------------------------------------------------------------


def test_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    run = CliRunner()
    seen: list[Any] = []

    def imagined(found: Facts) -> None:
        monkeypatch.setattr("lema.doctor.gather", lambda *arguments: seen.append(arguments) or found)

    imagined(GOOD)
    done = run.invoke(app, ["doctor", "--model", "m", "--no-measure"])
    assert done.exit_code == 0 and "0 problems, 0 to improve" in done.stdout and seen == [("m", "output", False)]
    imagined(with_torch(devices=(P100,)))
    done = run.invoke(app, ["doctor"])
    assert done.exit_code == 1 and "1 problem, 1 to improve" in done.stdout
    assert "fix: pip install --force-reinstall 'torch<2.15'" in done.stdout
    done = run.invoke(app, ["doctor", "--json"])
    content = json.loads(done.stdout)
    assert done.exit_code == 1 and content["problems"] == 1
    assert {f["level"] for f in content["findings"]} == {"ok", "advice", "problem"}
    done = run.invoke(app, ["doctor", "--help"])
    assert done.exit_code == 0 and "Example" in done.stdout


def test_the_verbs_import_no_torch_before_they_run() -> None:
    script = (
        "import sys, lema.cli.doctor, lema.cli.prepare; print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    source = str(Path(__file__).parents[2] / "src")
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": source}
    )
    assert done.stdout == "False False\n", done.stderr


@pytest.mark.slow
def test_the_real_thing(tmp_path: Path) -> None:
    done = CliRunner().invoke(
        app, ["doctor", "--output-dir", str(tmp_path), "--json"], env={"LEMA_CACHE": str(tmp_path)}
    )
    content = json.loads(done.stdout)
    assert done.exit_code == (1 if content["problems"] else 0)
    assert {"python", "libraries", "device", "memory", "disk", "output"} <= {f["topic"] for f in content["findings"]}
