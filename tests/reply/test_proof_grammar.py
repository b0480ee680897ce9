"""The grammar of replies: what is written reads back as itself, and every way out of the format has a fault."""

from __future__ import annotations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lema_reply.grammar import CLOSE, CONFIDENCES, OPEN, LemaReply, prompt, read

MARKS = (OPEN, "Answer:", "Explanation:", "Confidence:", CLOSE)
LINE = st.text(st.characters(blacklist_characters="\r\n"), max_size=20) | st.sampled_from(
    [f"before {mark}" for mark in MARKS]
    + ["", "High", "東京 🗼 Ωµ", "Answers: none", "[/LEMA_REPLY", "\u2028", "\x1c", "\x0b"]
)
REPLY = LemaReply("Oslo", "It has been the capital since 1814.\n\nBefore, it was Copenhagen.", "High")
BLOCK = REPLY.text()
LINES = ("[LEMA_REPLY]", "Answer: Oslo", "Explanation: So it is.", "Confidence: High", "[/LEMA_REPLY]")


def begins_with_mark(line: str) -> bool:
    """Written another way than the grammar has it: blanks, a mark in any case, blanks before the colon."""
    line = line.lstrip(" \t\x0b\x0c").lower()
    return any(
        line.startswith(mark.lower().removesuffix(":"))
        and (mark[0] == "[" or line[len(mark) - 1 :].lstrip(" \t\x0b\x0c").startswith(":"))
        for mark in MARKS
    )


@st.composite
def fields(draw: st.DrawFn) -> str:
    """Any legal field: no blanks around it, not empty, and no line after the first begins with a mark."""
    field = "\n".join(draw(st.lists(LINE, min_size=1, max_size=4))).strip()
    assume(field and not any(begins_with_mark(line) for line in field.split("\n")[1:]))
    return field


replies = st.builds(LemaReply, fields(), fields(), st.sampled_from(CONFIDENCES))


@settings(max_examples=400)
@given(replies, st.sampled_from(["", "\n", " \n\t\n"]), st.booleans())
def test_a_legal_reply_reads_as_itself(reply: LemaReply, around: str, carriage: bool) -> None:
    text = around + reply.text() + around
    reading = read(text.replace("\n", "\r\n") if carriage else text)
    assert reading.reply == reply
    assert reading.strict, reading.faults
    assert reply.legal


@settings(max_examples=400)
@given(
    st.text()
    | st.lists(LINE | st.sampled_from([*MARKS, *LINES, "\r", "\n"])).map("\n".join)
    | st.binary().map(bytes.hex)
)
def test_any_text_can_be_read(text: str) -> None:
    reading = read(text)
    if reading.strict:
        assert reading.reply is not None
        assert reading.reply.text() == text.replace("\r\n", "\n").replace("\r", "\n").strip()
    assert all(fault and "\n" not in fault for fault in reading.faults)


@given(replies, st.data())
def test_what_is_taken_out_doubled_or_moved_is_named(reply: LemaReply, data: st.DataObject) -> None:
    marks = [
        OPEN,
        f"Answer: {reply.answer}",
        f"Explanation: {reply.explanation}",
        f"Confidence: {reply.confidence}",
        CLOSE,
    ]
    at = data.draw(st.integers(0, 4))
    name = MARKS[at].removesuffix(":")
    without = read("\n".join(marks[:at] + marks[at + 1 :]))
    if not (name in (OPEN, CLOSE) and any(name in mark for mark in marks[1:4])):  # one inside a field stands in for it
        assert f"{name} is missing" in without.faults
    assert not without.strict
    twice = read("\n".join([*marks[:at], marks[at], *marks[at:]]))
    assert f"{name} is there 2 times" in twice.faults
    order = data.draw(st.permutations(range(5)))
    assume(order != sorted(order))
    moved = read("\n".join(marks[i] for i in order))
    assert any(fault.startswith("order is") for fault in moved.faults)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (BLOCK + "\nAnd so on.", "text after [/LEMA_REPLY]: 'And so on.'"),
        ("Sure!\n" + BLOCK, "text before [LEMA_REPLY]: 'Sure!'"),
        (BLOCK.replace("High", "Certain"), "Confidence is 'Certain', none of High, Medium, Low"),
        (BLOCK.replace("High", "high"), "Confidence is 'high', none of High, Medium, Low"),
        (BLOCK.replace("High", "High\nor so"), "Confidence is 'High\\nor so', none of High, Medium, Low"),
        (BLOCK.replace("Oslo", ""), "Answer is empty"),
        (BLOCK.replace("High", " "), "Confidence is empty"),
        (BLOCK.replace("Answer:", "answer:"), "Answer is written 'answer:'"),
        (BLOCK.replace("Answer:", "Answer :"), "Answer is written 'Answer :'"),
        (BLOCK.replace(OPEN, "[lema_reply]"), "[LEMA_REPLY] is written '[lema_reply]'"),
        (BLOCK.replace("\n[/", " [/"), "[/LEMA_REPLY] is not at the start of a line"),
        (BLOCK.replace(OPEN, f"So: {OPEN}"), "[LEMA_REPLY] is not at the start of a line"),
        (BLOCK.replace(OPEN, f"{OPEN} well"), "text after [LEMA_REPLY]: 'well'"),
        (BLOCK.replace("Answer: ", "Answer:"), "whitespace is not where the format has it"),
        (BLOCK.replace("\nConfidence", "\n\nConfidence"), "whitespace is not where the format has it"),
        (BLOCK.replace("Answer", " Answer"), "whitespace is not where the format has it"),
        (f"{BLOCK}\n{BLOCK}", "[LEMA_REPLY] is there 2 times"),
        ("", "[LEMA_REPLY] is missing"),
    ],
)
def test_each_way_out_of_the_format_is_named(text: str, fault: str) -> None:
    reading = read(text)
    assert fault in reading.faults
    assert not reading.strict


def test_what_can_be_read_is_read() -> None:
    half = read("I say [LEMA_REPLY]\nanswer: Oslo\nConfidence: **high** I think [/LEMA_REPLY] bye")
    assert half.reply == LemaReply("Oslo", "", "High")
    assert read("Answer: 4").reply == LemaReply("4", "", "")
    assert read("The capital is Oslo.").reply is None
    twice = read("\n".join(LINES[:2] + ("Answer: Bergen",) + LINES[2:]))
    assert twice.reply == LemaReply("Oslo", "So it is.", "High"), "the first counts"
    letters = read(BLOCK.replace("Confidence", "Conf\u0130dence").replace("Answer", "An\u017fwer"))
    assert letters.faults[:2] == ("Answer is missing", "Confidence is missing")


def test_tags_and_labels_within_a_line_are_text() -> None:
    reply = LemaReply(CLOSE, f"It ends with {CLOSE}; Answer: comes first.", "High")
    assert reply.legal
    for field in ("a\nConfidence: b", f"a\n  {CLOSE}", "", " a", "a\r\nb"):
        assert not LemaReply(field, "b", "High").legal
        assert not LemaReply("b", field, "High").legal
    assert not LemaReply("a", "b", "Sure").legal


def test_the_prompt_leaves_the_opening_tag_to_the_model() -> None:
    text = prompt("What is the capital of Norway?")
    assert text.endswith("\n\n<|user|>\nWhat is the capital of Norway?\n\n<|assistant|>\n")
    assert text.startswith("<|system|>\nYou are a precise assistant trained using LEMA.\n\n")
    assert OPEN not in text
