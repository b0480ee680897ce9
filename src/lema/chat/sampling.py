"""How the next token is chosen, and when an answer ends.

Values and their bounds, and how transformers' `generate` takes them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError


@dataclass(frozen=True, slots=True)
class Sampling:
    """Settings of one answer.

    Raises:
        ConfigError: a value out of its bounds.
    """

    max_new_tokens: int = 256
    """Tokens of an answer at most."""
    temperature: float = 0.7
    """0: always the likeliest token."""
    top_p: float = 0.9
    """Share of probability that is drawn from."""
    stop: tuple[str, ...] = ()
    """Texts at whose end an answer ends; they may begin and end inside tokens."""
    keep_stop: bool = False
    """Whether the stop text stays in the answer."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens={self.max_new_tokens} must be 1 or more")
        if not self.temperature >= 0:
            raise ConfigError(f"temperature={self.temperature} must be 0 or more; 0 takes the likeliest token")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p} must be more than 0 and at most 1")
        if not all(self.stop):
            raise ConfigError("a stop text is empty: every answer would end before it began")

    def settings(self) -> dict[str, Any]:
        """As transformers' `generate` takes them; nothing of a model's own generation settings is left over."""
        chosen: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "num_beams": 1, "repetition_penalty": 1.0}
        if self.temperature == 0:
            return {**chosen, "do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        return {**chosen, "do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
