"""Trainers of transformers and TRL on a streamed model: plain PEFT's adapter to the last bit, saved and resumed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import lema
from data_helpers import CHATML, VOCABULARY, make_tokenizer
from families import save_tiny
from helpers import ALPHA, RANK, SEED, lema_config, plain_model
from lema.errors import UnsupportedError

pytestmark = pytest.mark.timeout(300)

QUIET: dict[str, Any] = {
    "use_cpu": True, "report_to": [], "disable_tqdm": True, "max_steps": 4, "save_steps": 2, "logging_steps": 1,
    "per_device_train_batch_size": 2, "learning_rate": 1e-2, "seed": 3, "save_strategy": "steps",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("foreign") / "model"
    save_tiny("llama", path, vocab_size=VOCABULARY, max_position_embeddings=256)
    make_tokenizer(CHATML).save_pretrained(path)
    return path


PLANNED: dict[str, Any] = {"ram_budget": "2GB", "ram_layers": 0, "keep_activations": 1}
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "LemaModel": ("LemaModel", {}),
    "LemaModel planned": ("LemaModel", PLANNED),
    "from_pretrained": ("from_pretrained", {}),
    "from_pretrained planned": ("from_pretrained", PLANNED),
}


@pytest.fixture(params=WAYS)
def streamed(request: pytest.FixtureRequest, folder: Path) -> Iterator[Callable[[], Any]]:
    """Makes streamed models with adapters, closed at the end."""
    way, settings = WAYS[request.param]
    opened: list[lema.LemaModel] = []
    bare: list[Any] = []

    def make() -> Any:
        if way == "LemaModel":
            opened.append(lema.LemaModel(lema_config(folder, loss_chunk_size=None, **settings)))
            return opened[-1].hf_model
        bare.append(open_bare(folder, **settings))
        torch.manual_seed(SEED)
        return get_peft_model(bare[-1], lora()).train()

    yield make
    for model in opened:
        model.close()
    for model in bare:
        lema.close(model)


def open_bare(folder: Path, **settings: Any) -> Any:
    return lema.from_pretrained(folder, device="cpu", dtype="float32", attn_implementation="eager", **settings)


def lora() -> LoraConfig:
    return LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")


def rows(count: int = 8, length: int = 12) -> list[dict[str, torch.Tensor]]:
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (count, length), generator=random)
    return [{"input_ids": row, "labels": row.clone()} for row in ids]


def trainer(model: Any, out: Path, **settings: Any) -> Trainer:
    return Trainer(
        model, TrainingArguments(str(out), **{**QUIET, **settings}), train_dataset=rows(), eval_dataset=rows(2)
    )


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys() and len(found) == 2 * 7 * 4
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def test_transformers_trainer_saves_what_plain_peft_does(
    folder: Path, streamed: Callable[[], Any], tmp_path: Path
) -> None:
    for name, model in (("plain", plain_model(folder)), ("lema", streamed())):
        run = trainer(model, tmp_path / name)
        run.train()
        run.save_model(str(tmp_path / name / "saved"))
        assert math.isfinite(run.evaluate()["eval_loss"])
    for part in ("checkpoint-2", "checkpoint-4", "saved"):
        assert_equal(adapter(tmp_path / "lema" / part), adapter(tmp_path / "plain" / part))
    assert not list((tmp_path / "lema").rglob("model*.safetensors"))


@pytest.mark.parametrize("streamed", ["LemaModel", "from_pretrained planned"], indirect=True)
@pytest.mark.long
def test_transformers_trainer_goes_on_from_its_checkpoint(streamed: Callable[[], Any], tmp_path: Path) -> None:
    trainer(streamed(), tmp_path / "whole").train()
    trainer(streamed(), tmp_path / "cut", max_steps=4).train()
    (tmp_path / "cut" / "checkpoint-4" / "adapter_model.safetensors").unlink()
    resumed = trainer(streamed(), tmp_path / "cut")
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-2"))
    assert resumed.state.global_step == 4
    assert_equal(adapter(tmp_path / "cut" / "checkpoint-4"), adapter(tmp_path / "whole" / "checkpoint-4"))


@pytest.mark.parametrize("streamed", ["LemaModel planned", "from_pretrained"], indirect=True)
def test_transformers_trainer_loads_its_best_model(streamed: Callable[[], Any], tmp_path: Path) -> None:
    model = streamed()
    settings = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    run = trainer(model, tmp_path, **settings)
    run.train()
    best = run.state.best_model_checkpoint
    assert best is not None
    run.save_model(str(tmp_path / "best"))
    assert_equal(adapter(tmp_path / "best"), adapter(Path(best)))


SETTINGS: dict[str, dict[str, Any]] = {
    "clipped": {"max_grad_norm": 1e-3},
    "accumulated": {"gradient_accumulation_steps": 2, "max_steps": 2},
    "bf16 on a float32 model": {"bf16": True},
    "checkpointing of their own": {"gradient_checkpointing": True},
    "by length": {"train_sampling_strategy": "group_by_length"},
}


@pytest.mark.parametrize("streamed", ["from_pretrained"], indirect=True)
@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_transformers_trainer_do_what_they_do(
    folder: Path, streamed: Callable[[], Any], tmp_path: Path, name: str
) -> None:
    for model, out in ((plain_model(folder), tmp_path / "plain"), (streamed(), tmp_path / "lema")):
        run = trainer(model, out, save_strategy="no", **SETTINGS[name])
        run.train()
        run.save_model(str(out))
    assert_equal(adapter(tmp_path / "lema"), adapter(tmp_path / "plain"))


@pytest.mark.parametrize("streamed", ["from_pretrained planned"], indirect=True)
def test_evaluation_computes_metrics_of_the_same_logits(
    folder: Path, streamed: Callable[[], Any], tmp_path: Path
) -> None:
    found = []
    for model in (plain_model(folder), streamed()):
        run = trainer(model, tmp_path)
        run.compute_metrics = lambda pairs: {"logits": pairs.predictions.tolist(), "labels": pairs.label_ids.tolist()}
        found.append(run.evaluate())
    assert found[0]["eval_logits"] == found[1]["eval_logits"]
    assert found[0]["eval_labels"] == found[1]["eval_labels"]


@pytest.mark.parametrize("streamed", ["LemaModel planned", "from_pretrained planned"], indirect=True)
def test_several_adapters_are_saved(streamed: Callable[[], Any], tmp_path: Path) -> None:
    model = streamed()
    model.add_adapter("other", model.peft_config["default"])
    model.save_pretrained(tmp_path, state_dict=None)
    assert adapter(tmp_path).keys() == adapter(tmp_path / "other").keys()


def test_the_state_of_a_streamed_model_is_that_of_its_files(folder: Path, streamed: Callable[[], Any]) -> None:
    expected, found = plain_model(folder).state_dict(), streamed().state_dict()
    assert found.keys() == expected.keys()
    assert [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)] == []


def test_the_state_of_a_cast_model_is_in_the_type_of_its_files(folder: Path) -> None:
    expected = plain_model(folder).state_dict()
    with lema.LemaModel(lema_config(folder, dtype="bfloat16")) as model:
        found = model.hf_model.state_dict()
    base = {name: tensor for name, tensor in expected.items() if "lora_" not in name}
    assert len(base) < len(expected)
    assert [name for name, tensor in base.items() if not torch.equal(found[name].float(), tensor)] == []


def test_a_state_of_stacked_experts_is_put_together(tmp_path: Path) -> None:
    save_tiny("mixtral", tmp_path)
    expected = plain_model(tmp_path, targets=["q_proj"]).state_dict()
    with lema.LemaModel(lema_config(tmp_path, lora_target_modules=["q_proj"])) as model:
        found = model.hf_model.state_dict()
    assert found.keys() == expected.keys()
    assert [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)] == []


@pytest.mark.parametrize("head", ["streamed", "resident"])
def test_a_head_that_is_read_past_its_module(folder: Path, head: str) -> None:
    """As TRL's fused head does, by a forward of its own."""
    ids = torch.arange(3, 9)[None]
    with lema.LemaModel(lema_config(folder, head=head, ram_budget="2GB")) as model:
        model.initialize_lora()
        base = model.adapter.causal_lm().module
        own = base.forward
        expected = plain_model(folder).base_model.model.lm_head.weight

        def forward(fused_lm_head: bool = False, **inputs: Any) -> Any:
            if fused_lm_head:
                assert torch.equal(base.lm_head.weight, expected)
            return own(**inputs)

        base.forward = forward
        if head == "streamed":
            with pytest.raises(UnsupportedError, match="from_pretrained"):
                model.hf_model(input_ids=ids, fused_lm_head=True)
        else:
            model.hf_model(input_ids=ids, fused_lm_head=True)
        base.forward = own


