"""The loss of a batch and its gradient at the hidden states, on all rows at once or in chunks of targets.

It knows logits and targets; it knows nothing of layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from ..models.causal_lm import CausalLM

IGNORE_INDEX = -100


def shift_left(labels: torch.Tensor) -> torch.Tensor:
    """Targets of each position: the next position's label. `[batch, seq]` -> `[batch, seq]`, the last is -100."""
    return functional.pad(labels, (0, 1), value=IGNORE_INDEX)[:, 1:].contiguous()


@dataclass(frozen=True, slots=True)
class LossResult:
    """Loss summed over targets and divided by the denominator, as float and (unless evaluated) its gradient."""

    loss: float
    gradient: torch.Tensor | None
    """`[batch, seq, hidden]`, times the loss scale."""
    logits: torch.Tensor | None
    """`[batch, seq, vocab]`, only on request."""
    correct: int | None = None
    """Targets that are the first of the largest logits, only on request."""


def compute_loss(
    lm: CausalLM,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    denominator: float,
    *,
    chunk_size: int | None = None,
    scale: float = 1.0,
    with_gradient: bool = True,
    with_logits: bool = False,
    with_accuracy: bool = False,
    smoothing: float = 0.0,
) -> LossResult:
    """Run head and loss.

    Args:
        hidden: `[batch, seq, hidden]` from the decoder.
        targets: `[batch, seq]`, already shifted, -100 where there is none; best on the host, which picks the positions.
        denominator: target tokens the sum is divided by.
        chunk_size: targets a chunk, positions without one are skipped; None: the model's own loss on all rows.
        scale: loss scale, applied before the gradient is formed.
        smoothing: share of a target's weight that is spread evenly over the vocabulary; see `smoothed_loss`.
    """
    hidden = hidden.detach()
    if chunk_size is None:
        targets = targets.to(hidden.device)
        loss, gradient, everything = _piece(lm, hidden, targets, denominator, scale, with_gradient, smoothing)
        right = _count_right(everything, targets) if with_accuracy else None
        return LossResult(float(loss), gradient, everything if with_logits else None, right)
    rows = hidden.reshape(-1, hidden.shape[-1])
    flat = targets.reshape(-1)
    losses: list[torch.Tensor] = []
    whole = torch.zeros_like(rows) if with_gradient else None
    right = 0 if with_accuracy else None
    for positions in (flat != IGNORE_INDEX).nonzero().squeeze(1).split(chunk_size):
        wanted = flat[positions].unsqueeze(0).to(rows.device)
        positions = positions.to(rows.device)
        chunk = rows.index_select(0, positions).unsqueeze(0)
        loss, gradient, piece = _piece(lm, chunk, wanted, denominator, scale, with_gradient, smoothing)
        losses.append(loss)
        if right is not None:
            right += _count_right(piece, wanted)
        if whole is not None and gradient is not None:
            whole.index_copy_(0, positions, gradient.squeeze(0))
    with torch.no_grad():
        logits = lm.logits(hidden) if with_logits else None
    total = sum(torch.stack(losses).tolist()) if losses else 0.0
    return LossResult(total, None if whole is None else whole.view_as(hidden), logits, right)


def smoothed_loss(logits: torch.Tensor, targets: torch.Tensor, denominator: float, smoothing: float) -> torch.Tensor:
    """Cross entropy with the targets' weight spread: `(1 - s) * -log p_y + s * mean_j(-log p_j)` a target.

    That of Szegedy et al., Rethinking the Inception Architecture (2016), section 7, with the mean over all logits,
    as transformers' `LabelSmoother` has it.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, -2)
    flat = targets.reshape(-1)
    summed = functional.cross_entropy(wide, flat, ignore_index=IGNORE_INDEX, reduction="sum", label_smoothing=smoothing)
    return summed / denominator


def _count_right(logits: torch.Tensor, targets: torch.Tensor) -> int:
    return int((logits.argmax(-1) == targets).sum())


def _piece(
    lm: CausalLM, hidden: torch.Tensor, targets: torch.Tensor, denominator: float, scale: float, with_gradient: bool,
    smoothing: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:  # fmt: skip
    with torch.set_grad_enabled(with_gradient):
        hidden = hidden.requires_grad_(with_gradient)
        logits = lm.logits(hidden)
        loss = (
            smoothed_loss(logits, targets, denominator, smoothing)
            if smoothing
            else lm.loss(logits, targets, denominator)
        )
        if not with_gradient:
            return loss, None, logits
        (gradient,) = torch.autograd.grad(loss if scale == 1.0 else loss * scale, hidden)
    return loss.detach(), gradient, logits.detach()
