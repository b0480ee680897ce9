"""Rows wherever they are: the line index and its cache, other files, fingerprints, and every bad row by its place."""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_helpers import chat, encoder, make_tokenizer, write_jsonl
from lema.data import JsonlRows, ListRows, TokenDataset, detect_format, fingerprint_difference, index, open_rows
from lema.data.rows import SomeRows
from lema.errors import ConfigError, InputError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("LEMA_CACHE", str(folder))
    return folder


_LINE = st.sampled_from(
    [b"", b" ", b"\t \r", b'{"n": 1}', b'{"n": 22}\r', b'  {"n": "\xc3\xa9"}', b'{"long": "' + b"x" * 40 + b'"}']
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=st.lists(_LINE, max_size=12), ended=st.booleans(), chunk=st.integers(1, 50))
def test_the_index_finds_just_the_lines_that_are_not_blank(
    lines: list[bytes], ended: bool, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "_CHUNK", chunk)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(lines) + (b"\n" if ended and lines else b""))
    made = index._scan(path, path.stat())
    data = path.read_bytes()
    expected = [(n, line) for n, line in enumerate(data.split(b"\n"), 1) if line.strip()]
    assert [data[o : o + length] for o, length, _ in made.spans.tolist()] == [line for _, line in expected]
    assert [made.line(row) for row in range(len(expected))] == [n for n, _ in expected]


def test_the_index_is_kept_and_made_anew_when_the_file_changes(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"n": i} for i in range(10, 60)])
    first = JsonlRows(path)
    scans: list[Path] = []
    scan = index._scan
    monkeypatch.setattr(index, "_scan", lambda p, s: scans.append(p) or scan(p, s))
    again = JsonlRows(path)
    assert not scans and again.fingerprint == first.fingerprint
    assert [row["n"] for row in again] == list(range(10, 60)) and isinstance(again.byte_lengths.base, np.memmap)
    write_jsonl(path, [{"n": i} for i in range(11, 61)])  # as many bytes
    changed = JsonlRows(path)
    assert len(scans) == 1 and changed[0] == {"n": 11}
    assert "content" in str(fingerprint_difference(first.fingerprint, changed.fingerprint))
    for file in cache.iterdir():  # damaged in any way: made anew
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert JsonlRows(path)[49] == {"n": 60} and len(scans) == 2


def test_without_a_place_for_the_cache_rows_are_read_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"n": 1}])
    monkeypatch.setenv("LEMA_CACHE", str(path / "no folder"))
    assert JsonlRows(path)[0] == {"n": 1}


def test_a_file_changed_while_in_use_is_noticed(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"n": 1}, {"n": 2}])
    rows = JsonlRows(path)
    with open(path, "a", encoding="utf-8") as file:
        file.write('{"n": 3}\n')
    with pytest.raises(InputError, match="changed while it is in use"):
        rows[0]


BAD_FILES: list[tuple[str, bytes, str]] = [
    ("not JSON", b'{"text": "a"}\n\n{broken\n', r"line 3 is not JSON: .* \(character 2\)"),
    ("cut off", b'{"text": "a"}\n{"text": "b', r"line 2 is not JSON: Unterminated string"),
    ("an array on a line", b"[1]\n", r"line 1 holds list, not an object; if the file is one JSON array, name it .json"),
    ("a number", b"7\n", r"line 1 holds int"),
    ("null", b"null\n", r"line 1 holds null"),
    ("pretty printed", b'{\n  "text": "a"\n}\n', r"line 1 is not JSON.*one line"),
    ("Latin-1", b'{"text": "caf\xe9"}\n', r"line 1 is not UTF-8: byte 14 of the line is 0xe9"),
    ("UTF-16", '{"text": "a"}\n'.encode("utf-16"), r"line 1 is not UTF-8: it begins like UTF-16; .*iconv"),
    ("deep", b"[" * 100_000 + b"\n", r"line 1 is (nested too deeply|not JSON)"),
    ("huge number", b'{"text": ' + b"1" * 5000 + b"}\n", r"line 1 is not JSON that can be read.*digits"),
    ("empty", b"", r"has no rows"),
    ("blank", b"\n \n\t\n", r"has no rows"),
]  # fmt: skip


