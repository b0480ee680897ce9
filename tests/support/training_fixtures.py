"""The model and the rows of tests that train by settings, made once a file; a plugin of pytest."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a tokenizer."""
    from training_runs import make_model

    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows it can learn from."""
    from training_runs import write_rows

    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl")
