"""`lema train`: one YAML file to an adapter.

It knows options, what is said before and after a run, and exit statuses; `run` puts a run together.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import ConfigError
from .progress import progress_bar
from .settings import split_settings, usage_of

if TYPE_CHECKING:
    from ..run.prepared import PlannedRun
    from ..training.result import TrainResult
    from ..training.run_config import RunConfig
    from ..training.start import Start


def train(
    file: Annotated[Path, typer.Argument(metavar="RUN.YAML", help="What `lema init` writes.", show_default=False)],
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Comes before what the file says; repeatable."),
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="auto|PATH|none",
            help="auto: go on from the newest whole checkpoint of output_dir. PATH: from that one. none: begin anew, "
            "what is there is put aside.",
        ),
    ] = None,
    plain: Annotated[bool, typer.Option("--plain", help="Lines instead of a panel.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, say what it will cost, and end.")
    ] = False,
) -> None:
    """Train an adapter as RUN.YAML says.

    Ctrl-C finishes the step, saves and says how to go on; a second one abandons the step.
    max_train_hours stops it before that time is over, saves likewise, and is no failure: exit status 0.
    Exit status: 0 done, 1 failed, 2 bad usage, 130 interrupted and saved.

    Example: lema train run.yaml --set learning_rate=2e-4 --resume auto
    """
    from ..coordinator import Coordinator
    from ..run.prepared import begun, plan_run
    from ..training.panel import make_view

    run = _read(file, split_settings(settings or ()))
    ranks = Coordinator()
    with begun(run, resume, ranks, look=dry_run) as (folder, start):
        with progress_bar(run.lema.quantize is not None) as progress:
            planned = plan_run(run, start, progress)
        if dry_run:
            planned.check()
        _say_cost(run, start, planned)
        result = None if dry_run else planned.train(folder, make_view(plain or None), ranks)
    if result is None:
        typer.echo("dry run: settings, model, data and output_dir are fine; nothing was trained")
        return
    _say_result(run, result)
    if result.status != "finished":
        again = ["lema", "train", str(file), *(part for pair in settings or () for part in ("--set", pair))]
        by = f" by max_train_hours={run.training.max_train_hours:g}" if result.status == "stopped" else ""
        typer.echo(
            f"{result.status} after step {result.global_step}{by}. Go on with:\n"
            f"  {shlex.join([*again, '--resume', 'auto'])}"
        )
    if result.status == "interrupted":
        raise typer.Exit(130)


def _read(file: Path, overrides: Mapping[str, str]) -> RunConfig:
    """The run's settings; `typer.BadParameter` if it is one of the overrides that is refused."""
    from ..machine.device import default_device
    from ..training.run_config import ALIASES, RunConfig, parse_overrides, setting_named

    with usage_of("--set"):
        parse_overrides(overrides)
    defaults = {"ram_budget": "auto", "vram_budget": "auto", "device": default_device()}
    try:
        return RunConfig.from_yaml(file, overrides, defaults)
    except ConfigError as error:
        if setting_named(error) not in {ALIASES.get(name, name) for name in overrides}:
            raise
        raise typer.BadParameter(str(error), param_hint="--set") from error


def _say_cost(run: RunConfig, start: Start, planned: PlannedRun) -> None:
    from ..machine.memory import format_bytes
    from ..training.meanings import understood
    from ..training.panel import duration
    from ..training.schedule import Schedule

    data, plan = planned.data, planned.planned.plan
    schedule = Schedule.of(run.training, data.train.steps_per_epoch)
    left = schedule.max_steps - (start.state["global_step"] if start.checkpoint is not None else 0)
    evaluation = f", {data.summary['eval']['rows']} held out" if data.eval is not None else ""
    passing = len(plan.from_disk) if len(plan.from_disk) > plan.host_slots else 0
    streamed = f"{passing} layers from disk" if passing else "all layers in memory"
    memory = f"host memory {format_bytes(plan.host_peak)}" if plan.host_bytes else "not counted, as no budget was given"
    if plan.device_bytes:
        memory = f"device memory {format_bytes(plan.device_peak)}, {memory}"
    lines = [
        ("model", f"{run.lema.model_name_or_path}: {run.lema.dtype} on {run.lema.device}, rank {run.lema.lora_rank}"),
        ("data", f"{data.summary['train']['rows']:,} rows{evaluation}; up to {run.lema.max_seq_length} tokens a row"),
        (
            "run",
            f"{schedule.max_steps:,} steps of {run.rows_per_step} rows, {left:,} to go, into {run.lema.output_dir}",
        ),
        ("memory", f"{memory}; {streamed}"),
    ]
    length, estimate = planned.usual_step
    if estimate is not None:
        step = estimate.step_seconds
        lines.append(
            (
                "time",
                f"about {duration(step * left)}: {step:.3g} s a step of {run.rows_per_step} rows of {length} tokens, "
                f"bound by {estimate.bound_by}",
            )
        )
    lines += [("meaning", text) for text in understood(run)]
    for label, text in lines:
        typer.echo(f"{label:8}{text}")


def _say_result(run: RunConfig, result: TrainResult) -> None:
    from ..training.panel import duration

    metrics = result.metrics
    parts = [f"{result.global_step} steps in {duration(metrics['train_seconds'])}"]
    if metrics.get("train_loss") is not None:
        parts.append(f"loss {metrics['train_loss']:.4f}")
    if "eval_loss" in metrics:
        parts.append(f"eval loss {metrics['eval_loss']:.4f}, token accuracy {metrics['eval_token_accuracy']:.1%}")
    if metrics["nonfinite_steps"]:
        parts.append(f"{metrics['nonfinite_steps']} steps skipped")
    typer.echo(f"{result.status}: {', '.join(parts)}")
    if result.adapter is not None:
        typer.echo(f"adapter: {result.adapter}")
    if result.status == "finished":
        final, folder = shlex.quote(str(result.adapter)), shlex.quote(run.lema.output_dir)
        typer.echo(f"next:\n  lema chat {final}\n  lema report {folder}\n  lema merge {final} merged")
