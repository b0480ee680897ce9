"""The loss of a frozen head whose weight is only there in pieces of the vocabulary, in one pass over them.

It knows a head's linear and that a family does things before and after it; it knows nothing of models or of where the
pieces come from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn
from torch.nn import functional

from ...errors import InputError
from ...machine.host_copies import to_device
from .positions import IGNORE_INDEX, GradientSums, LossResult

Linear = Callable[[torch.Tensor], torch.Tensor]
Epilogue = Callable[[torch.Tensor, Linear], torch.Tensor]
"""From hidden states `[1, n, hidden]` to logits `[1, n, rows]`, by a linear that has these rows of the vocabulary."""


class HeadPieces(Protocol):
    """A head's weight, one run of vocabulary rows at a time, in order."""

    @property
    def ranges(self) -> Sequence[tuple[int, int]]:
        """Half-open vocabulary rows of each piece; they cover 0..vocab in order."""

    def use(self, piece: int, /) -> AbstractContextManager[torch.Tensor]:
        """The piece's weight `[end - start, hidden]`, valid inside the block."""


@dataclass(frozen=True, slots=True)
class Head:
    """A frozen linear layer whose weight is there in pieces only: its bias and shape, and the pieces."""

    linear: nn.Linear
    pieces: HeadPieces

    def __post_init__(self) -> None:
        starts, ends = zip(*self.pieces.ranges, strict=True)
        assert starts == (0, *ends[:-1]) and ends[-1] == self.linear.out_features, self.pieces.ranges
        assert all(start < end for start, end in self.pieces.ranges), self.pieces.ranges

    @torch.no_grad()
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """All outputs, without a gradient: `[.., hidden]` -> `[.., vocab]`."""
        joined: torch.Tensor | None = None
        for number, (start, end) in enumerate(self.pieces.ranges):
            with self.pieces.use(number) as weight:
                outputs = self.outputs(weight, start, x)
                if joined is None:
                    joined = outputs.new_empty(*outputs.shape[:-1], self.linear.out_features)
                joined[..., start:end] = outputs
        assert joined is not None, "a head without rows"
        return joined

    def outputs(self, weight: torch.Tensor, start: int, x: torch.Tensor) -> torch.Tensor:
        """Those of one piece, whose first vocabulary row is `start`: `[.., hidden]` -> `[.., rows]`."""
        bias = self.linear.bias
        return functional.linear(x, weight, None if bias is None else bias[start : start + weight.shape[0]])


