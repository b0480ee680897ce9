"""`ChatTemplate`: messages as one text, by the Jinja template of a tokenizer or of a file.

It knows which template is meant, its variables, and what may go wrong in it; it knows nothing of tokens or labels.

A template is a program of somebody else's: it runs in transformers' sandbox, for so many seconds and so much memory,
and whatever it raises is an `InputError`. Templates that write the date get a fixed one: a run must not depend on its
day. What a template does with contents and with reasoning is found by trying it, once.
"""

from __future__ import annotations

import difflib
import re
import stat
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser

from ..errors import ConfigError, InputError
from .config import RESERVED_VARIABLES
from .messages import Message
from .sandbox import OutOfTimeError, limited
from .thinking import count_tags, opening, with_field, within_content

VARIABLES = "lema_template_variables"  # their name in tokenizer_config.json
_TODAY = "26 Jul 2024"  # what Llama's templates say where they cannot ask
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
_SECONDS = 30.0
_BYTES = 2 << 30  # of address space, while a template runs
_LONGEST_TEXT = 1 << 28  # characters
_LONGEST_FILE = 1 << 24  # bytes of a template
_MARK = re.compile(r"{%([-+]?)\s*(end)?generation\s*([-+]?)%}")
_OF_TEMPLATES = (  # what a template's own expressions can raise
    jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, NameError, RuntimeError, SyntaxError, TypeError,
    ValueError, ImportError, AssertionError,
)  # fmt: skip
_QUESTION, _ANSWER, _REASON = "Plugh", "Xyzzy", "Frotz"


