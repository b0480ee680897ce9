"""The reply's grammar: how a reply is written, and what a text says when read as one.

It is about tags, labels and lines, of any text.

Layout. A reply is five marks, each at the start of a line: the opening tag, three labelled fields, the closing tag.

    [LEMA_REPLY]
    Answer: Oslo
    Explanation: Oslo has been the capital since 1814.
    Confidence: High
    [/LEMA_REPLY]

A field is text without blanks around it that is not empty. It may span lines and hold tags and labels, but no line
after its first may begin with one, in any case and however indented: that would be the next mark.

Mechanics. A text is strict if writing down what was read gives the same text again, line ends and whitespace around
it aside; the faults found on the way say where it parts. Nothing in here raises, whatever the text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

Confidence = Literal["High", "Medium", "Low"]
CONFIDENCES: tuple[Confidence, ...] = get_args(Confidence)
SYSTEM = "You are a precise assistant trained using LEMA."
OPEN, CLOSE = "[LEMA_REPLY]", "[/LEMA_REPLY]"
STOP = f"\n{CLOSE}"
"""Where a reply ends as it is written: the closing tag, at the start of a line."""
_FIELDS = ("Answer", "Explanation", "Confidence")
_MARKS = (OPEN, *_FIELDS, CLOSE)
_AT_LINE_START = re.compile(
    rf"^[^\S\n]*(?P<mark>{re.escape(OPEN)}|{re.escape(CLOSE)}|(?:{'|'.join(_FIELDS)})[^\S\n]*:)",
    re.MULTILINE | re.IGNORECASE | re.ASCII,
)
_SURE = re.compile(rf"\W*({'|'.join(CONFIDENCES)})\b", re.IGNORECASE | re.ASCII)


@dataclass(frozen=True, slots=True)
class LemaReply:
    """What a reply says. A field that was not there is empty, which no legal reply has."""

    answer: str
    explanation: str
    confidence: str
    """One of `CONFIDENCES`; what the text said, where a text that is not strict said something else."""

    def text(self) -> str:
        """The block from the opening tag to the closing one, without a line end after it."""
        fields = (self.answer, self.explanation, self.confidence)
        return "\n".join([OPEN, *(f"{name}: {field}" for name, field in zip(_FIELDS, fields)), CLOSE])

    @property
    def legal(self) -> bool:
        """Whether its text reads as this reply and nothing else."""
        return read(self.text()) == Reading(self, ())


@dataclass(frozen=True, slots=True)
class Reading:
    """A text read as a reply."""

    reply: LemaReply | None
    """What could be read; None: not one field is there."""
    faults: tuple[str, ...]
    """Where the text leaves the format, one sentence each."""

    @property
    def strict(self) -> bool:
        """Whether the text is exactly a reply."""
        return not self.faults


@dataclass(frozen=True, slots=True)
class _Mark:
    """A tag or label found, and the text up to the next one."""

    name: str
    written: str
    after: str
    inside_line: bool


def prompt(question: str) -> str:
    """The text a model is given: all of the format's text before the reply. The opening tag is the model's to write."""
    return f"<|system|>\n{SYSTEM}\n\n<|user|>\n{question}\n\n<|assistant|>\n"


def read(text: str) -> Reading:
    """Read a text as a reply: strictly, and where it is none, as much of it as can be told.

    Where something stands twice the first one counts.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    before, marks = _split(text)
    first = {mark.name: mark for mark in reversed(marks)}
    fields = [first[name].after.strip() if name in first else "" for name in _FIELDS]
    faults = [*_faults_of_marks(before, marks), *_faults_of_fields(fields, first)]
    if sure := _SURE.match(fields[2]):
        fields[2] = sure[1].capitalize()
    reply = LemaReply(*fields) if any(name in first for name in _FIELDS) else None
    if not faults and (reply is None or reply.text() != text.strip()):
        faults.append("whitespace is not where the format has it")
    return Reading(reply, tuple(faults))


def _split(text: str) -> tuple[str, list[_Mark]]:
    """The text before the first mark, and the marks in order."""
    spans = [(found.start(), found.end(), found["mark"], False) for found in _AT_LINE_START.finditer(text)]
    for tag, find in ((OPEN, text.find), (CLOSE, text.rfind)):
        at = find(tag)
        if at >= 0 and not any(_name(written) == tag for _, _, written, _ in spans):
            spans.append((at, at + len(tag), tag, True))
    spans.sort()
    ends = [start for start, *_ in spans[1:]] + [len(text)]
    marks = [_Mark(_name(mark), mark, text[end:until], inside) for (_, end, mark, inside), until in zip(spans, ends)]
    return text[: spans[0][0]] if spans else text, marks


def _name(written: str) -> str:
    """The mark that something written is, whatever its case and blanks."""
    plain = written.rstrip(":").rstrip().lower()
    return next(mark for mark in _MARKS if mark.lower() == plain)


def _faults_of_marks(before: str, marks: list[_Mark]) -> list[str]:
    faults = []
    if before.strip():
        faults.append(f"text before {marks[0].name if marks else OPEN}: {_shown(before)}")
    names = [mark.name for mark in marks]
    for name in _MARKS:
        if (count := names.count(name)) != 1:
            faults.append(f"{name} is missing" if not count else f"{name} is there {count} times")
    if len(names) == len(set(names)) and names != [name for name in _MARKS if name in names]:
        faults.append(f"order is {' '.join(names)}")
    for mark in marks:
        if mark.inside_line:
            faults.append(f"{mark.name} is not at the start of a line")
        elif mark.written.removesuffix(":") != mark.name:
            faults.append(f"{mark.name} is written {mark.written!r}")
        if mark.name in (OPEN, CLOSE) and mark.after.strip():
            faults.append(f"text after {mark.name}: {_shown(mark.after)}")
    return faults


def _faults_of_fields(fields: list[str], first: dict[str, _Mark]) -> list[str]:
    faults = [f"{name} is empty" for name, field in zip(_FIELDS, fields) if name in first and not field]
    if fields[2] and fields[2] not in CONFIDENCES:
        faults.append(f"{_FIELDS[2]} is {_shown(fields[2])}, none of {', '.join(CONFIDENCES)}")
    return faults


def _shown(text: str, longest: int = 40) -> str:
    """The beginning of a text, as a message shows it."""
    text = text.strip()
    return repr(text if len(text) <= longest else f"{text[:longest]}…")
