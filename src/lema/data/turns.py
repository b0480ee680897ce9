"""`Turns`: where the assistant's turns of a conversation lie in its text.

It knows what a template writes for some of the messages; it knows nothing of tokens' numbers or labels.

Mechanics. The prompt of a turn is what the template writes for the messages before it; the text has to begin with it.
To write all that comes before each turn would take the square of a conversation's length. So from the `_WHOLE`th
message on a prompt is written from the messages before the first answer and a few of those right before the turn:
what it adds to the prompt of the turn before, written from the same messages, has to follow that prompt in the text,
character for character. Where it does not, all that comes before is written after all, and decides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..errors import InputError
from .messages import Message

_WHOLE = 32
_NEAR, _FAR = 4, 24
"""Messages before a turn from which its prompt is written: at least, and at most, where each turn is learned."""


@dataclass(slots=True)
class _Prompt:
    """The prompt of a turn, written from the first messages and those from `since` on."""

    turn: int
    since: int
    text: str
    end: int
    """Characters of the whole text up to its end."""


class Turns:
    """Asked for one turn after the other, in order.

    Args:
        write: the text of messages, ended with what makes the assistant speak where the second argument is true.
        messages: of the conversation.
        text: what is learned from: begins with what the template writes for the messages.
        without_end: characters of a text before the end token or white space it ends in; None: it ends in neither.
        hint: which variables of the template might help, as the end of a message.
    """

    def __init__(
        self, write: Callable[[Sequence[Message], bool], str], messages: Sequence[Message], text: str,
        without_end: Callable[[str], int | None], hint: str = "",
    ) -> None:  # fmt: skip
        self._write = write
        self._messages = messages
        self._text = text
        self._without_end = without_end
        self._hint = hint
        self._first = next((n for n, m in enumerate(messages) if m.get("role") == "assistant"), len(messages))
        self._last: _Prompt | None = None

    def prompt_end(self, turn: int) -> int | None:
        """Characters of the text up to the end of a turn's prompt; None: the text does not begin with the prompt."""
        found = self._prompt(turn)
        return None if found is None else found.end

    def span(self, turn: int) -> tuple[int, int]:
        """Characters of a turn that is not the last: from its prompt on as far as it stays once others follow.

        Raises:
            InputError: the template writes the prompt or the turn differently.
        """
        prompt = self._prompt(turn)
        if prompt is not None and (stop := self._stop(prompt)) is not None:
            return prompt.end, stop
        before, answered = self.prompt(turn), self._write(self._messages[: turn + 1], False)
        if not answered.startswith(before):
            raise rewritten_prompt(turn, before, answered, self._hint)
        whole = self._whole(turn)
        stop = None if whole is None else self._stop(whole)
        if stop is None:
            raise InputError(
                f"the chat template rewrites message {turn + 1} once others follow (as those that strip thinking do): "
                f"{first_difference(answered, self._text)}; learning that would teach what the model never says. Set "
                "mask_history: true to learn the last answer of each conversation, make one row of each answer, or "
                "give chat_template: a file whose template keeps turns as they are"
            )
        return len(before), stop

    def prompt(self, turn: int) -> str:
        """A turn's prompt, from all that comes before it."""
        return self._write(self._messages[:turn], True)

    def _prompt(self, turn: int) -> _Prompt | None:
        last = self._last
        if last is not None and turn >= _WHOLE:
            try:
                self._last = self._after(last, turn) or self._whole(turn)
            except InputError:  # the template wants to see more of the conversation
                self._last = self._whole(turn)
        else:
            self._last = self._whole(turn)
        return self._last

    def _whole(self, turn: int) -> _Prompt | None:
        text = self.prompt(turn)
        return _Prompt(turn, self._first, text, len(text)) if self._text.startswith(text) else None

    def _after(self, last: _Prompt, turn: int) -> _Prompt | None:
        """The prompt of a turn by what it adds to that of one before it; None: something else follows that one."""
        if last.turn - last.since > _FAR:
            since = next((n for n in range(last.turn - _NEAR, self._first, -1) if self._is_answer(n)), self._first)
            last = _Prompt(last.turn, since, self._write(self._near(since, last.turn), True), last.end)
        text = self._write(self._near(last.since, turn), True)
        more = text[len(last.text) :]
        if not text.startswith(last.text) or not self._text.startswith(more, last.end):
            return None
        return _Prompt(turn, last.since, text, last.end + len(more))

    def _stop(self, prompt: _Prompt) -> int | None:
        """Where a turn ends in the text, but for an end that is another one there; None: more is different."""
        answered = self._write(self._near(prompt.since, prompt.turn + 1), False)
        if not answered.startswith(prompt.text):
            return None
        kept = len(answered)
        while not self._text.startswith(answered[len(prompt.text) : kept], prompt.end):
            shorter = self._without_end(answered[:kept])
            if shorter is None or shorter <= len(prompt.text):
                return None
            kept = shorter
        return prompt.end + kept - len(prompt.text)

    def _near(self, since: int, stop: int) -> Sequence[Message]:
        return [*self._messages[: self._first], *self._messages[since:stop]]

    def _is_answer(self, number: int) -> bool:
        return self._messages[number].get("role") == "assistant"


def rewritten_prompt(turn: int, prompt: str, answered: str, hint: str) -> InputError:
    """Of a template that writes what comes before a turn differently once it is answered."""
    return InputError(
        f"the chat template writes what comes before message {turn + 1} differently once it is answered: "
        f"{first_difference(prompt, answered)}{hint}; set mask_history: true if this is one of several answers, or "
        "give chat_template: a file whose template does not, or one with {% generation %} marks"
    )


def first_difference(one: str, other: str) -> str:
    """Where two texts part, as a message shows it."""
    at = next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))
    return f"{one[max(at - 20, 0) : at + 30]!r} became {other[max(at - 20, 0) : at + 30]!r}"
