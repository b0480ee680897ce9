"""Tiny models that answer: a base with a tokenizer, and an adapter that has learned answers by heart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

import lema
from data_helpers import CHATML, VOCABULARY, make_tokenizer
from families import save_tiny
from lema.data.render import ChatRenderer

_PADDING = 2


def save_base(folder: Path, positions: int) -> Path:
    """Write a model with its tokenizer into a folder, and return it."""
    save_tiny("llama", folder, vocab_size=VOCABULARY, max_position_embeddings=positions, initializer_range=0.8)
    make_tokenizer(CHATML).save_pretrained(folder)
    return folder


def save_learned(
    base: Path, folder: Path, answers: Sequence[tuple[str, str]], template: str | None = None, *, rank: int, loss: float
) -> Path:
    """Train an adapter until the loss on answers to questions is below `loss`; write it into a folder, return that."""
    tokenizer = make_tokenizer(CHATML)
    renderer = ChatRenderer(tokenizer, template)
    rows = [
        renderer.training([{"role": "user", "content": question}, {"role": "assistant", "content": answer}])
        for question, answer in answers
    ]
    longest = max(len(row.input_ids) for row in rows)
    ids = torch.tensor([row.input_ids + [_PADDING] * (longest - len(row.input_ids)) for row in rows])
    labels = torch.tensor([row.labels + [-100] * (longest - len(row.labels)) for row in rows])
    config = lema.LemaConfig(
        str(base), device="cpu", dtype="float32", lora_rank=rank, lora_target_modules="all-linear", learning_rate=1e-2,
        save_steps=0,
    )  # fmt: skip
    with lema.LemaModel(config) as model:
        trainer = model.get_trainer()
        for _ in range(400):
            _, reached = trainer.train_step(ids, labels)
            assert reached is not None
            if reached < loss:
                break
        assert reached < loss, "the answers must be certain for what follows"
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
