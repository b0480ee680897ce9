"""`lema plan`: numbers shown are the plan's, errors end in one message and a status, and no GPU is needed to ask."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner, Result

from lema import LemaModel
from lema.cli.app import app
from lema.cli.plan_table import show
from lema.cli.settings import parse_settings, parse_value
from lema.config import LemaConfig
from lema.engine.assembly import StoredModel
from lema.engine.outlook import Outlook
from lema.machine import device
from lema.machine import memory as budget
from lema.machine.memory import format_bytes
from lema.models.registry import get_adapter
from lema.planning import policy, probe
from lema.planning.hardware import Hardware
from lema.planning.plan import MemoryPlan, describe
from lema.planning.policy import plan_for
from lema.run import planned as verb

pytestmark = pytest.mark.timeout(120)

ROOT = Path(__file__).resolve().parents[2]
GB = 10**9

# hidden, intermediate, layers, heads, key-value heads, bytes of a layer in two-byte types, LoRA parameters at rank 16
SHAPES = {
    "tiny-llama-1.1b": (2048, 5632, 22, 32, 4, 88_088_576, 12_615_680),
    "llama-2-7b": (4096, 11008, 32, 32, 32, 404_766_720, 39_976_960),
    "llama-2-13b": (5120, 13824, 40, 40, 40, 634_408_960, 62_586_880),
    "llama-2-70b": (8192, 28672, 80, 64, 8, 1_711_308_800, 207_093_760),
}
MACHINES = {
    "8 GB, PCIe 4, a fast disk": "rtx4060-8g,ram=32GB,disk=7GB/s",
    "12 GB, PCIe 3": "rtx3060-12g,ram=64GB,disk=3.5GB/s,link=pcie3",
    "16 GB, PCIe 4": "rtx4080-16g,ram=64GB,disk=3.5GB/s",
    "24 GB, PCIe 5, a fast disk": "rtx4090-24g,ram=192GB,disk=7GB/s,link=pcie5",
    "no card": "ram=64GB,disk=3.5GB/s,flops=1T",
}
SMALL_MACHINE = MACHINES["8 GB, PCIe 4, a fast disk"]

Write = Callable[..., Path]


def lema(*arguments: object, width: int = 100, **env: str | None) -> Result:
    """Run the command line in this process."""
    settings: dict[str, str | None] = {"COLUMNS": str(width), "FORCE_COLOR": None, "TERM": "xterm", **env}
    result = CliRunner(env=settings).invoke(app, ["plan", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def shown(*arguments: object, width: int = 100) -> dict[str, str]:
    """The table's values by label, continued lines joined."""
    result = lema(*arguments, width=width)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    return rows_of(result.stdout, width)