@torch.no_grad()
def linear_cross_entropy(
    hidden: torch.Tensor,
    head: Head,
    targets: torch.Tensor,
    epilogue: Epilogue,
    *,
    denominator: float = 1.0,
    positions: int = 512,
    scale: float = 1.0,
    with_gradient: bool = True,
    with_accuracy: bool = False,
    smoothing: float = 0.0,
    trained: Sequence[nn.Parameter] = (),
) -> LossResult:
    """Head and loss as `compute_loss` has them; each piece of the weight is used once, in order.

    Positions without a target are skipped; without any target no piece is used.

    Args:
        hidden: `[batch, seq, hidden]` from the decoder.
        targets: `[batch, seq]`, already shifted, -100 where there is none; on the host, or the host waits for them.
        epilogue: treats each logit alone and alike, which `ModelEpilogue.check` makes sure of.
        denominator: target tokens the sum is divided by.
        positions: targets at once; at most `positions` times a piece's rows logits are there at a time.
        scale: loss scale, applied before the gradient is rounded to the type of the hidden states.
        smoothing: see `lema.engine.loss.positions.smoothed_loss`.
        trained: parameters that may lie before the head's linear.

    Raises:
        InputError: a target is outside the vocabulary.
    """
    flat = targets.reshape(-1).cpu()
    where = (flat != IGNORE_INDEX).nonzero().squeeze(1)
    count = where.shape[0]
    gradient = hidden.new_zeros(hidden.shape) if with_gradient else None
    if count == 0:
        return LossResult(hidden.new_zeros(0), gradient, None, hidden.new_zeros(0) if with_accuracy else None)
    wanted, order = flat[where].sort(stable=True)
    cuts = _cuts(wanted, head.pieces.ranges)
    cut = [range(0, count, size) for size in (positions, min(positions, 256))]
    blocks, small = ([slice(start, min(start + starts.step, count)) for start in starts] for starts in cut)
    where, wanted = to_device(where[order], hidden.device), to_device(wanted, hidden.device)
    softmax = _OnlineSoftmax(head, epilogue, hidden.reshape(-1, hidden.shape[-1]), where, wanted, with_gradient)
    softmax.keep_best, softmax.smoothing = with_accuracy, smoothing
    softmax.beside = GradientSums(trained if with_gradient else ())
    for number, (start, end) in enumerate(head.pieces.ranges):
        with head.pieces.use(number) as weight:
            assert weight.shape[0] == end - start, (weight.shape, start, end)
            chunk = _Chunk(weight, start, slice(cuts[number], cuts[number + 1]))
            softmax.take_target_rows(chunk)
            for block in blocks:
                softmax.add(chunk, block)
    losses = [softmax.finish(block, scale / denominator, gradient) for block in small]
    right = torch.stack(softmax.right) if with_accuracy else None
    beside = softmax.beside.found()
    return LossResult(torch.stack(losses), gradient, None, right, divisor=denominator, beside=beside)


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Head rows that are there now."""

    weight: torch.Tensor
    start: int
    """Vocabulary row of the first."""
    targets: slice
    """Which of the sorted targets are among them."""


class _OnlineSoftmax:
    """Loss and gradient of some positions, of which softmax is known only as far as the chunks have come.

    Layout: positions are sorted by target, so those whose target is in a chunk lie side by side. All have, in
    float32 or better, the maximum and the sum of exponentials `[count, 1]` and the sum of head rows weighted
    by these exponentials `[count, hidden]`; and, as computed, their target's head row and linear output.

    Mechanics: with `l` the logits, `f` what the family does after the linear, `W` the head's rows and `E` the
    mean over all rows but the target `y`, weighted by exp(l):

        d = log sum exp(l_j, j != y) - l_y    loss = softplus(d)    gradient = sigmoid(d) (E[f' W] - f'_y W_y)

    The target is left out of the sums: for a token predicted well the usual softmax(l) W - W_y is a small
    difference of two rounded rows, and all other terms would vanish beside exp(l_y) in half precision.
    Label smoothing s adds s (l_y - mean l) to the loss, and its gradient s (f'_y W_y - mean f' W).
    """

    def __init__(
        self, head: Head, epilogue: Epilogue, rows: torch.Tensor, where: torch.Tensor, wanted: torch.Tensor,
        with_gradient: bool,
    ) -> None:  # fmt: skip
        self._head, self._epilogue = head, epilogue
        self._rows, self._where, self._wanted = rows, where, wanted
        self._with_gradient = with_gradient
        self._dtype = torch.promote_types(rows.dtype, torch.float32)
        count = where.shape[0]
        # the lowest number, not -inf: where nothing but the target was seen, -inf - -inf would be NaN
        self._maximum = rows.new_full((count, 1), torch.finfo(self._dtype).min, dtype=self._dtype)
        self._sum = rows.new_zeros((count, 1), dtype=self._dtype)
        width = head.linear.in_features if with_gradient else 0
        self._weighted = rows.new_zeros((count, width), dtype=self._dtype)
        self._target_rows: torch.Tensor | None = None
        self._target_outputs: torch.Tensor | None = None
        self.keep_best = False
        """Whether to note which other token has the largest logit."""
        self.right: list[torch.Tensor] = []
        """Targets whose logit is the largest, of equal ones the first; counted as blocks are finished."""
        self.smoothing = 0.0
        self.beside = GradientSums(())
        """Gradients of parameters before the linear."""
        self._logits = rows.new_zeros((count, 1), dtype=self._dtype)
        self._even: torch.Tensor | None = None
        self._best = torch.full_like(where, -1).unsqueeze(1)

    def take_target_rows(self, chunk: _Chunk) -> None:
        """Keep the head rows of the chunk's targets."""
        if self._with_gradient:
            if self._target_rows is None:
                self._target_rows = chunk.weight.new_empty(self._weighted.shape)
            rows = self._wanted[chunk.targets] - chunk.start
            torch.index_select(chunk.weight, 0, rows, out=self._target_rows[chunk.targets])

    def add(self, chunk: _Chunk, block: slice) -> None:
        """Go on by one chunk for a block of positions."""
        outputs: list[torch.Tensor] = []

        def linear(x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                outputs.append(self._head.outputs(chunk.weight, chunk.start, x))
            return outputs[0].requires_grad_(self._with_gradient)

        with torch.set_grad_enabled(self._with_gradient):
            logits = self._epilogue(self._gathered(block), linear)
        output, values = outputs[0].detach(), logits.detach()
        # the linear's output is ours to overwrite; what the family made of it its backward may need
        ours = values.data_ptr() == output.data_ptr()
        values = values.to(self._dtype, copy=not ours).view(-1, chunk.weight.shape[0])
        if self.smoothing:
            self._count_evenly(chunk, block, values, logits, None if ours else outputs)
        self._set_targets_apart(chunk, block, output.view_as(values), values)
        if self.keep_best:
            self._note_best(chunk, block, values)
        amount, fading = self._exponentials(values, block)
        if self._with_gradient:
            weighted = self._weighted[block].mul_(fading)
            unit = None
            if output.dtype is torch.float16:  # few exponents: no product may overflow, no small term vanish
                unit = amount.clamp_min(1e-30).div_(256)
                values.div_(unit)
            scores = output.copy_(values.view_as(output)) if ours else values.to(logits.dtype)
            (factors,) = torch.autograd.grad(logits, outputs, scores.view_as(logits))
            _add_product(weighted, factors.view_as(values), chunk.weight, unit)

    def _count_evenly(
        self,
        chunk: _Chunk,
        block: slice,
        values: torch.Tensor,
        logits: torch.Tensor,
        outputs: list[torch.Tensor] | None,
    ) -> None:
        """Sums over the vocabulary with equal weights; one for all positions where logits are the linear's outputs."""
        self._logits[block] += values.sum(1, keepdim=True)
        if not self._with_gradient:
            return
        if self._even is None:
            self._even = self._weighted.new_zeros(1 if outputs is None else len(self._weighted), chunk.weight.shape[1])
        if outputs is None:
            if block.start == 0:
                self._even += chunk.weight.sum(0, dtype=self._dtype)
            return
        (slopes,) = torch.autograd.grad(logits, outputs, torch.ones_like(logits), retain_graph=True)
        _add_product(self._even[block], slopes.view_as(values), chunk.weight, None)

    def _set_targets_apart(self, chunk: _Chunk, block: slice, output: torch.Tensor, values: torch.Tensor) -> None:
        first, last = max(chunk.targets.start, block.start), min(chunk.targets.stop, block.stop)
        if first >= last:
            return
        columns = (self._wanted[first:last] - chunk.start).unsqueeze(1)
        local = slice(first - block.start, last - block.start)
        if self._target_outputs is None:
            self._target_outputs = output.new_empty(self._sum.shape)
        self._target_outputs[first:last] = output[local].gather(1, columns)
        values[local].scatter_(1, columns, -torch.inf)

    def _note_best(self, chunk: _Chunk, block: slice, values: torch.Tensor) -> None:
        place = values.argmax(1, keepdim=True)
        larger = values.gather(1, place) > self._maximum[block]
        self._best[block] = torch.where(larger, place + chunk.start, self._best[block])

    def _exponentials(self, values: torch.Tensor, block: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Replaces logits by exponentials; their sums, and the factor of all there was before."""
        maximum = torch.maximum(self._maximum[block], values.amax(1, keepdim=True))
        fading = (self._maximum[block] - maximum).exp_()
        self._maximum[block] = maximum
        amount = values.sub_(maximum).exp_().sum(1, keepdim=True)
        self._sum[block].mul_(fading).add_(amount)
        return amount, fading

    def finish(self, block: slice, factor: float, gradient: torch.Tensor | None) -> torch.Tensor:
        """Summed loss of a block; its rows of `gradient` are set to the loss's gradient times `factor`."""
        assert self._target_outputs is not None
        output = self._target_outputs[block].requires_grad_(self._with_gradient)
        inputs: list[torch.Tensor] = []

        def linear(x: torch.Tensor) -> torch.Tensor:
            inputs.append(x)
            return output.view(*x.shape[:-1], 1)

        rows = self._gathered(block).requires_grad_(self._with_gradient)
        with torch.set_grad_enabled(self._with_gradient):
            logits = self._epilogue(rows, linear)
        target = logits.detach().to(self._dtype).view(-1, 1)
        if self.keep_best:
            first = self._wanted[block].unsqueeze(1) < self._best[block]
            largest = self._maximum[block]
            self.right.append(((target > largest) | ((target == largest) & first)).sum())
        distance = (self._maximum[block] - target).add_(self._sum[block].log())
        if gradient is not None:
            assert self._target_rows is not None
            (slope,) = torch.autograd.grad(logits, output, torch.ones_like(logits))
            at_input = self._weighted[block].div_(self._sum[block].clamp_min(1.0))
            at_target = slope.to(self._dtype) * self._target_rows[block]
            at_input.sub_(at_target).mul_(distance.sigmoid())
            if self._even is not None:
                even = self._even if len(self._even) == 1 else self._even[block]
                at_input.add_(at_target.sub_(even / self._head.linear.out_features), alpha=self.smoothing)
            at_input.mul_(factor)
            (x,) = inputs
            found = self.beside.add(x, rows, at_input.to(x.dtype).view_as(x))
            gradient.view(self._rows.shape).index_copy_(0, self._where[block], found[0])
        loss = functional.softplus(distance, threshold=40)
        if self.smoothing:
            loss += self.smoothing * (target - self._logits[block] / self._head.linear.out_features)
        return loss.sum()

    def _gathered(self, block: slice) -> torch.Tensor:
        return self._rows.index_select(0, self._where[block]).unsqueeze(0)


def _add_product(total: torch.Tensor, factors: torch.Tensor, weight: torch.Tensor, unit: torch.Tensor | None) -> None:
    """Add factors x weight to a total that may be of a wider type; the factors are in `unit`s, one a row."""
    if factors.dtype == total.dtype:
        total.addmm_(factors, weight)
        return
    product = factors @ weight
    total.add_(product if unit is None else product.to(total.dtype).mul_(unit))


def _cuts(wanted: torch.Tensor, ranges: Sequence[tuple[int, int]]) -> list[int]:
    """Where in the sorted targets each chunk's begin, and where the last one's end."""
    edges = torch.tensor([0, *(end for _, end in ranges)], device=wanted.device, dtype=wanted.dtype)
    cuts: list[int] = torch.searchsorted(wanted, edges).tolist()
    if cuts[0] != 0 or cuts[-1] != wanted.shape[0]:
        raise InputError(
            f"targets from {int(wanted[0])} to {int(wanted[-1])}; the head has rows 0..{ranges[-1][1] - 1}"
        )
    return cuts