class ChatTemplate:
    """A tokenizer's chat template.

    Args:
        tokenizer: of transformers; the template is its own, or has been made so.
        variables: what the template is given besides the messages, `enable_thinking` say; None: what is kept with the
            tokenizer. Kept with it from now on.

    Raises:
        ConfigError: it is not Jinja, has no variable of a name, or does not end.
    """

    def __init__(self, tokenizer: Any, variables: Mapping[str, Any] | None = None) -> None:
        self._tokenizer = tokenizer
        own = tokenizer.chat_template
        self._named: dict[str, str] = dict(own) if isinstance(own, dict) else {} if own is None else {"default": own}
        kept = tokenizer.init_kwargs.get(VARIABLES)
        if variables is None and isinstance(kept, dict):  # of the template they were kept with
            variables = {name: value for name, value in kept.items() if name in self.known_variables}
        self.variables: dict[str, Any] = dict(variables or {})
        """Given to the template besides the messages."""
        tokenizer.init_kwargs.pop(VARIABLES, None)
        if self._named:
            self._check()
        elif variables:
            raise ConfigError(
                f"chat_template_kwargs names {', '.join(variables)}, and the tokenizer has no chat template"
            )
        if self.variables:
            tokenizer.init_kwargs[VARIABLES] = dict(self.variables)

    @cached_property
    def text(self) -> str | None:
        """The template as text: of several with names, the one used where no tools are given."""
        return self._named.get("default", next(iter(self._named.values()), None))

    @property
    def names(self) -> list[str]:
        """Names of the templates, where the tokenizer has several."""
        return sorted(self._named) if len(self._named) > 1 else []

    @cached_property
    def marked(self) -> bool:
        """Whether it says itself, by `{% generation %}`, what the assistant says."""
        return self.text is not None and _MARK.search(self.text) is not None

    @cached_property
    def known_variables(self) -> frozenset[str]:
        """Names a user may give a value for, as far as the templates read any."""
        found: set[str] = set()
        for text in self._named.values():
            found |= jinja2.meta.find_undeclared_variables(_parse(text))
        return frozenset(found - RESERVED_VARIABLES - {*self._tokenizer.special_tokens_map} - {*_GLOBALS})

    def render(self, messages: Sequence[Message], tools: list[Any] | None = None, ask: bool = False) -> str:
        """The text of messages.

        Args:
            ask: end with what makes the assistant speak.

        Raises:
            InputError: the template refuses them, fails, or takes more than a template may.
        """
        text: str = self._apply(self._suited(messages), tools, tokenize=False, add_generation_prompt=ask)
        return text

    def marked_turns(self, messages: Sequence[Message], tools: list[Any] | None) -> tuple[str, list[tuple[int, int]]]:
        """The text of messages, and the characters in it that each pair of `{% generation %}` marks encloses.

        Raises:
            InputError: as `render` does, or the template works on with what it writes between marks.
        """
        text = self.render(messages, tools)
        # Characters that no text has show where the marks are: these are none, by Unicode's definition.
        first, last = [sign for sign in map(chr, range(0xFDD0, 0xFDF0)) if sign not in text][:2]

        def shown(mark: re.Match[str]) -> str:
            return f"{{%{mark[1]} if true %}}{{{{ '{last if mark[2] else first}' }}}}{{% endif {mark[3]}%}}"

        template = _MARK.sub(shown, self._given(tools)["chat_template"])
        found: list[tuple[int, int]] = []
        plain, length, begin = [], 0, 0
        for part in re.split(f"([{first}{last}])", self._apply(self._suited(messages), tools, chat_template=template)):
            if part == first:
                begin = length
            elif part == last:
                found.append((begin, length))
            else:
                plain.append(part)
                length += len(part)
        if "".join(plain) != text:
            raise InputError("the chat template works on with what it writes between its generation marks")
        return text, found

    def _suited(self, messages: Sequence[Message]) -> list[Message]:
        """Messages in the form this template reads: reasoning apart from content, content as parts."""
        given: list[Message] = list(messages)
        if self._takes_reasoning:
            given = [with_field(message) for message in given]
        if opened := self._thinks_in_content:
            given = [within_content(message, opened) for message in given]
        if self._takes_parts:
            given = [
                {**m, "content": [{"type": "text", "text": m["content"]}]} if isinstance(m.get("content"), str) else m
                for m in given
            ]
        return given

    # -- found by trying -------------------------------------------------------------------------

    @cached_property
    def _takes_parts(self) -> bool:
        """Whether contents are written only where they are lists of parts, as templates for images do."""

        def shown(content: Any) -> bool | None:
            try:
                text = self._apply(
                    [_message("user", content(_QUESTION)), _message("assistant", content(_ANSWER))], None
                )
            except InputError:
                return None
            return _QUESTION in text and _ANSWER in text

        return not shown(str) and shown(lambda word: [{"type": "text", "text": word}]) is True

    @cached_property
    def _takes_reasoning(self) -> bool:
        """Whether reasoning written into a content is taken for the answer, and only a field of its own is not."""
        asked, inside = _message("user", _QUESTION), f"<think>\n{_REASON}\n</think>\n\n{_ANSWER}"
        try:
            apart = self._apply([asked, {**_message("assistant", _ANSWER), "reasoning_content": _REASON}], None)
            within = self._apply([asked, _message("assistant", inside)], None)
        except InputError:
            return False
        return _REASON in apart and count_tags(within) > count_tags(apart)

    @cached_property
    def drops_reasoning(self) -> bool:
        """Whether a prompt opens thinking that answers are written without, whatever a message says of it."""
        return self._opens_only and not self._thinks_in_content

    @cached_property
    def _opens_only(self) -> bool:
        """Whether a prompt opens thinking, and a field with reasoning is not written."""
        asked, answer = _message("user", _QUESTION), {**_message("assistant", _ANSWER), "reasoning_content": _REASON}
        try:
            opened = opening(self._apply([asked], None, add_generation_prompt=True))
            return bool(opened) and _REASON not in self._apply([asked, answer], None)
        except InputError:
            return False

    @cached_property
    def _thinks_in_content(self) -> str:
        """What opens thinking in the prompt of a template that writes reasoning as part of the content alone."""
        if not self._opens_only:
            return ""
        asked, answer = _message("user", _QUESTION), {**_message("assistant", _ANSWER), "reasoning_content": _REASON}
        prompt = self._apply([asked], None, add_generation_prompt=True)
        try:
            within = self._apply([asked, within_content(answer, opening(prompt))], None)
        except InputError:
            return ""
        return opening(prompt) if within.startswith(prompt + _REASON) else ""

    # -- running it ------------------------------------------------------------------------------

    def _apply(self, messages: Sequence[Message], tools: list[Any] | None, **how: Any) -> Any:
        if not self._named:
            raise InputError(
                "the tokenizer has no chat template, so messages cannot be written out: give chat_template: a Jinja "
                "file (that of the model's chat version, say), use the chat version of the model, or rows with prompt "
                "and completion, or text"
            )
        how.setdefault("tokenize", False)
        try:
            with limited(_SECONDS, _BYTES):
                made = self._tokenizer.apply_chat_template(list(messages), tools=tools, **{**self._given(tools), **how})
        except _OF_TEMPLATES as error:
            raise InputError(f"the chat template refuses the conversation: {_said(error)}") from error
        except OutOfTimeError as error:
            raise InputError(f"the chat template did not end within {_SECONDS:g} seconds, and was stopped") from error
        except MemoryError as error:
            raise InputError(f"the chat template asked for more than {_BYTES >> 30} GiB of memory") from error
        if isinstance(made, str) and len(made) > _LONGEST_TEXT:
            raise InputError(f"the chat template wrote {len(made):,} characters; {_LONGEST_TEXT:,} are the most taken")
        return made

    def _given(self, tools: list[Any] | None) -> dict[str, Any]:
        """Variables, and the template itself: the one transformers would take of several."""
        name = "tool_use" if tools is not None and "tool_use" in self._named else "default"
        if name not in self._named:
            raise InputError(
                f"the tokenizer has chat templates named {', '.join(self.names)} and none of them is the default: give "
                "chat_template: one of these names, or a file"
            )
        text = self._named[name]
        fixed = _FIXED_DATE if _ASKS_DATE in text else ""
        return {"date_string": _TODAY, **self.variables, "chat_template": fixed + text}

    def _check(self) -> None:
        """What can be said of a template before there are rows."""
        for text in self._named.values():
            if powers := list(_parse(text).find_all(jinja2.nodes.Pow)):  # may take hours in one operation
                raise ConfigError(f"the chat template raises to a power in line {powers[0].lineno}: that is not run")
        for name in self.variables:
            if name not in self.known_variables:
                raise ConfigError(f"chat_template_kwargs: {self._unknown(name)}")
        try:
            self._apply([_message("user", "?")], None)
        except InputError as error:
            if isinstance(error.__cause__, jinja2.TemplateSyntaxError | OutOfTimeError | MemoryError | RecursionError):
                raise ConfigError(str(error)) from error
            return  # it may ask for more than one turn; rows will tell

    def _unknown(self, name: str) -> str:
        close = difflib.get_close_matches(name, self.known_variables, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        return (
            f"the chat template reads no {name!r}; it reads {', '.join(sorted(self.known_variables)) or 'none'}{hint}"
        )


def read_template(path: str | Path) -> str:
    """The text of a template's file.

    Raises:
        ConfigError: no regular file, too large, or not UTF-8.
    """
    file = Path(path)
    try:
        about = file.stat()
        if not stat.S_ISREG(about.st_mode):
            raise ConfigError(f"chat_template={str(path)!r} is no regular file, so it is not read")
        if about.st_size > _LONGEST_FILE:
            raise ConfigError(
                f"chat_template={str(path)!r} has {about.st_size:,} bytes: no chat template is that large"
            )
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"chat_template={str(path)!r} cannot be read: {error}") from error


class _GenerationTag(jinja2.ext.Extension):
    """Lets `{% generation %}` be parsed."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """Its body."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


_PARSER = jinja2.Environment(
    autoescape=False, trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, "jinja2.ext.loopcontrols"]
)
_GLOBALS = (*_PARSER.globals, "raise_exception", _ASKS_DATE)


def _parse(text: str) -> jinja2.nodes.Template:
    try:
        with limited(_SECONDS, _BYTES):
            return _PARSER.parse(text)
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(f"the chat template is not Jinja: line {error.lineno}: {error.message}") from error
    except (RecursionError, MemoryError, OutOfTimeError, ValueError, OverflowError) as error:
        raise ConfigError(f"the chat template is no Jinja that can be read: {_said(error)}") from error


def _message(role: str, content: Any) -> Message:
    return {"role": role, "content": content}


def _said(error: BaseException) -> str:
    """An error's message, with its kind where that says more."""
    text = str(error) or "no reason given"
    if isinstance(error, jinja2.TemplateSyntaxError):
        return f"line {error.lineno}: {error.message}"
    if isinstance(error, RecursionError):  # Python's own words depend on where it happens
        return "it calls itself without end"
    return text if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: {text}"
