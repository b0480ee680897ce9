"""`ChatRenderer`: conversations as text and token ids, the same way for training and for chat.

It knows a tokenizer and its chat template; it knows nothing of files, batches or models.

Layout. A template turns messages into one text. An assistant's turn is what the template writes between the prompt
for it (the messages before, and the generation prompt) and its end, the end token included; where a template writes
none, the tokenizer's own comes after the last turn, or nothing would teach the model to stop. Labels follow from the
characters a token stands for: a token with a character of a turn is learned.

Mechanics. That only holds where the text of a prefix of the messages is a prefix of the whole text, so it is
checked for every turn learned. Templates that write a turn differently once others follow (some strip a model's
thinking) would teach what the model should never say, and are refused; `mask_history` learns the last answer of such
conversations, whose context is then what the model sees when it answers. A template with `{% generation %}` marks its
turns itself and is believed. Templates that write the date get a fixed one: a run must not depend on its day.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2

from ..errors import ConfigError, InputError, UnsupportedError
from .messages import Message
from .prefix import encode_text

IGNORE = -100
_END_AMONG = 3  # last tokens of a turn: templates write a line end or two after its end token
_TODAY = "26 Jul 2024"  # what Llama's templates say where they cannot ask
_SEPARATOR = "lema_separator"  # its name in tokenizer_config.json
_ASKS_DATE = "strftime_now"
# Takes the place of the function of that name that transformers gives to templates.
_FIXED_DATE = (
    "{%- macro strftime_now(format) -%}{{- format"
    + "".join(
        f"|replace('%{letter}', '{text}')"
        for letter, text in {
            "Y": "2024", "m": "07", "d": "26", "b": "Jul", "B": "July", "y": "24", "A": "Friday", "a": "Fri",
            "H": "00", "M": "00", "S": "00", "e": "26", "-d": "26",
        }.items()
    )
    + " -}}{%- endmacro -%}"
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """Token ids, and for each its id where it is learned, else -100."""

    input_ids: list[int]
    """The row's tokens."""
    labels: list[int]
    """As many, -100 where nothing is learned."""
    cut_from: int | None = None
    """Tokens the row had before it was truncated, about so many where it is far longer; None: it was not."""
    unused: tuple[str, ...] = ()
    """Fields of the row that nothing reads."""

    @property
    def num_targets(self) -> int:
        """Tokens that are predicted from one before them."""
        return sum(label != IGNORE for label in self.labels[1:])

    def cut(self, length: int) -> EncodedRow:
        """The first `length` tokens."""
        return replace(
            self, input_ids=self.input_ids[:length], labels=self.labels[:length],
            cut_from=self.cut_from or len(self.input_ids),
        )  # fmt: skip


