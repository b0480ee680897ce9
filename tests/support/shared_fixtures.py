"""What tests of several files are given: folders that are made once a file, and Kaggle; a plugin of pytest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from kaggle_server import KaggleServer


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


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Folder of a tiny model of a family, with what its configuration says otherwise; each made once."""
    from families import save_tiny

    made: dict[tuple[Any, ...], Path] = {}

    def get(family: str, **overrides: Any) -> Path:
        key = (family, *sorted(overrides.items()))
        if key not in made:
            made[key] = tmp_path_factory.mktemp(family)
            save_tiny(family, made[key], **overrides)
        return made[key]

    return get


@pytest.fixture(scope="module")
def llama(tiny: Callable[..., Path]) -> Path:
    """Folder of a tiny Llama."""
    return tiny("llama")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[KaggleServer]:
    """Kaggle on this machine, without credentials."""
    from kaggle_server import running_server

    with running_server(monkeypatch, tmp_path / "home") as running:
        yield running
