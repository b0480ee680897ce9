"""A plan as one table for people. It knows words and columns; every number is the plan's."""

from __future__ import annotations

from collections.abc import Mapping

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..machine.memory import format_bytes
from ..planning.plan import MemoryPlan
from ..run.planned import Planned
from .model_table import adapters, left_out

Section = list[tuple[str, str]]


def show(planned: Planned, console: Console | None = None) -> None:
    """Print the table, as wide as the terminal allows and in colour where it is one."""
    table = Table(box=box.HORIZONTALS, show_header=False, pad_edge=False, title_justify="left", caption_justify="left")
    config = planned.config
    table.title = Text(
        f"{config.model_name_or_path}: {config.dtype}, {config.batch_size} x {config.max_seq_length} tokens a step, "
        + (f"rank {config.lora_rank}" if config.use_lora else "no adapters")
    )
    table.caption = Text("Memory and time are predictions.")
    table.add_column(style="bold cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for section in sections(planned):
        for label, value in section:
            table.add_row(Text(label), Text(value))
        table.add_section()
    (console or Console()).print(table)


def sections(planned: Planned) -> list[Section]:
    """Labels and values: what the model is, what is kept where, memory, time, and what was assumed."""
    return [_model(planned), _kept(planned), _memory(planned), _time(planned), _assumed(planned)]


def _model(planned: Planned) -> Section:
    found = planned.found
    rows = [("family", found.family)]
    if found.left_out:
        rows.append(("left out", left_out(found)))
    if found.targets:
        rows.append(("adapters", adapters(found)))
    return rows


def _kept(planned: Planned) -> Section:
    plan, config = planned.plan, planned.config
    n = len(plan.on_device) + len(plan.in_ram) + len(plan.from_disk) + len(plan.mapped)
    kept = len(plan.keep_activations)
    device = f"{len(plan.on_device)} on the device, " if plan.device != "cpu" else ""
    activations = f"kept in {kept} of {n} layers, the others compute them again" if kept else "all computed again"
    positions = config.batch_size * config.max_seq_length
    chunk = f"{plan.loss_chunk_size} of {positions}" if plan.loss_chunk_size else f"all {positions}"
    cut = "as its logits ask for" if plan.loss_chunk_size == "auto" else f"{chunk} positions at once"
    mapped = f", {len(plan.mapped)} mapped from the files" if plan.mapped else ""
    return [
        *_codes(planned),
        ("layers", f"{device}{len(plan.in_ram)} in RAM, {len(plan.from_disk)} from disk{mapped}"),
        ("activations", f"kept in all {n} layers" if kept == n else activations),
        ("head", _head(plan)),
        ("boundaries", _place(plan, plan.boundaries)),
        ("optimizer", _place(plan, plan.optimizer)),
        ("micro-batch", f"{plan.micro_batch_size} of {config.batch_size} rows at once"),
        ("loss chunk", cut),
        ("slots", _slots(plan)),
    ]


def _codes(planned: Planned) -> Section:
    if planned.outlook is None or planned.plan.estimate is None:  # a model that cannot be looked into
        return []
    sizes = planned.outlook.sizes
    if not sizes.decoded:
        return []
    values = f"{format_bytes(sum(sizes.units))} of layers as codes, {format_bytes(sum(sizes.decoded))} as values"
    rate = format_bytes(int(sizes.decode_bytes_per_s))
    return [
        ("weights", f"{values}, decoded at {rate}/s{' (assumed)' if planned.stated or not planned.weights else ''}")
    ]


def _head(plan: MemoryPlan) -> str:
    if plan.head == "chunked":
        return f"streamed in chunks of {plan.head_rows} vocabulary rows, once a step"
    return "streamed whole, once a step" if plan.head == "streamed" else "resident"


def _place(plan: MemoryPlan, place: str) -> str:
    return "on the device" if place == "device" and plan.device != "cpu" else "in RAM"


def _slots(plan: MemoryPlan) -> str:
    if plan.device == "cpu":
        return f"{plan.host_slots} in RAM" if plan.from_disk else "none, nothing streams"
    device = min(plan.device_slots, len(plan.streamed_to_compute))
    return f"{device} on the device, {plan.host_slots} in RAM" if device else "none on the device, nothing streams"


def _memory(planned: Planned) -> Section:
    plan = planned.plan
    rows = [("host memory", _peak(plan.host_peak, planned.ram_budget, plan.host_bytes))]
    if plan.device != "cpu":
        rows.insert(0, ("device memory", _peak(plan.device_peak, planned.vram_budget, plan.device_bytes)))
    return rows


def _peak(peak: int, budget: int | None, parts: Mapping[str, int]) -> str:
    limit = f"of {format_bytes(budget)}" if budget is not None else "without a limit"
    largest_first = sorted(parts.items(), key=lambda part: -part[1])
    listed = ", ".join(f"{name} {format_bytes(size)}" for name, size in largest_first if size)
    return f"{format_bytes(peak)} {limit}\n{listed}"


def _time(planned: Planned) -> Section:
    plan, estimate = planned.plan, planned.plan.estimate
    if estimate is None:
        return []
    busy = {"compute": estimate.compute_seconds, "disk": estimate.disk_seconds}
    if plan.device != "cpu":
        busy["link"] = estimate.link_seconds
    if estimate.decode_seconds:
        busy["compute"] -= estimate.decode_seconds
        busy["decoding"] = estimate.decode_seconds
    return [
        (
            "step",
            f"{_seconds(estimate.step_seconds)}, {_short(estimate.tokens_per_second)} tokens/s, "
            f"bound by {estimate.bound_by}",
        ),
        ("of which", ", ".join(f"{name} {_seconds(seconds)}" for name, seconds in busy.items())),
    ]


def _assumed(planned: Planned) -> Section:
    config = planned.config
    asked = [("host", config.ram_budget, planned.ram_budget)]
    if planned.plan.device != "cpu":
        asked.insert(0, ("device", config.vram_budget, planned.vram_budget))
    auto = {name for name, words, _ in asked if str(words).strip().lower() == "auto"}
    budgets = ", ".join(
        f"{name} {'no limit' if budget is None else format_bytes(budget)}" + (" (auto)" if name in auto else "")
        for name, _, budget in asked
    )
    if auto:
        budgets += f"; auto: what {'it has' if planned.stated else 'is free now'}, less a margin"
    return [
        ("hardware", str(planned.hardware)),
        ("numbers from", _origin(planned)),
        ("budgets", budgets),
        ("sizes from", "the weights" if planned.weights else f"config.json alone, stored in {config.dtype}"),
    ]


def _origin(planned: Planned) -> str:
    if not planned.stated:
        return "measurements of this machine, which --probe repeats"
    return "--hardware" + (
        ", data sheets for a card" if planned.hardware.source == "stated" else ", measured elsewhere"
    )


def _seconds(seconds: float) -> str:
    return f"{_short(seconds)} s" if seconds >= 0.1 or not seconds else f"{_short(1000 * seconds)} ms"


def _short(number: float) -> str:
    """Three digits, or all before the point."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"
