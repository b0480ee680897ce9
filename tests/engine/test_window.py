"""`train_window`: the calls of an accumulation window at once, the base's weights read once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import lema_model, relative
from lema.errors import ConfigError, InputError

pytestmark = pytest.mark.timeout(120)


def batches(*shapes: tuple[int, int]) -> list[dict[str, torch.Tensor]]:
    """Batches of these shapes, the first two targets of every row left out."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for shape in shapes:
        ids = torch.randint(3, 90, shape, generator=generator)
        labels = ids.clone()
        labels[:, :3] = -100
        made.append({"input_ids": ids, "labels": labels})
    return made


@pytest.mark.parametrize("shapes", [((2, 10),) * 4, ((2, 10), (1, 7), (3, 12))], ids=["alike", "of all lengths"])
def test_a_window_is_its_calls_with_one_read(llama: Path, shapes: tuple[tuple[int, int], ...]) -> None:
    given = batches(*shapes)
    weights, losses, read = {}, {}, {}
    for way in ("calls", "window"):
        with lema_model(llama, gradient_accumulation_steps=len(given), loss_chunk_size=None) as model:
            trainer = model.get_trainer(torch.optim.SGD(model.get_trainable_parameters(), lr=1.0))
            before = [p.detach().clone() for p in model.get_trainable_parameters()]
            first = trainer.memory.stats.loads
            if way == "calls":
                found: list[Any] = [trainer.train_step(batch)[1] for batch in given]
                targets = [int((batch["labels"][:, 1:] != -100).sum()) for batch in given]
                losses[way] = sum(f * n for f, n in zip(found, targets, strict=True)) / sum(targets)
            else:
                losses[way] = trainer.train_window(given)
            assert trainer.global_step == 1
            read[way] = trainer.memory.stats.loads - first
            weights[way] = torch.cat(
                [(p.detach() - b).flatten() for p, b in zip(model.get_trainable_parameters(), before, strict=True)]
            )
    assert read["calls"] - read["window"] >= (len(given) - 1) * 4, "each call reads two of four layers twice"
    assert relative(losses["window"], losses["calls"]) <= 1e-6
    assert (weights["window"] - weights["calls"]).norm() <= 1e-4 * weights["calls"].norm()


def test_a_window_saves_and_runs_no_more_rows_at_once_than_a_batch(llama: Path, tmp_path: Path) -> None:
    given = batches((2, 10), (3, 10))
    with lema_model(llama, gradient_accumulation_steps=2, save_steps=2, output_dir=str(tmp_path)) as model:
        trainer = model.get_trainer()
        seen: list[int] = []
        trainer.lm.layers[0].self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(len(kwargs["hidden_states"])), with_kwargs=True
        )
        trainer.train_window(given)
        assert max(seen) == 3
        assert trainer.attachment.batching.micro_batch_size is None and not (tmp_path / "checkpoint-2").exists()
        trainer.train_step(given[0])
        with pytest.raises(ConfigError, match="1 calls of train_step"):
            trainer.train_window(given)
        trainer.train_step(given[1])
        assert trainer.global_step == 2 and (tmp_path / "checkpoint-2").exists(), "plain calls go on as before"
        trainer.train_window(given)
        trainer.train_window(given)
        assert (tmp_path / "checkpoint-4").exists()


def test_batches_that_do_not_go_together_are_refused(llama: Path) -> None:
    one, other = batches((2, 10), (2, 8))
    positions = {name: torch.arange(ids.shape[1]).expand(2, -1) for name, ids in (("a", one["input_ids"]),)}["a"]
    wrong: list[tuple[list[Any], str]] = [
        ([], "no batch"),
        ([one, {"input_ids": other["input_ids"]}], "batch 1 of the window holds input_ids"),
        ([{"input_ids": one["input_ids"]}], "need input_ids, labels"),
        ([{**one, "labels": other["labels"]}], "labels has shape"),
        ([{**one, "position_ids": positions}, {**other, "position_ids": positions[:, :8]}], "position_ids"),
    ]
    with lema_model(llama) as model:
        trainer = model.get_trainer()
        for given, message in wrong:
            with pytest.raises(InputError, match=message):
                trainer.train_window(given)
        assert trainer.train_window([one, other]) > 0


def test_a_setting_of_more_rows_at_once_does_not_widen_a_window(llama: Path) -> None:
    with lema_model(llama, gradient_accumulation_steps=2, micro_batch_size=4) as model:
        trainer = model.get_trainer()
        seen: list[int] = []
        trainer.lm.layers[0].self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(len(kwargs["hidden_states"])), with_kwargs=True
        )
        trainer.train_window(batches((1, 10), (2, 10), (2, 10)))
        assert max(seen) == 2 and trainer.attachment.batching.micro_batch_size == 4
