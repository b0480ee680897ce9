"""Models of text with towers, trained on rows of text without the towers, beside plain PEFT on the whole model.

The whole model gets the settings that LEMA saved with its adapter, so that names and targets are compared as well.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

import lema
from helpers import (
    Everywhere64,
    Gradients,
    adapter_of,
    assert_as_exact_as_plain,
    cut_into,
    differing,
    lema_config,
    lema_model,
    lema_step,
    padded_batch,
    plain_step,
    randomise,
    recorded,
    recording_trainer,
    relative,
)
from lema.errors import UnsupportedError
from lema.export.merge import merge
from lema.models.towers import LeftOut

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.tiny_families import auto_class, save_tiny

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
]
FEW = ("gemma3", "qwen3_vl", "llama4")
MORE = (
    "gemma3n_text", "gemma4:12B", "gemma4:26B", "gemma4:31B", "gemma4:E2B", "mistral3", "mistral3:ministral3", "mllama",
    "qwen3_5", "qwen3_5_moe",
)  # fmt: skip
ROUTERS = {"llama4": ["router"]}


@dataclass
class Whole:
    """A composite model: its folder, plain PEFT on all of it, and LEMA's without towers, with one adapter."""

    family: str
    folder: Path
    plain: PeftModel
    model: lema.LemaModel

    def again(self, **settings: Any) -> lema.LemaModel:
        """Another model of LEMA's with the same adapter."""
        model = lema_model(self.folder, exclude_modules=ROUTERS.get(self.family), **settings)
        with torch.no_grad():
            own = adapter_of(self.plain)
            for name, parameter in adapter_of(model.hf_model).items():
                parameter.copy_(own[name])
        return model

    def whole_base(self, dtype: torch.dtype = torch.float32) -> Any:
        """transformers' whole model."""
        return auto_class(self.family).from_pretrained(self.folder, dtype=dtype, attn_implementation="eager")


@pytest.fixture(scope="module", params=[*FEW, *(pytest.param(family, marks=pytest.mark.long) for family in MORE)])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Whole]:
    family = request.param
    folder = tmp_path_factory.mktemp("whole") / "model"
    save_tiny(family, folder)
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5]}')
    (folder / "LICENSE").write_text("as you like")
    model = lema_model(folder, exclude_modules=ROUTERS.get(family))
    model.save_pretrained(folder / "adapter")
    made = Whole(family, folder, None, model)  # type: ignore[arg-type]
    settings = LoraConfig.from_pretrained(str(folder / "adapter"))
    settings.inference_mode = False
    made.plain = get_peft_model(made.whole_base(), settings).train()
    randomise(made.plain, model.hf_model)
    yield made
    model.close()


def test_towers_are_neither_there_nor_adapted_and_names_are_the_whole_models(whole: Whole) -> None:
    left_out = whole.model.adapter.causal_lm().left_out
    base = whole.plain.get_base_model()
    assert bool(left_out) == ("_text" not in whole.family)
    named = dict(base.named_modules())
    assert all(type(named[path]) is type(tower) for path, tower in left_out.items())
    assert adapter_of(whole.model.hf_model).keys() == adapter_of(whole.plain).keys()
    read = {piece.record.name for _, _, source in whole.model.adapter.placed_sources(whole.model.gbi)
            for piece in source.pieces}  # fmt: skip
    assert not [name for name in read for path in left_out if f".{path.rpartition('.')[2]}." in f".{name}."]
    held = {name for name, _ in whole.model.hf_model.named_parameters()}
    assert not [name for name in held for path in left_out if name.startswith(f"base_model.model.{path}.")]


def test_loss_and_every_gradient_are_plain_pefts(whole: Whole) -> None:
    batch = padded_batch()
    expected_loss, expected = plain_step(whole.plain, batch)
    loss, found = lema_step(whole.model, batch)
    assert relative(loss, expected_loss) <= 1e-6
    assert not differing(expected, found)