def rows_of(screen: str, width: int) -> dict[str, str]:
    """The table's values by label; its title, which has a path of any length, is what stands above the first rule."""
    lines = screen.splitlines()
    assert all(len(line) <= width for line in lines)
    rules = [number for number, line in enumerate(lines) if "─" in line and set(line) <= set(" ─")]
    rows: dict[str, str] = {}
    label = ""
    for line in lines[rules[0] + 1 : rules[-1]]:
        if label and line.startswith("  "):
            rows[label] = f"{rows[label]} {line.strip()}"
        elif not set(line) <= set(" ─"):
            label, _, value = line.strip().partition("  ")
            rows[label] = value.strip()
    return rows


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes the config.json of a shape into a folder of its name, without weights."""

    def written(name: str = "llama-2-7b", **changes: Any) -> Path:
        hidden, intermediate, layers, heads, key_value_heads, *_ = SHAPES[name]
        values = {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
            "intermediate_size": intermediate, "num_hidden_layers": layers, "num_attention_heads": heads,
            "num_key_value_heads": key_value_heads, "vocab_size": 32000, "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "torch_dtype": "float16", **changes,
        }  # fmt: skip
        path = tmp_path / name / "config.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(values))
        return path

    return written


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """This machine is a made-up one; whether it was measured anew is noted at each plan."""
    refreshed: list[bool] = []

    def profile(device: str, path: Any = None, refresh: bool = False) -> Hardware:
        refreshed.append(refresh)
        rates = {"float32": 1e11, "bfloat16": 4e11}
        return Hardware("a processor", "cpu", 0, 16 * GB, 1e9, float("inf"), rates, "measured")

    monkeypatch.setattr(probe, "profile", profile)
    monkeypatch.setattr(policy, "free_ram", lambda: 10 * GB)
    return refreshed


def expected_plan(path: Path, machine: str, **settings: Any) -> MemoryPlan:
    """What the planner says with all that machine's memory, less a tenth."""
    hardware = Hardware.parse(machine)
    values = {"dtype": "bfloat16", "ram_budget": hardware.ram_bytes - hardware.ram_bytes // 10, **settings}
    if hardware.device == "cuda":
        values.setdefault("vram_budget", hardware.vram_bytes - hardware.vram_bytes // 10)
    config = LemaConfig(str(path), device=hardware.device, **values)
    values = json.loads(path.read_text())
    return plan_for(Outlook(config, StoredModel(get_adapter("llama", values), None), hardware))


# -- the numbers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "machine"),
    [
        ("tiny-llama-1.1b", "no card"), ("llama-2-7b", "8 GB, PCIe 4, a fast disk"), ("llama-2-7b", "12 GB, PCIe 3"),
        ("llama-2-13b", "16 GB, PCIe 4"), ("llama-2-70b", "24 GB, PCIe 5, a fast disk"), ("llama-2-70b", "no card"),
    ],
)  # fmt: skip
@pytest.mark.long
def test_the_table_has_the_plans_numbers(write: Write, name: str, machine: str) -> None:
    path = write(name)
    plan = expected_plan(path, MACHINES[machine])
    assert plan.estimate is not None
    hardware = Hardware.parse(MACHINES[machine])
    rows = shown(path, "--hardware", MACHINES[machine], width=200)
    on_device = f"{len(plan.on_device)} on the device, " if plan.device == "cuda" else ""
    assert rows["layers"] == f"{on_device}{len(plan.in_ram)} in RAM, {len(plan.from_disk)} from disk"
    count = SHAPES[name][2]
    assert len(plan.on_device) + len(plan.in_ram) + len(plan.from_disk) == count
    kept = len(plan.keep_activations)
    known = {0: "all computed again", count: f"kept in all {count} layers"}
    assert rows["activations"] == known.get(kept, f"kept in {kept} of {count} layers, the others compute them again")
    assert rows["head"].startswith({"resident": "resident", "streamed": "streamed whole"}.get(plan.head, "streamed in"))
    if plan.head == "chunked":
        assert f" {plan.head_rows} vocabulary rows" in rows["head"]
    for row, place in (("boundaries", plan.boundaries), ("optimizer", plan.optimizer)):
        assert rows[row] == ("on the device" if place == "device" and plan.device == "cuda" else "in RAM")
    assert rows["micro-batch"] == "1 of 1 rows at once"
    assert rows["loss chunk"].startswith(f"{plan.loss_chunk_size} of 512" if plan.loss_chunk_size else "all 512")
    for row, peak, parts, total in (
        ("host memory", plan.host_peak, plan.host_bytes, hardware.ram_bytes),
        ("device memory", plan.device_peak, plan.device_bytes, hardware.vram_bytes),
    ):
        if not total:
            assert row not in rows
            continue
        assert rows[row].startswith(f"{format_bytes(peak)} of {format_bytes(total - total // 10)} ")
        listed = rows[row].split(" ", 5)[-1].split(", ")
        assert sorted(listed) == sorted(f"{part} {format_bytes(size)}" for part, size in parts.items() if size)
    step, tokens, bound = rows["step"].split(", ")
    assert parsed_seconds(step) == pytest.approx(plan.estimate.step_seconds, rel=6e-3)
    assert float(tokens.removesuffix(" tokens/s").replace(",", "")) == pytest.approx(
        512 / plan.estimate.step_seconds, rel=6e-3
    )
    assert bound == f"bound by {plan.estimate.bound_by}"
    busy = dict(part.split(" ", 1) for part in rows["of which"].split(", "))
    assert busy.keys() == {"compute", "disk", *(["link"] if plan.device == "cuda" else [])}
    for what, seconds in busy.items():
        assert parsed_seconds(seconds) == pytest.approx(getattr(plan.estimate, f"{what}_seconds"), rel=6e-3)
    assert rows["hardware"] == str(hardware)
    assert rows["sizes from"] == "config.json alone, stored in bfloat16"


def parsed_seconds(text: str) -> float:
    number, unit = text.split()
    return float(number.replace(",", "")) * {"s": 1, "ms": 1e-3}[unit]


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.long
def test_json_has_the_sizes_of_the_shapes(write: Write, name: str) -> None:
    path = write(name)
    everything = ["--ram-budget", "2TB", "--hardware", "rtx4080-16g,ram=4TB,disk=7GB/s"]
    settings = ["device_layers=2", "keep_activations=0", "optimizer_place=device", "boundaries=host", "head=chunked"]
    result = lema(path, "--json", *everything, *[word for pair in settings for word in ("--set", pair)])
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    found = json.loads(result.stdout)
    *_, layers, _, _, unit, lora = SHAPES[name]
    plan = found["plan"]
    assert plan["device_bytes"]["layers kept on the device"] == 2 * unit
    assert plan["device_bytes"]["slots"] == 2 * unit
    assert plan["device_bytes"]["adapters"] == 16 * lora
    assert plan["host_bytes"]["layers kept in RAM"] == (layers - 2) * unit
    assert plan["host_bytes"]["head"] == 32000 * SHAPES[name][0] * 2
    assert plan["from_disk"] == []
    assert len(plan["in_ram"]) == layers - 2
    assert found["peaks"]["device"] == sum(plan["device_bytes"].values()) <= found["budgets"]["vram_budget"]
    assert found["budgets"] == {"ram_budget": 2000 * GB, "vram_budget": 14_400_000_000}
    assert found["sizes_from"] == "configuration"
    assert found["hardware_from"] == "stated"
    assert found["hardware"]["disk_bytes_per_s"] == 7e9
    assert found["settings"]["lora_rank"] == 16
    link_seconds = 2 * (layers - 2 - 2) * unit / 24e9
    assert plan["estimate"]["link_seconds"] >= link_seconds * 0.999


def test_json_is_the_plan_that_is_made(write: Write) -> None:
    path = write(num_hidden_layers=6)
    machine = MACHINES["16 GB, PCIe 4"]
    options = ["--batch-size", 3, "--max-seq-length", 256, "--lora-rank", 8, "--vram-budget", "2.1GB"]
    options += ["--dtype", "float16"]
    found = json.loads(lema(path, "--json", "--hardware", machine, *options).stdout)
    plan = expected_plan(
        path, machine, batch_size=3, max_seq_length=256, lora_rank=8, vram_budget=2_100_000_000, dtype="float16"
    )
    assert found["plan"] == json.loads(json.dumps(describe(plan)))
    assert found["settings"]["batch_size"] == 3


def test_the_plan_of_a_run(write: Write, tmp_path: Path) -> None:
    path = write(num_hidden_layers=4)
    file = tmp_path / "run.yaml"
    file.write_text(
        f"model_name_or_path: {path}\nbatch_size: 2\ngradient_accumulation_steps: 4\nmax_seq_length: 96\n"
        "lora_rank: 8\nram_budget: 3GB\nlearning_rate: 1e-4\ndtype: float32\n"
    )
    machine = MACHINES["16 GB, PCIe 4"]
    found = json.loads(lema(file, "--json", "--hardware", machine).stdout)
    assert (found["plan"]["batch"], found["plan"]["seq"]) == (8, 96)
    assert found["settings"]["lora_rank"] == 8
    assert found["budgets"]["ram_budget"] == 3 * GB
    assert found["settings"]["vram_budget"] == "auto"
    other = json.loads(
        lema(file, "--json", "--hardware", machine, "--max-seq-length", 48, "--ram-budget", "4GB").stdout
    )
    assert (other["plan"]["seq"], other["budgets"]["ram_budget"]) == (48, 4 * GB)


def test_more_rows_are_shown(write: Write) -> None:
    path = write(num_hidden_layers=4)
    rows = shown(path, "--hardware", SMALL_MACHINE, "--batch-size", 4, "--set", "micro-batch-size=2",
                 "--set", "loss_chunk_size=100", "--set", "gradient_checkpointing=yes")  # fmt: skip
    assert rows["micro-batch"] == "2 of 4 rows at once"
    assert rows["loss chunk"] == "100 of 2048 positions at once"
    assert rows["activations"] == "all computed again"
    rows = shown(path, "--hardware", MACHINES["24 GB, PCIe 5, a fast disk"], "--set", "device_layers=4")
    assert rows["slots"] == "none on the device, nothing streams"
    assert rows["layers"] == "4 on the device, 0 in RAM, 0 from disk"
    rows = shown(path, "--hardware", SMALL_MACHINE, "--set", "ram_budget=none", "--set", "vram_budget=none")
    assert rows["budgets"] == "device no limit, host no limit"
    assert " without a limit " in rows["host memory"]


# -- machines --------------------------------------------------------------------------------------


def test_nothing_of_this_machine_is_asked_for_another_one(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("this machine was asked")

    for owner, names in (
        (probe, ("profile", "measure")), (policy, ("free_ram", "device_memory")),
        (budget, ("free_ram", "total_ram")), (device, ("accelerator_module",)),
        (torch.cuda, ("_lazy_init", "get_device_capability", "mem_get_info", "get_device_name")),
        (torch.accelerator, ("synchronize",)),
    ):  # fmt: skip
        for name in names:
            if hasattr(owner, name):
                monkeypatch.setattr(owner, name, never)
    rows = shown(write(num_hidden_layers=3), "--hardware", SMALL_MACHINE)
    assert rows["numbers from"] == "--hardware, data sheets for a card"
    assert rows["budgets"] == "device 7.2 GB (auto), host 28.8 GB (auto); auto: what it has, less a margin"


def test_a_machine_from_a_file(write: Write, tmp_path: Path) -> None:
    machine = Hardware.parse("rtx3060-12g,ram=16GB,disk=2GB/s,name=the one in the cellar")
    file = tmp_path / "machine.json"
    file.write_text(machine.to_json())
    path = write(num_hidden_layers=3)
    found = json.loads(lema(path, "--json", "--hardware", file).stdout)
    assert found["hardware"] == json.loads(machine.to_json())
    assert shown(path, "--hardware", file, width=150)["hardware"].startswith("the one in the cellar: 12 GB VRAM")
    file.write_text(machine.to_json().replace("stated", "measured"))
    assert shown(path, "--hardware", file)["numbers from"] == "--hardware, measured elsewhere"


def test_this_machine(write: Write, here: list[bool]) -> None:
    path = write("tiny-llama-1.1b", num_hidden_layers=3)
    rows = shown(path, "--device", "cpu")
    assert here == [False]
    assert rows["hardware"].startswith("a processor: 16 GB RAM, disk 1 GB/s")
    assert rows["numbers from"] == "measurements of this machine, which --probe repeats"
    assert rows["budgets"] == "host 9 GB (auto); auto: what is free now, less a margin"
    assert "device memory" not in rows
    found = json.loads(lema(path, "--device", "cpu", "--probe", "--ram-budget", "3GB", "--json").stdout)
    assert here == [False, True]
    assert found["budgets"] == {"ram_budget": 3 * GB, "vram_budget": None}
    assert found["hardware_from"] == "measured"
    assert found["hardware"]["link_bytes_per_s"] is None


@pytest.mark.skipif(torch.accelerator.is_available(), reason="the default is the accelerator")
def test_without_a_gpu_the_default_is_the_cpu(write: Write, here: list[bool]) -> None:
    path = write(num_hidden_layers=2)
    assert json.loads(lema(path, "--json").stdout)["settings"]["device"] == "cpu"
    failed(lema(path, "--device", "cuda", "--hardware", "ram=8GB,disk=1GB/s,flops=1T"), "computes on: cpu")


def failed(result: Result, *messages: str, status: int = 1) -> None:
    """One message on stderr, nothing on stdout, no traceback."""
    assert result.exit_code == status, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    if status == 1:
        assert result.stderr.startswith("error: ")
    for message in messages:
        assert message in result.stderr, result.stderr


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("rtx4061", "did you mean 'rtx4060-8g'?"),
        ("rtx4060-8g", "does not say ram, disk: add ram=32GB,disk=3GB/s"),
        ("rtx4060-8g,ram=32GB,disk=fast", "disk='fast' is not a size"),
        ("t4,ram=32GB,disk=1GB/s", "does not compute in bfloat16: choose dtype="),
        ("nosuch.json", "cannot be read"),
    ],
)
def test_machines_that_are_none(write: Write, spec: str, message: str) -> None:
    failed(lema(write(num_hidden_layers=2), "--hardware", spec), message)


