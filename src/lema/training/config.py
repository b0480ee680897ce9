"""`TrainingConfig`: how long, how fast, when to look and when to save, under Hugging Face's names.

It knows names, defaults and bounds; it knows nothing of models, memory or data.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field

from ..errors import ConfigError
from ..typed import check_types, split_names

SCHEDULES = ("linear", "cosine", "constant")
_SCHEDULE_ALIASES = {"constant_with_warmup": "constant"}
STRATEGIES = ("auto", "no", "steps", "epoch")
SAVE_STRATEGIES = ("no", "steps", "epoch")
_OFF = ("false", "off", "n", "never", "none", "no")
ON_SAVE_ERROR = ("stop", "continue")
METRICS = ("eval_loss", "eval_perplexity", "eval_token_accuracy")
REPORTERS = ("none", "tensorboard", "wandb", "trackio")


@dataclass
class TrainingConfig:
    """Settings of a training run. Bad values raise `ConfigError` at construction."""

    num_train_epochs: float = 1.0
    """Passes over the data; `max_steps` comes before it."""
    max_steps: int = -1
    """Optimizer steps in all; 0 or less: as many as the epochs take."""
    max_train_hours: float | None = None
    """Hours within which a run, from its start, stops by itself and saves; `--resume auto` goes on. None: no limit."""
    lr_scheduler_type: str = "linear"
    """linear, cosine (both down to 0) or constant; each after the warm-up."""
    warmup_steps: float = 0.0
    """Steps in which the learning rate rises from 0; a number below 1 is a share of all steps."""
    weight_decay: float = 0.0
    """Of AdamW, on the adapters."""
    adam_beta1: float = 0.9
    """Decay of AdamW's first moment."""
    adam_beta2: float = 0.999
    """Decay of AdamW's second moment."""
    adam_epsilon: float = 1e-8
    """Of AdamW."""
    label_smoothing_factor: float = 0.0
    """Share of a target's weight that the loss spreads evenly over the vocabulary; evaluation is without it."""
    max_nonfinite_steps: int = 3
    """Steps in a row whose loss or gradient is not finite before training stops; each is skipped and counted."""

    logging_steps: int = 10
    """Steps between entries of the log; `metrics.jsonl` has every step."""
    report_to: list[str] | str = "none"
    """none, tensorboard, wandb, trackio; several may be given."""
    run_name: str | None = None
    """The run's name for the above; None: the output folder's."""

    eval_strategy: str = "auto"
    """no, steps, epoch; auto: where there is evaluation data, every `eval_steps` if set, else every epoch."""
    eval_steps: int | None = None
    """Steps between evaluations; None: every 500 where the strategy is steps."""
    load_best_model_at_end: bool = False
    """Whether `final/` holds the best adapter by evaluation instead of the last one."""
    metric_for_best_model: str = "eval_loss"
    """eval_loss, eval_perplexity or eval_token_accuracy."""
    greater_is_better: bool | None = None
    """None: as the metric's name says."""
    early_stopping_patience: int | None = None
    """Evaluations in a row without a better metric before training stops; None: it goes on."""
    sample_prompts: list[str] | str = field(default_factory=list)
    """Prompts that are answered before the first step and at every evaluation."""
    sample_max_new_tokens: int = 64
    """Tokens an answer to a sample prompt has at most."""

    save_strategy: str = "steps"
    """steps: every `save_steps`; epoch: after every epoch; no: only at the end, and where a run is stopped."""
    save_total_limit: int | None = 3
    """Checkpoints kept; the newest and the best are never removed. None: all."""
    on_save_error: str = "stop"
    """stop or continue, when a checkpoint cannot be written (a full disk); the one before stays either way."""

    def __post_init__(self) -> None:
        for name, off in (("eval_strategy", "no"), ("save_strategy", "no"), ("report_to", "none")):
            if (value := getattr(self, name)) is False or (isinstance(value, str) and value.lower() in _OFF):
                setattr(self, name, off)
        check_types(self)
        self.lr_scheduler_type = _SCHEDULE_ALIASES.get(self.lr_scheduler_type, self.lr_scheduler_type)
        for name in ("report_to", "sample_prompts"):
            value = getattr(self, name)
            setattr(self, name, [value] if isinstance(value, str) else list(value))
        self.report_to = [name for text in self.report_to for name in split_names(text) if name.lower() not in _OFF]
        for name, choices in (
            ("lr_scheduler_type", SCHEDULES),
            ("eval_strategy", STRATEGIES),
            ("save_strategy", SAVE_STRATEGIES),
            ("on_save_error", ON_SAVE_ERROR),
            ("metric_for_best_model", METRICS),
        ):
            _check_choice(name, getattr(self, name), choices)
        for name in self.report_to:
            _check_choice("report_to", name, REPORTERS)
        self._check_bounds()
        if self.max_steps <= 0 and not self.num_train_epochs > 0:
            raise ConfigError(
                f"num_train_epochs={self.num_train_epochs} must be more than 0, unless max_steps is given"
            )
        needs = [n for n in ("load_best_model_at_end", "early_stopping_patience") if getattr(self, n)]
        if needs and self.eval_strategy == "no":
            raise ConfigError(f"{needs[0]} needs evaluations, and eval_strategy is no; set it to steps or epoch")

    def _check_bounds(self) -> None:
        for name, low, below in (
            ("label_smoothing_factor", 0, 1),
            ("warmup_steps", 0, None), ("weight_decay", 0, None), ("adam_beta1", 0, 1), ("adam_beta2", 0, 1),
            ("max_nonfinite_steps", 1, None), ("logging_steps", 1, None), ("eval_steps", 1, None),
            ("early_stopping_patience", 1, None), ("sample_max_new_tokens", 1, None), ("save_total_limit", 1, None),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is None:
                continue
            if value < low or (below is not None and value >= below):
                bounds = f"{low} or more" + (f" and less than {below}" if below is not None else "")
                raise ConfigError(f"{name}={value} must be {bounds}")
        if self.max_train_hours is not None and not self.max_train_hours > 0:
            raise ConfigError(f"max_train_hours={self.max_train_hours} must be more than 0")
        if not self.adam_epsilon > 0:
            raise ConfigError(f"adam_epsilon={self.adam_epsilon} must be more than 0")

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


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        close = difflib.get_close_matches(value, choices, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ConfigError(f"{name}={value!r} is unknown: choose one of {', '.join(choices)}{hint}")