def test_a_batch_in_pieces_and_a_window_of_batches_are_as_exact_as_plain_peft(whole: Whole) -> None:
    batch = padded_batch(6, 9)
    expected_loss, plain = plain_step(whole.plain, batch)
    with Everywhere64():
        double = get_peft_model(whole.whole_base(torch.float64), whole.plain.peft_config["default"]).to(torch.float64)
        double.get_base_model().set_experts_implementation("eager")  # grouped_mm has no float64
        own = adapter_of(whole.plain)
        with torch.no_grad():
            for name, parameter in adapter_of(double).items():
                parameter.copy_(own[name])
        _, reference = plain_step(double.train(), batch)
    trainer = recording_trainer(whole.model)
    with cut_into(whole.model, micro=1, chunk=3):
        loss, found = lema_step(whole.model, batch, trainer)
    assert relative(loss, expected_loss) <= 1e-6
    as_exact(whole.family, reference, plain, found)
    trainer = recording_trainer(whole.model)
    trainer.window.length = 2
    for rows in (slice(0, 2), slice(2, 6)):
        trainer.train_step({name: value[rows] for name, value in batch.items()})
    as_exact(whole.family, reference, plain, recorded(trainer, whole.model.hf_model))


def as_exact(family: str, reference: Gradients, plain: Gradients, found: Gradients) -> None:
    """Every tensor as exact as plain PEFT's; of linear attention, whose few gates are sums that nearly cancel, all of
    them together."""
    if not family.startswith("qwen3_5"):
        assert_as_exact_as_plain(reference, plain, found)
        return
    assert found.keys() == plain.keys()
    own, ours = ({"all": torch.cat([g[n].flatten() for n in reference])} for g in (plain, found))
    assert_as_exact_as_plain({"all": torch.cat([g.flatten() for g in reference.values()])}, own, ours)


def test_a_budget_and_kept_activations_change_no_bit(whole: Whole) -> None:
    batch = padded_batch()
    expected_loss, expected = plain_step(whole.plain, batch)
    settings: dict[str, Any] = {"batch_size": 4, "max_seq_length": 10, "loss_chunk_size": None, "micro_batch_size": 4}
    kept = 0 if whole.family == "qwen3_5_moe" else 2  # its experts are put together at every use
    with whole.again(ram_budget="2GB", keep_activations=kept, ram_layers=1, **settings) as model:
        assert len(model.memory.plan.keep_activations) == kept
        for _ in range(2):
            loss, found = lema_step(model, batch)
            assert relative(loss, expected_loss) <= 1e-6
            assert not differing(expected, found)


def test_generation_gives_the_same_tokens(whole: Whole) -> None:
    batch = padded_batch()
    given = {"input_ids": batch["input_ids"][1:3], "attention_mask": batch["attention_mask"][1:3]}
    whole.plain.eval()
    expected = whole.plain.generate(**given, max_new_tokens=6, do_sample=False)
    whole.plain.train()
    assert torch.equal(whole.model.generate(given, max_new_tokens=6, do_sample=False), expected)


def test_the_whole_model_takes_the_saved_adapter_and_a_merge_keeps_its_towers(whole: Whole, tmp_path: Path) -> None:
    whole.model.save_pretrained(tmp_path / "adapter")
    base = whole.whole_base()
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    values = {name: p for name, p in loaded.named_parameters() if "lora_" in name}
    assert not differing(dict(adapter_of(whole.plain)), values)
    ids = padded_batch()["input_ids"]
    with torch.no_grad():
        expected = loaded.eval()(input_ids=ids, use_cache=False).logits
    merge(tmp_path / "adapter", tmp_path / "merged", verify=True)
    before, after = (load_all(folder) for folder in (whole.folder, tmp_path / "merged"))
    assert before.keys() == after.keys()
    towers = whole.model.adapter.causal_lm().left_out
    same = [name for name in before if torch.equal(before[name], after[name])]
    assert len(same) < len(before)
    for name in before:
        if any(f".{path.rpartition('.')[2]}." in f".{name}." for path in towers):
            assert name in same
    for name in ("preprocessor_config.json", "LICENSE"):
        assert (tmp_path / "merged" / name).read_text() == (whole.folder / name).read_text()
    merged = auto_class(whole.family).from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.allclose(merged(input_ids=ids, use_cache=False).logits, expected, atol=1e-4)


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a model's directory."""
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def test_a_run_that_was_stopped_goes_on_bit_for_bit(whole: Whole, tmp_path: Path) -> None:
    def train(model: lema.LemaModel, trainer: Any, steps: range) -> None:
        for step in steps:
            trainer.train_step(padded_batch(seed=step))

    with whole.again() as straight:
        train(straight, straight.get_trainer(), range(3))
        expected = {n: p.detach().clone() for n, p in adapter_of(straight.hf_model).items()}
    with whole.again() as stopped:
        trainer = stopped.get_trainer()
        train(stopped, trainer, range(2))
        trainer.save_checkpoint(tmp_path / "checkpoint")
    resumed = lema.LemaModel.from_pretrained(tmp_path / "checkpoint")
    with resumed:
        train(resumed, resumed.get_trainer(resume_from=tmp_path / "checkpoint"), range(2, 3))
        assert not differing(expected, dict(adapter_of(resumed.hf_model)))


