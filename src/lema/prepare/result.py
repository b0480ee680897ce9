"""What `prepare` found or made, in numbers and notes for whoever asked.

Only said, never written.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from ..machine.memory import format_bytes
from .fit import Fit
from .source import Source


@dataclass(frozen=True)
class Prepared:
    """What `prepare` found or made."""

    path: Path
    """The folder (or file) to give as `model_name_or_path`."""
    written: bool
    """False: the source streams well as it is, and nothing was written."""
    files: int
    """Of weights."""
    tensors: int
    """In all files."""
    nbytes: int
    """Of all tensors."""
    dtypes: tuple[str, ...]
    """Types of the tensors, the one with most bytes first."""
    kept: int = 0
    """Tensors that an earlier, interrupted run had written: verified, not written again."""
    overflowed: dict[str, int] = field(default_factory=dict)
    """Finite values that became infinite in the type asked for, by tensor."""
    errors: dict[str, float] = field(default_factory=dict)
    """Of tensors that became codes: norm of what they are off, over the norm of the source's."""
    notes: tuple[str, ...] = ()
    """What else a user should know."""


def notes(source: Source, fit: Fit) -> tuple[str, ...]:
    """What a user should know of a source that fitted."""
    found = [fit.note] if fit.note else []
    if fit.copies:
        found.append(f"{', '.join(fit.copies)}: tied to another tensor and equal to it: one copy will do")
    if fit.contradicted:
        found.append(
            f"{', '.join(fit.contradicted)}: the configuration ties it to a tensor with other values; both were kept, "
            "and tie_word_embeddings is false now"
        )
    held = getattr(source, "held_bytes", 0)
    if held:
        found.append(f"the form torch wrote before 1.6 had to be read whole: {format_bytes(held)} of memory")
    return tuple(found)


def described(path: Path, types: Mapping[str, torch.dtype], source: Source, files: int) -> Prepared:
    """A folder (or file) that holds a source's tensors in these types."""
    by_type: Counter[str] = Counter()
    for name, dtype in types.items():
        numel = torch.Size(source.tensors[name].shape).numel()
        by_type[str(dtype).removeprefix("torch.")] += numel * dtype.itemsize
    names = tuple(name for name, _ in by_type.most_common())
    return Prepared(path, False, files, len(types), sum(by_type.values()), names)


def as_it_is(source: Source, types: Mapping[str, torch.dtype], fit: Fit, path: Path) -> Prepared:
    """The source itself, where nothing has to be written."""
    given = path.parent if path.name in ("model.safetensors", "model.safetensors.index.json") else path
    return replace(described(given, types, source, len(source.files)), notes=notes(source, fit))
