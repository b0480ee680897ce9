"""Heads cut into pieces: models that have them whole and in pieces, and how far results lie apart."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from families import save_tiny
from helpers import Everywhere64
from lema.engine.loss.epilogue import ModelEpilogue
from lema.engine.loss.positions import LossResult, compute_loss
from lema.engine.loss.vocabulary import Head, linear_cross_entropy
from lema.models.causal_lm import TransformersCausalLM
from lema.models.skeleton import find_layers

VOCAB = 99
EVEN = [(0, 33), (33, 66), (66, 99)]
UNEVEN = [(0, 10), (10, 11), (11, 70), (70, 97), (97, 99)]
ONE_ROW = [(row, row + 1) for row in range(VOCAB)]


class Pieces:
    """A weight in chunks, each a copy that is wiped at the end of its use; remembers the uses."""

    def __init__(self, weight: torch.Tensor, ranges: Sequence[tuple[int, int]]) -> None:
        self.ranges = ranges
        self.used: list[int] = []
        self._weight = weight
        self._busy = False

    @contextlib.contextmanager
    def use(self, chunk: int) -> Iterator[torch.Tensor]:
        """A copy of the chunk's rows."""
        assert not self._busy
        self._busy = True
        self.used.append(chunk)
        piece = self._weight[slice(*self.ranges[chunk])].clone()
        try:
            yield piece
        finally:
            piece.fill_(torch.nan)
            self._busy = False


@dataclass
class Models:
    """One tiny model whole, in float64, and with a head that has no weight of its own."""

    plain: TransformersCausalLM
    double: TransformersCausalLM
    headless: TransformersCausalLM
    weight: torch.Tensor

    @classmethod
    def of(cls, family: str, folder: Path, dtype: torch.dtype = torch.float32) -> Models:
        model = save_tiny(family, folder).to(dtype).eval()
        weight = model.get_output_embeddings().weight.detach().clone()
        headless = copy.deepcopy(model)
        headless.get_output_embeddings().weight = nn.Parameter(torch.full_like(weight, torch.nan))
        return cls(_driven(model), _driven(copy.deepcopy(model).double()), _driven(headless), weight)

    def pieces(self, ranges: Sequence[tuple[int, int]] = tuple(UNEVEN)) -> Pieces:
        return Pieces(self.weight, ranges)

    def batch(self, size: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states and targets of 3 x 9 positions, a third without target."""
        random = torch.Generator().manual_seed(3)
        hidden = torch.randn(3, 9, self.weight.shape[1], generator=random) * size
        targets = torch.randint(0, VOCAB, (3, 9), generator=random)
        targets[0, :5] = targets[1, 7:] = targets[2, ::4] = -100
        return hidden.to(self.weight.dtype), targets

    def reference(self, hidden: torch.Tensor, targets: torch.Tensor, denominator: float) -> LossResult:
        with Everywhere64():
            return compute_loss(self.double, hidden.double(), targets, denominator)


def _driven(model: Any) -> TransformersCausalLM:
    lm = TransformersCausalLM(model, find_layers(model)[1])
    lm.hidden_states(input_ids=torch.ones(1, 2, dtype=torch.long))  # learns the decoder's output type
    return lm


def distance(found: torch.Tensor | None, reference: torch.Tensor | None) -> float:
    """Relative error of a gradient."""
    assert found is not None
    assert reference is not None
    return float((found.double() - reference.double()).norm() / reference.double().norm())


_epilogues: WeakKeyDictionary[Any, ModelEpilogue] = WeakKeyDictionary()


def vocabulary_loss(
    lm: Any, hidden: torch.Tensor, targets: torch.Tensor, denominator: float, chunks: Pieces, **how: Any
) -> LossResult:
    """The loss of a model whose head comes in these pieces."""
    epilogue = _epilogues.setdefault(lm, ModelEpilogue(lm))
    if bool((targets != -100).any()):
        epilogue.check(chunks.ranges, hidden)
    with epilogue.in_place():
        head = Head(epilogue.linear, chunks)
        return linear_cross_entropy(hidden, head, targets, epilogue, denominator=denominator, **how)
