"""Smoothed labels: the loss transformers' own smoother has, however the head is cut, and none of it in evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.trainer_pt_utils import LabelSmoother

from heads import EVEN, ONE_ROW, UNEVEN, Models, distance, vocabulary_loss
from helpers import Everywhere64, lema_model, padded_batch, relative
from lema.engine.loss.positions import IGNORE_INDEX, LossResult, compute_loss
from training_runs import make_model, read_lines, settings_of, train, write_rows

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
]
SMOOTHING = 0.3
FAMILIES = ("llama", "gemma2", "cohere", "granite", "gpt2", "gptj")


@pytest.fixture(scope="module", params=FAMILIES)
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models.of(request.param, tmp_path_factory.mktemp(request.param))


def exact(models: Models, hidden: torch.Tensor, targets: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Transformers' smoother in float64, summed over the targets and divided by 7: loss and gradient."""
    with Everywhere64():
        inputs = hidden.double().requires_grad_()
        logits = models.double.logits(inputs)
        smoother = LabelSmoother(epsilon=SMOOTHING, ignore_index=IGNORE_INDEX)
        loss = smoother({"logits": logits}, targets.clone())  # the mean; it writes into the labels
        loss = loss * (targets != IGNORE_INDEX).sum() / 7.0
        (gradient,) = torch.autograd.grad(loss, inputs)
    return float(loss), gradient


@pytest.mark.parametrize("cut", ["whole", "positions", "even", "uneven", "one row"])
def test_exact_however_the_head_is_cut(models: Models, cut: str) -> None:
    hidden, targets = models.batch()
    expected, gradient = exact(models, hidden, targets)
    found = smoothed(models, hidden, targets, cut)
    assert relative(found.loss, expected) < 1e-6
    assert distance(found.gradient, gradient) < 2e-6
    assert relative(models.reference(hidden, targets, 7.0).loss, expected) > 1e-3, "it makes a difference"


def smoothed(models: Models, hidden: torch.Tensor, targets: torch.Tensor, cut: str, **more: Any) -> LossResult:
    ranges: dict[str, Sequence[tuple[int, int]]] = {"even": EVEN, "uneven": UNEVEN, "one row": ONE_ROW}
    if cut in ranges:
        pieces = models.pieces(ranges[cut])
        return vocabulary_loss(models.headless, hidden, targets, 7.0, pieces, positions=4, smoothing=SMOOTHING, **more)
    chunk = 4 if cut == "positions" else None
    return compute_loss(models.plain, hidden, targets, 7.0, chunk_size=chunk, smoothing=SMOOTHING, **more)


def test_a_target_that_is_certain(models: Models) -> None:
    """Where the plain loss is nothing, the smoothed one is not, and keeps its gradient."""
    hidden, targets = models.batch(size=30.0)
    expected, gradient = exact(models, hidden, targets)
    for cut in ("whole", "uneven"):
        found = smoothed(models, hidden, targets, cut)
        assert relative(found.loss, expected) < 1e-5
        assert distance(found.gradient, gradient) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_half_precision_is_no_worse_than_the_whole_head(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    models = Models.of(family, tmp_path, dtype)
    hidden, targets = models.batch()
    expected, gradient = exact(models, hidden, targets)
    whole, pieces = smoothed(models, hidden, targets, "whole"), smoothed(models, hidden, targets, "uneven")
    assert abs(pieces.loss - expected) <= 1.5 * abs(whole.loss - expected) + 4 * torch.finfo(dtype).eps * expected
    assert distance(pieces.gradient, gradient) <= 1.5 * distance(whole.gradient, gradient) + torch.finfo(dtype).eps


@pytest.mark.parametrize("settings", [{}, {"loss_chunk_size": 5}, {"head": "chunked", "ram_budget": "2GB"}])
def test_evaluation_measures_the_plain_loss(tmp_path: Path, settings: dict[str, Any]) -> None:
    batch = padded_batch(6, 12)
    with lema_model(make_model(tmp_path / "model"), **settings) as model:
        trainer = model.get_trainer()
        plain = trainer.evaluate(batch)
        trainer.label_smoothing = SMOOTHING
        assert trainer.evaluate(batch) == plain
        first = trainer.train_step(batch)[1] or 0.0
    assert abs(first - plain[0] / plain[1]) > 1e-4


def test_a_run_with_smoothed_labels(tmp_path: Path) -> None:
    model, rows = make_model(tmp_path / "model"), write_rows(tmp_path / "rows.jsonl")
    losses = {}
    for name, more in (
        ("plain", {}),
        ("whole", {"label_smoothing_factor": SMOOTHING}),
        ("pieces", {"label_smoothing_factor": SMOOTHING, "loss_chunk_size": 3}),
    ):
        settings = settings_of(model, rows, tmp_path / name, max_steps=3, lora_dropout=0.0, sample_prompts=[], **more)
        train(settings)
        lines = read_lines(tmp_path / name / "metrics.jsonl")
        losses[name] = [line["loss"] for line in lines if line["type"] == "train"]
    assert all(relative(a, b) < 1e-5 for a, b in zip(losses["whole"], losses["pieces"], strict=True))
    assert all(abs(a - b) > 1e-4 for a, b in zip(losses["whole"], losses["plain"], strict=True))