# --- TRL --------------------------------------------------------------------------------------------

TEXTS = [f"Number {n}." for n in range(8)]
PAIRS = [{"prompt": f"{n}?", "chosen": f" {n}!", "rejected": f" {n + 1}?"} for n in range(8)]
MARKED = [{"prompt": f"{n}?", "completion": f" {n}!", "label": n % 2 == 0} for n in range(8)]


def of_trl(kind: str) -> tuple[Any, Any, list[dict[str, Any]], dict[str, Any]]:
    """Trainer, its settings' class, rows, and settings of a kind of training."""
    trl = pytest.importorskip("trl")
    if kind == "orpo":
        orpo = pytest.importorskip("trl.experimental.orpo")
        return orpo.ORPOTrainer, orpo.ORPOConfig, PAIRS, {"max_length": 32}
    found = {
        "sft": ("SFT", [{"text": text} for text in TEXTS], {"max_length": 32}),
        "dpo": ("DPO", PAIRS, {"max_length": 32}),
        "dpo precomputed": ("DPO", PAIRS, {"max_length": 32, "precompute_ref_log_probs": True}),
        "kto": ("KTO", MARKED, {"max_length": 32}),
        "kto precomputed": ("KTO", MARKED, {"max_length": 32, "precompute_ref_log_probs": True}),
        "grpo": ("GRPO", [{"prompt": f"{n}?"} for n in range(8)], {"num_generations": 2, "max_completion_length": 4}),
    }  # fmt: skip
    name, data, settings = found[kind]
    return getattr(trl, f"{name}Trainer"), getattr(trl, f"{name}Config"), data, settings