@pytest.mark.parametrize(("data", "words"), [b[1:] for b in BAD_FILES], ids=[b[0] for b in BAD_FILES])
def test_bad_lines_are_named(data: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(data)
    with pytest.raises(InputError, match=words) as caught:
        list(open_rows(path))
    assert str(path) in str(caught.value)


def test_a_byte_order_mark_is_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "bom.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n{"text": "b"}\r\n')
    assert [row["text"] for row in open_rows(path)] == ["a", "b"]


Q, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
BAD_ROWS: list[tuple[str, dict[str, Any], str]] = [
    ("messages", {"text": "a"}, r"the field 'messages' is missing; it has text"),
    ("messages", {"message": [Q, A]}, r"missing; it has message \(message\?\)"),
    ("messages", {"messages": None}, r"messages is null"),
    ("messages", {"messages": "q"}, r"messages is text, not a list"),
    ("messages", {"messages": []}, r"messages is empty"),
    ("messages", {"messages": [Q, "a"]}, r"message 2 is text, not an object"),
    ("messages", {"messages": [Q, {"content": "a"}]}, r"message 2 has no role; it has content"),
    ("messages", {"messages": [Q, {"role": "asistant", "content": "a"}]}, r"role 'asistant'.*did you mean 'assistant'"),
    ("messages", {"messages": [Q, {"role": ["user"], "content": "a"}]}, r"message 2 has the role \['user'\]"),
    ("messages", {"messages": [Q, {"role": "assistant"}]}, r"message 2 \(role assistant\) has no content"),
    ("messages", {"messages": [Q, {"role": "assistant", "content": None}]}, r"message 2 .* has no content"),
    ("messages", {"messages": [Q, {"role": "assistant", "content": " \n"}]}, r"message 2 .*content is empty"),
    ("messages", {"messages": [Q, {"role": "assistant", "content": 4}]}, r"message 2 .*content is int, not text"),
    ("messages", {"messages": [Q, {"role": "assistant", "content": [{"type": "image_url"}]}]}, r"part 1 .*'image_url'"),
    ("messages", {"messages": [Q, {"role": "assistant", "content": "\ud83d"}]}, r"half a surrogate pair"),
    ("messages", {"messages": [Q]}, r"no assistant turn"),
    ("messages", {"messages": [A, Q]}, r"begins with the assistant"),
    ("conversations", {"conversations": [{"from": "humen", "value": "q"}]}, r"from 'humen'.*did you mean 'human'"),
    ("conversations", {"conversations": [{"from": "human", "text": "q"}]}, r"turn 1 has no value; it has from, text"),
    ("conversations", {"conversations": [{"from": ["gpt"], "value": "q"}]}, r"turn 1 is from \['gpt'\]"),
    ("conversations", {"conversations": {"from": "human"}}, r"conversations is an object, not a list"),
    ("prompt_completion", {"prompt": "q"}, r"'completion' is missing"),
    ("prompt_completion", {"prompt": "q", "completion": ""}, r"completion is empty"),
    ("prompt_completion", {"prompt": "", "completion": "a"}, r"prompt is empty"),
    ("prompt_completion", {"prompt": 3, "completion": "a"}, r"prompt is int, neither text nor a list of messages"),
    ("instruction", {"instruction": "q", "output": None}, r"output is null"),
    ("instruction", {"instruction": "q", "input": 3, "output": "a"}, r"input is int, not text"),
    ("text", {"text": ""}, r"text is empty"),
    ("text", {"text": ["a"]}, r"text is a list, not text"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "row", "words"), BAD_ROWS, ids=[f"{b[0]}-{i}" for i, b in enumerate(BAD_ROWS)])
def test_bad_rows_are_named_with_their_line(kind: str, row: dict[str, Any], words: str, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [row])
    dataset = TokenDataset(open_rows(path), encoder(make_tokenizer(), kind), max_seq_length=64)
    with pytest.raises(InputError, match=words) as caught:
        dataset[0]
    assert f"{path}, line 1: " in str(caught.value)


def test_kinds_are_detected_from_the_first_readable_rows(tmp_path: Path) -> None:
    rows: dict[str, Any] = {
        "messages": {"messages": [Q, A], "text": "more"}, "text": {"text": "a", "id": 3},
        "conversations": {"conversations": []}, "prompt_completion": {"prompt": "a", "completion": "b"},
        "instruction": {"instruction": "a", "input": "", "output": "b"},
    }  # fmt: skip
    for kind, row in rows.items():
        assert detect_format(ListRows([row])) == kind
    path = tmp_path / "rows.jsonl"
    path.write_text('broken\n{"odd": 1}\n{"text": "a"}\n', encoding="utf-8")
    assert detect_format(JsonlRows(path)) == "text"
    with pytest.raises(
        InputError, match=r"the rows have question, answer, which is no known kind .*prompt and completion"
    ):
        detect_format(ListRows([{"question": 1, "answer": 2}]))
    path.write_text("broken\n", encoding="utf-8")
    with pytest.raises(InputError, match="line 1 is not JSON"):
        detect_format(JsonlRows(path))


# -- other sources -------------------------------------------------------------------------------

TABLE = [{"prompt": f'q{i}, "é"\n', "completion": str(i)} for i in range(7)]


def _csv(path: Path) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "completion"])
        writer.writeheader()
        writer.writerows(TABLE)


def _saved(path: Path) -> None:
    import datasets

    if path.suffix == ".parquet":
        datasets.Dataset.from_list(TABLE).to_parquet(path)
    else:
        datasets.Dataset.from_list(TABLE).save_to_disk(path)


