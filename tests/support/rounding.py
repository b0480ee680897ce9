"""How far rounding in float32 can take the gradient of a head and its loss, whatever the order of its sums."""

from __future__ import annotations

import torch
from torch.nn import functional

EPS = torch.finfo(torch.float32).eps


def head_gradient_bound(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    denominator: float,
    cap: float | None = None,
    scale: float = 1.0,
) -> torch.Tensor:
    """The largest error of each position's gradient, as a norm: `[batch, seq]`, 0 where there is no target.

    A product of width n is off by at most n eps/2 |h| |W| (Higham, Accuracy and Stability of Numerical Algorithms, 3).
    Logits that are off by at most d move a softmax by at most d in the 1-norm, and by at most 4 d (1 - p) exp(2 d)
    where its largest is p: an error that is large beside 1 matters only where two tokens are nearly as likely.

    Args:
        hidden: `[batch, seq, hidden]`, of float32.
        weight: `[vocab, hidden]`.
        targets: `[batch, seq]`, -100 where there is none.
        cap: logits are `cap tanh(x / cap)` of the products x.
        scale: logits are products divided by it.
    """
    x = hidden.double() @ weight.double().T
    off = weight.shape[1] * EPS / 2 * (hidden.double().abs() @ weight.double().abs().T)
    logits, slope = x / scale, torch.full_like(x, 1 / scale)
    slope_off = 4 * EPS * slope
    if cap is not None:
        logits = cap * (x / cap).tanh()
        least = (x.abs() - off).clamp_min(0) / cap
        slope = least.cosh().pow(-2)  # the steepest within the error
        # 1 - tanh^2 is rounded beside 1, until tanh is 1 in float32 and it is 0
        slope_off = 2 / cap * slope * off + torch.where(least < 10, 4 * EPS, slope)
    moved = (slope * off + 4 * EPS * logits.abs()).amax(-1)
    likely = logits.softmax(-1)
    best = likely.argmax(-1, keepdim=True)
    others = likely.scatter(-1, best, 0.0).sum(-1)
    shift = moved * (4 * others * (2 * moved).exp()).clamp_max(1.0)
    wrong = (likely - functional.one_hot(targets.clamp_min(0), weight.shape[0])).abs()
    rows = weight.double().norm(dim=-1)
    sums = (weight.shape[0] + 32) * EPS * (wrong * slope * rows).sum(-1)
    bound = shift * ((slope + slope_off) * rows).amax(-1) + (wrong * slope_off * rows).sum(-1) + sums
    return torch.where(targets == -100, 0.0, bound / denominator + torch.finfo(torch.float32).tiny)
