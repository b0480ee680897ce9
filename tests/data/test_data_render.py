"""Templates, spans and labels: what is learned is what the assistant says, to the token, and nothing is guessed."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from data_helpers import (
    CHATML,
    LLAMA2,
    MARKED,
    STRIPS_THINKING,
    TEMPLATES,
    chat,
    encoder,
    learned_text,
    make_metaspace_tokenizer,
    make_tokenizer,
)  # fmt: skip
from lema.data import ChatRenderer, DataConfig, EncodedRow, load_data
from lema.data.render import IGNORE
from lema.errors import ConfigError, InputError, UnsupportedError

_BY_TEMPLATE = {name: make_tokenizer(template) for name, template in TEMPLATES.items()}
_WORDS = st.text(alphabet=st.sampled_from("abc é漢🙂\n ?"), min_size=1, max_size=12).filter(lambda t: t.strip())


def same_where_labelled(row: EncodedRow) -> bool:
    return all(label in (-100, token) for token, label in zip(row.input_ids, row.labels, strict=True))


@pytest.mark.parametrize(
    ("template", "expected"),
    [(CHATML, "one<|im_end|>\ntwo<|im_end|>\n"), (LLAMA2, " one<|im_end|> two<|im_end|>")],
    ids=["header", "no header"],
)
def test_every_answer_and_its_end_token_is_learned_and_nothing_else(template: str, expected: str) -> None:
    tokenizer = make_tokenizer(template)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    row = ChatRenderer(tokenizer).training(chat("q", "one", "r", "two"))
    assert learned_text(tokenizer, row) == expected
    assert same_where_labelled(row)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    turns=st.lists(_WORDS, min_size=2, max_size=6).filter(lambda t: len(t) % 2 == 0),
    name=st.sampled_from(list(TEMPLATES)),
)
def test_what_is_learned_begins_where_the_prompt_ends(turns: list[str], name: str) -> None:
    """Of any conversation: the prompt and what is learned of the last answer are the whole text."""
    tokenizer = _BY_TEMPLATE[name]
    renderer, messages = ChatRenderer(tokenizer), chat(*turns)
    row = renderer.training(messages, last_only=True)
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    prompt = renderer.prompt_ids(messages[:-1])
    assert row.input_ids[: len(prompt)] == prompt and set(row.labels[: len(prompt)]) <= {-100}
    assert tokenizer.decode(row.input_ids) == whole
    assert learned_text(tokenizer, row) == whole[len(renderer.prompt(messages[:-1])) :]
    every = renderer.training(messages)
    assert tokenizer.decode(every.input_ids) == whole and every.num_targets >= row.num_targets
    assert same_where_labelled(every)


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
def test_words_that_carry_the_space_before_them_are_learned_whole(scheme: str) -> None:
    """SentencePiece puts the space after a prompt into the answer's first token, which must not be lost for it."""
    plain = make_metaspace_tokenizer(None, scheme)
    for prompt, completion in (("Q: one? A:", " two three"), ("Q: one? A: ", "two three")):
        row = encoder(plain, "prompt_completion")({"prompt": prompt, "completion": completion})
        assert learned_text(plain, row).replace(" ", "") == "twothree<|im_end|>"
    for template in (CHATML, LLAMA2):
        tokenizer = make_metaspace_tokenizer(template, scheme)
        row = ChatRenderer(tokenizer).training(chat("one", "two three", "four", "Oslo"))
        assert "".join(learned_text(tokenizer, row).split()) == "twothree<|im_end|>Oslo<|im_end|>"


def test_a_template_that_rewrites_turns_is_refused_or_its_last_answer_learned() -> None:
    tokenizer = make_tokenizer(STRIPS_THINKING)
    renderer = ChatRenderer(tokenizer)
    messages = chat("q", "<think>hm</think>one", "r", "<think>ah</think>two")
    with pytest.raises(InputError, match=r"rewrites message 2 .*mask_history"):
        renderer.training(messages)
    row = renderer.training(messages, last_only=True)
    assert learned_text(tokenizer, row) == "<think>ah</think>two<|im_end|>\n"
    # What comes before is what the model sees when it answers.
    prompt = renderer.prompt_ids(messages[:-1])
    assert row.input_ids[: len(prompt)] == prompt
    assert "hm" not in tokenizer.decode(row.input_ids)
    single = renderer.training(messages[:2])
    assert learned_text(tokenizer, single) == "<think>hm</think>one<|im_end|>\n"


