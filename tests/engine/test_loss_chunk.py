"""The default of `loss_chunk_size`: pieces where all logits at once would be large, exact mode by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import lema
from families import save_tiny
from helpers import lema_model, relative
from lema.engine.loss import head_loss
from lema.engine.loss.head_loss import wide_piece
from lema.errors import ConfigError
from lema.planning import plan as plan_module
from lema.planning.footprint import HEAD_CHUNK_BYTES
from lema.planning.plan import AUTO_CHUNK, LARGE_LOGITS, loss_chunk
from lema.training.resume import check_resume

pytestmark = pytest.mark.timeout(120)


@pytest.mark.parametrize(
    ("given", "kept"),
    [("auto", "auto"), (None, None), ("none", None), ("Exact", None), (7, 7), ("7", 7)],
)
def test_spellings(given: Any, kept: Any) -> None:
    assert lema.LemaConfig("x", loss_chunk_size=given).loss_chunk_size == kept
    assert lema.LemaConfig("x").loss_chunk_size == "auto"


@pytest.mark.parametrize("wrong", [0, -3, "0", "some", True])
def test_other_words_and_sizes_are_refused(wrong: Any) -> None:
    with pytest.raises(ConfigError, match="loss_chunk_size"):
        lema.LemaConfig("x", loss_chunk_size=wrong)


def test_auto_cuts_what_is_large() -> None:
    most = LARGE_LOGITS // 4 // 1000
    assert loss_chunk("auto", most, 1000) is None
    assert loss_chunk("auto", most + 1, 1000) == AUTO_CHUNK
    assert loss_chunk(None, 10**9, 10**6) is None and loss_chunk(3, 1, 1) == 3


@pytest.mark.parametrize("chunk", [1, 7, 64, 256, 1000, 1024, 5000])
@pytest.mark.parametrize("positions", [1, 48, 300, 512, 4096, 10**6])
def test_a_piece_is_wide_and_no_larger_than_was_asked(chunk: int, positions: int) -> None:
    wide, nbytes = wide_piece(chunk, positions)
    assert min(chunk, positions) <= wide <= positions
    assert wide * nbytes <= min(chunk, positions) * HEAD_CHUNK_BYTES, "logits at once"
    assert HEAD_CHUNK_BYTES // 4 <= nbytes <= HEAD_CHUNK_BYTES, "or calls would be many and small"


def test_the_default_of_a_run_follows_its_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny("llama", tmp_path)
    ids = torch.randint(3, 99, (3, 16), generator=torch.Generator().manual_seed(1))
    cut: list[int] = []
    real = head_loss.linear_cross_entropy

    def watched(*args: Any, positions: int, **kwargs: Any) -> Any:
        cut.append(positions)
        return real(*args, positions=positions, **kwargs)

    monkeypatch.setattr(head_loss, "linear_cross_entropy", watched)
    losses = {}
    for setting in ("auto", None):
        with lema_model(tmp_path, loss_chunk_size=setting) as model:
            trainer = model.get_trainer(None)
            _, small = trainer.eval_step(ids, ids)
            monkeypatch.setattr(plan_module, "LARGE_LOGITS", 3 * 16 * 99 * 4 - 1)
            _, large = trainer.eval_step(ids, ids)
            monkeypatch.setattr(plan_module, "LARGE_LOGITS", LARGE_LOGITS)
        losses[setting] = small, large
    assert cut == [3 * 16], "the large batch of 'auto', and nothing else"
    assert losses["auto"][0] == losses[None][0] == losses[None][1]
    assert relative(losses["auto"][1], losses[None][1]) <= 1e-6


def test_a_run_goes_on_with_its_loss_in_other_pieces() -> None:
    """Of the former default, too, which was none; that last bits may differ is said elsewhere."""
    for saved, now in ((None, "auto"), (5, "auto"), ("auto", None), (None, 5)):
        check_resume(Path("c"), {"loss_chunk_size": saved}, {"loss_chunk_size": now})
