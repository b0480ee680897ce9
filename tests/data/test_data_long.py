"""A row costs what its kept tokens cost, however long it is; a file costs no memory, however large it is."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_helpers import CHATML, LLAMA2, MARKED, chat, encoder, make_metaspace_tokenizer, make_tokenizer, write_jsonl
from lema.data import ListRows, TokenDataset, open_rows, prefix, tokens, turns
from lema.data.survey import survey
from lema.data.tokens import Tokens
from lema.errors import InputError

LIMIT = 256


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEMA_CACHE", str(tmp_path / "cache"))


def _dataset(kind: str, row: dict[str, Any], template: str | None = CHATML, **more: Any) -> TokenDataset:
    encode = encoder(make_tokenizer(template), kind, limit=LIMIT)
    return TokenDataset(ListRows([row]), encode, max_seq_length=LIMIT, **more)


def _rows(size: int) -> dict[str, tuple[str, dict[str, Any], str | None]]:
    words = "one two three " * (size // 14)
    talk = [turn for number in range(size // 400) for turn in (f"question {number}", "answer " * 50)]
    return {
        "an answer": ("messages", {"messages": chat("q", words)}, CHATML),
        "a marked answer": ("messages", {"messages": chat("q", words)}, MARKED),
        "a question": ("messages", {"messages": chat("q " + words, "a")}, CHATML),
        "many turns": ("messages", {"messages": chat(*talk)}, CHATML),
        "a text": ("text", {"text": words}, None),
        "one word": ("text", {"text": "x" * size}, None),
        "a completion": ("prompt_completion", {"prompt": "q", "completion": words}, None),
    }


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", _rows(800))
def test_a_row_of_20_mb_costs_what_its_kept_tokens_cost(name: str) -> None:
    kind, row, template = _rows(20_000_000)[name]
    dataset = _dataset(kind, row, template)
    asked: list[int] = []
    tokenizer = dataset.encoder.renderer.tokenizer  # type: ignore[attr-defined]
    call = type(tokenizer)._encode_plus

    def counted(self: Any, text: Any, *args: Any, **kwargs: Any) -> Any:
        asked.append(len(text))
        return call(self, text, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(tokenizer), "_encode_plus", counted)
        encoded, length = dataset.measured(0)
    assert sum(asked) < 1_000_000
    if name == "a question":
        assert encoded.reason == "no target"  # type: ignore[union-attr]
        return
    assert len(encoded.input_ids) == LIMIT and encoded.cut_from == length > 1_000_000  # type: ignore[union-attr]


@pytest.mark.parametrize("name", _rows(800))
def test_the_beginning_of_a_long_row_is_that_of_the_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, row, template = _rows(150_000)[name]
    short = _dataset(kind, row, template).measured(0)
    monkeypatch.setattr(prefix, "_WHOLE", 1 << 30)
    whole = _dataset(kind, row, template).measured(0)
    if name == "a question":
        assert short[0] == whole[0]
        return
    assert (short[0].input_ids, short[0].labels) == (whole[0].input_ids, whole[0].labels)  # type: ignore[union-attr]
    assert abs(short[1] - whole[1]) < 0.1 * whole[1]


_TOKENIZERS = {
    "bytes": make_tokenizer(None), "with a first token": make_tokenizer(None, bos=True),
    "words": make_metaspace_tokenizer(None, "first"), "all spaces": make_metaspace_tokenizer(None, "always"),
}  # fmt: skip
_PIECES = st.sampled_from(
    ["one ", "capital", " of  ", "\n\n", "é", "漢字", "🙂", "<|im_end|>", "x" * 70, " \t ", "Norway? "]
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    pieces=st.lists(_PIECES, min_size=1, max_size=40), name=st.sampled_from(list(_TOKENIZERS)), limit=st.integers(1, 40)
)
def test_first_tokens_are_those_of_the_whole_text(
    pieces: list[str], name: str, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefix, "_WHOLE", 40)
    monkeypatch.setattr(prefix, "_PER_TOKEN", 2)
    monkeypatch.setattr(prefix, "_MARGIN", 100)
    tokenizer, text = _TOKENIZERS[name], "".join(pieces) * 4
    encode = Tokens(tokenizer).begun
    (whole, whole_offsets), none = prefix.first_tokens(encode, text)
    (ids, offsets), length = prefix.first_tokens(encode, text, limit)
    assert none is None and ids == whole[: len(ids)] and offsets == whole_offsets[: len(ids)]
    assert (length is None and len(ids) == len(whole)) or (length is not None and len(ids) > limit)


def test_a_row_far_too_long_is_dropped_refused_and_counted() -> None:
    row = {"text": "one two three " * 100_000}
    assert _dataset("text", row, too_long="drop").measured(0)[0].reason == "too long"  # type: ignore[union-attr]
    with pytest.raises(InputError, match=r"row 1 has about \d{6,} tokens, more than max_seq_length=256"):
        _dataset("text", row, too_long="error")[0]
    found = survey(_dataset("text", row), [0])
    assert found.truncated == found.kept == 1 and found.lengths[0] > 100_000 and not found.whole


# -- many turns ----------------------------------------------------------------------------------

_ALONE = "{% for m in messages %}{{ m.role|upper }}: {{ m.content }}\n{% endfor %}"
_MANY_TURNS = {
    "headers": CHATML, "no headers": LLAMA2, "marked": MARKED,
    "cut at each prompt": _ALONE + "{% if add_generation_prompt %}ASSISTANT: {% endif %}",
    "numbered": CHATML.replace("{{ m.role }}", "{{ m.role }} {{ loop.index }}").replace(
        ">assistant", ">assistant {{ messages|length + 1 }}"
    ),
    "another end": CHATML + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}",
}  # fmt: skip


def _talk(turns: int) -> list[dict[str, str]]:
    return chat(*(f"{'answer' if n % 2 else 'question'} {n} of many" for n in range(turns)), system="one two")


@pytest.mark.parametrize("on_prompt", [False, True])
@pytest.mark.parametrize("name", _MANY_TURNS)
def test_turns_found_from_those_near_them_are_those_of_the_whole(
    name: str, on_prompt: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = encoder(make_tokenizer(_MANY_TURNS[name]), "messages", train_on_prompt=on_prompt)
    row = {"messages": _talk(90)}
    monkeypatch.setattr(turns, "_WHOLE", 1 << 30)
    monkeypatch.setattr(tokens, "_REACH", 1 << 30)
    whole = encode(row)
    monkeypatch.setattr(turns, "_WHOLE", 8)
    monkeypatch.setattr(tokens, "_REACH", 200)
    assert encode(row) == whole and whole.num_targets > 90


def test_a_turn_far_back_that_is_rewritten_is_still_refused() -> None:
    forgets = CHATML.replace("{{ m.content }}", "{{ m.content if loop.revindex < 60 else 'gone' }}")
    with pytest.raises(InputError, match=r"differently once it is answered: .* became .*gone"):
        encoder(make_tokenizer(forgets), "messages")({"messages": _talk(90)[1:]})
    late = "{{ ' late' if m.role == 'user' and loop.index > 50 and messages|length > 80 }}"
    longer = CHATML.replace("{{ m.role }}", "{{ m.role }}" + late)
    with pytest.raises(InputError, match=r"rewrites message 5\d once others follow"):
        encoder(make_tokenizer(longer), "messages")({"messages": _talk(90)[1:]})


@pytest.mark.parametrize("name", ["headers", "marked", "cut at each prompt"])
def test_what_turns_cost_grows_as_their_number(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = make_tokenizer(_MANY_TURNS[name])
    encode = encoder(tokenizer, "messages")
    written, read = [], []
    render, call = type(tokenizer).apply_chat_template, type(tokenizer)._encode_plus

    def counted(self: Any, messages: Any, *args: Any, **kwargs: Any) -> Any:
        written.append(len(messages))
        return render(self, messages, *args, **kwargs)

    def counted_text(self: Any, text: Any, *args: Any, **kwargs: Any) -> Any:
        read.append(len(text))
        return call(self, text, *args, **kwargs)

    monkeypatch.setattr(type(tokenizer), "apply_chat_template", counted)
    monkeypatch.setattr(type(tokenizer), "_encode_plus", counted_text)
    cost = []
    for count in (200, 400):
        written.clear(), read.clear()
        encode({"messages": _talk(count)})
        cost.append((sum(written), sum(read)))
    assert all(twice < 2.4 * once for once, twice in zip(*cost, strict=True)), cost


# -- memory --------------------------------------------------------------------------------------


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", ["csv", "json"])
def test_memory_does_not_grow_with_a_table_or_an_array(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows.{kind}"
    rows = ({"prompt": f"question {i}", "completion": f"answer {i} " + "word " * 400} for i in range(30_000))
    with open(path, "w", encoding="utf-8", newline="") as file:
        if kind == "csv":
            writer = csv.DictWriter(file, ["prompt", "completion"])
            writer.writeheader()
            writer.writerows(rows)
        else:
            file.writelines(f"{',' if i else '['}{json.dumps(row)}\n" for i, row in enumerate(rows))
            file.write("]")
    assert path.stat().st_size > 60e6
    for _ in range(2):  # without and with a kept index
        before = _resident()
        data = open_rows(path)
        for i in np.random.default_rng(0).integers(0, len(data), 500).tolist():
            assert data[i]["completion"].startswith(f"answer {i} ")
        assert _resident() - before < 40e6


def test_fields_longer_than_the_library_allows_by_itself(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("prompt,completion\na," + "word " * 100_000 + "\n", encoding="utf-8")
    assert len(open_rows(path)[0]["completion"]) == 500_000
    assert open_rows(write_jsonl(tmp_path / "rows.jsonl", [{"text": "a" * 500_000}]))[0]["text"].count("a") == 500_000
