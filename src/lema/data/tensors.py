"""Encoded rows as tensors: padded on either side, or packed.

It knows ids, labels and shapes; it knows nothing of text or of which rows these are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .render import IGNORE, EncodedRow

Tensors = dict[str, torch.Tensor]


def collate(rows: Sequence[EncodedRow], pad_token_id: int, padding_side: str = "right") -> Tensors:
    """A padded batch: `input_ids`, `attention_mask` and `labels`, each `[rows, seq]`.

    On the left, also `position_ids`, so that every row's first token is at position 0 there too.
    """
    width = max(len(row.input_ids) for row in rows)
    ids = torch.full((len(rows), width), pad_token_id, dtype=torch.long)
    labels = torch.full_like(ids, IGNORE)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        length = len(row.input_ids)
        at = slice(0, length) if padding_side == "right" else slice(width - length, width)
        ids[i, at] = torch.tensor(row.input_ids)
        labels[i, at] = torch.tensor(row.labels)
        # What is before a row's first token is not what it follows from.
        labels[i, at.start] = IGNORE
        mask[i, at] = 1
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    if padding_side == "left":
        batch["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)
    return batch


def collate_packed(packs: Sequence[Sequence[EncodedRow]], pad_token_id: int) -> Tensors:
    """A packed batch: `input_ids`, `labels` and `position_ids`, each `[packs, seq]`, and no mask.

    Positions restart at every row, which is how attention is told that it must not look across; padding at the end
    is a row of its own, without targets.
    """
    width = max(sum(len(row.input_ids) for row in pack) for pack in packs)
    ids = torch.full((len(packs), width), pad_token_id, dtype=torch.long)
    labels = torch.full_like(ids, IGNORE)
    positions = torch.zeros_like(ids)
    for i, pack in enumerate(packs):
        at = 0
        for row in pack:
            stop = at + len(row.input_ids)
            ids[i, at:stop] = torch.tensor(row.input_ids)
            labels[i, at + 1 : stop] = torch.tensor(row.labels[1:])  # the first has nothing it could follow from
            positions[i, at:stop] = torch.arange(stop - at)
            at = stop
        positions[i, at:] = torch.arange(width - at)
    return {"input_ids": ids, "labels": labels, "position_ids": positions}
