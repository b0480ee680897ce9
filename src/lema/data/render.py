"""`ChatRenderer`: conversations as text and token ids, the same way for training and for chat.

It knows a tokenizer and its chat template; it knows nothing of files, batches or models.

Layout. A template turns messages into one text. An assistant's turn is what the template writes between the prompt
for it (the messages before, and the generation prompt) and its end, the end token included; where a template writes
none, the tokenizer's own comes after the last turn, or nothing would teach the model to stop. Labels follow from the
characters a token stands for: a token with a character of a turn is learned. Tokens are cut where the prompt of a
learned turn ends, so that what is learned follows the very tokens that chat gives.

Mechanics. That only holds where the text of a prefix of the messages is a prefix of the whole text, so it is
checked for every turn learned. Templates that write a turn differently once others follow (some strip a model's
thinking) would teach what the model should never say, and are refused; `mask_history` learns the last answer of such
conversations, whose context is then what the model sees when it answers. Only an end token may be another one at the
end of the whole text: of the turns before it what both have in common is learned. A prompt that opens a model's
thinking, which the template leaves out once it is answered, is gone on from as the model does. A template with
`{% generation %}` marks its turns itself and is believed.

One file, because what is trained on and what chat sends must come out of the same few functions.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import tee
from pathlib import Path
from typing import Any

from ..errors import ConfigError, InputError, UnsupportedError
from .messages import Message
from .prefix import Encoded, first_tokens
from .template import ChatTemplate, read_template
from .thinking import after_opened, reasoning_of, with_field
from .tokens import Tokens
from .turns import Turns, first_difference, rewritten_prompt

logger = logging.getLogger(__name__)

IGNORE = -100
_END_AMONG = 3  # last tokens of a turn: templates write a line end or two after its end token
_SEPARATOR = "lema_separator"  # its name in tokenizer_config.json


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
        variables: of the template, as `enable_thinking`; None: those kept with the tokenizer, as these will be.

    Raises:
        UnsupportedError: the tokenizer cannot say which characters its tokens stand for.
        ConfigError: the template is not Jinja, does not end, or reads no such variable.
    """

    def __init__(self, tokenizer: Any, template: str | None = None, variables: Mapping[str, Any] | None = None) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise UnsupportedError(
                f"{type(tokenizer).__name__} is no fast tokenizer: it cannot say which characters a token stands for; "
                "load the model's tokenizer.json with AutoTokenizer"
            )
        self.tokenizer = tokenizer
        if template is not None:
            tokenizer.chat_template = template
        self._template = ChatTemplate(tokenizer, variables)
        self._tokens = Tokens(tokenizer)
        self._said: set[str] = set()

    @classmethod
    def from_file(
        cls, tokenizer: Any, path: str | Path | None, variables: Mapping[str, Any] | None = None
    ) -> ChatRenderer:
        """With the template in a file, or of this name among the tokenizer's, or the tokenizer's own for None."""
        if path is None:
            return cls(tokenizer, None, variables)
        own = tokenizer.chat_template
        if isinstance(own, dict) and str(path) in own and not Path(path).exists():
            return cls(tokenizer, own[str(path)], variables)
        template = read_template(path)
        try:
            return cls(tokenizer, template, variables)
        except ConfigError as error:
            if str(error).startswith("chat_template_kwargs"):
                raise
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

    @property
    def template(self) -> str | None:
        """The chat template as text; None: there is none."""
        return self._template.text

    @property
    def known_variables(self) -> frozenset[str]:
        """Names of variables that the template reads."""
        return self._template.known_variables

    @property
    def variables(self) -> dict[str, Any]:
        """What the template is given besides the messages."""
        return self._template.variables

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
        return self._asked(text, self.separator)

    def _asked(self, text: str, separator: str) -> list[int]:
        return self._tokens.before_word(text + separator) if separator else self.plain(text)

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
            ends |= set([token for token in after if token in self._tokens.special][:1])
        return sorted(ends)

    def plain(self, text: str) -> list[int]:
        """Token ids of a text to be continued as it is, begun as texts are in training."""
        return self._tokens.begun(text)[0]

    def ids(self, text: str) -> list[int]:
        """Token ids of rendered text, which has its special tokens written out."""
        return self._tokens.of(text)[0]

    def completion(
        self, prompt: str, completion: str, *, separator: str = "", on_prompt: bool = False, limit: int | None = None
    ) -> EncodedRow:
        """Prompt and completion without a template, cut where the tokens that `ask` gives for the prompt end.

        Args:
            prompt: may be empty: then all is learned.
            separator: between the two, as `ask` has it.
            on_prompt: learn the prompt too.
            limit: tokens that are wanted; of a far longer text the rest is not looked at.

        Raises:
            UnsupportedError: the tokenizer has no end token.
        """
        end = self.tokenizer.eos_token_id
        if end is None:
            raise UnsupportedError("the tokenizer has no eos_token, so nothing could teach the model where to stop")
        bare, prompt = prompt, prompt + separator
        begins: int | None = None

        def encode(part: str) -> Encoded:
            nonlocal begins
            if len(part) < len(prompt):
                return self._tokens.begun(part)
            asked = self._asked(bare, separator) if prompt else []
            begins = len(asked)
            return self._tokens.continued(asked, prompt, part[len(prompt) :])

        (ids, _), whole = first_tokens(encode, prompt + completion, limit)
        self._say_cuts()
        begins = len(ids) if begins is None else begins
        labels = list(ids) if on_prompt else [IGNORE] * len(ids[:begins]) + ids[begins:]
        if ids and ids[0] == self.tokenizer.bos_token_id != end:  # nothing comes before it, so nothing could say it
            labels[0] = IGNORE
        if whole is None and not self._tokens.ends_in(ids, end):
            ids, labels = [*ids, end], [*labels, end]
        return EncodedRow(ids, labels, whole)

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
            text = self._render(messages, tools)
            self._check_reasoning(messages[turns[-1]], turns[-1], text)
            found = self._turns(messages, tools, text)
            ends = (found.prompt_end(turn) for turn in turns if turn)
            return self._ended(self.labelled(text, None, (end for end in ends if end is not None), limit))
        turns = [turn for turn in turns if turn not in unlearned]
        turns = turns[-1:] if last_only else turns
        if not turns:
            return self.labelled(self._render(messages, tools), (), (), limit)
        messages = messages[: turns[-1] + 1]
        reasoned = any(reasoning_of(with_field(messages[turn])) is not None for turn in turns)
        if self._template.marked and not (reasoned and self._template.drops_reasoning):
            return self._ended(self._by_marks(messages, tools, turns, limit))
        text, prompt = self._answered(messages, tools)
        self._check_reasoning(messages[-1], turns[-1], text[len(prompt) :])

        found = self._turns(messages, tools, text)

        def spans() -> Iterator[tuple[int, int]]:
            for turn in turns[:-1]:
                yield self._span(found, messages[turn], turn, text)
            yield len(prompt), len(text)

        return self._ended(self.labelled(text, spans(), limit=limit))

    def labelled(
        self,
        text: str,
        spans: Iterable[tuple[int, int]] | None,
        prompts: Iterable[int] | None = None,
        limit: int | None = None,
    ) -> EncodedRow:
        """Rendered text, with labels on the tokens of these runs of its characters; None: on all.

        Args:
            spans: in order.
            prompts: where prompts end, in order: the tokens before are those of the prompt alone; None: where spans
                begin.
            limit: tokens that are wanted: what lies beyond them is not asked for, as it costs much in long texts.
        """
        asked = _Asked(spans if spans is not None else ())
        borders = asked if prompts is None else _Asked((at, at) for at in prompts)
        encode: Callable[[str], Encoded] = lambda part: self._tokens.cut(part, borders.up_to(len(part)))  # noqa: E731
        (ids, offsets), whole = first_tokens(encode, text, limit)
        self._say_cuts()
        if spans is None:
            return EncodedRow(ids, list(ids), whole)
        labels = [IGNORE] * len(ids)
        i = 0
        asked.up_to(offsets[-1][1] if offsets else 0)
        for begin, stop in asked.spans:
            while i < len(ids) and max(offsets[i][1], offsets[i][0] + 1) <= begin:
                i += 1
            while i < len(ids) and offsets[i][0] < stop:
                labels[i] = ids[i]
                i += 1
        return EncodedRow(ids, labels, whole)

    def _ended(self, row: EncodedRow) -> EncodedRow:
        """The row, with the end token after a last turn that the template ends with no special token at all."""
        end = self.tokenizer.eos_token_id
        if end is None or row.cut_from is not None or not self._tokens.special.isdisjoint(row.input_ids[-_END_AMONG:]):
            return row
        return EncodedRow([*row.input_ids, end], [*row.labels, end])

    def _answered(self, messages: Sequence[Message], tools: list[Any] | None) -> tuple[str, str]:
        """The text of a conversation up to its last answer, and the prompt of chat that it goes on from."""
        text, last = self._render(messages, tools), len(messages) - 1
        if last == 0:
            raise InputError("the conversation begins with the assistant: nothing says what it answers to")
        prompt = self._render(messages[:last], tools, ask=True)
        if text.startswith(prompt):
            return text, prompt
        opened = after_opened(prompt, text, messages[last])
        if opened is None:
            raise rewritten_prompt(last, prompt, text, self._variables_hint())
        if opened[len(prompt) :].lstrip().startswith("</"):
            self._warn(
                "the chat template's prompt opens the model's thinking, and rows without any are learned with an empty "
                f"one{self._variables_hint()}"
            )
        return opened, prompt

    def _turns(self, messages: Sequence[Message], tools: list[Any] | None, text: str) -> Turns:
        write: Callable[[Sequence[Message], bool], str] = lambda some, ask: self._render(some, tools, ask)  # noqa: E731
        return Turns(write, messages, text, self._tokens.without_last_special, self._variables_hint())

    def _span(self, turns: Turns, message: Message, turn: int, text: str) -> tuple[int, int]:
        """Characters of an assistant's turn, not the last, in the text of the conversation."""
        if turn == 0:
            raise InputError("the conversation begins with the assistant: nothing says what it answers to")
        begin, stop = turns.span(turn)
        self._check_reasoning(message, turn, text[begin:stop])
        return begin, stop

    def _check_reasoning(self, message: Message, turn: int, learned: str) -> None:
        """No field that should be learned is left out in silence."""
        reason = reasoning_of(with_field(message))
        if reason is not None and reason.strip() not in learned:
            raise InputError(
                f"message {turn + 1} has reasoning, which the chat template does not write, so it would not be learned"
                f"{self._variables_hint()}; take it out of the row, or give chat_template: a file whose template "
                "writes it"
            )

    def _variables_hint(self) -> str:
        """Which variables might help, as a message's end."""
        names = [name for name in sorted(self._template.known_variables) if "think" in name or "reason" in name]
        named = ", ".join(
            f"{name} ({self.variables[name]!r} now)" if name in self.variables else name for name in names
        )
        return f"; chat_template_kwargs can set the template's {named}" if names else ""

    def _by_marks(
        self, messages: Sequence[Message], tools: list[Any] | None, turns: list[int], limit: int | None
    ) -> EncodedRow:  # fmt: skip
        """As the template's `{% generation %}` marks say."""
        text, marked = self._template.marked_turns(messages, tools)
        answers = [number for number, message in enumerate(messages) if message.get("role") == "assistant"]
        if len(marked) != len(answers):
            marked = _joined(marked)  # a turn may be marked piece by piece
        if len(marked) != len(answers):
            raise InputError(
                f"the chat template's generation marks show {len(marked)} turns, and {len(answers)} are there"
            )
        of_turn = dict(zip(answers, marked, strict=True))
        found = self._turns(messages, tools, text)
        end = self.tokenizer.eos_token or ""

        def learned() -> Iterator[tuple[int, int, int | None]]:
            for turn in turns:
                begin, stop = of_turn[turn]
                if end and text.startswith(end, stop):  # belongs to the turn, marked or not, or nothing would end it
                    stop += len(end)
                asked = found.prompt_end(turn) if turn else 0
                if asked is not None:
                    begin = max(begin, asked) if asked < stop else begin
                else:
                    self._warn(
                        "the chat template's prompt is not what its marked answers follow in training: "
                        f"{first_difference(found.prompt(turn), text)}{self._variables_hint()}"
                    )
                self._check_reasoning(messages[turn], turn, text[begin:stop])
                yield begin, stop, asked

        spans, prompts = tee(learned())
        return self.labelled(
            text,
            ((begin, stop) for begin, stop, _ in spans),
            (asked for *_, asked in prompts if asked is not None),
            limit,
        )

    def _render(self, messages: Sequence[Message], tools: list[Any] | None, ask: bool = False) -> str:
        return self._template.render(messages, tools, ask)

    def _say_cuts(self) -> None:
        if self._tokens.cuts:
            self._warn(
                "tokens would reach from prompts into answers: they are cut there, so that answers follow the tokens "
                "that chat gives"
            )

    def _warn(self, text: str) -> None:
        """Say it once."""
        if text.split(":")[0] not in self._said:
            self._said.add(text.split(":")[0])
            logger.warning("%s", text)


class _Asked:
    """Spans that are asked for only as far as they are wanted.

    Args:
        spans: in order of their begins.
    """

    def __init__(self, spans: Iterable[tuple[int, int]]) -> None:
        self._more = iter(spans)
        self.spans: list[tuple[int, int]] = []

    def up_to(self, length: int) -> list[int]:
        """Where they begin; all that begin before so many characters are among them."""
        while not self.spans or self.spans[-1][0] < length:
            if (one := next(self._more, None)) is None:
                break
            self.spans.append(one)
        return [begin for begin, _ in self.spans]


def _joined(spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Spans with those put together that touch."""
    joined: list[tuple[int, int]] = []
    for begin, stop in spans:
        if joined and joined[-1][1] == begin:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((begin, stop))
    return joined
