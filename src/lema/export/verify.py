"""Whether a merged model says what base and adapter say together, by their logits on a few tokens.

Both are streamed by our own engine and computed in float32, so that what differs is the cast of the merged
weights alone. How one was made from the other plays no part.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel

from ..config import LemaConfig
from ..errors import WeightsError
from ..model import StreamedModel
from ..models.lora import peft_of_this_transformers
from .checkpoint import Checkpoint

_ROWS, _LENGTH, _SEED = 2, 16, 0
_FLOOR = 1e-4  # what the order of float32 sums may do


@dataclass(frozen=True)
class Comparison:
    """How far two models' logits are apart on the same tokens."""

    tokens: int
    error: float
    """Norm of a position's difference over that of its centred logits with base and adapter; the median position's,
    as a router that decides otherwise for one token is no fault of the merge."""
    largest: float
    """Largest difference of a logit."""
    same_choice: float
    """Share of positions with the same most likely token."""
    effect: float
    """The same distance between base alone and base with adapter."""
    kept: float
    """Share of that effect which the merged model has: the part of its difference from the base that goes where base
    and adapter go. About 1, or less where the type rounds the adapter away; 1 where the adapter has no effect."""
    allowed: float
    """What `error` may be: a rounding of every weight, adding up over the layers as a random walk does."""

    @property
    def arrives(self) -> bool:
        """Whether at least half of what the adapter does is in the merged model."""
        return self.kept >= 0.5

    @property
    def good(self) -> bool:
        """Whether the cast explains the difference."""
        return math.isfinite(self.error) and self.error <= self.allowed


def compare(checkpoint: Checkpoint, merged: Path, dtype: torch.dtype) -> Comparison:
    """Compare a merged model's logits with those of base and adapter.

    Args:
        merged: its directory.
        dtype: the type its changed tensors have.

    Raises:
        WeightsError: the merged directory does not load as a model.
    """
    plain, layers = _logits(checkpoint.base, checkpoint.weights)
    joined, _ = _logits(checkpoint.base, checkpoint.weights, checkpoint)
    found, _ = _logits(str(merged), None)
    if found.shape != joined.shape:
        raise WeightsError(f"{merged}: gives logits {tuple(found.shape)}, base and adapter give {tuple(joined.shape)}")
    return Comparison(
        tokens=_ROWS * _LENGTH,
        error=_distance(found, joined),
        largest=float((found - joined).abs().max()),
        same_choice=float((found.argmax(-1) == joined.argmax(-1)).float().mean()),
        effect=_distance(plain, joined),
        kept=_projection(found - plain, joined - plain),
        allowed=_FLOOR + torch.finfo(dtype).eps * math.sqrt(layers),
    )


def _distance(logits: torch.Tensor, reference: torch.Tensor) -> float:
    scale = (reference - reference.mean(-1, keepdim=True)).norm(dim=-1).clamp_min(1e-30)
    shares = (logits - reference).norm(dim=-1) / scale
    return float(shares.median()) if bool(torch.isfinite(shares).all()) else math.inf


def _projection(step: torch.Tensor, way: torch.Tensor) -> float:
    """How far along `way` a step goes, in lengths of it."""
    length = float(way.double().square().sum())
    return float((step.double() * way.double()).sum()) / length if length > 0 else 1.0


def _logits(model_path: str, weights: str | None, adapter: Checkpoint | None = None) -> tuple[torch.Tensor, int]:
    """Logits `[rows, length, vocabulary]` of a streamed model on tokens that are always the same, and its layers."""
    config = LemaConfig(
        model_path, gbi_path=weights, device="cpu", dtype="float32", use_lora=False, save_steps=0,
        attn_implementation="eager",
    )  # fmt: skip
    with StreamedModel(config) as model:
        lm = model.adapter.causal_lm()
        module: torch.nn.Module = lm.module
        if adapter is not None:
            # In at its own precision, as PEFT keeps it in training.
            with peft_of_this_transformers():
                peft = PeftModel.from_pretrained(module, str(adapter.folder), low_cpu_mem_usage=True)
            peft.eval()
        model.initialize_lora()
        random = torch.Generator().manual_seed(_SEED)
        ids = torch.randint(0, lm.vocab_size, (_ROWS, _LENGTH), generator=random)
        with torch.no_grad():
            mask = torch.ones_like(ids)
            logits: torch.Tensor = model.hf_model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return logits.float().clone(), len(lm.layers)
