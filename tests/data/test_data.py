"""Conversations become ids whose labels are exactly what the assistant says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

import lema.data
from lema.data import ChatExample, collate, encode_chat, read_jsonl
from lema.errors import InputError

pytestmark = pytest.mark.timeout(60)

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    words = ["<unk>", "<end>", "<user>", "<assistant>", "what", "is", "one", "two", "three"]
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="<end>", pad_token="<end>")
    fast.chat_template = TEMPLATE
    return fast


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEMA_CACHE", str(tmp_path / "cache"))


def messages(*turns: str) -> list[dict[str, str]]:
    return [{"role": "user" if i % 2 == 0 else "assistant", "content": turn} for i, turn in enumerate(turns)]


def test_only_assistant_turns_are_targets_and_the_end_token_is_one(tokenizer: Any) -> None:
    example = encode_chat(tokenizer, messages("what is", "one two", "what is", "three"))
    learned = tokenizer.convert_ids_to_tokens([i for i in example.labels if i != -100])
    assert learned == ["one", "two", "<end>", "three", "<end>"]
    assert [a for a, b in zip(example.input_ids, example.labels, strict=True) if b != -100] == [
        b for b in example.labels if b != -100
    ]


def test_padding_equal_to_the_end_token_hides_nothing(tokenizer: Any) -> None:
    short, long = encode_chat(tokenizer, messages("is", "one")), encode_chat(tokenizer, messages("is", "one two three"))
    batch = collate([short, long], tokenizer.pad_token_id)
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
    end = tokenizer.eos_token_id
    for row, example in enumerate((short, long)):
        length = len(example.input_ids)
        assert int((batch["labels"][row] == end).sum()) == 1
        assert batch["attention_mask"][row].sum() == length
        assert (batch["labels"][row, length:] == -100).all()


def test_refusals_name_what_is_wrong(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no assistant turn"):
        encode_chat(tokenizer, messages("what"))
    with pytest.raises(InputError, match="max_length=3"):
        encode_chat(tokenizer, messages("what is", "one two"), max_length=3)
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": []}) + "\n\n{broken\n", encoding="utf-8")
    with pytest.raises(InputError, match="line 3"):
        read_jsonl(path)
    path.write_text("[1]\n", encoding="utf-8")
    with pytest.raises(InputError, match="line 1 holds list"):
        read_jsonl(path)


def test_rows_of_the_demo_are_different_and_complete() -> None:
    rows = read_jsonl(Path(lema.data.__file__).with_name("questions.jsonl"))
    assert len({row["messages"][0]["content"] for row in rows}) == len(rows) >= 32
    assert isinstance(ChatExample([1], [1]).input_ids, list)