def test_generation_marks_are_believed_and_the_end_token_is_added() -> None:
    tokenizer = make_tokenizer(MARKED)
    renderer = ChatRenderer(tokenizer)
    messages = chat("q", "one", "r", "two")
    assert learned_text(tokenizer, renderer.training(messages)) == "one<|im_end|>two<|im_end|>"
    assert learned_text(tokenizer, renderer.training(messages, last_only=True)) == "two<|im_end|>"
    assert learned_text(tokenizer, renderer.training(messages, learned_from=2)) == "two<|im_end|>"


def test_training_begins_with_the_very_prompt_of_chat() -> None:
    for template in (CHATML, LLAMA2, MARKED):
        renderer = ChatRenderer(make_tokenizer(template))
        messages = chat("What is gold?", "Au.", system=None)
        prompt = renderer.prompt_ids(messages[:1])
        row = renderer.training(messages)
        assert row.input_ids[: len(prompt)] == prompt
        assert set(row.labels[: len(prompt)]) == {-100} and -100 not in row.labels[len(prompt) : len(prompt) + 1]
        assert renderer.ask("What is gold?") == prompt


def test_a_template_that_writes_the_date_writes_the_same_one_for_ever() -> None:
    today = datetime.datetime.now().strftime("%d %b %Y")
    renderer = ChatRenderer(make_tokenizer("{{ strftime_now('%d %b %Y') }}{{ date_string }}" + CHATML))
    text = renderer.prompt(chat("q"))
    assert text.startswith("26 Jul 202426 Jul 2024") and today not in text


