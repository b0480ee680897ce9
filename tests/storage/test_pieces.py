"""Stored bytes come by the piece, equal to what is in the file, or with a word on where the file ends."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lema.errors import ReadError
from lema.storage import pieces
from lema.storage.header import TensorRecord
from lema.storage.pieces import read_elements, read_pieces


@pytest.fixture
def stored(tmp_path: Path) -> tuple[TensorRecord, torch.Tensor]:
    values = torch.arange(1000, dtype=torch.float32)
    (tmp_path / "w").write_bytes(b"head" + values.numpy().tobytes())
    return TensorRecord("w", tmp_path / "w", 4, 4000, torch.float32, (10, 100)), values


@pytest.mark.parametrize(("start", "count"), [(0, 1000), (0, 0), (1000, 0), (7, 1), (990, 10)])
def test_elements(stored: tuple[TensorRecord, torch.Tensor], start: int, count: int) -> None:
    record, values = stored
    assert torch.equal(read_elements(record, start, count), values[start : start + count])


@pytest.mark.parametrize("size", [4, 400, 1 << 20])
def test_pieces_follow_each_other(
    stored: tuple[TensorRecord, torch.Tensor], size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, values = stored
    monkeypatch.setattr(pieces, "PIECE_BYTES", size)
    found = [piece.clone() for piece in read_pieces(record.file, 4, 4000, torch.float32, "w")]
    assert torch.equal(torch.cat(found), values) and all(4 * len(piece) <= size for piece in found)


def test_nothing_is_no_piece(stored: tuple[TensorRecord, torch.Tensor]) -> None:
    assert list(read_pieces(stored[0].file, 4, 0, torch.float32, "w")) == []


def test_a_file_that_was_cut(stored: tuple[TensorRecord, torch.Tensor]) -> None:
    record, _ = stored
    record.file.write_bytes(record.file.read_bytes()[:-5])
    with pytest.raises(ReadError, match=r"'w'.*3995 of 4000 bytes"):
        read_elements(record, 0, 1000)
    with pytest.raises(ReadError, match="ends at byte 3999, 5 bytes short"):
        list(read_pieces(record.file, 4, 4000, torch.float32, "w"))
    record.file.unlink()
    with pytest.raises(ReadError, match="cannot be opened"):
        next(read_pieces(record.file, 4, 4000, torch.float32, "w"))
