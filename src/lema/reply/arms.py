"""The arms of an evaluation in the [LEMA_REPLY] format: a speaker with its adapter, and its base in the two ways.

It knows how each is asked; questions and scores are the proof's business.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

from ..data.render import ChatRenderer
from ..proof.evaluate import Arm
from ..run.training import load_tokenizer
from .lema_format import to_closing_tag
from .sampling import Sampling
from .speaker import Speaker

BASE_IN_FORMAT, BASE_PLAINLY, ADAPTER, MODEL = "base, in the format", "base, asked plainly", "adapter", "model"


def _of_base(speaker: Speaker) -> ChatRenderer:
    """The base's own template, with the variables it has in common with the one trained with."""
    renderer = ChatRenderer(load_tokenizer(speaker.model.config.model_name_or_path))
    shared = {name: value for name, value in speaker.renderer.variables.items() if name in renderer.known_variables}
    return ChatRenderer(renderer.tokenizer, None, shared) if shared else renderer


def arms_of(
    speaker: Speaker,
    *,
    alone: bool = False,
    max_new_tokens: int = 128,
    batch_size: int = 16,
    tell: Callable[[int], None] | None = None,
) -> list[Arm]:
    """The arms of a model: an adapter after its base in the format and its base asked plainly, or a model for itself.

    In the format, a model gets the format's prompt and ends with the closing tag. Asked plainly, the base gets the
    question through its own chat template, or without one as `Question: …` and `Answer:`. All answers are greedy.

    Args:
        alone: leave the base out.
        tell: told how many more are answered, batch after batch.

    Raises:
        ConfigError: the base has no tokenizer.
    """
    greedy = Sampling(max_new_tokens, temperature=0)
    adapted = speaker.model.lora_manager is not None

    def with_prompts(prompts: Sequence[str], bare: bool) -> list[str]:
        ids = [speaker.renderer.ids(prompt) for prompt in prompts]  # as in training: the template's text and no more
        return _said(speaker, ids, to_closing_tag(greedy), bare)

    def _said(asked: Speaker, ids: list[list[int]], sampling: Sampling, bare: bool) -> list[str]:
        model: Any = asked.model.hf_model
        with model.disable_adapter() if bare else nullcontext():
            return [reply.text for reply in asked.continue_all(ids, sampling, batch_size, tell)]

    if not adapted or alone:
        return [Arm(ADAPTER if adapted else MODEL, lambda prompts: with_prompts(prompts, False))]
    base = Speaker(speaker.model, _of_base(speaker))

    def plainly(questions: Sequence[str]) -> list[str]:
        if base.renderer.has_template:
            return _said(base, [base.renderer.ask(question) for question in questions], greedy, True)
        asked = [base.renderer.plain(f"Question: {question}\nAnswer:") for question in questions]
        return _said(base, asked, Sampling(max_new_tokens, temperature=0, stop=("\nQuestion:",)), True)

    return [
        Arm(BASE_IN_FORMAT, lambda prompts: with_prompts(prompts, True)),
        Arm(BASE_PLAINLY, plainly, in_format=False),
        Arm(ADAPTER, lambda prompts: with_prompts(prompts, False)),
    ]