# -- models ----------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A small model with weights in float32."""
    config = LlamaConfig(
        vocab_size=99, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_say_their_own_sizes(saved: Path, here: list[bool], dtype: str) -> None:
    options = ["--device", "cpu", "--dtype", dtype, "--ram-budget", "1GB", "--set", "ram_layers=1", "--json"]
    found = json.loads(lema(saved, *options).stdout)
    assert found["sizes_from"] == "weights"
    config = LemaConfig(str(saved), device="cpu", dtype=dtype, ram_budget="1GB", ram_layers=1)
    with LemaModel(config) as model:  # what a run with these settings does
        assert found["plan"] == json.loads(json.dumps(describe(model.memory.plan)))
    of_file = json.loads(lema(saved / "model.safetensors", *options).stdout)
    assert of_file["plan"] == found["plan"]
    assert of_file["sizes_from"] == "weights"
    alone = json.loads(lema(saved / "config.json", *options).stdout)
    assert alone["sizes_from"] == "configuration"
    stored = found["plan"]["host_bytes"]["layers kept in RAM"]
    computed = alone["plan"]["host_bytes"]["layers kept in RAM"]
    assert abs(stored - computed * (1 if dtype == "float32" else 2)) <= 2 * 4096, "whole pages"
    elsewhere = json.loads(lema(saved / "config.json", *options, "--set", f"gbi_path={saved}").stdout)
    assert elsewhere["plan"] == found["plan"]


def test_of_a_hub_id_only_the_configuration_is_fetched(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(num_hidden_layers=2).parent
    (folder / "model.safetensors").write_bytes(b"half of it, from an earlier run")
    asked = []

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    found = json.loads(lema("somebody/llama", "--json", "--hardware", SMALL_MACHINE).stdout)
    assert asked == [("somebody/llama", ["config.json"])]
    assert found["sizes_from"] == "configuration"
    assert found["model"] == "somebody/llama"


def test_models_that_are_none(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: Any, **kwargs: Any) -> Any:
        raise OSError("the network is down")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    machine = ["--hardware", SMALL_MACHINE]
    failed(lema("nosuch", *machine), "'nosuch' is neither a local path nor a model", "the network is down")
    failed(lema(tmp_path / "nosuch", *machine), "does not exist")
    failed(lema(tmp_path / "nosuch" / "config.json", *machine), "does not exist")
    failed(lema(tmp_path / "nosuch.safetensors", *machine), "does not exist")
    failed(lema(tmp_path, *machine), "config.json does not exist")
    for name in ("notes.txt", "other.json"):
        (tmp_path / name).write_text("{}")
        failed(lema(tmp_path / name, *machine), "neither a directory, a .safetensors or .gguf file nor a config.json")
    (tmp_path / "model.safetensors").write_bytes(b"")
    failed(lema(tmp_path / "model.safetensors", *machine), "config.json does not exist")
    path = write(num_hidden_layers=2)
    (path.parent / "model.safetensors").write_bytes(b"not safetensors")
    failed(lema(path.parent, *machine), "model.safetensors")
    assert lema(path, *machine).exit_code == 0, "the configuration alone needs no weights"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": "wide"}, "describes no model: StrictDataclass"),
        ({"hidden_size": 4095}, "not a multiple of the number of attention heads"),
        ({"hidden_act": "nosuch"}, "describes no model: KeyError: 'nosuch'"),
        ({"num_attention_heads": 0}, "describes no model"),
        ({"num_hidden_layers": 0}, "lists of decoder layers"),
        ({"model_type": "nosuch"}, "neither registered"),
        ({"model_type": None}, "has no model_type"),
    ],
)
def test_configurations_that_describe_nothing(write: Write, changes: dict[str, Any], message: str) -> None:
    path = write(**{"num_hidden_layers": 2, **changes})
    failed(lema(path, "--hardware", SMALL_MACHINE), message)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "\x00"])
