"""`lema plan`: what a run would keep where, the memory it would take and how fast it would be.

It knows options and what is printed; the plan is made where runs are put together.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import Json
from .settings import parse_settings

if TYPE_CHECKING:
    from ..run.planned import Planned


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
    as_json: Json = False,
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
    from ..run.planned import make

    planned = make({**values, **others}, hardware, probe)
    if as_json:
        typer.echo(json.dumps(as_dict(planned), indent=2))
        return
    from .plan_table import show

    show(planned)


def _of_run(file: Path, hardware: str | None) -> dict[str, Any]:
    """What a run's plan is made by, `auto` budgets where the file says none."""
    from ..machine.device import default_device
    from ..run.planned import for_windows
    from ..training.run_config import RunConfig

    run = RunConfig.from_yaml(file, defaults={"vram_budget": "auto", "ram_budget": "auto", "device": default_device()})
    values = for_windows(run.lema).to_dict()
    if hardware is not None:  # which has a device of its own
        del values["device"]
    return values


def as_dict(planned: Planned) -> dict[str, Any]:
    """JSON-ready: bytes, seconds and tokens a second."""
    from ..planning.plan import describe

    return {
        "model": planned.config.model_name_or_path,
        "found": dataclasses.asdict(planned.found),
        "settings": planned.config.to_dict(),
        "sizes_from": "weights" if planned.weights else "configuration",
        "hardware_from": "stated" if planned.stated else "measured",
        "hardware": json.loads(planned.hardware.to_json()),
        "sizes": _sizes(planned),
        "budgets": {"ram_budget": planned.ram_budget, "vram_budget": planned.vram_budget},
        "peaks": {"host": planned.plan.host_peak, "device": planned.plan.device_peak},
        "plan": describe(planned.plan),
    }


def _sizes(planned: Planned) -> dict[str, Any] | None:
    if planned.outlook is None or planned.plan.estimate is None:  # a model that cannot be looked into
        return None
    sizes = planned.outlook.sizes
    rate = sizes.decode_bytes_per_s if sizes.decoded else None
    return {"layers": sum(sizes.units), "decoded": sum(sizes.decoded), "decode_bytes_per_s": rate}
