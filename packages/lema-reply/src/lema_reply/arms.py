"""The arms of an evaluation in the [LEMA_REPLY] format: a model with its adapter, and its base in the two ways.

How each is asked is known here; questions and scores are not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

from lema.chat import ChatModel, Sampling
from lema.data.render import ChatRenderer
from lema.run.training import load_tokenizer

from .evaluate import Arm
from .lema_format import to_closing_tag

BASE_IN_FORMAT, BASE_PLAINLY, ADAPTER, MODEL = "base, in the format", "base, asked plainly", "adapter", "model"


def _of_base(chat_model: ChatModel) -> ChatRenderer:
    """The base's own template, with the variables it has in common with the one trained with."""
    renderer = ChatRenderer(load_tokenizer(chat_model.model.config.model_name_or_path))
    shared = {name: value for name, value in chat_model.renderer.variables.items() if name in renderer.known_variables}
    return ChatRenderer(renderer.tokenizer, None, shared) if shared else renderer


def arms_of(
    chat_model: ChatModel,
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
    adapted = chat_model.model.lora_manager is not None

    def with_prompts(prompts: Sequence[str], bare: bool) -> list[str]:
        ids = [chat_model.renderer.ids(prompt) for prompt in prompts]  # as in training: the template's text and no more
        return _said(chat_model, ids, to_closing_tag(greedy), bare)

    def _said(asked: ChatModel, ids: list[list[int]], sampling: Sampling, bare: bool) -> list[str]:
        model: Any = asked.model.hf_model
        with model.disable_adapter() if bare else nullcontext():
            return [reply.text for reply in asked.continue_all(ids, sampling, batch_size, tell)]

    if not adapted or alone:
        return [Arm(ADAPTER if adapted else MODEL, lambda prompts: with_prompts(prompts, False))]
    base = ChatModel(chat_model.model, _of_base(chat_model))

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