WRITERS: dict[str, Callable[[Path], Any]] = {
    "rows.json": lambda path: path.write_text(json.dumps(TABLE, indent=1), encoding="utf-8"),
    "lines.json": lambda path: write_jsonl(path, TABLE),
    "rows.csv": _csv,
    "rows.parquet": _saved,
    "folder": _saved,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_gives_the_same_rows(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    WRITERS[name](path)
    rows = open_rows(path)
    assert list(rows) == TABLE and rows[3]["completion"] == "3"
    assert len(rows.byte_lengths) == len(rows) == rows.fingerprint["rows"] == 7
    assert fingerprint_difference(rows.fingerprint, open_rows(path).fingerprint) is None
    assert name in rows.where(0)
    json.dumps(rows.fingerprint)


def test_csv_answers_that_look_like_something_else_stay_text(tmp_path: Path) -> None:
    path = tmp_path / "odd.csv"
    path.write_text("prompt,completion\na,007\nb,None\nc,1e3\nd,2024-01-01\ne,\n", encoding="utf-8")
    assert [row["completion"] for row in open_rows(path)] == ["007", "None", "1e3", "2024-01-01", ""]


def test_rows_in_python(tmp_path: Path) -> None:
    import datasets

    plain, table = open_rows(TABLE), open_rows(datasets.Dataset.from_list(TABLE))
    assert list(plain) == list(table) == TABLE
    assert plain.fingerprint == table.fingerprint and plain.byte_lengths.tolist() == table.byte_lengths.tolist()
    assert open_rows(plain) is plain
    with pytest.raises(InputError, match="row 2 holds str"):
        open_rows([{}, "a"])[1]
    for wrong, words in (([], "no rows"), ({"a": 1}, "type dict"), (iter(TABLE), "cannot be asked for by number")):
        with pytest.raises(InputError, match=words):
            open_rows(wrong)


def test_sources_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    (tmp_path / "rows.txt").write_text("a", encoding="utf-8")
    (tmp_path / "broken.json").write_text('[{"a": 1}, {', encoding="utf-8")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 not really")
    (tmp_path / "twice.csv").write_text("a,a\n1,2\n", encoding="utf-8")
    (tmp_path / "latin.csv").write_bytes(b"prompt,caf\xe9\n")
    (tmp_path / "folder").mkdir()
    datasets.DatasetDict(train=datasets.Dataset.from_list(TABLE)).save_to_disk(tmp_path / "splits")
    for name, words in {
        "absent.jsonl": "does not exist", "rows.txt": r"ending '.txt' is not known", "broken.json": "row 2 is not JSON",
        "broken.parquet": "cannot be read", "twice.csv": "each once", "latin.csv": "UTF-8", "folder": "save_to_disk",
        "splits": r"several splits: give one of .*splits/train",
    }.items():  # fmt: skip
        with pytest.raises(InputError, match=words):
            open_rows(tmp_path / name)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"pip install 'datasets>=3'"):
        open_rows(tmp_path / "broken.parquet")


def test_fingerprints_say_what_differs() -> None:
    rows = ListRows([{"text": str(i)} for i in range(9)])
    fewer = ListRows([{"text": str(i)} for i in range(8)])
    other = ListRows([{"text": str(i)} for i in (*range(8), 9)], name="other")
    assert fingerprint_difference(rows.fingerprint, rows.fingerprint) is None
    assert "9 rows then, 8 now" in str(fingerprint_difference(rows.fingerprint, fewer.fingerprint))
    difference = str(fingerprint_difference(rows.fingerprint, other.fingerprint))
    assert "dataset then, other now" in difference and "content" in difference and "rows then" not in difference
    some, others = (SomeRows(rows, np.array(chosen)) for chosen in ([0, 1], [0, 2]))
    assert "held out" in str(fingerprint_difference(some.fingerprint, others.fingerprint))
    moved = {**rows.fingerprint, "name": "elsewhere"}
    assert fingerprint_difference(moved, rows.fingerprint) is None


# -- size ----------------------------------------------------------------------------------------


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _read_some(path: Path, rows: int) -> tuple[int, float]:
    """Growth of memory over an index and `rows` random rows, and seconds until the first."""
    import time

    before, started = _resident(), time.perf_counter()
    data = JsonlRows(path)
    data[len(data) - 1]
    seconds = time.perf_counter() - started
    for i in np.random.default_rng(0).integers(0, len(data), rows).tolist():
        assert data[i]["messages"][1]["content"].startswith(f"answer {i} ")
    return _resident() - before, seconds


def _write_many(path: Path, rows: int, width: int) -> None:
    with open(path, "w", encoding="utf-8") as file:
        for start in range(0, rows, 1000):
            file.write("".join(
                json.dumps({"messages": chat(f"question {i}", f"answer {i} " + "word " * (width // 5))}) + "\n"
                for i in range(start, min(start + 1000, rows))
            ))  # fmt: skip


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    _write_many(path, 40_000, 2000)
    assert path.stat().st_size > 80e6
    for _ in range(2):  # without and with a cached index
        grown, _ = _read_some(path, 2000)
        assert grown < 50e6, grown


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_million_rows_in_a_gigabyte_are_there_at_once(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    _write_many(path, 1_000_000, 900)
    assert path.stat().st_size > 1e9
    grown, first = _read_some(path, 20_000)
    assert grown < 100e6 and first < 15, (grown, first)
    grown, first = _read_some(path, 20_000)
    assert grown < 60e6 and first < 2, (grown, first)
