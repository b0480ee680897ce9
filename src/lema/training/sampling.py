"""Answers to fixed prompts, to be compared over the run.

It knows prompts, ids and a tokenizer; it knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .engine import TrainingEngine

_GREEDY: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "num_beams": 1,
                           "repetition_penalty": 1.0}  # fmt: skip


@dataclass(frozen=True)
class Sampler:
    """Greedy answers, one prompt after the other.

    Args:
        tokenizer: decodes, and knows the token that ends an answer.
        ask: ids of a prompt as the user's turn, as `lema chat` writes it.
    """

    tokenizer: Any
    ask: Callable[[str], Sequence[int]]
    prompts: Sequence[str]
    max_new_tokens: int
    end_tokens: Sequence[int] = ()
    """Tokens that end an answer; none: the model's own."""

    def answers(self, engine: TrainingEngine) -> Iterator[tuple[str, str]]:
        """Prompt and answer; the random state is left as it was."""
        before = engine.random_state()
        pad = self.tokenizer.pad_token_id
        pad = self.tokenizer.eos_token_id if pad is None else pad
        ends = {"eos_token_id": list(self.end_tokens)} if self.end_tokens else {}
        try:
            for prompt in self.prompts:
                ids = torch.tensor([list(self.ask(prompt))])
                inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
                found = engine.generate(inputs, max_new_tokens=self.max_new_tokens, pad_token_id=pad, **ends, **_GREEDY)
                yield prompt, self.tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True)
        finally:
            before.restore()
