"""A folder that can be pushed: a notebook and its `kernel-metadata.json`.

Both files are written and read here, and nothing is sent.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lema.errors import KaggleError
from lema.storage.atomic import write_text

from .credentials import check_user
from .metadata import ACCELERATOR, FILE, LONGEST_HOURS, metadata, notebook
from .notebook import build_notebook, parameters_of

SPARE_HOURS = 1.0
"""What a run may take beyond what its notebook aims at, before Kaggle ends it."""


@dataclass(frozen=True)
class Order:
    """What notebook to build, and how it differs from its usual self."""

    name: str
    user: str
    title: str | None = None
    accelerator: str = ACCELERATOR
    hours: float | None = None
    """Within which the notebook ends by itself; None: its own."""
    resume_from: str | None = None
    """OWNER/SLUG of the kernel whose training is gone on with."""
    kernels: Sequence[str] = ()
    datasets: Sequence[str] = ()
    private: bool = True
    internet: bool | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    benchmarks: Path | None = None


def build(order: Order, folder: Path) -> Path:
    """Write notebook and metadata into a folder, made if missing; returns the notebook's path.

    Raises:
        KaggleError: an unknown notebook or parameter, or what Kaggle would refuse.
    """
    kind = notebook(order.name)
    title = order.title or (next_title(kind.title, order.resume_from) if order.resume_from else kind.title)
    parameters = dict(order.parameters)
    if order.hours is not None:
        parameters["HOURS"] = order.hours
    if "HOURS" in parameters:
        parameters["HOURS"] = hours = _hours(parameters["HOURS"])
        if "RESERVE" in kind.parameters:
            parameters.setdefault("RESERVE", min(float(kind.parameters["RESERVE"]), hours / 4))
    kernels = list(order.kernels)
    if order.resume_from is not None:
        if kind.template != "training":
            raise KaggleError(f"{order.name} trains nothing that could be gone on with: use --kernel to attach outputs")
        parameters["RESUME"] = True
        kernels.insert(0, order.resume_from)
    name = f"lema-{order.name}.ipynb"
    described = metadata(
        check_user(order.user, "user"), title, name, accelerator=order.accelerator,
        internet=kind.internet if order.internet is None else order.internet, private=order.private,
        kernels=kernels, datasets=order.datasets,
    )  # fmt: skip
    text = build_notebook(order.name, parameters, title, order.benchmarks)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / name, text)
    write_text(folder / FILE, json.dumps(described, indent=2) + "\n")
    return folder / name


def _hours(given: Any) -> float:
    try:
        hours = float(given)
    except ValueError as error:
        raise KaggleError(f"HOURS={given} must be a number") from error
    if not 0 < hours <= LONGEST_HOURS:
        raise KaggleError(f"hours={hours:g} must be more than 0 and at most {LONGEST_HOURS:g}: Kaggle ends at 12")
    return hours


def next_title(title: str, resumed: str) -> str:
    """The title of the kernel that goes on from another one: it needs a name of its own, `TITLE 2` and so on."""
    last = resumed.rpartition("-")[2]
    return f"{title} {int(last) + 1 if last.isdigit() and int(last) < 1000 else 2}"


def read(folder: Path) -> tuple[dict[str, Any], str, int | None]:
    """Metadata, notebook and run time in seconds (None: not known) of a folder that `build` made.

    Cells' outputs are left out, as Kaggle's own client does.

    Raises:
        KaggleError: a file is missing or not what it should be.
    """
    try:
        described = json.loads((folder / FILE).read_text(encoding="utf-8"))
        source = (folder / described["code_file"]).read_text(encoding="utf-8")
        content = json.loads(source)
        cells = content["cells"]
    except FileNotFoundError as error:
        raise KaggleError(f"{error.filename} is missing: lema kaggle build NOTEBOOK -o {folder}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise KaggleError(f"{folder} is not what lema kaggle build makes: {type(error).__name__}: {error}") from error
    if wrong := set(metadata("user-x", "a title", "a")) ^ set(described):
        raise KaggleError(f"{folder / FILE}: {', '.join(sorted(wrong))} missing or unknown; every key is to be set")
    for cell in cells:
        if isinstance(cell["source"], list):
            cell["source"] = "".join(cell["source"])
        if cell["cell_type"] == "code":
            cell["outputs"], cell["execution_count"] = [], None
    hours = parameters_of(source).get("HOURS")
    seconds = None if hours is None else math.ceil(3600 * (float(hours) + SPARE_HOURS))
    return described, json.dumps(content), seconds
