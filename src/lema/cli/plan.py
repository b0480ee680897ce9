"""`lema plan`: what a run would keep where, the memory it would take and how fast it would be.

It knows options and which machine is meant; plans are made by the engine, from a configuration and no weights.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..config import LemaConfig
from ..errors import ConfigError, LemaError, WeightsNotFoundError
from .settings import parse_settings

if TYPE_CHECKING:
    from ..models.base import LemaModelAdapter
    from ..planning.hardware import Hardware
    from ..planning.plan import MemoryPlan
    from ..storage.index import GlobalBinaryIndex


@dataclass(frozen=True)
class Planned:
    """A plan with all it was made from."""

    config: LemaConfig
    """Its budgets are as they were asked for."""
    plan: MemoryPlan
    hardware: Hardware
    stated: bool
    """The hardware was given, and is not this machine as measured."""
    ram_budget: int | None
    """Bytes; None: no limit."""
    vram_budget: int | None
    weights: bool
    """Sizes are those of the weight files; False: they follow from the model's configuration."""
    adapter: LemaModelAdapter
    """The model without its weights."""


def plan(
    ctx: typer.Context,
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A directory, a .safetensors file, a config.json alone, a hub id, of which only the configuration "
            "is fetched, or the YAML file of a run.",
            show_default=False,
        ),
    ],
    batch_size: Annotated[int, typer.Option(help="Rows a step.")] = 1,
    max_seq_length: Annotated[int, typer.Option(help="Tokens a row.")] = 512,
    lora_rank: Annotated[int, typer.Option(help="Rank of the adapters.")] = 16,
    dtype: Annotated[str, typer.Option(help="float16, bfloat16 or float32.")] = "bfloat16",
    device: Annotated[
        str | None,
        typer.Option(
            help="cpu, or an accelerator as torch names it: cuda, cuda:1, xpu. Default: that of --hardware, or the "
            "accelerator that is there.",
            metavar="NAME",
        ),
    ] = None,
    vram_budget: Annotated[
        str,
        typer.Option(metavar="SIZE", help="Device memory to stay within: 8GB, 7.5GiB, or auto: free now, less some."),
    ] = "auto",
    ram_budget: Annotated[
        str, typer.Option(metavar="SIZE", help="Host memory to stay within, above what importing takes.")
    ] = "auto",
    hardware: Annotated[
        str | None,
        typer.Option(
            metavar="SPEC",
            help="Plan for another machine: a JSON file, or a card and words, as in "
            "rtx4060-8g,ram=32GB,disk=3GB/s. Nothing here is measured then, and auto is all it has, "
            "less some.",
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Any other setting of LemaConfig; repeatable."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
    probe: Annotated[bool, typer.Option("--probe", help="Measure this machine anew.")] = False,
) -> None:
    """Show what would be kept where for MODEL, with predicted memory and time. No weights are loaded.

    Of a run's YAML file the plan is for its steps; options that are given come before what the file says.

    Example: lema plan path/to/model --max-seq-length 512 --ram-budget 3GB
    """
    if probe and hardware is not None:
        raise typer.BadParameter("measures this machine, and --hardware describes another one", param_hint="--probe")
    values: dict[str, Any] = {
        "model_name_or_path": model,
        "batch_size": batch_size,
        "max_seq_length": max_seq_length,
        "lora_rank": lora_rank,
        "dtype": dtype,
        "vram_budget": vram_budget,
        "ram_budget": ram_budget,
    }
    if device is not None:
        values["device"] = device
    others = parse_settings(settings or ())
    for name in others.keys() & values.keys():
        source = ctx.get_parameter_source("model" if name == "model_name_or_path" else name)
        if source is not None and source.name == "COMMANDLINE":
            raise typer.BadParameter(f"{name} is given without --set as well", param_hint="--set")
    if Path(model).suffix in (".yaml", ".yml"):
        given = {
            n for n in values if (source := ctx.get_parameter_source(n)) is not None and source.name == "COMMANDLINE"
        }
        values = {**_of_run(Path(model), hardware), **{name: values[name] for name in given}}
    planned = make({**values, **others}, hardware, probe)
    if as_json:
        typer.echo(json.dumps(as_dict(planned), indent=2))
        return
    from .plan_table import show

    show(planned)


def _of_run(file: Path, hardware: str | None) -> dict[str, Any]:
    """What a run's engine is built with, `auto` budgets where the file says none."""
    from ..machine.device import default_device
    from ..training.run_config import RunConfig

    run = RunConfig.from_yaml(file, defaults={"vram_budget": "auto", "ram_budget": "auto", "device": default_device()})
    values = run.engine_config().to_dict()
    if hardware is not None:  # which has a device of its own
        del values["device"]
    return values


def make(values: dict[str, Any], spec: str | None, probe: bool = False) -> Planned:
    """Plan for settings by name, on the machine a specification describes or on this one.

    Raises:
        LemaError: settings, model, machine or budgets are not good, or nothing fits.
    """
    if str(values.get("device")).lower() == "auto":  # that of the machine meant
        values = {name: value for name, value in values.items() if name != "device"}
    config = LemaConfig.from_dict(values)
    from ..engine.assembly import assemble_plan, resolve_budgets
    from ..machine.device import default_device
    from ..planning.hardware import Hardware

    machine = Hardware.parse(spec) if spec is not None else None
    if "device" not in values:
        config = config.replace(device=machine.device if machine is not None else default_device())
    elif machine is not None and config.device.partition(":")[0] != machine.device:
        raise ConfigError(f"device={config.device!r} is not what {machine.name} computes on: {machine.device}")
    with _opened(config) as (adapter, gbi):
        # Before anything is measured: what measuring takes is given back, but not at once.
        ram, vram = resolve_budgets(config, machine)
        if machine is None:
            from ..planning.probe import profile

            machine = profile(config.device, gbi.path if gbi is not None else None, refresh=probe)
        _check_budget("ram_budget", ram, machine.ram_bytes, machine.name)
        _check_budget("vram_budget", vram, machine.vram_bytes, machine.name)
        made = assemble_plan(config.replace(ram_budget=ram, vram_budget=vram), adapter, gbi, machine)
    return Planned(config, made, machine, spec is not None, ram, vram, gbi is not None, adapter)


def as_dict(planned: Planned) -> dict[str, Any]:
    """JSON-ready: bytes, seconds and tokens a second."""
    from ..planning.plan import describe

    return {
        "model": planned.config.model_name_or_path,
        "settings": planned.config.to_dict(),
        "sizes_from": "weights" if planned.weights else "configuration",
        "hardware_from": "stated" if planned.stated else "measured",
        "hardware": json.loads(planned.hardware.to_json()),
        "budgets": {"ram_budget": planned.ram_budget, "vram_budget": planned.vram_budget},
        "peaks": {"host": planned.plan.host_peak, "device": planned.plan.device_peak},
        "plan": describe(planned.plan),
    }


def _check_budget(name: str, budget: int | None, there: int, machine: str) -> None:
    from ..machine.memory import format_bytes

    if budget is not None and budget > there:
        raise ConfigError(f"{name} of {format_bytes(budget)} is more than the {format_bytes(there)} that {machine} has")


@contextlib.contextmanager
def _opened(config: LemaConfig) -> Iterator[tuple[LemaModelAdapter, GlobalBinaryIndex | None]]:
    """The model's adapter, and the index of its weights where they are on this machine."""
    from ..storage.index import GlobalBinaryIndex

    given = Path(config.model_name_or_path)
    if given.suffix == ".json" and not given.exists():
        raise WeightsNotFoundError(f"{given} does not exist: give a model's directory, its config.json or a hub id")
    if given.is_file() and given.name != "config.json" and given.suffix != ".safetensors":
        raise ConfigError(f"{given} is neither a directory, a .safetensors file nor a config.json")
    adapter = adapter_of(config)
    where = Path(config.gbi_path) if config.gbi_path is not None else given
    if config.gbi_path is None and not (where.suffix == ".safetensors" or any(where.glob("*.safetensors"))):
        yield adapter, None
        return
    gbi = GlobalBinaryIndex(where)
    try:
        yield adapter, gbi
    finally:
        gbi.close()


def adapter_of(config: LemaConfig) -> LemaModelAdapter:
    """The model of a configuration, built once so that what is wrong with the configuration shows here."""
    import torch
    from huggingface_hub.errors import StrictDataclassError

    from ..models.locate import adapter_for, local_path
    from ..models.transformers_adapter import TransformersAdapter

    path = local_path(config.model_name_or_path, "config.json")
    try:
        adapter = adapter_for(config, path)
        adapter.configure(getattr(torch, config.dtype), config.attn_implementation)
        if isinstance(adapter, TransformersAdapter):
            adapter.causal_lm()
    except (StrictDataclassError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
        if isinstance(error, LemaError):
            raise
        raise ConfigError(
            f"the config.json of {config.model_name_or_path} describes no model: {type(error).__name__}: {error}"
        ) from error
    return adapter