def test_a_config_json_that_is_not_one(write: Write, text: str) -> None:
    path = write()
    path.write_text(text)
    failed(lema(path, "--hardware", SMALL_MACHINE), str(path.parent))


# -- budgets and settings --------------------------------------------------------------------------


@pytest.mark.parametrize("tier", ["vram", "ram"])
@pytest.mark.long
def test_a_budget_nothing_fits_into_names_one_that_is_enough(write: Write, tier: str) -> None:
    options = [write(), "--hardware", SMALL_MACHINE, f"--{tier}-budget"]
    result = lema(*options, "300MB")
    failed(result, f"does not fit into ram_budget {'28.8 GB' if tier == 'vram' else '300 MB'}", "slots 810 MB")
    enough = result.stderr.partition(f"Set {tier}_budget to at least ")[2].partition(",")[0]
    assert lema(*options, enough).exit_code == 0
    assert budget.parse_bytes(enough) > 810 * 10**6


def test_a_decision_that_does_not_fit_names_what_does(write: Write) -> None:
    options = [write(), "--hardware", SMALL_MACHINE, "--set"]
    result = lema(*options, "device_layers=30")
    failed(result, "device_layers=30 does not fit into", "What fits: device_layers=")
    fits = result.stderr.partition("What fits: ")[2].split(",")[0]
    assert lema(*options, fits).exit_code == 0


