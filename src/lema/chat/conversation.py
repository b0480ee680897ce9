"""`Conversation`: turns that are really in the prompt, within the model's window.

A terminal is one way to have one; nothing here prints or reads.
"""

from __future__ import annotations

from collections.abc import Callable

from ..data.thinking import opening
from ..errors import InputError
from .answer import Reply
from .chat_model import ChatModel
from .sampling import Sampling


class Conversation:
    """Questions and answers in turn.

    Without a chat template each question is answered for itself: nothing says how turns would be written.

    Args:
        system: what comes before all turns; None: whatever the template does by itself.
    """

    def __init__(self, chat_model: ChatModel, system: str | None = None) -> None:
        self.chat_model = chat_model
        self._first = [{"role": "system", "content": system}] if system is not None else []
        self.turns: list[dict[str, str]] = []
        """Messages of user and assistant so far, without the system's."""
        self.dropped = 0
        """Turns that no longer fitted into the window at the last question."""

    def clear(self) -> None:
        """Forget all turns."""
        self.turns = []
        self.dropped = 0

    def prompt(self, question: str, room: int = 1) -> str:
        """The text the model would see, the oldest turns left out where `room` tokens for the answer demand it.

        Raises:
            InputError: not even the question alone fits.
        """
        asked = {"role": "user", "content": question}
        renderer, context = self.chat_model.renderer, self.chat_model.context
        if not renderer.has_template:
            return question
        for start in range(0, len(self.turns) + 2, 2):
            text = renderer.prompt([*self._first, *self.turns[start:], asked])
            if context is None or len(renderer.ids(text)) + room <= context:
                self.dropped = start
                return text
            if start >= len(self.turns):
                break
        raise InputError(
            f"the question has {len(renderer.ids(text))} tokens with its template, and the model takes {context}, "
            f"{room} of them for the answer: shorten the question or max_new_tokens"
        )

    def room(self, sampling: Sampling) -> int:
        """Tokens kept for an answer: what it may have, at most half of the window."""
        context = self.chat_model.context
        return sampling.max_new_tokens if context is None else min(sampling.max_new_tokens, max(context // 2, 1))

    def ask(self, question: str, sampling: Sampling, tell: Callable[[str], None] | None = None) -> Reply:
        """Ask, and remember question and answer; a turn that is interrupted is not remembered."""
        text = self.prompt(question, self.room(sampling))
        renderer = self.chat_model.renderer
        ids = renderer.ids(text) if renderer.has_template else renderer.ask(text)
        reply = self.chat_model.continue_from(ids, sampling, tell)
        answer = reply.text.strip()
        if "</" in answer:  # what the prompt opened is a part of what was said
            answer = opening(text) + answer
        self.turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return reply