def train_with_trl(kind: str, model: Any, folder: Path, out: Path, resume: bool = False, **settings: Any) -> None:
    datasets = pytest.importorskip("datasets")
    cls, config, data, own = of_trl(kind)
    args = config(output_dir=str(out), **{**QUIET, "bf16": False, "gradient_checkpointing": False, **own, **settings})
    more: dict[str, Any] = {}
    if kind == "grpo":
        more["reward_funcs"] = lambda completions, **_: [float(len(text)) for text in completions]
    tokenizer = make_tokenizer(CHATML)
    run = cls(model, args=args, train_dataset=datasets.Dataset.from_list(data), processing_class=tokenizer, **more)
    run.train(resume_from_checkpoint=str(out / "checkpoint-2") if resume else None)
    run.save_model(str(out / "saved"))


@pytest.mark.long
def test_sft_gives_a_bare_model_its_adapter(folder: Path, tmp_path: Path) -> None:
    datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")
    data = datasets.Dataset.from_list([{"text": text} for text in TEXTS])
    base = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    for name, model in (("plain", base), ("lema", open_bare(folder, ram_budget="2GB"))):
        torch.manual_seed(0)
        args = trl.SFTConfig(str(tmp_path / name), **{**QUIET, "bf16": False, "max_length": 32})
        assert args.gradient_checkpointing, "TRL's default"
        run = trl.SFTTrainer(
            model, args=args, train_dataset=data, processing_class=make_tokenizer(CHATML), peft_config=lora()
        )
        run.train()
        run.save_model(str(tmp_path / name / "saved"))
    lema.close(model)
    for part in ("checkpoint-2", "saved"):
        assert_equal(adapter(tmp_path / "lema" / part), adapter(tmp_path / "plain" / part))


KINDS = ["sft", "dpo", "dpo precomputed", "kto", "kto precomputed", "orpo", "grpo"]


@pytest.mark.parametrize("streamed", ["LemaModel", "from_pretrained planned"], indirect=True)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.long
def test_trl_trains_saves_and_goes_on(folder: Path, streamed: Callable[[], Any], tmp_path: Path, kind: str) -> None:
    torch.manual_seed(0)
    train_with_trl(kind, plain_model(folder), folder, tmp_path / "plain")
    torch.manual_seed(0)
    train_with_trl(kind, streamed(), folder, tmp_path / "lema")
    for part in ("checkpoint-2", "saved"):
        assert_equal(adapter(tmp_path / "lema" / part), adapter(tmp_path / "plain" / part))
    if kind == "sft":
        train_with_trl(kind, streamed(), folder, tmp_path / "lema", resume=True)
        assert_equal(adapter(tmp_path / "lema" / "saved"), adapter(tmp_path / "plain" / "saved"))