def test_budgets_above_what_there_is(write: Write) -> None:
    options = [write(num_hidden_layers=2), "--hardware", SMALL_MACHINE]
    failed(lema(*options, "--vram-budget", "16GB"), "vram_budget of 16 GB is more than the 8 GB that rtx4060-8g")
    failed(lema(*options, "--ram-budget", "33GB"), "ram_budget of 33 GB is more than the 32 GB that rtx4060-8g")
    failed(lema(*options, "--ram-budget", "lots"), "ram_budget='lots' is not a size")


@pytest.mark.parametrize(
    ("arguments", "message", "status"),
    [
        (["--set", "hed=chunked"], "unknown setting 'hed'; did you mean 'head'?", 2),
        (["--set", "head=chunkd"], "did you mean 'chunked'?", 2),
        (["--set", "num_slots=many"], "num_slots='many' must be a whole number", 2),
        (["--set", "lora_alpha=much"], "lora_alpha='much' must be a number", 2),
        (["--set", "use_lora=perhaps"], "use_lora='perhaps' must be true or false", 2),
        (["--batch-size", "0"], "batch_size=0 must be 1 or more", 1),
        (["--dtype", "int8"], "dtype='int8' is unknown", 1),
        (["--set", "head"], "'head' is not name=value", 2),
        (["--set", "=3"], "'=3' is not name=value", 2),
        (["--set", "head=chunked", "--set", "head=streamed"], "head is given twice", 2),
        (["--batch-size", "2", "--set", "batch-size=3"], "batch_size is given without --set as well", 2),
        (["--set", "model_name_or_path=x"], "model_name_or_path is given without --set as well", 2),
        (["--batch-size", "two"], "--batch-size", 2),
        (["--probe"], "--hardware describes another one", 2),
        (["--nosuch"], "No such option", 2),
    ],
)
def test_settings_that_are_none(write: Write, arguments: list[str], message: str, status: int) -> None:
    result = lema(write(num_hidden_layers=2), "--hardware", SMALL_MACHINE, *arguments, width=400)
    failed(result, status=status)
    assert message in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("ram_layers", "3", "3"), ("ram_layers", "none", None), ("ram_layers", "-1", "-1"),
        ("ram_budget", "3GB", "3GB"),
        ("ram_budget", "900", 900), ("use_lora", "False", False), ("use_lora", "yes", True), ("head", "NULL", None),
        ("learning_rate", "1e-4", "1e-4"), ("lora_alpha", "16", "16"), ("max_grad_norm", "none", None),
        ("lora_target_modules", "q_proj, v_proj", ["q_proj", "v_proj"]), ("lora_target_modules", "q_proj", "q_proj"),
        ("lora_target_modules", "all-linear", "all-linear"), ("strategy", "RESIDENT", "RESIDENT"), ("nosuch", "3", "3"),
        ("model_type", "none", None), ("seed", "x", "x"),
    ],
)  # fmt: skip
def test_values(name: str, text: str, value: Any) -> None:
    found = parse_value(name, text)
    assert found == value
    assert type(found) is type(value)