class ChatRenderer:
    """Renders conversations with a chat template.

    Args:
        tokenizer: a fast tokenizer of transformers.
        template: a Jinja chat template; None: the tokenizer's own. One given becomes the tokenizer's own, so that it
            is saved with it.

    Raises:
        UnsupportedError: the tokenizer cannot say which characters its tokens stand for.
        ConfigError: the template is not Jinja.
    """

    def __init__(self, tokenizer: Any, template: str | None = None) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise UnsupportedError(
                f"{type(tokenizer).__name__} is no fast tokenizer: it cannot say which characters a token stands for; "
                "load the model's tokenizer.json with AutoTokenizer"
            )
        self.tokenizer = tokenizer
        if template is not None:
            tokenizer.chat_template = template
        own = tokenizer.chat_template
        self.template: str | None = own.get("default") if isinstance(own, dict) else own
        self._marked = self.template is not None and re.search(r"{%-?\s*generation\s*-?%}", self.template) is not None
        self._dated: dict[str, Any] = {"date_string": _TODAY}
        if self.template is not None and _ASKS_DATE in self.template:
            self._dated["chat_template"] = _FIXED_DATE + self.template
        if self.template is not None:
            self._check_syntax()

    @classmethod
    def from_file(cls, tokenizer: Any, path: str | Path | None) -> ChatRenderer:
        """With the template in a file, or the tokenizer's own for None."""
        if path is None:
            return cls(tokenizer)
        try:
            template = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"chat_template={str(path)!r} cannot be read: {error}") from error
        try:
            return cls(tokenizer, template)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error

    @property
    def has_template(self) -> bool:
        """Whether conversations can be rendered at all."""
        return self.template is not None

    def mentions(self, field: str) -> bool:
        """Whether a template of the tokenizer has a word that is a field's name; one without cannot read the field."""
        own = self.tokenizer.chat_template
        texts = own.values() if isinstance(own, dict) else () if own is None else (own,)
        return any(re.search(rf"\b{re.escape(field)}\b", text) for text in texts)

    def prompt(self, messages: Sequence[Message], tools: list[Any] | None = None) -> str:
        """The text after which the assistant speaks."""
        return self._render(messages, tools, ask=True)

    def prompt_ids(self, messages: Sequence[Message], tools: list[Any] | None = None) -> list[int]:
        """Token ids of `prompt`."""
        return self.ids(self.prompt(messages, tools))

    def ask(self, text: str) -> list[int]:
        """Token ids of a prompt given as one text: a user's turn where there is a template, else text and separator."""
        if self.has_template:
            return self.prompt_ids([{"role": "user", "content": text}])
        return self._before_answer(text + self.separator) if self.separator else self.plain(text)

    @property
    def separator(self) -> str:
        """What stands between prompt and answer where there is no template; kept with the tokenizer, as that is."""
        return "" if self.has_template else str(self.tokenizer.init_kwargs.get(_SEPARATOR, ""))

    @separator.setter
    def separator(self, text: str) -> None:
        self.tokenizer.init_kwargs.pop(_SEPARATOR, None)
        if text:
            self.tokenizer.init_kwargs[_SEPARATOR] = text

    @cached_property
    def end_tokens(self) -> list[int]:
        """Tokens that end an answer: the tokenizer's end token, and what the template writes after a turn."""
        ends = {self.tokenizer.eos_token_id} - {None}
        if self.has_template:
            word = "Xyzzy"
            try:
                text = self._render([{"role": "user", "content": "?"}, {"role": "assistant", "content": word}], None)
            except InputError:  # of a template that wants something else, the rows will tell
                return sorted(ends)
            after = self.ids(text.rpartition(word)[2])
            ends |= set([token for token in after if token in self._special][:1])
        return sorted(ends)

    def plain(self, text: str) -> list[int]:
        """Token ids of a text to be continued as it is, begun as texts are in training."""
        ids: list[int] = self.tokenizer(text)["input_ids"]
        return ids[:-1] if len(ids) > 1 and ids[-1] == self.tokenizer.eos_token_id else ids

    def _before_answer(self, text: str) -> list[int]:
        """Token ids of a text that an answer follows: at its end white space is cut otherwise than before a word."""
        encoded = self.tokenizer(text + "a", return_offsets_mapping=True, verbose=False)
        ids = [token for token, (_, end) in zip(encoded["input_ids"], encoded["offset_mapping"]) if end <= len(text)]
        return ids[:-1] if len(ids) > 1 and ids[-1] == self.tokenizer.eos_token_id else ids

    def ids(self, text: str) -> list[int]:
        """Token ids of rendered text, which has its special tokens written out."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def training(
        self,
        messages: Sequence[Message],
        tools: list[Any] | None = None,
        *,
        learned_from: int = 0,
        unlearned: frozenset[int] = frozenset(),
        on_prompt: bool = False,
        last_only: bool = False,
        limit: int | None = None,
    ) -> EncodedRow:
        """A conversation with labels on the assistant's turns; what follows the last of them is left out.

        Args:
            messages: with `role` and `content`; at least one is the assistant's.
            tools: schemas of tools, for templates that show them.
            learned_from: number of the first message whose turn may be learned.
            on_prompt: learn every token instead.
            unlearned: numbers of messages whose turns are not learned, wherever they are.
            last_only: learn the last of the turns only.
            limit: tokens that are wanted; of a far longer text the rest is not looked at.

        Raises:
            InputError: no assistant turn, or one the template refuses or rewrites.
        """
        turns = [i for i, m in enumerate(messages) if m.get("role") == "assistant" and i >= learned_from]
        if not turns:
            raise InputError("the conversation has no assistant turn, so there is nothing to learn from it")
        if on_prompt:
            if unlearned:
                raise InputError(
                    f"message {min(unlearned) + 1} is marked not to be learned, and train_on_prompt learns everything: "
                    "take the mark away, or set train_on_prompt: false"
                )
            return self._ended(self.labelled(self._render(messages, tools), None, limit))
        turns = [turn for turn in turns if turn not in unlearned]
        turns = turns[-1:] if last_only else turns
        if not turns:
            return self.labelled(self._render(messages, tools), [], limit)
        if self._marked:
            return self._ended(self._by_marks(messages[: turns[-1] + 1], tools, turns))
        text = self._render(messages[: turns[-1] + 1], tools)
        spans = (self._span(messages, tools, turn, text) for turn in turns)
        return self._ended(self.labelled(text, spans, limit))

    def labelled(self, text: str, spans: Iterable[tuple[int, int]] | None, limit: int | None = None) -> EncodedRow:
        """Rendered text, with labels on the tokens of these runs of its characters; None: on all.

        Args:
            limit: tokens that are wanted: spans beyond them are not asked for.
        """
        ids, offsets, whole = encode_text(self.tokenizer, text, limit, add_special_tokens=False)
        if spans is None:
            return EncodedRow(ids, list(ids), whole)
        labels = [IGNORE] * len(ids)
        i = 0
        for begin, stop in spans:
            while i < len(ids) and max(offsets[i][1], offsets[i][0] + 1) <= begin:
                i += 1
            while i < len(ids) and offsets[i][0] < stop:
                labels[i] = ids[i]
                i += 1
            if i == len(ids):
                break  # spans follow each other, and making one of a long conversation costs much
        return EncodedRow(ids, labels, whole)

    def _ended(self, row: EncodedRow) -> EncodedRow:
        """The row, with the end token after a last turn that the template ends with no special token at all."""
        end = self.tokenizer.eos_token_id
        if end is None or row.cut_from is not None or not self._special.isdisjoint(row.input_ids[-_END_AMONG:]):
            return row
        return EncodedRow([*row.input_ids, end], [*row.labels, end])

    @cached_property
    def _special(self) -> frozenset[int]:
        return frozenset((*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder))

    def _span(self, messages: Sequence[Message], tools: list[Any] | None, turn: int, text: str) -> tuple[int, int]:
        """Characters of an assistant's turn in the text of the conversation."""
        if turn == 0:
            raise InputError("the conversation begins with the assistant: nothing says what it answers to")
        prompt = self._render(messages[:turn], tools, ask=True)
        answered = text if turn == len(messages) - 1 else self._render(messages[: turn + 1], tools)
        if not answered.startswith(prompt):
            raise InputError(
                f"the chat template writes what comes before message {turn + 1} differently once it is answered: "
                f"{_first_difference(prompt, answered)}; give chat_template: a file whose template does not, or one "
                "with {% generation %} marks"
            )
        if not text.startswith(answered):
            raise InputError(
                f"the chat template rewrites message {turn + 1} once others follow (as those that strip thinking do): "
                f"{_first_difference(answered, text)}; learning that would teach what the model never says. Set "
                "mask_history: true to learn the last answer of each conversation, make one row of each answer, or "
                "give chat_template: a file whose template keeps turns as they are"
            )
        return len(prompt), len(answered)

    def _by_marks(self, messages: Sequence[Message], tools: list[Any] | None, turns: list[int]) -> EncodedRow:
        """As the template's `{% generation %}` marks say."""
        encoded = self._apply(messages, tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        ids, mask = list(encoded["input_ids"]), list(encoded["assistant_masks"])
        begins = [i for i, on in enumerate(mask) if on and (i == 0 or not mask[i - 1])]
        answers = [number for number, message in enumerate(messages) if message.get("role") == "assistant"]
        if len(begins) != len(answers):
            raise InputError(
                f"the chat template's generation marks show {len(begins)} turns, and {len(answers)} are there"
            )
        end = self.tokenizer.eos_token_id  # belongs to the turn before it, marked or not, or nothing would end it
        mask = [on or (i > 0 and bool(mask[i - 1]) and ids[i] == end) for i, on in enumerate(mask)]
        learned = [answer in turns for answer in answers]
        at = [bisect_right(begins, i) - 1 for i in range(len(ids))]  # the turn a token is in or after
        return EncodedRow(ids, [t if on and learned[at[i]] else IGNORE for i, (t, on) in enumerate(zip(ids, mask))])

    def _render(self, messages: Sequence[Message], tools: list[Any] | None, ask: bool = False) -> str:
        text: str = self._apply(messages, tools, tokenize=False, add_generation_prompt=ask)
        return text

    def _apply(self, messages: Sequence[Message], tools: list[Any] | None, **how: Any) -> Any:
        if self.template is None:
            raise InputError(
                "the tokenizer has no chat template, so messages cannot be written out: give chat_template: a Jinja "
                "file (that of the model's chat version, say), use the chat version of the model, or rows with prompt "
                "and completion, or text"
            )
        try:
            return self.tokenizer.apply_chat_template(list(messages), tools=tools, **self._dated, **how)
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            raise InputError(f"the chat template refuses the conversation: {error}") from error

    def _check_syntax(self) -> None:
        try:
            self.tokenizer.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(f"the chat template is not Jinja: line {error.lineno}: {error.message}") from error
        except (jinja2.TemplateError, TypeError, ValueError, KeyError):
            return  # it may ask for more than one turn; rows will tell


def _first_difference(one: str, other: str) -> str:
    """Where two texts part, as a message shows it."""
    at = next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))
    return f"{one[max(at - 20, 0) : at + 30]!r} became {other[max(at - 20, 0) : at + 30]!r}"
