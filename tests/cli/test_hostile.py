"""docs/errors.md says what the commands say."""

from __future__ import annotations

import difflib
from pathlib import Path

import pytest

import hostile


@pytest.mark.timeout(280)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.long
def test_the_table_of_errors_is_true(tmp_path: Path) -> None:
    written, now = hostile.DOCUMENT.read_text(encoding="utf-8"), hostile.table(tmp_path)
    difference = "\n".join(difflib.unified_diff(written.splitlines(), now.splitlines(), "docs/errors.md", "now", n=0))
    assert written == now, f"`python tests/support/hostile.py` writes it anew:\n{difference}"
