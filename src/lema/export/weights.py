"""The merged model's tensors, made a run at a time from the base's and the adapter's.

Which stored tensors the adapter changes, and where in them, is worked out once; then each is a stream of runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from ..errors import NonFiniteError, UnsupportedError
from ..models.transformers_adapter import TransformersAdapter
from ..storage.index import GlobalBinaryIndex
from ..storage.placement import Part, PlacedTensor
from ..storage.plain_tensors import PlainTensor, PlainTensors
from .checkpoint import Checkpoint
from .elements import read_parameter, runs
from .lora_layers import Target, copies_of_base, find_targets

_MERGEABLE = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class MergedWeights:
    """Every tensor of the base under its stored name, with the adapter in those it changes; codes as their values.

    Args:
        checkpoint: the adapter.
        base: its model's weights.
        saved: its tensors.

    Raises:
        MissingTensorError, ShapeMismatchError: the weights are not the model's.
        UnsupportedError: an adapter that cannot be merged.
        CheckpointError: the adapter does not fit the model.
    """

    def __init__(self, checkpoint: Checkpoint, base: GlobalBinaryIndex, saved: GlobalBinaryIndex) -> None:
        model: TransformersAdapter = checkpoint.base_model()
        found = model.checkpoint_map(base)
        self._placed = found.placed
        self.tensors = PlainTensors(base, found.coded)
        """The base's, by name."""
        self.targets = find_targets(checkpoint, model, saved)
        self._changes: dict[str, list[tuple[Target, Part]]] = {}
        for target in self.targets.values():
            for part in self._placed[target.name].parts:
                self._changes.setdefault(part.tensor.name, []).append((target, part))
        self._refuse_shared(checkpoint)
        self._refuse_other_values(checkpoint, saved)
        self.second_copies = _second_copies(found.tied, found.placed)
        """Stored tensors that transformers ties to another one of the same values."""
        self._compared = self._moved = 0

    @property
    def changed(self) -> list[str]:
        """Stored tensors the adapter changes."""
        return list(self._changes)

    @property
    def moved(self) -> float | None:
        """Of the elements merged so far, the share whose value is another than the base's in the type written.

        An adapter changes nearly all of them; a change below half a step of the type is rounded away.
        """
        return self._moved / self._compared if self._compared else None

    def parts(self, tensor: PlainTensor, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        """One stored tensor in runs, in row-major order, merged in float32 where the adapter changes it.

        Raises:
            NonFiniteError: merged values that are not finite, or not so in `dtype`.
        """
        cursor = 0
        for target, part in sorted(self._changes.get(tensor.name, ()), key=lambda change: change[1].source):
            yield from (run.to(dtype) for run in runs(self.tensors, tensor, cursor, part.source))
            for merged, before in self._merged(target, part, dtype):
                cast = merged.to(dtype)
                self._compared += cast.numel()
                self._moved += int(torch.count_nonzero(cast != before))
                if not _finite(cast):
                    raise NonFiniteError(_not_finite(tensor.name, merged, dtype))
                yield cast
            cursor = part.source + part.count
        yield from (run.to(dtype) for run in runs(self.tensors, tensor, cursor, math.prod(tensor.shape)))

    def _merged(self, target: Target, part: Part, dtype: torch.dtype) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Merged runs in float32, and what the base has there in the type written."""
        placed = self._placed[target.name]
        width = max(1, math.prod(target.shape[1:]))
        cursor, end = part.target, part.target + part.count
        for first, last in target.blocks(cursor // width, -(-end // width)):
            block = self._read(target.name, placed, first * width, last * width).view(last - first, *target.shape[1:])
            before = block.to(dtype, copy=True).view(-1)  # the block is taken over
            merged = target.merge(block, first).reshape(-1)
            stop = min(end, last * width)
            here = slice(cursor - first * width, stop - first * width)
            yield merged[here], before[here]
            cursor = stop

    def _read(self, name: str, placed: PlacedTensor, start: int, stop: int) -> torch.Tensor:
        return read_parameter(self.tensors, name, placed, start, stop)

    def _refuse_shared(self, checkpoint: Checkpoint) -> None:
        for target in self.targets.values():
            for part in self._placed[target.name].parts:
                if part.tensor.dtype not in _MERGEABLE:
                    raise UnsupportedError(
                        f"{checkpoint.base}: {part.tensor.name} is stored as {part.tensor.dtype}, which nothing "
                        "can be merged into. Give the unquantised model with --base"
                    )
        for name, placed in self._placed.items():
            for part in placed.parts:
                changes = self._changes.get(part.tensor.name, ())
                if shared := [t.name for t, changed in changes if t.name != name and _overlap(part, changed)]:
                    raise UnsupportedError(
                        f"{checkpoint.folder} changes {shared[0]}, which {checkpoint.base} ties to {name}: a merge "
                        "would change both. Keep the adapter apart, or train it without this module"
                    )

    def _refuse_other_values(self, checkpoint: Checkpoint, saved: GlobalBinaryIndex) -> None:
        """PEFT loads the adapter's own copy of a base's parameter over the base's; here they must be the same."""
        for key, name in copies_of_base(saved).items():
            placed, record = self._placed.get(name), saved.record(key)
            same = placed is not None and placed.shape == record.shape
            cursor = 0
            for run in runs(PlainTensors(saved), record, 0, math.prod(record.shape)) if same else ():
                assert placed is not None
                same = same and torch.equal(run.float(), self._read(name, placed, cursor, cursor + len(run)))
                cursor += len(run)
            if not same:
                raise UnsupportedError(
                    f"{checkpoint.folder} holds {name} itself, and not as {checkpoint.base} has it: it was trained or "
                    "resized as a whole. Merge this adapter with PEFT's own merge_and_unload"
                )


def _finite(tensor: torch.Tensor) -> bool:
    """One pass, no temporary; a NaN is its own least and greatest."""
    return all(math.isfinite(float(value)) for value in torch.aminmax(tensor))


def _not_finite(name: str, merged: torch.Tensor, dtype: torch.dtype) -> str:
    if not _finite(merged):
        return f"{name}: merged values are not finite; the adapter or the base is damaged. Use an earlier checkpoint"
    return (
        f"{name}: merged values reach {merged.abs().max():.3g}, beyond {dtype}. "
        "Use --dtype bfloat16, which has the range of float32"
    )


def _overlap(a: Part, b: Part) -> bool:
    return a.source < b.source + b.count and b.source < a.source + a.count


def _second_copies(tied: dict[str, str], placed: dict[str, PlacedTensor]) -> frozenset[str]:
    copies: set[str] = set()
    for name, partner in tied.items():
        copies |= {p.tensor.name for p in placed[name].parts} - {p.tensor.name for p in placed[partner].parts}
    return frozenset(copies)