def test_numbers_are_the_settings_own_type() -> None:
    given = parse_settings(["ram_layers=3", "learning_rate=1e-4", "lora_alpha=16", "use_lora=no"])
    config = LemaConfig("any", **given)
    found = [config.ram_layers, config.learning_rate, config.lora_alpha, config.use_lora]
    assert found == [3, 1e-4, 16.0, False]
    assert [type(value) for value in found] == [int, float, float, bool]


def test_a_value_of_the_wrong_type() -> None:
    for name, text in (("use_lora", "2"), ("use_lora", "none"), ("learning_rate", "fast"), ("lora_alpha", "none")):
        with pytest.raises(typer.BadParameter, match=name):
            parse_settings([f"{name}={text}"])


# -- screens ---------------------------------------------------------------------------------------


def planned_for(values: dict[str, Any]) -> Any:
    """What `lema plan` shows for settings on the small machine."""
    machine = Hardware.parse(SMALL_MACHINE)
    return verb.make(LemaConfig.from_dict({"device": machine.device, **values}), machine)


def test_every_width_with_a_path_of_any_length(write: Write) -> None:
    path = write(num_hidden_layers=4)
    values = {"model_name_or_path": str(path), "dtype": "bfloat16", "ram_budget": "auto", "vram_budget": "auto"}
    planned = planned_for(values)

    def columns(name: str, width: int) -> dict[str, str]:
        screen = io.StringIO()
        config = planned.config.replace(model_name_or_path=name)
        show(dataclasses.replace(planned, config=config), Console(file=screen, width=width))
        return joined(rows_of(screen.getvalue(), width))

    def joined(rows: dict[str, str]) -> dict[str, str]:
        return {label: "".join(value.split()) for label, value in rows.items()}

    wide = columns(str(path), 300)
    assert {"layers", "host memory", "step", "sizes from"} <= wide.keys()
    for width in (28, 40, 80):
        for length in range(1, 2 * width):  # the title breaks elsewhere at each, at some just before a blank
            assert columns("x" * length, width) == wide, (width, length)
    assert joined(shown(path, "--hardware", SMALL_MACHINE, width=28)) == wide


