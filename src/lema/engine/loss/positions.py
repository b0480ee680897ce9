"""The loss of a batch and its gradient at the hidden states, on all rows at once or in chunks of targets.

It knows logits and targets; it knows nothing of layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from ...machine.host_copies import to_device
from ...models.causal_lm import CausalLM

IGNORE_INDEX = -100


def shift_left(labels: torch.Tensor) -> torch.Tensor:
    """Targets of each position: the next position's label. `[batch, seq]` -> `[batch, seq]`, the last is -100."""
    return functional.pad(labels, (0, 1), value=IGNORE_INDEX)[:, 1:].contiguous()


@dataclass(frozen=True, slots=True)
class LossResult:
    """Loss summed over targets and divided by the denominator, and (unless evaluated) its gradient.

    Everything may still be on its way: what is read as a number of the host waits for the device.
    """

    parts: torch.Tensor
    """`[n]`: what the pieces add to the loss, times the divisor."""
    gradient: torch.Tensor | None
    """`[batch, seq, hidden]`, times the loss scale."""
    logits: torch.Tensor | None
    """`[batch, seq, vocab]`, only on request."""
    right: torch.Tensor | None = None
    """`[n]`: in each piece, targets that are the first of the largest logits; only on request."""
    divisor: float = 1.0
    beside: tuple[tuple[torch.Tensor, torch.Tensor], ...] = ()
    """Parameters between decoder and logits, and their gradients, times the loss scale."""

    def backward(self, hidden: torch.Tensor) -> None:
        """Hand the gradients on: to what made the hidden states, and to the parameters after them."""
        pairs = [*([(hidden, self.gradient)] if hidden.requires_grad else []), *self.beside]
        torch.autograd.backward([root for root, _ in pairs], [gradient for _, gradient in pairs])

    @property
    def loss(self) -> float:
        """The loss, read."""
        return float(sum(self.parts.tolist()) / self.divisor)

    @property
    def correct(self) -> int | None:
        """Targets that are the first of the largest logits, read; None where they were not counted."""
        return None if self.right is None else int(sum(self.right.tolist()))


class GradientSums:
    """Gradients of some parameters, summed over pieces of a loss; a parameter that no piece depends on has none."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self._sums: list[torch.Tensor | None] = [None] * len(self._parameters)

    def add(self, output: torch.Tensor, hidden: torch.Tensor, gradient: torch.Tensor | None = None) -> torch.Tensor:
        """Go backward from an output: the gradient at the hidden states; those of the parameters are added."""
        if not self._parameters:
            (at_hidden,) = torch.autograd.grad(output, hidden, gradient)
            return at_hidden
        at_hidden, *found = torch.autograd.grad(output, [hidden, *self._parameters], gradient, allow_unused=True)
        for number, (total, part) in enumerate(zip(self._sums, found, strict=True)):
            if part is not None:
                self._sums[number] = part if total is None else total.add_(part)
        return at_hidden

    def found(self) -> tuple[tuple[nn.Parameter, torch.Tensor], ...]:
        """Parameters that have a gradient, and it."""
        return tuple((p, g) for p, g in zip(self._parameters, self._sums, strict=True) if g is not None)


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
    trained: Sequence[nn.Parameter] = (),
) -> LossResult:
    """Run head and loss.

    Args:
        hidden: `[batch, seq, hidden]` from the decoder.
        targets: `[batch, seq]`, already shifted, -100 where there is none; on the host, or the host waits for them.
        denominator: target tokens the sum is divided by.
        chunk_size: targets a chunk, positions without one are skipped; None: the model's own loss on all rows.
        scale: loss scale, applied before the gradient is formed.
        smoothing: share of a target's weight that is spread evenly over the vocabulary; see `smoothed_loss`.
        trained: parameters that may lie between hidden states and logits; those that do get a gradient.
    """
    hidden = hidden.detach()
    beside = GradientSums(trained if with_gradient else ())
    if chunk_size is None:
        targets = to_device(targets, hidden.device)
        loss, gradient, everything = loss_of_piece(
            lm, hidden, targets, denominator, scale, with_gradient, smoothing, beside
        )
        right = _count_right(everything, targets).view(1) if with_accuracy else None
        return LossResult(loss.view(1), gradient, everything if with_logits else None, right, beside=beside.found())
    rows = hidden.reshape(-1, hidden.shape[-1])
    flat = targets.reshape(-1).cpu()
    losses: list[torch.Tensor] = []
    counts: list[torch.Tensor] = []
    whole = torch.zeros_like(rows) if with_gradient else None
    for where in (flat != IGNORE_INDEX).nonzero().squeeze(1).split(chunk_size):
        wanted, positions = to_device(flat[where].unsqueeze(0), rows.device), to_device(where, rows.device)
        chunk = rows.index_select(0, positions).unsqueeze(0)
        loss, gradient, piece = loss_of_piece(lm, chunk, wanted, denominator, scale, with_gradient, smoothing, beside)
        losses.append(loss)
        if with_accuracy:
            counts.append(_count_right(piece, wanted))
        if whole is not None and gradient is not None:
            whole.index_copy_(0, positions, gradient.squeeze(0))
    with torch.no_grad():
        logits = lm.logits(hidden) if with_logits else None
    right = _joined(counts, rows) if with_accuracy else None
    gradient = None if whole is None else whole.view_as(hidden)
    return LossResult(_joined(losses, rows), gradient, logits, right, beside=beside.found())


def _joined(numbers: list[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    return torch.stack(numbers) if numbers else like.new_zeros(0)


def smoothed_loss(logits: torch.Tensor, targets: torch.Tensor, denominator: float, smoothing: float) -> torch.Tensor:
    """Cross entropy with the targets' weight spread: `(1 - s) * -log p_y + s * mean_j(-log p_j)` a target.

    That of Szegedy et al., Rethinking the Inception Architecture (2016), section 7, with the mean over all logits,
    as transformers' `LabelSmoother` has it.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, -2)
    flat = targets.reshape(-1)
    summed = functional.cross_entropy(wide, flat, ignore_index=IGNORE_INDEX, reduction="sum", label_smoothing=smoothing)
    return summed / denominator


def _count_right(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (logits.argmax(-1) == targets).sum()


def loss_of_piece(
    lm: CausalLM, hidden: torch.Tensor, targets: torch.Tensor, denominator: float, scale: float, with_gradient: bool,
    smoothing: float = 0.0, beside: GradientSums | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:  # fmt: skip
    """Loss of some positions, its gradient at their hidden states, and their logits; the gradients of parameters in
    between are added to `beside`."""
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
        gradient = (beside or GradientSums(())).add(loss if scale == 1.0 else loss * scale, hidden)
    return loss.detach(), gradient, logits.detach()