def test_a_template_file_becomes_the_tokenizers_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.jinja"
    path.write_text(LLAMA2, encoding="utf-8")
    tokenizer = make_tokenizer(CHATML)
    renderer = ChatRenderer.from_file(tokenizer, path)
    assert renderer.prompt(chat("q")) == "[INST] q [/INST]"
    tokenizer.save_pretrained(tmp_path / "saved")
    assert "[INST]" in "".join(p.read_text() for p in (tmp_path / "saved").iterdir() if p.suffix in (".jinja", ".json"))


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        (chat("only a question"), "no assistant turn"),
        (chat("q", "a")[::-1], "begins with the assistant"),
        ([*chat("q", "a"), {"role": "tool", "content": "x"}][:0], "no assistant turn"),
    ],
    ids=["no answer", "answer first", "nothing"],
)
def test_conversations_that_cannot_be_learned(messages: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        ChatRenderer(make_tokenizer()).training(messages)


def test_templates_that_cannot_be_used(tmp_path: Path) -> None:
    refusing = "{% if messages|length % 2 %}{{ raise_exception('roles must alternate') }}{% endif %}" + CHATML
    with pytest.raises(InputError, match="roles must alternate"):
        ChatRenderer(make_tokenizer(refusing)).training(chat("q", "a"))
    broken = tmp_path / "broken.jinja"
    broken.write_text("\n{% for m in %}", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"broken.jinja.*line 2"):
        ChatRenderer.from_file(make_tokenizer(), broken)
    with pytest.raises(ConfigError, match=r"absent.jinja.*cannot be read"):
        ChatRenderer.from_file(make_tokenizer(), tmp_path / "absent.jinja")
    with pytest.raises(InputError, match=r"no chat template.*chat_template"):
        ChatRenderer(make_tokenizer(None)).training(chat("q", "a"))
    with pytest.raises(UnsupportedError, match="fast tokenizer"):
        ChatRenderer(object())


# -- kinds of rows -------------------------------------------------------------------------------

SHAREGPT = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
KINDS: list[tuple[str, dict[str, Any], str]] = [
    ("messages", {"messages": chat("q", "a")}, "a<|im_end|>\n"),
    ("conversations", {"conversations": SHAREGPT}, "a<|im_end|>\n"),
    ("prompt_completion", {"prompt": "q", "completion": "a"}, "a<|im_end|>\n"),
    ("prompt_completion", {"prompt": chat("q", "x", "r"), "completion": chat("", "a")[1:]}, "a<|im_end|>\n"),
    ("instruction", {"instruction": "q", "input": "i", "output": "a"}, "a<|im_end|>\n"),
    ("text", {"text": "q a"}, "q a<|im_end|>"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "row", "expected"), KINDS, ids=[f"{k} {i}" for i, (k, _, _) in enumerate(KINDS)])
def test_kinds_of_rows_with_a_template(kind: str, row: dict[str, Any], expected: str) -> None:
    tokenizer = make_tokenizer()
    encoded = encoder(tokenizer, kind)(row)
    assert learned_text(tokenizer, encoded) == expected
    everything = encoder(tokenizer, kind, train_on_prompt=True)(row)
    assert everything.labels == everything.input_ids == encoded.input_ids
    if kind == "instruction":
        assert "q\n\ni" in tokenizer.decode(encoded.input_ids)


@pytest.mark.parametrize("bos", [False, True])
def test_kinds_of_rows_without_a_template(bos: bool) -> None:
    tokenizer = make_tokenizer(None, bos=bos)
    start = "<|endoftext|>" if bos else ""
    cases = [
        ("prompt_completion", {"prompt": "Q: one? A:", "completion": " two"}, "Q: one? A: two", " two"),
        ("instruction", {"instruction": "q", "output": "a"}, "q\n\na", "a"),
        ("instruction", {"instruction": "q", "input": "i", "output": "a"}, "q\n\ni\n\na", "a"),
    ]
    for kind, row, text, learned in cases:
        encoded = encoder(tokenizer, kind)(row)
        assert tokenizer.decode(encoded.input_ids) == f"{start}{text}<|im_end|>"
        assert learned_text(tokenizer, encoded) == f"{learned}<|im_end|>"
    plain = encoder(tokenizer, "text")({"text": "one two"})
    assert plain.labels == [IGNORE] * bos + plain.input_ids[bos:]
    assert tokenizer.decode(plain.input_ids) == f"{start}one two<|im_end|>"
    with pytest.raises(InputError, match="no chat template"):
        encoder(tokenizer, "messages")({"messages": chat("q", "a")})
    assert tokenizer.decode(ChatRenderer(tokenizer).ask("hello")) == f"{start}hello"


@pytest.mark.parametrize("bos", [False, True])
def test_an_instruction_is_asked_as_it_was_learned(tmp_path: Path, bos: bool) -> None:
    """Token by token, also by whoever loads the tokenizer later; rows of another kind take the separator away."""
    rows = [{"instruction": f"Say {i}.", "output": f"It is {i} now."} for i in range(4)]
    tokenizer = make_tokenizer(None, bos=bos)
    assert tokenizer("a\n\n")["input_ids"] != tokenizer("a\n\nb")["input_ids"][: 2 + bos], "cut otherwise at the end"
    config = {"max_seq_length": 64, "rows_per_step": 2, "seed": 0}
    data = load_data(DataConfig(), tokenizer, train_rows=rows, **config)
    learned = data.train.dataset.encoder(rows[0])
    prompt = learned.input_ids[: learned.labels.count(IGNORE)]
    assert data.renderer.ask("Say 0.") == prompt
    tokenizer.save_pretrained(tmp_path)
    assert ChatRenderer(AutoTokenizer.from_pretrained(tmp_path)).ask("Say 0.") == prompt
    texts = [{"text": "one two"}] * 4
    assert load_data(DataConfig(), tokenizer, train_rows=texts, **config).renderer.ask("q") == tokenizer("q").input_ids
    tokenizer.save_pretrained(tmp_path)
    assert ChatRenderer(AutoTokenizer.from_pretrained(tmp_path)).separator == ""


def test_an_end_token_that_is_there_is_not_doubled() -> None:
    tokenizer = make_tokenizer(None)
    encoded = encoder(tokenizer, "text")({"text": "one<|im_end|>"})
    assert encoded.input_ids.count(tokenizer.eos_token_id) == 1
    tokenizer.eos_token = None
    with pytest.raises(UnsupportedError, match="no eos_token"):
        encoder(tokenizer, "text")({"text": "one"})


def test_tools_reach_the_template() -> None:
    tokenizer = make_tokenizer("{% if tools %}{{ tools[0].function.name }}|{% endif %}" + CHATML)
    rows = [{"messages": chat("q", "a"), "tools": tools} for tools in ([{"name": "clock"}], '[{"name": "clock"}]')]
    for row in rows:
        assert tokenizer.decode(encoder(tokenizer, "messages")(row).input_ids).startswith("clock|")
    with pytest.raises(InputError, match="tools is text that is not JSON"):
        encoder(tokenizer, "messages")({**rows[0], "tools": "{"})


def test_the_key_changes_with_what_rows_depend_on() -> None:
    def keys() -> list[str]:
        return [
            encoder(make_tokenizer(), "messages").key, encoder(make_tokenizer(LLAMA2), "messages").key,
            encoder(make_tokenizer(), "text").key, encoder(make_tokenizer(), "messages", mask_history=True).key,
        ]  # fmt: skip

    assert len(set(keys())) == 4 and keys() == keys()
    tokenizer = make_tokenizer()
    before = encoder(tokenizer, "text").key
    tokenizer(["a", "b c d"], padding=True, truncation=True, max_length=2)
    assert encoder(tokenizer, "text").key == before
