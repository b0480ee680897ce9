"""`lema train`: one YAML file to an adapter.

It knows options, what is said before and after a run, and exit statuses; the run itself is the training room's.
"""

from __future__ import annotations

import contextlib
import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError
from .settings import split_settings, usage_of

if TYPE_CHECKING:
    from ..planning.plan import Estimate
    from ..training.result import TrainResult
    from ..training.run_config import RunConfig
    from ..training.start import Start
    from .plan import Planned

_BUDGETS = ("ram_budget", "vram_budget")


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
    from ..training.checkpoints import CheckpointFolder
    from ..training.start import choose_start

    run = _read(file, split_settings(settings or ()))
    folder = CheckpointFolder(run.lema.output_dir)
    cleared = folder.look() if dry_run else folder.open()
    try:
        start = choose_start(folder, resume)
        result = _run(run, folder, start, cleared, plain, dry_run)
    finally:
        folder.close()
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
    defaults = {**dict.fromkeys(_BUDGETS, "auto"), "device": default_device()}
    try:
        return RunConfig.from_yaml(file, overrides, defaults)
    except ConfigError as error:
        if setting_named(error) not in {ALIASES.get(name, name) for name in overrides}:
            raise
        raise typer.BadParameter(str(error), param_hint="--set") from error


def _run(
    run: RunConfig, folder: Any, start: Start, cleared: list[str], plain: bool, dry_run: bool
) -> TrainResult | None:
    import dataclasses

    from ..data.load import Data, check_all_rows
    from ..model import LemaModel
    from ..run.training import load_tokenizer, open_data, train_run
    from ..training.panel import make_view
    from ..training.run import RunData, check_start
    from .plan import make

    config = _kept(run.resolved().engine_config().to_dict(), run, start)
    tokenizer = load_tokenizer(run.lema.model_name_or_path)
    planned = make(config, None)
    resolved = planned.config.replace(ram_budget=planned.ram_budget, vram_budget=planned.vram_budget)
    with contextlib.ExitStack() as opened:
        data = open_data(run, tokenizer, lm=planned.adapter.causal_lm())
        check_start(RunData(data.train, data.eval), run, start)
        if dry_run:
            assert isinstance(data, Data)
            check_all_rows(data)
            opened.enter_context(LemaModel(resolved)).get_trainer()  # whatever making it would refuse
        _say_cost(run, data, planned, start)
        if dry_run:
            return None
        start = dataclasses.replace(start, messages=[*cleared, *start.messages])
        trainer = opened.enter_context(LemaModel(resolved)).get_trainer()
        return train_run(trainer, run, data, tokenizer, folder, start, make_view(plain or None))


def _kept(config: dict[str, Any], run: RunConfig, start: Start) -> dict[str, Any]:
    """The settings, with those of the run that is gone on with that say more than what is given now.

    The sizes that automatic budgets came to: free memory is another one now, and another plan would cut sums elsewhere
    and change their last bits. And where an adapter was trained further, its form is that in the checkpoint.
    """
    if start.checkpoint is None:
        return config
    before: Mapping[str, Any] = start.state["lema"]["run"]["settings"]
    saved = json.loads((start.checkpoint / "lema_config.json").read_text(encoding="utf-8"))
    kept = {name: saved.get(name) for name in _BUDGETS if before.get(name) == getattr(run.lema, name)}
    if saved.get("adapter_name_or_path") is not None:
        kept["adapter_name_or_path"] = str(start.checkpoint)
    return {**config, **kept}


def _say_cost(run: RunConfig, data: Any, planned: Planned, start: Start) -> None:
    from ..machine.memory import format_bytes
    from ..training.meanings import understood
    from ..training.panel import duration
    from ..training.schedule import Schedule

    schedule = Schedule.of(run.training, data.train.steps_per_epoch)
    left = schedule.max_steps - (start.state["global_step"] if start.checkpoint is not None else 0)
    plan = planned.plan
    rows = data.summary["train"]["rows"]
    evaluation = f", {data.summary['eval']['rows']} held out" if data.eval is not None else ""
    passing = len(plan.from_disk) if len(plan.from_disk) > plan.host_slots else 0
    streamed = f"{passing} layers from disk" if passing else "all layers in memory"
    memory = f"host memory {format_bytes(plan.host_peak)}"
    if plan.device != "cpu":
        memory = f"device memory {format_bytes(plan.device_peak)}, {memory}"
    lines = [
        ("model", f"{run.lema.model_name_or_path}: {run.lema.dtype} on {run.lema.device}, rank {run.lema.lora_rank}"),
        ("data", f"{rows:,} rows{evaluation}; up to {run.lema.max_seq_length} tokens a row"),
        (
            "run",
            f"{schedule.max_steps:,} steps of {run.rows_per_step} rows, {left:,} to go, into {run.lema.output_dir}",
        ),
        ("memory", f"{memory}; {streamed}"),
    ]
    length, estimate = _usual_step(run, data, planned)
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


def _usual_step(run: RunConfig, data: Any, planned: Planned) -> tuple[int, Estimate | None]:
    """Tokens of a long row of a usual step, and what that step takes; memory is planned for the longest row allowed."""
    from .plan import make

    longest = run.lema.max_seq_length
    seen = data.summary["train"]["sample"]["length_percentiles"].get("95", longest)
    length = longest if run.data.packing else min(seen, longest)
    if length == longest:
        return length, planned.plan.estimate
    budgets = {"ram_budget": planned.ram_budget, "vram_budget": planned.vram_budget}
    return length, make({**planned.config.to_dict(), **budgets, "max_seq_length": length}, None).plan.estimate


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