def test_colour_only_on_a_terminal(write: Write) -> None:
    path = write(num_hidden_layers=2)
    assert "\x1b" not in lema(path, "--hardware", SMALL_MACHINE).output
    planned = planned_for({"model_name_or_path": str(path), "dtype": "bfloat16", "ram_budget": "auto"})
    terminal = io.StringIO()
    show(planned, Console(file=terminal, force_terminal=True, color_system="standard", width=80))
    assert "\x1b[" in terminal.getvalue()


def test_names_are_not_taken_for_markup(write: Write) -> None:
    path = write("llama-2-7b", num_hidden_layers=2)
    folder = path.parent.rename(path.parents[1] / "[bold]x[nosuch]")
    assert "[bold]x[nosuch]" in lema(folder, "--hardware", SMALL_MACHINE, width=300).stdout


# -- the process -----------------------------------------------------------------------------------


def process(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run `python -m lema` where it would be refused any file of the hub."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "80"}
    env.pop("FORCE_COLOR", None)
    command = [sys.executable, "-m", "lema", *map(str, arguments)]
    return subprocess.run(command, env=env, capture_output=True, text=True, cwd=ROOT, timeout=100)


@pytest.mark.long
def test_exit_codes_of_the_process(write: Write) -> None:
    path = write(num_hidden_layers=2)
    good = process("plan", path, "--hardware", SMALL_MACHINE, "--json")
    assert good.returncode == 0, good.stderr
    assert good.stderr == ""
    assert json.loads(good.stdout)["plan"]["device"] == "cuda"
    bad = process("plan", path, "--hardware", SMALL_MACHINE, "--vram-budget", "100MB")
    assert bad.returncode == 1
    assert bad.stdout == ""
    assert bad.stderr.startswith("error: this step does not fit into")
    assert bad.stderr.count("\n") == 1
    usage = process("plan")
    assert usage.returncode == 2
    assert "MODEL" in usage.stderr


def test_help_imports_nothing_heavy() -> None:
    script = """
import sys
from lema.cli.app import main
for sys.argv in (["lema", "--help"], ["lema", "plan", "--help"], ["lema", "--version"]):
    try:
        main()
    except SystemExit as end:
        assert not end.code, end.code
heavy = {"torch", "transformers", "peft", "numpy", "accelerate", "safetensors", "huggingface_hub"} & sys.modules.keys()
assert not heavy, heavy
"""
    started = time.perf_counter()
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert run.returncode == 0, run.stderr
    assert time.perf_counter() - started < 10, "a second at most where nothing else runs"
    assert "plan" in run.stdout
    assert "--vram-budget" in run.stdout


def test_the_command_is_installed_under_its_name() -> None:
    assert 'lema = "lema.cli.app:main"' in (ROOT / "pyproject.toml").read_text()


def test_interrupting(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any, **more: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(verb, "make", interrupted)
    result = lema(write(), "--hardware", SMALL_MACHINE)
    assert result.exit_code == 130
    assert result.output == ""


def test_our_own_mistakes_are_not_hidden(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **more: Any) -> Any:
        raise RuntimeError("a mistake")

    monkeypatch.setattr(verb, "make", broken)
    failed(lema(write()), "RuntimeError: a mistake", "LEMA's fault: LEMA_DEBUG=1 before the command")
    with pytest.raises(RuntimeError, match="a mistake"):
        lema(write(), LEMA_DEBUG="1")


# -- the published tables --------------------------------------------------------------------------


@pytest.mark.long
def test_the_planning_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks import planning

    before = planning.PAGE.read_text()
    out = tmp_path / "page.md"
    words = "--models Llama-2-7B --cards rtx4060-8g --links pcie4 --disks 7GB/s --ram 32GB --batches 64 --out"
    assert planning.main([*words.split(), str(out)]) == 0
    text = out.read_text()
    assert "prediction" in text.splitlines()[2]
    assert planning.PAGE.read_text() == before
    tables = [line.split(" | ") for line in text.splitlines() if line.startswith("| ") and "---" not in line]
    head, row, _, larger = tables
    assert row[:3] == ["| rtx4060-8g", "pcie4", "7GB/s"]
    config = tmp_path / "config.json"
    config.write_text(json.dumps(planning.model_config("Llama-2-7B")))
    plan = expected_plan(config, SMALL_MACHINE)
    assert plan.estimate is not None
    assert row[3] == f"{len(plan.on_device)} / {len(plan.in_ram)} / {len(plan.from_disk)}"
    assert row[head.index("s/step")] == f"{plan.estimate.step_seconds:.3g}"
    assert larger[:2] == ["| Llama-2-7B", "64"]


def test_the_page_on_planning_shows_rows_of_the_tables() -> None:
    page, tables = ((ROOT / "docs" / name).read_text() for name in ("planning.md", "benchmarks/planning.md"))
    assert "Predictions, not measurements" in page
    assert "Nothing here was measured" in tables
    part = page.partition("<!-- made by python -m benchmarks.planning -->")[2].partition("<!-- end -->")[0]
    rows = [line.split(" | ", 2) for line in part.splitlines() if line.startswith("| Llama")]
    assert len(rows) == 12
    for _, card, rest in rows:
        assert any(line.startswith(f"| {card} ") and line.endswith(f" | {rest}") for line in tables.splitlines())
