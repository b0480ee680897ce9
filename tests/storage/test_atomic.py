"""Files and folders appear whole or not at all, and leave nothing behind."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lema.storage import atomic
from lema.storage.atomic import new_directory, put_in_place, replaced_directory, replaced_file, write_text
from lema.storage.complete import problem_of


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("durable", [False, True])
def test_a_file_takes_the_place_of_another(tmp_path: Path, durable: bool) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")
    with replaced_file(path, durable) as aside:
        aside.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and names(tmp_path) == ["a.json"]


@pytest.mark.parametrize("durable", [False, True])
def test_a_failure_leaves_the_file_that_was_there(tmp_path: Path, durable: bool) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), replaced_file(path, durable) as aside:
        aside.write_text("half")
        _ = 1 / 0
    assert path.read_text() == "old" and names(tmp_path) == ["a.json"]


def test_a_block_that_writes_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), replaced_file(tmp_path / "a"):
        pass
    assert names(tmp_path) == []


def test_a_text_is_written_in_utf8(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "ü\n", durable=True)
    assert (tmp_path / "a").read_bytes() == b"\xc3\xbc\n"


def test_permissions_are_those_of_any_new_file(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "a", "")
        with replaced_directory(tmp_path / "b"), new_directory(tmp_path / "c"):
            pass
    finally:
        os.umask(before)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in "abc"] == [0o640, 0o750, 0o750]


def test_a_new_directory_appears_when_it_is_full(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "model"
    with new_directory(target) as fresh:
        (fresh / "sub").mkdir()
        (fresh / "sub" / "a").write_text("1")
        assert not target.exists()
    assert (target / "sub" / "a").read_text() == "1" and names(target.parent) == ["model"]


def test_a_new_directory_takes_no_place_that_is_taken(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with pytest.raises(OSError, match="not empty"), new_directory(target) as fresh:
        (fresh / "a").write_text("ours")
        target.mkdir()
        (target / "a").write_text("theirs")
    assert (target / "a").read_text() == "theirs" and names(tmp_path) == ["model"]


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_directory_is_replaced_and_marked(tmp_path: Path, exchanges: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not exchanges:
        monkeypatch.setattr(atomic, "_exchange", lambda a, b: False)
    target = tmp_path / "checkpoint-1"
    for text in ("one", "two"):
        with replaced_directory(target) as fresh:
            (fresh / "weights").write_text(text)
        assert problem_of(target) is None and (target / "weights").read_text() == text
    assert names(tmp_path) == ["checkpoint-1"]


def test_everything_is_flushed_before_the_name_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh, target = tmp_path / "fresh", tmp_path / "target"
    (fresh / "sub").mkdir(parents=True)
    (fresh / "sub" / "a").write_text("1")
    seen: list[str] = []
    monkeypatch.setattr(atomic, "flush", lambda path: seen.append(f"{path.name} {target.exists()}"))
    put_in_place(fresh, target)
    assert seen == ["sub False", "a False", "fresh False", f"{tmp_path.name} True"]
