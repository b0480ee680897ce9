"""Where rows may come from: tables, arrays, compressed files, patterns, standard input, data sets by name, frames."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from data_helpers import chat, encoder, make_tokenizer, write_jsonl
from lema.data import DataConfig, TokenDataset, array_rows, fingerprint_difference, load_data, open_rows, read_jsonl
from lema.data.unpack import unpacked
from lema.data.views import MappedRows
from lema.errors import ConfigError, InputError
from lema.training.run_config import RunConfig

TABLE = [{"prompt": f'q{i}, "é"\n', "completion": str(i)} for i in range(7)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("LEMA_CACHE", str(folder))
    return folder


# -- CSV and TSV ---------------------------------------------------------------------------------


def _is_refused(path: Path, text: str, words: str) -> None:
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=words):
        open_rows(path)


@pytest.mark.parametrize(("ending", "sign", "said"), [("csv", ",", "comma"), ("tsv", "\t", "tab")])
def test_a_row_with_more_or_fewer_fields_than_columns_is_named(
    ending: str, sign: str, said: str, tmp_path: Path
) -> None:
    path = tmp_path / f"rows.{ending}"
    lines = ["prompt,completion", "Hello", '"two', 'lines",b', "", "a,b,c", "a,", "x,y"]
    path.write_text("\n".join(lines).replace(",", sign), encoding="utf-8")
    rows = open_rows(path)
    assert len(rows) == 5 and rows[1] == {"prompt": "two\nlines", "completion": "b"} and rows[4]["completion"] == "y"
    assert rows[3] == {"prompt": "a", "completion": ""}
    with pytest.raises(
        InputError, match=rf"rows.{ending}, line 2 has 1 field, and line 1 names 2 \(prompt, completion\)"
    ):
        rows[0]
    with pytest.raises(InputError, match=rf"rows.{ending}, line 6 has 3 fields.*has a {said} in it between double"):
        rows[2]
    assert [rows.where(i).rpartition(" ")[2] for i in range(5)] == ["2", "3", "6", "7", "8"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "line 1 must name the columns"), ("prompt,completion\n", "nothing after the line"),
        ("a,a\n1,2\n", "each once"),
        ("prompt;completion\na;b\n", "separated by a comma, not by a semicolon"),
        ("prompt\tcompletion\na\tb\n", "not by a tab"),
        ('prompt,completion\na,b\n"open,b\nc,d\n', "line 3: the record that begins here is not well formed"),
        ('prompt,completion\n"a"b,c\n', "line 2: the record that begins here"),
    ],
)  # fmt: skip
def test_tables_that_are_none(text: str, words: str, tmp_path: Path) -> None:
    _is_refused(tmp_path / "rows.csv", text, words)


def test_bytes_of_a_table_that_are_no_text_are_named_by_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b"prompt,completion\na,b\ncaf\xe9,c\n")
    with pytest.raises(InputError, match=r"line 3 is not UTF-8: byte 4 of the line is 0xe9"):
        open_rows(path)


# -- JSON arrays ---------------------------------------------------------------------------------

_VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3), max_leaves=5,
)  # fmt: skip


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.dictionaries(st.text(max_size=4), _VALUE, max_size=3), min_size=1, max_size=6),
    indent=st.sampled_from([None, 0, 2]), ascii_only=st.booleans(), chunk=st.integers(1, 60), mark=st.booleans(),
)  # fmt: skip
def test_an_array_gives_its_elements_however_it_is_read(
    rows: list[Any], indent: int | None, ascii_only: bool, chunk: int, mark: bool, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(array_rows, "_CHUNK", chunk)
    monkeypatch.setenv("LEMA_CACHE", str(tmp_path / "rows.json" / "none"))
    path = tmp_path / "rows.json"
    text = json.dumps(rows, indent=indent, ensure_ascii=ascii_only) + "\n "
    path.write_text(text, encoding="utf-8-sig" if mark else "utf-8", errors="surrogatepass")
    assert list(open_rows(path)) == rows


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[]", "the array is empty"), ('[{"a": 1}', "ends inside the array|, is expected"), ('[{"a": 1}] 3', "follows"),
        ('[{"a": 1} {"b": 2}]', ", is expected here, and there is {"),
        ('[\n{"a": 1},\n{"b": }]', "line 3: row 2 is not JSON"),
        ('[{"a": "b', "row 1 is not JSON: Unterminated"), ("[" * 100_000, "row 1 is (nested|not JSON)"),
        ('[{"a": ' + "1" * 5000 + "}]", "row 1 is not JSON that can be read"),
    ],
)  # fmt: skip
def test_arrays_that_are_none(text: str, words: str, tmp_path: Path) -> None:
    _is_refused(tmp_path / "rows.json", text, words)


def test_rows_of_an_array_keep_their_types_and_are_named(tmp_path: Path) -> None:
    rows = [{"text": "2024-01-01T00:00:00"}, {"text": 1}, {"other": [1, "a", None]}]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    found = open_rows(path)
    assert list(found) == rows and found.where(1).endswith("rows.json, row 2 (line 5)")
    path.write_text('[{"text": "a"}, 3]', encoding="utf-8")
    with pytest.raises(InputError, match=r"row 2 \(line 1\) holds int"):
        open_rows(path)[1]


# -- compressed, many, piped ---------------------------------------------------------------------


def _zstd(data: bytes) -> bytes:
    import pyarrow

    packed: bytes = pyarrow.compress(data, codec="zstd", asbytes=True)
    return packed


PACKERS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": _zstd}


@pytest.mark.parametrize("ending", PACKERS)
def test_compressed_files_are_the_same_rows(ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = write_jsonl(tmp_path / "rows.jsonl", TABLE)
    packed = tmp_path / f"rows.jsonl{ending}"
    packed.write_bytes(PACKERS[ending](plain.read_bytes()))
    for _ in range(2):
        rows = open_rows(packed)
        assert list(rows) == TABLE and rows.where(2) == f"{packed}, line 3"
        assert fingerprint_difference(rows.fingerprint, open_rows(plain).fingerprint) is None
    packed.write_bytes(PACKERS[ending](b'{"text": "new"}\n[1]\n'))
    rows = open_rows(packed)
    assert rows[0] == {"text": "new"}
    with pytest.raises(InputError, match=rf"rows.jsonl{ending}, line 2 holds list"):
        rows[1]
    assert len(list((tmp_path / "cache" / "unpacked").rglob("*.jsonl"))) == 1
    monkeypatch.setenv("LEMA_CACHE", str(plain / "none"))
    assert open_rows(packed)[0] == {"text": "new"}
    for broken in (packed.read_bytes()[:-9], b"no " * 99):
        packed.write_bytes(broken)
        with pytest.raises(InputError, match=rf"rows.jsonl{ending} (is damaged|cannot be unpacked)"):
            open_rows(packed)


def test_other_kinds_compressed(tmp_path: Path) -> None:
    for name, text in (
        ("a.json.gz", json.dumps(TABLE)), ("b.csv.gz", "prompt,completion\na,1\n"),
        ("c.tsv.gz", "prompt\tcompletion\na\t1\n"),
    ):  # fmt: skip
        (tmp_path / name).write_bytes(gzip.compress(text.encode()))
        assert open_rows(tmp_path / name)[0]["completion"] in "01"
    (tmp_path / "d.csv.gz").write_bytes(gzip.compress(b"prompt,completion\na,1,2\n"))
    with pytest.raises(InputError, match=r"d.csv.gz, line 2 has 3 fields"):
        open_rows(tmp_path / "d.csv.gz")[0]
    for name in ("e.gz", "f.txt.gz"):
        (tmp_path / name).write_bytes(gzip.compress(b"{}"))
        with pytest.raises(InputError, match=r"ending .* is not known"):
            open_rows(tmp_path / name)


def test_a_pattern_is_all_files_that_fit(tmp_path: Path) -> None:
    tmp_path = tmp_path / "data"
    (tmp_path / "more").mkdir(parents=True)
    write_jsonl(tmp_path / "b.jsonl", TABLE[2:4])
    write_jsonl(tmp_path / "a.jsonl", TABLE[:2])
    (tmp_path / "more" / "c.json").write_text(json.dumps(TABLE[4:]), encoding="utf-8")
    assert list(open_rows(str(tmp_path / "[ab].jsonl"))) == TABLE[:4]
    rows = open_rows(str(tmp_path / "**" / "*.json*"))
    assert list(rows) == TABLE and len(rows.byte_lengths) == 7 and rows.fingerprint["rows"] == 7
    assert rows.where(2).endswith("b.jsonl, line 1") and rows.where(6).endswith("c.json, row 3 (line 1)")
    before = rows.fingerprint
    write_jsonl(tmp_path / "a.jsonl", [TABLE[1], TABLE[0]])
    assert "content" in str(fingerprint_difference(before, open_rows(str(tmp_path / "**" / "*.json*")).fingerprint))
    with pytest.raises(InputError, match=r"\*.csv fits no file"):
        open_rows(str(tmp_path / "*.csv"))


def test_a_pattern_beside_the_file_of_a_run(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", TABLE)
    (tmp_path / "run.yaml").write_text(
        "model_name_or_path: m\ntrain_file: '*.jsonl'\ncolumns: {prompt: question, history: null}\non_bad_row: skip\n",
        encoding="utf-8",
    )
    run = RunConfig.from_yaml(tmp_path / "run.yaml")
    assert run.data.train_file == str(tmp_path / "*.jsonl") and run.data.on_bad_row == "skip"
    assert run.data.columns == {"prompt": "question", "history": None}
    assert RunConfig.from_yaml(run.save(tmp_path / "out")).data == run.data
    changed = RunConfig.from_yaml(tmp_path / "run.yaml", {"columns": '{"text": "body"}'})
    assert changed.data.columns == {"text": "body"}


class _Input(io.TextIOWrapper):
    def isatty(self) -> bool:
        return False


@pytest.mark.parametrize("packed", [False, True])
def test_standard_input(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in TABLE).encode()
    for data in (lines, json.dumps(TABLE, indent=1).encode()):
        monkeypatch.setattr(sys, "stdin", _Input(io.BytesIO(gzip.compress(data) if packed else data)))
        rows = open_rows("-")
        assert list(rows) == TABLE and rows.where(0).startswith("standard input, ")
        assert rows.fingerprint["name"] == "standard input"
    monkeypatch.setattr(sys, "stdin", _Input(io.BytesIO(b"{oops\n")))
    with pytest.raises(InputError, match="standard input, line 1 is not JSON"):
        open_rows("-")[0]
    monkeypatch.setattr(sys, "stdin", _Input(io.BytesIO(b"")))
    with pytest.raises(InputError, match="standard input has no rows"):
        open_rows("-")
    monkeypatch.setattr(_Input, "isatty", lambda self: True)
    with pytest.raises(InputError, match="nothing is piped in"):
        open_rows("-")
    with pytest.raises(ConfigError, match="can be read once"):
        DataConfig(train_file="-", eval_file="-")


def test_data_check_reads_standard_input(tmp_path: Path) -> None:
    from lema.cli.app import app

    make_tokenizer().save_pretrained(tmp_path)
    lines = "".join(json.dumps({"messages": chat("q", "a")}) + "\n" for _ in range(3))
    result = CliRunner().invoke(app, ["data", "check", "-", "--model", str(tmp_path)], input=lines)
    assert result.exit_code == 0 and "3 rows, read as messages" in result.output


# -- what is no file -----------------------------------------------------------------------------


@pytest.mark.timeout(60)
@pytest.mark.parametrize("read", [open_rows, read_jsonl, lambda path: open_rows(str(path)[:-1] + "?")])
def test_pipes_and_devices_are_refused_at_once(read: Any, tmp_path: Path) -> None:
    started = time.monotonic()
    for name in ("rows.jsonl", "rows.json", "rows.csv", "rows.parquet", "rows.jsonl.gz", "rows.txt"):
        path = tmp_path / name
        os.mkfifo(path)
        with pytest.raises(InputError, match=r"is a named pipe, and rows are read more than once.*give - as the file"):
            read(path)
    (tmp_path / "zero.jsonl").symlink_to("/dev/zero")
    with pytest.raises(InputError, match=r"zero.jsonl is a device"):
        read(tmp_path / "zero.jsonl")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s.jsonl"))
        with pytest.raises(InputError, match="is a socket"):
            read(tmp_path / "s.jsonl")
    assert time.monotonic() - started < 30
    with pytest.raises(InputError, match="is a device"):
        open_rows("/dev/zero")


# -- data sets by name ---------------------------------------------------------------------------


@pytest.mark.long
def test_data_sets_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "owner" / "name"
    folder.mkdir(parents=True)
    write_jsonl(folder / "train.jsonl", TABLE)
    write_jsonl(folder / "test.jsonl", TABLE[:3])
    for name, expected in (
        ("hf://owner/name", TABLE), ("hf://datasets/owner/name:test", TABLE[:3]),
        ("hf://owner/name:train[2:4]", TABLE[2:4]),
        ("hf://owner/name/default:train", TABLE),
    ):  # fmt: skip
        rows = open_rows(name)
        assert list(rows) == expected and rows.where(0).startswith("hf://owner/name"), name
        assert len(rows.fingerprint["sha256"]) == 64
    prints = [open_rows(f"hf://owner/name:train{part}").fingerprint for part in ("[:2]", "[2:4]", "[:2]")]
    assert fingerprint_difference(prints[0], prints[1]) and not fingerprint_difference(prints[0], prints[2])
    for name, words in (
        ("hf://owner/name:dev", "dev"), ("hf://owner/name/other:train", "other"), ("hf://owner", "does not exist"),
        ("owner/rows.jsonl", "rows.jsonl does not exist"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=words):
            open_rows(name)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match="hf://owner/absent:train cannot be read as a data set of the hub"):
        open_rows("owner/absent")


# -- frames --------------------------------------------------------------------------------------


def test_pandas_frames() -> None:
    import pandas

    frame = pandas.DataFrame(TABLE, index=range(10, 17))
    rows = open_rows(frame)
    assert list(rows) == TABLE and len(rows.byte_lengths) == 7 and rows.fingerprint["rows"] == 7
    frame = pandas.DataFrame({"messages": [chat("q", "a"), None], "id": [1, None], "when": [pandas.NaT, pandas.NaT]})
    assert open_rows(frame)[0] == {"messages": chat("q", "a"), "id": 1.0, "when": None}
    assert open_rows(frame)[1] == {"messages": None, "id": None, "when": None}
    with pytest.raises(InputError, match="no rows"):
        open_rows(frame[:0])


def test_polars_frames() -> None:
    import polars

    rows = [{"messages": chat("q", "a"), "tools": [{"a": 1}]}, {"messages": chat("r", "b"), "tools": [{"b": 2}]}]
    frame = polars.DataFrame(rows, strict=False)
    assert list(open_rows(polars.DataFrame(TABLE))) == list(open_rows(polars.LazyFrame(TABLE))) == TABLE
    assert list(open_rows(frame)) == rows


# -- fields under other names --------------------------------------------------------------------


def test_fields_under_other_names(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"question": f"q{i}", "answer": f"a{i}", "prompt": "old", "label": 1} for i in range(4)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)

    def load(columns: Any, **more: Any) -> Any:
        config = DataConfig(train_file=str(path), columns=columns, **more)
        return load_data(config, make_tokenizer(), max_seq_length=64, rows_per_step=4, seed=0)

    data = load({"prompt": "question", "completion": "answer", "label": None})
    assert data.summary["train"]["format"] == "prompt_completion" and data.summary["train"]["sample"]["kept"] == 4
    assert set(data.summary["train"]["sample"]["unused_fields"]) == {
        "prompt (set aside by columns)", "label (set aside by columns)"
    }  # fmt: skip
    with pytest.raises(InputError, match="the row has label"):
        load({"prompt": "question", "completion": "answer"})
    with pytest.raises(
        ConfigError, match=r"completion is to be read from 'anwser', and the first rows .* have question"
    ):
        load({"prompt": "question", "completion": "anwser"})
    swapped = MappedRows(
        open_rows([{"prompt": "a", "completion": "b"}]), {"prompt": "completion", "completion": "prompt"}
    )
    assert swapped[0] == {"prompt": "b", "completion": "a"}
    other = load({"prompt": "answer", "completion": "question", "label": None})
    assert "columns" in str(
        fingerprint_difference(data.train.dataset.rows.fingerprint, other.train.dataset.rows.fingerprint)
    )
    for columns in ({"prompt": ""}, {"prompt": 3}, ["prompt"], {"": "a"}, {"a": "x", "b": "x"}):
        with pytest.raises(ConfigError, match="columns"):
            DataConfig(columns=columns)  # type: ignore[arg-type]


# -- bad rows ------------------------------------------------------------------------------------


def _with_bad(path: Path, good: int, bad: int) -> Path:
    write_jsonl(path, [{"messages": chat(f"q{i}", "a")} for i in range(good)])
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(["{oops\n", '{"messages": []}\n'][i % 2] for i in range(bad))
    return path


@pytest.mark.parametrize("packing", [False, True])
def test_bad_rows_are_skipped_counted_and_reported(
    packing: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = _with_bad(tmp_path / "rows.jsonl", 40, 3)
    config = DataConfig(train_file=str(path), on_bad_row="skip", packing=packing)
    data = load_data(config, make_tokenizer(), max_seq_length=32, rows_per_step=4, seed=0)
    sample = data.summary["train"]["sample"]
    assert (
        sample["dropped"] == {"bad": 3} and len(sample["bad_rows"]) == 3 and sample["kept"] == 40 and not sample["bad"]
    )
    batches = [next(data.train) for _ in range(data.train.steps_per_epoch)]
    assert sum(batch.rows for batch in batches) == 40 and data.train.counts["bad"] == 3
    assert "skipped: " in caplog.text and "line 41 is not JSON" in caplog.text and "(3 bad)" in caplog.text
    with pytest.raises(InputError, match="line 41 is not JSON"):
        load_data(DataConfig(train_file=str(path)), make_tokenizer(), max_seq_length=32, rows_per_step=4, seed=0)


def test_too_many_bad_rows_stop_the_run(tmp_path: Path) -> None:
    path = _with_bad(tmp_path / "rows.jsonl", 20, 5)
    config = DataConfig(train_file=str(path), on_bad_row="skip")
    data = load_data(config, make_tokenizer(), max_seq_length=32, rows_per_step=25, seed=0)
    with pytest.raises(
        InputError, match=r"5 of 25 rows \(20.0%\) are dropped \(5 bad\), more than.*The first bad row: .*line"
    ):
        next(data.train)
    config = DataConfig(train_file=str(path), on_bad_row="skip", max_dropped=0.3)
    data = load_data(config, make_tokenizer(), max_seq_length=32, rows_per_step=25, seed=0)
    assert next(data.train).rows == 20


def test_a_file_that_changed_is_no_bad_row(tmp_path: Path) -> None:
    path = _with_bad(tmp_path / "rows.jsonl", 4, 0)
    dataset = TokenDataset(
        open_rows(path), encoder(make_tokenizer(), "messages"), max_seq_length=32, on_bad_row="skip"
    )  # fmt: skip
    path.write_text("{}\n", encoding="utf-8")
    with pytest.raises(InputError, match="changed while it is in use"):
        dataset[0]
    with pytest.raises(ConfigError, match="on_bad_row='ignore' is unknown"):
        DataConfig(on_bad_row="ignore")


def test_a_compressed_parquet_file_is_refused_before_it_is_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LEMA_CACHE", str(tmp_path / "cache"))
    (tmp_path / "rows.parquet.gz").write_bytes(gzip.compress(b"PAR1"))
    with pytest.raises(InputError, match="compressed inside"):
        open_rows(tmp_path / "rows.parquet.gz")
    assert not (tmp_path / "cache" / "unpacked").exists()


def test_what_another_process_is_unpacking_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEMA_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "a"}\n'))
    first = unpacked(path)
    theirs = first.with_suffix(".1.tmp")
    theirs.write_bytes(b"half")
    path.write_bytes(gzip.compress(b'{"text": "another"}\n'))
    second = unpacked(path)
    assert second.read_bytes() == b'{"text": "another"}\n' and theirs.is_file() and not first.exists()
