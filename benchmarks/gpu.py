"""LEMA on one CUDA card beside PEFT and beside the card's own limits, in ten minutes, without a network.

It knows the stages and the time that is left; it does not know how an arm measures itself. What is known so far is
written after every arm, so a run that is killed leaves its results.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import machine
from .folders import evict, model_folder
from .gpu_report import ALL, CHECKPOINTING, NOTES, PLAIN, bounds, judge, panels
from .make_model import NAMES, PRESETS
from .options import command_line, common_options, parse, several, size, written_budget
from .processes import Arm, NotPrepared, Option, Run, describe, run_arm
from .report import Report, save, write

MODULE = "benchmarks.gpu"
CARD_SHARE = 0.95
"""Of a card's memory that a budget may name; a larger one becomes 'auto'."""
DRY_RUN = "SIMULATED ON THE CPU WITH A TINY MODEL: a dry run of this program, NOT A MEASUREMENT"


@dataclass(frozen=True)
class Scale:
    """What differs between a card and the dry run."""

    device: str
    budget: str
    """The setting that the budgets are given to."""
    budgets: tuple[str, ...]
    main: str
    further: tuple[tuple[str, tuple[str, ...]], ...]
    """Shapes that are measured if time is left, and their budgets."""
    small: str
    tight_ram: str
    flat_steps: int


CARD = Scale(
    "cuda", "vram_budget", ("8GB", "4GB", "16GB"), "7b", (("tinyllama", ("2GB",)), ("13b", ("16GB", "8GB"))),
    "small", "4GB", 200,
)  # fmt: skip
SIMULATED = Scale("cpu", "ram_budget", ("1GB", "200MB"), "tiny", (("small", ("300MB",)),), "tiny", "130MB", 8)


@dataclass
class Session:
    """A run of stages against a deadline."""

    options: argparse.Namespace
    scale: Scale
    report: Report
    ends: float
    limits: dict[str, Any] = field(default_factory=dict)
    """The card as `planning/probe` measured it."""

    @property
    def on_card(self) -> bool:
        """False where the CPU stands in for it."""
        return self.scale.device != "cpu"

    @property
    def left(self) -> float:
        """Seconds."""
        return self.ends - time.monotonic()

    @property
    def dtype(self) -> str:
        """The card's own half precision."""
        return "bfloat16" if "bfloat16" in self.limits["flops"] else "float16"

    def arm(self, arm: Arm, pair: int = 0) -> Run:
        """Run one arm within the time that is left, and write what is known."""
        if arm.kind == "lema":  # the others do not read in their timed steps, and load faster so
            evict(arm.folder)
        run = run_arm(arm, pair, max(min(self.left, self.options.timeout), 1))
        describe(run)
        if run.numbers is not None:
            run.numbers.update(bounds(run, self.limits))
        self.report.runs.append(run)
        self.save()
        return run

    def save(self) -> None:
        """Write what is known so far."""
        judge(self.report, self.on_card, self.options.tokens)
        save(self.report, self.options.out)

    def stage(self, name: str, seconds: float, work: Callable[[], None]) -> None:
        """Do one stage if about so many seconds are left; what it cannot do is noted."""
        if self.left < seconds:
            self.report.facts[f"left out: {name}"] = f"{max(self.left, 0):.0f} s left, about {seconds:.0f} needed"
            return
        print(f"{name}, {self.left:.0f} s left", file=sys.stderr, flush=True)
        try:
            work()
        except NotPrepared as error:
            self.report.facts[f"left out: {name}"] = " ".join(str(error).split())[-500:]
        self.save()


# -- stages ----------------------------------------------------------------------------------------


def budgets_for(session: Session, wanted: Sequence[str]) -> list[str]:
    """Budgets as the card has room for them: one that is too large becomes 'auto', once."""
    room = CARD_SHARE * (session.limits["vram_bytes"] or float("inf"))
    return list(dict.fromkeys(one if one != "auto" and size(one) <= room else "auto" for one in wanted))