# -- without a family ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gemma3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gemma3") / "model"
    save_tiny("gemma3", folder)
    return folder


def test_names_alone_and_patterns_stay_off_the_towers(gemma3: Path, tmp_path: Path) -> None:
    """q_proj is a name of the vision tower's attention as well."""
    for number, targets in enumerate((["q_proj", "v_proj"], r".*\.(q_proj|fc1)")):
        with lema_model(gemma3, lora_target_modules=targets) as model:
            model.save_pretrained(tmp_path / str(number))
            ours = set(adapter_of(model.hf_model))
        base = auto_class("gemma3").from_pretrained(gemma3)
        loaded = PeftModel.from_pretrained(base, str(tmp_path / str(number)))
        assert ours == set(adapter_of(loaded))


def test_sdpa_is_the_texts_alone_and_exact_too(gemma3: Path, tmp_path: Path) -> None:
    with lema_model(gemma3, attn_implementation="sdpa") as model:
        config: Any = model.hf_model.config
        assert config.get_text_config()._attn_implementation == "sdpa"
        assert config.vision_config._attn_implementation == "eager"
        model.save_pretrained(tmp_path)
        settings = LoraConfig.from_pretrained(str(tmp_path))
        settings.inference_mode = False
        base = auto_class("gemma3").from_pretrained(gemma3, attn_implementation="sdpa")
        plain = get_peft_model(base, settings).train()
        randomise(plain, model.hf_model)
        expected_loss, expected = plain_step(plain, padded_batch())
        loss, found = lema_step(model, padded_batch())
    assert relative(loss, expected_loss) <= 1e-6
    assert not differing(expected, found)


def test_a_tower_that_is_asked_says_that_rows_are_text() -> None:
    tower = LeftOut("model.vision_tower", torch.nn.Linear(2, 2, dtype=torch.float64))
    assert (tower.device, tower.dtype) == (torch.device("cpu"), torch.float64)
    with pytest.raises(UnsupportedError, match=r"model\.vision_tower \(Linear\) is left out.*text alone"):
        tower(torch.zeros(1))


def test_the_text_alone_of_a_composite_is_a_model_too(gemma3: Path, tmp_path: Path) -> None:
    save_tiny("gemma3_text", tmp_path)
    with lema_model(tmp_path) as model:
        assert not model.adapter.causal_lm().left_out
        assert all(name.startswith("base_model.model.model.layers.") for name in adapter_of(model.hf_model))


def test_without_a_word_on_its_class_a_configuration_of_parts_is_the_whole_model(gemma3: Path, tmp_path: Path) -> None:
    from lema.models.locate import adapter_for

    for family, whole_name in (("qwen3_5", "Qwen3_5ForConditionalGeneration"), ("gemma3", None)):
        from benchmarks.tiny_families import tiny_config

        values = tiny_config(family).to_dict()
        values["architectures"] = None
        (tmp_path / "config.json").write_text(json.dumps(values))
        adapter: Any = adapter_for(lema_config(tmp_path), tmp_path)
        assert type(adapter.model).__name__ == (whole_name or "Gemma3ForConditionalGeneration")
