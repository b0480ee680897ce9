"""Loss, perplexity and token accuracy over batches: sums first, one division at the end.

It knows batches and an engine's sums; it knows nothing of text.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from typing import Any

from ..errors import ConfigError
from .engine import TrainingEngine


def evaluate(
    engine: TrainingEngine, batches: Iterable[Any], between: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """`eval_loss`, `eval_perplexity`, `eval_token_accuracy`, `eval_targets` and `seconds`; dropout is off.

    Args:
        batches: with `inputs`, this rank's of them; one pass is made over them.
        between: called after every batch, of which ranks may have different numbers.

    Raises:
        ConfigError: there was no target at all.
    """
    started = time.perf_counter()
    losses: list[float] = []
    targets = right = 0
    for batch in batches:
        if getattr(batch, "targets", 1) == 0:
            continue
        loss, some, of_them = engine.evaluate(batch.inputs)
        losses.append(loss)
        targets += some
        right += of_them
        between()
    ranks = engine.coordinator
    targets, right = ranks.totals("evaluated targets", [targets, right])
    if targets == 0:
        raise ConfigError("the evaluation data has no target, so there is nothing to evaluate; look at eval_file")
    mean = ranks.totals("evaluation loss", [math.fsum(losses)])[0] / targets
    return {
        "eval_loss": mean,
        "eval_perplexity": math.exp(min(mean, 700.0)) if math.isfinite(mean) else mean,
        "eval_token_accuracy": right / targets,
        "eval_targets": targets,
        "seconds": round(time.perf_counter() - started, 3),
    }