def compare(session: Session, shape: str, budgets: Sequence[str], thorough: bool) -> None:
    """LEMA at each budget, PEFT with and without checkpointing; thorough: LEMA's own limits and a trace as well."""
    options, scale = session.options, session.scale
    settings: dict[str, Option] = {
        "device": scale.device, "dtype": session.dtype, "tokens": options.tokens, "rank": options.rank,
        "steps": options.steps,
    }  # fmt: skip
    ram = ["ram_budget=auto"] if scale.budget != "ram_budget" else []
    layers = PRESETS[shape]["num_hidden_layers"]
    name = NAMES[shape]
    given = options.folder if thorough else None
    with model_folder(shape, given, False, session.dtype, scale.device, session.left) as folder:
        arms: list[Arm] = []
        for one in budgets_for(session, budgets):
            own = {**settings, "set": [f"{scale.budget}={one}", *ram]}
            if thorough and not arms:
                own["trace"] = str(options.out / f"{session.report.stem}-trace.json.gz")
            arms.append(Arm(f"{name}: LEMA, {one}", "lema", folder, own))
        arms.insert(1, Arm(f"{name}: {CHECKPOINTING}", "peft_checkpointing", folder, settings))
        arms.insert(2, Arm(f"{name}: {PLAIN}", "peft", folder, settings))
        if thorough:
            kept = [
                f"device_layers={layers}",
                f"ram_layers={0 if ram else layers}",
                "keep_activations=0",
                "head=resident",
            ]
            arms.append(Arm(f"{name}: {ALL}", "lema", folder, {**settings, "set": kept}))
            tight = budgets_for(session, budgets)[0] if ram else scale.tight_ram
            changes = [f"{scale.budget}={tight}", *([f"ram_budget={scale.tight_ram}"] if ram else [])]
            label = f"{name}: LEMA, {tight}, {scale.tight_ram} of RAM"
            arms.append(Arm(label, "lema", folder, {**settings, "set": changes}))
        for pair in range(options.pairs if thorough else 1):
            for arm in arms if pair % 2 == 0 else reversed(arms):
                if session.left >= options.least:
                    session.arm(arm, pair)
                else:
                    left_out = f"left out: {arm.label}, pair {pair + 1}"
                    session.report.facts[left_out] = f"{max(session.left, 0):.0f} s left"


def check(session: Session, kind: str) -> None:
    """Parity or flat, on the small model."""
    scale = session.scale
    with model_folder(scale.small, None, False, "float32", scale.device) as folder:
        options: dict[str, Option] = {"device": scale.device, "steps": scale.flat_steps}
        session.arm(Arm(kind, kind, folder, options, module="benchmarks.gpu_checks"))


def measure_machine(session: Session) -> None:
    """Rates of matrix products, link and disk; nothing goes on without them."""
    given = (session.options.folder or Path(tempfile.gettempdir())).resolve()
    disk = next(place for place in (given, *given.parents) if place.exists())
    session.limits = machine.ask(disk, session.scale.device)
    session.report.facts["measured limits"] = session.limits["words"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write the report."""
    made = common_options(MODULE, "LEMA on a card beside PEFT and beside the card's limits", pairs=1, steps=5)
    made.add_argument("--device", default="cuda", choices=("cuda", "simulated"), help="simulated: a dry run on the CPU")
    made.add_argument("--minutes", type=float, default=10, help="to end within (default: %(default)s)")
    made.add_argument("--least", type=float, default=30, help="seconds an arm is begun with (default: %(default)s)")
    made.add_argument(
        "--budgets", type=several(written_budget), help="of VRAM for the 7B model (default: 8GB,4GB,16GB)"
    )
    made.add_argument("--folder", type=Path, help="a Llama-2-7B's folder, or where to make one (default: temporary)")
    options = parse(made, arguments)
    simulated = options.device == "simulated"
    scale = SIMULATED if simulated else CARD
    title = "LEMA on one card"
    report = Report(
        "gpu_simulated" if simulated else "gpu", f"{title} ({DRY_RUN})" if simulated else title,
        command_line(MODULE, options), notes=[DRY_RUN + ".", *NOTES] if simulated else list(NOTES), complete=False,
    )  # fmt: skip
    session = Session(options, scale, report, time.monotonic() + 60 * options.minutes)
    options.out.mkdir(parents=True, exist_ok=True)
    measure_machine(session)
    pace = 0.0 if simulated else 1.0
    session.stage("parity", 40 * pace, lambda: check(session, "parity"))
    budgets = options.budgets or scale.budgets
    session.stage(f"{NAMES[scale.main]} model", 120 * pace, lambda: compare(session, scale.main, budgets, True))
    session.stage("flat", 40 * pace, lambda: check(session, "flat"))
    for shape, own in scale.further:
        needed = (60 if shape != "13b" else 150) * pace
        session.stage(f"{NAMES[shape]} shape", needed, lambda shape=shape, own=own: compare(session, shape, own, False))
    report.complete = True
    report.panels = panels(report.runs, session.on_card)
    return write(report, options.out)


if __name__ == "__main__":
    sys.exit(main())
