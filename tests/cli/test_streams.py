"""Output that is not UTF-8: characters are replaced, JSON loses nothing, and nothing ends in a traceback."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from data_helpers import CHATML, chat, make_tokenizer, write_jsonl
from lema.cli.streams import as_json, replace_what_does_not_fit

TEXT = "漢 🙂 é"


@pytest.mark.parametrize(("encoding", "shown"), [("latin-1", "? ? é"), ("ascii", "? ? ?"), ("utf-8", TEXT)])
def test_what_does_not_fit_is_replaced(monkeypatch: pytest.MonkeyPatch, encoding: str, shown: str) -> None:
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    replace_what_does_not_fit()
    for stream in (sys.stdout, sys.stderr):
        stream.write(TEXT)
        stream.flush()
        assert stream.buffer.getvalue().decode(encoding) == shown
    assert json.loads(as_json({"a": TEXT})) == {"a": TEXT}
    assert (TEXT in as_json(TEXT)) == (encoding == "utf-8")


@pytest.mark.timeout(240)
@pytest.mark.long
def test_a_verb_in_a_terminal_of_another_alphabet(tmp_path: Path) -> None:
    make_tokenizer(CHATML).save_pretrained(tmp_path / "model")
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"messages": chat(TEXT, TEXT)}] * 3)
    done = subprocess.run(
        [sys.executable, "-m", "lema", "data", "check", str(rows), "--model", str(tmp_path / "model")],
        capture_output=True, timeout=230, env={**os.environ, "PYTHONIOENCODING": "latin-1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stderr and "é".encode("latin-1") in done.stdout
