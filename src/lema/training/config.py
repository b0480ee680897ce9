"""`TrainingConfig`: how long, how fast, when to look and when to save, under Hugging Face's names.

It knows names, defaults and bounds; it knows nothing of models, memory or data.
"""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator

from ..errors import ConfigError
from ..typed import (
    SAME_NUMBERS,
    Count,
    Flag,
    NotNegative,
    Positive,
    Real,
    Share,
    Texts,
    Whole,
    check_choice,
    one_of,
    settings,
    split_names,
)

SCHEDULES = ("linear", "cosine", "constant")
_OFF = ("false", "off", "n", "never", "none", "no")
REPORTERS = ("none", "tensorboard", "wandb", "trackio")


def _no(value: Any) -> Any:
    """Switched off, however a file or a person says it."""
    return "no" if value is False or (isinstance(value, str) and value.lower() in _OFF) else value


def _schedule(value: Any) -> Any:
    return "constant" if value == "constant_with_warmup" else value


def _reporters(value: list[str] | str) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    names = [name for text in texts for name in split_names(text) if name.lower() not in _OFF]
    for name in names:
        check_choice(name, REPORTERS)
    return names


def _listed(value: list[str] | str) -> list[str]:
    return [value] if isinstance(value, str) else list(value)


@settings
class TrainingConfig:
    """Settings of a training run. Bad values raise `ConfigError` at construction."""

    num_train_epochs: Real = 1.0
    """Passes over the data; `max_steps` comes before it."""
    max_steps: Whole = -1
    """Optimizer steps in all; 0 or less: as many as the epochs take."""
    max_train_hours: Annotated[Positive | None, SAME_NUMBERS] = None
    """Hours within which a run, from its start, stops by itself and saves; `--resume auto` goes on. None: no limit."""
    lr_scheduler_type: Annotated[str, one_of(*SCHEDULES), BeforeValidator(_schedule)] = "linear"
    """linear, cosine (both down to 0) or constant; each after the warm-up."""
    warmup_steps: NotNegative = 0.0
    """Steps in which the learning rate rises from 0; a number below 1 is a share of all steps."""
    weight_decay: NotNegative = 0.0
    """Of AdamW, on the adapters."""
    adam_beta1: Share = 0.9
    """Decay of AdamW's first moment."""
    adam_beta2: Share = 0.999
    """Decay of AdamW's second moment."""
    adam_epsilon: Positive = 1e-8
    """Of AdamW."""
    label_smoothing_factor: Share = 0.0
    """Share of a target's weight that the loss spreads evenly over the vocabulary; evaluation is without it."""
    max_nonfinite_steps: Annotated[Count, SAME_NUMBERS] = 3
    """Steps in a row whose loss or gradient is not finite before training stops; each is skipped and counted."""

    logging_steps: Annotated[Count, SAME_NUMBERS] = 10
    """Steps between entries of the log; `metrics.jsonl` has every step."""
    report_to: Annotated[Texts, AfterValidator(_reporters), BeforeValidator(_no), SAME_NUMBERS] = field(
        default_factory=list
    )
    """none, tensorboard, wandb, trackio; several may be given."""
    run_name: Annotated[str | None, SAME_NUMBERS] = None
    """The run's name for the above; None: the output folder's."""

    eval_strategy: Annotated[str, one_of("auto", "no", "steps", "epoch"), BeforeValidator(_no), SAME_NUMBERS] = "auto"
    """no, steps, epoch; auto: where there is evaluation data, every `eval_steps` if set, else every epoch."""
    eval_steps: Annotated[Count | None, SAME_NUMBERS] = None
    """Steps between evaluations; None: every 500 where the strategy is steps."""
    load_best_model_at_end: Annotated[Flag, SAME_NUMBERS] = False
    """Whether `final/` holds the best adapter by evaluation instead of the last one."""
    metric_for_best_model: Annotated[str, one_of("eval_loss", "eval_perplexity", "eval_token_accuracy")] = "eval_loss"
    """eval_loss, eval_perplexity or eval_token_accuracy."""
    greater_is_better: Flag | None = None
    """None: as the metric's name says."""
    early_stopping_patience: Annotated[Count | None, SAME_NUMBERS] = None
    """Evaluations in a row without a better metric before training stops; None: it goes on."""
    sample_prompts: Annotated[Texts, AfterValidator(_listed), SAME_NUMBERS] = field(default_factory=list)
    """Prompts that are answered before the first step and at every evaluation."""
    sample_max_new_tokens: Annotated[Count, SAME_NUMBERS] = 64
    """Tokens an answer to a sample prompt has at most."""

    save_strategy: Annotated[str, one_of("no", "steps", "epoch"), BeforeValidator(_no), SAME_NUMBERS] = "steps"
    """steps: every `save_steps`; epoch: after every epoch; no: only at the end, and where a run is stopped."""
    save_total_limit: Annotated[Count | None, SAME_NUMBERS] = 3
    """Checkpoints kept; the newest and the best are never removed. None: all."""
    on_save_error: Annotated[str, one_of("stop", "continue"), SAME_NUMBERS] = "stop"
    """stop or continue, when a checkpoint cannot be written (a full disk); the one before stays either way."""

    def __post_init__(self) -> None:
        if self.max_steps <= 0 and not self.num_train_epochs > 0:
            raise ConfigError(
                f"num_train_epochs={self.num_train_epochs} must be more than 0, unless max_steps is given"
            )
        needs = [n for n in ("load_best_model_at_end", "early_stopping_patience") if getattr(self, n)]
        if needs and self.eval_strategy == "no":
            raise ConfigError(f"{needs[0]} needs evaluations, and eval_strategy is no; set it to steps or epoch")

    @property
    def higher_is_better(self) -> bool:
        """Which direction of `metric_for_best_model` is better."""
        if self.greater_is_better is not None:
            return self.greater_is_better
        return self.metric_for_best_model == "eval_token_accuracy"

    @property
    def wants_best(self) -> bool:
        """Whether it matters which evaluation was the best."""
        return self.load_best_model_at_end or self.early_stopping_patience is not None
