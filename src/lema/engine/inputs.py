"""A batch, checked before anything is computed from it.

It knows ids, labels and masks; it knows nothing of text or of what the model does with them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from ..errors import InputError
from ..machine.host_copies import to_device
from ..models.causal_lm import CausalLM
from .loss.positions import IGNORE_INDEX, shift_left
from .packing import check_packing, is_packed


@dataclass(frozen=True, slots=True)
class Batch:
    """Token ids `[batch, seq]`, and targets of the same shape already shifted (-100: none)."""

    model_inputs: dict[str, Any]
    """As `CausalLM.hidden_states` takes them."""
    targets: torch.Tensor | None
    num_targets: int
    num_tokens: int

    def on(self, device: torch.device) -> Batch:
        """The batch where it is computed; its inputs stay on the host as well, and targets are there alone.

        On a device a batch without a mask gets one of ones, unless it is packed: without any, transformers reads the
        positions of the device to find out whether it is.
        """
        if device.type == "cpu":
            return self
        inputs = dict(self.model_inputs)
        if "attention_mask" not in inputs and not is_packed(None, inputs.get("position_ids")):
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"], dtype=torch.bool)
        moved = {name: to_device(value, device) for name, value in inputs.items()}
        return dataclasses.replace(self, model_inputs={**moved, "on_host": inputs})


def make_batch(
    lm: CausalLM,
    inputs: torch.Tensor | Mapping[str, Any],
    labels: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
) -> Batch:
    """Check a batch and shift its labels.

    Args:
        inputs: ids `[batch, seq]` (or `[seq]`), or a mapping with `input_ids` and any of the others.
        labels: `[batch, seq]`, unshifted, -100 where nothing is learned.
        attention_mask, position_ids: `[batch, seq]`.

    Raises:
        InputError: an empty batch, shapes that differ, ids or labels outside the vocabulary, a sequence longer
            than the model's positions, or labels without a single target.
    """
    if isinstance(inputs, Mapping):
        known = {"input_ids", "labels", "attention_mask", "position_ids"}
        if unknown := sorted(set(inputs) - known):
            raise InputError(f"the batch holds {', '.join(unknown)}, which train_step does not take; known: {known}")
        labels = inputs.get("labels") if labels is None else labels
        attention_mask = inputs.get("attention_mask") if attention_mask is None else attention_mask
        position_ids = inputs.get("position_ids") if position_ids is None else position_ids
        if "input_ids" not in inputs:
            raise InputError("the batch has no input_ids")
        inputs = inputs["input_ids"]
    ids = _as_rows("input_ids", inputs)
    given = {"attention_mask": attention_mask, "position_ids": position_ids}
    model_inputs = {"input_ids": ids}
    for name, value in given.items():
        if value is not None:
            model_inputs[name] = _same_shape(name, _as_rows(name, value), ids)
    if ids.numel() == 0:
        raise InputError(f"the batch is empty: input_ids has shape {list(ids.shape)}")
    if is_packed(model_inputs.get("attention_mask"), model_inputs.get("position_ids")):
        check_packing(lm)
    _check_range("input_ids", ids, lm.vocab_size)
    limit = lm.max_positions
    if limit is not None and ids.shape[1] > limit:
        raise InputError(
            f"sequences of {ids.shape[1]} tokens are longer than the model's {limit} positions; cut the rows"
        )
    if labels is None:
        return Batch(model_inputs, None, 0, ids.numel())
    labels = _same_shape("labels", _as_rows("labels", labels), ids)
    _check_range("labels", labels, lm.vocab_size, ignore=IGNORE_INDEX)
    targets = shift_left(labels)
    num_targets = int((targets != IGNORE_INDEX).sum())
    if num_targets == 0:
        raise InputError(
            f"none of the {ids.shape[0]} rows has a target: every label after the first position is {IGNORE_INDEX}"
        )
    return Batch(model_inputs, targets, num_targets, ids.numel())


def join_batches(batches: Sequence[Mapping[str, Any]]) -> tuple[dict[str, torch.Tensor], int]:
    """Batches to learn from as one, rows one after the other and shorter ones padded at the right; and the most rows
    that one of them has.

    Args:
        batches: mappings as `make_batch` takes them, all with the same names.

    Raises:
        InputError: no batch, no labels, other names in one than in the first, or position ids beside rows of unequal
            length.
    """
    if not batches:
        raise InputError("there is no batch in this window")
    for number, batch in enumerate(batches):
        if set(batch) != set(batches[0]) or not {"input_ids", "labels"} <= set(batch):
            raise InputError(
                f"batch {number} of the window holds {', '.join(sorted(batch)) or 'nothing'}, batch 0 "
                f"{', '.join(sorted(batches[0])) or 'nothing'}; all need input_ids, labels and the same names"
            )
    parts = {name: [_as_rows(name, batch[name]) for batch in batches] for name in batches[0]}
    for name, given in parts.items():
        parts[name] = [_same_shape(name, rows, ids) for rows, ids in zip(given, parts["input_ids"], strict=True)]
    lengths = sorted({rows.shape[1] for rows in parts["input_ids"]})
    if len(lengths) > 1:
        if "position_ids" in parts:
            raise InputError(f"rows of {lengths} tokens cannot be joined where position_ids are given; pad them alike")
        parts.setdefault("attention_mask", [torch.ones_like(rows) for rows in parts["input_ids"]])
    joined = {}
    for name, given in parts.items():
        filler = IGNORE_INDEX if name == "labels" else 0
        joined[name] = torch.cat(
            [functional.pad(rows, (0, lengths[-1] - rows.shape[1]), value=filler) for rows in given]
        )
    return joined, max(len(rows) for rows in parts["input_ids"])


def _as_rows(name: str, value: Any) -> torch.Tensor:
    tensor = torch.as_tensor(value).cpu()
    if tensor.is_floating_point() or tensor.dim() not in (1, 2):
        raise InputError(
            f"{name} must hold whole numbers of shape [batch, seq], not {tensor.dtype} {list(tensor.shape)}"
        )
    tensor = tensor.unsqueeze(0) if tensor.dim() == 1 else tensor
    return tensor if tensor.dtype == torch.bool else tensor.long()


def _same_shape(name: str, value: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    if value.shape != ids.shape:
        raise InputError(f"{name} has shape {list(value.shape)}, input_ids {list(ids.shape)}; they must be the same")
    return value


def _check_range(name: str, values: torch.Tensor, vocab_size: int, ignore: int | None = None) -> None:
    wrong = (values < 0) | (values >= vocab_size)
    if ignore is not None:
        wrong &= values != ignore
    if bool(wrong.any()):
        row, column = (int(i) for i in wrong.nonzero()[0])
        raise InputError(
            f"{name} row {row}, position {column} is {int(values[row, column])}, outside the model's vocabulary of "
            f"{vocab_size} tokens (0..{vocab_size - 1}); is this the model's own tokenizer?"
        )
