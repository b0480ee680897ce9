"""What Kaggle is told of a notebook: `kernel-metadata.json`, with every key set.

Notebooks are names, titles and settings here; their cells are the templates'.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lema.errors import KaggleError

FILE = "kernel-metadata.json"
CPU = "none"
ACCELERATOR = "NvidiaTeslaT4"
"""Two T4 with 16 GB each, of which the notebooks use one."""
LONGEST_HOURS = 11.0
"""Kaggle ends a run after 12 hours, perhaps without keeping its outputs."""


@dataclass(frozen=True)
class Notebook:
    """A notebook that can be built."""

    title: str
    template: str
    what: str
    parameters: Mapping[str, Any]
    internet: bool = True
    """Models and missing packages are fetched."""


def _training(recipe: str, hours: float, reserve: float) -> dict[str, Any]:
    return {"RECIPE": f"lema_reply_{recipe}.yaml", "HOURS": hours, "RESERVE": reserve}


NOTEBOOKS: dict[str, Notebook] = {
    "proof": Notebook(
        "LEMA proof", "training", "SmolLM2-135M learns the [LEMA_REPLY] format", _training("smollm2_135m", 2.0, 0.5)
    ),
    "smollm2": Notebook(
        "LEMA SmolLM2 1.7B", "training", "fine-tunes HuggingFaceTB/SmolLM2-1.7B", _training("smollm2_1.7b", 6.0, 1.0)
    ),
    "tinyllama": Notebook(
        "LEMA TinyLlama 1.1B", "training", "fine-tunes TinyLlama-1.1B-Chat", _training("tinyllama", 6.0, 1.0)
    ),
    "llama2": Notebook(
        "LEMA Llama 2 7B", "training", "fine-tunes NousResearch/Llama-2-7b-hf", _training("llama2_7b", 9.0, 2.0)
    ),
    "inference": Notebook("LEMA inference", "inference", "asks an adapter of another kernel", {}),
    "benchmark": Notebook("LEMA benchmark", "benchmark", "memory and speed beside PEFT, four models", {}),
}


def notebook(name: str) -> Notebook:
    """The notebook of a name.

    Raises:
        KaggleError: there is none.
    """
    if name not in NOTEBOOKS:
        raise KaggleError(f"there is no notebook {name!r}: choose one of {', '.join(NOTEBOOKS)}")
    return NOTEBOOKS[name]


def slug_of(title: str) -> str:
    """The slug that Kaggle makes of a title, which has to be the one in `id`."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def check_accelerator(accelerator: str) -> str:
    """An accelerator's ID; returns it.

    Raises:
        KaggleError: it is a TPU's, or none at all.
    """
    if not accelerator.strip() or accelerator.lower().startswith("tpu"):
        raise KaggleError(
            f"--accelerator {accelerator!r}: LEMA computes on NVIDIA cards, as {ACCELERATOR}, or on {CPU}"
        )
    return accelerator


def metadata(
    user: str,
    title: str,
    code_file: str,
    *,
    accelerator: str = ACCELERATOR,
    internet: bool = True,
    private: bool = True,
    kernels: Sequence[str] = (),
    datasets: Sequence[str] = (),
) -> dict[str, Any]:
    """`kernel-metadata.json` of a notebook.

    Args:
        accelerator: as NvidiaTeslaT4; none: the CPU.
        kernels, datasets: OWNER/SLUG of what is attached.

    Raises:
        KaggleError: a title Kaggle refuses, a TPU, a source that is not OWNER/SLUG, or one that is this kernel itself.
    """
    check_accelerator(accelerator)
    if len(title) < 5 or len(slug_of(title)) < 5 or len(title) > 50:
        raise KaggleError(f"title {title!r}: Kaggle wants 5 to 50 characters, at least 5 of them letters or digits")
    for source in (*kernels, *datasets):
        if not re.fullmatch(r"[^/\s]+/[^/\s]{5,}", source):
            raise KaggleError(f"{source!r} must be OWNER/SLUG, as in the address of the kernel or data set")
    ref = f"{user}/{slug_of(title)}"
    if ref in kernels:
        raise KaggleError(f"{ref} cannot take its own outputs: give this kernel a name of its own with --title")
    return {
        "id": ref,
        "title": title,
        "code_file": code_file,
        "language": "python",
        "kernel_type": "notebook",
        "is_private": private,
        "enable_gpu": accelerator != CPU,
        "enable_tpu": False,
        "enable_internet": internet,
        "machine_shape": accelerator if accelerator != CPU else None,
        "dataset_sources": list(datasets),
        "competition_sources": [],
        "kernel_sources": list(kernels),
        "model_sources": [],
        "keywords": [],
        "docker_image": None,
        "docker_image_pinning_type": "latest",
    }
