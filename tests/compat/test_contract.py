"""The promises of the original's API: names, defaults, the facade, the low-level use, a family of one's own."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

import lema
from families import save_tiny
from helpers import (
    Pair,
    Recorder,
    adapter_of,
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
    relative,
)
from lema import LemaConfig, LemaModel, LemaTrainer, MemoryStrategy
from lema.core.memory import TripleBufferManager
from lema.engine.loss_scale import LossScale
from lema.models import GPT2Adapter, LlamaAdapter, get_adapter, register_adapter
from lema.models.base import LemaModelAdapter, bind_flat_buffer
from lema.models.lora import LoRAManager
from lema.storage.index import GlobalBinaryIndex

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
]


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GPT-2 with `transformer.h.N` names and a head of its own."""
    folder = tmp_path_factory.mktemp("gpt2")
    save_tiny("gpt2", folder, tie_word_embeddings=False)
    names = set(load_file(folder / "model.safetensors"))
    assert "transformer.h.0.attn.c_attn.weight" in names
    assert "lm_head.weight" in names
    return folder


# -- names and defaults ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("lema", ["LemaConfig", "MemoryStrategy", "LemaModel", "LemaTrainer", "__version__"]),
        ("lema.config", ["LemaConfig", "MemoryStrategy"]),
        ("lema.core.gbi", ["GlobalBinaryIndex"]),
        ("lema.core.memory", ["TripleBufferManager"]),
        ("lema.core.lora", ["LoRAManager"]),
        ("lema.core.model", ["LemaModel"]),
        ("lema.engine.trainer", ["LemaTrainer"]),
        ("lema.models.base", ["LemaModelAdapter"]),
        ("lema.models.llama", ["LlamaAdapter"]),
        ("lema.models.gpt2", ["GPT2Adapter"]),
        ("lema.models", ["get_adapter", "register_adapter"]),
        ("lema.utils.model_utils", ["prepare_monolithic_safetensors", "break_shared_weights"]),
    ],
)
def test_public_names(module: str, names: list[str]) -> None:
    loaded = importlib.import_module(module)
    assert all(hasattr(loaded, name) for name in names)
    if module == "lema":
        assert set(loaded.__all__) == {*names, "from_pretrained", "close"}
    for name, public in (("LemaModel", LemaModel), ("LemaTrainer", LemaTrainer)):
        assert name not in names or getattr(loaded, name) is public, "one class has this name"


def test_a_block_and_what_makes_a_model_keep_the_class() -> None:
    """For type checkers: `with LemaModel(config) as model: model.get_trainer().train(...)`."""
    for method in (LemaModel.__enter__, LemaModel.from_pretrained, LemaModel.to):
        assert inspect.signature(method).return_annotation == "Self"


def test_settings_without_names_are_the_originals_in_its_order() -> None:
    config = LemaConfig("m", None, None, "cpu", "resident", 3, 2)
    assert (config.device, config.strategy, config.ram_buffer_size, config.vram_buffer_size) == (
        "cpu", MemoryStrategy.RESIDENT, 3, 2
    )  # fmt: skip
    with pytest.raises(TypeError, match="at most 7 values without names"):
        LemaConfig("m", None, None, "cpu", "resident", 3, 2, True)
    with pytest.raises(TypeError, match="model_name_or_path is given twice"):
        LemaConfig("m", model_name_or_path="n")


def test_parameters_of_the_public_callables() -> None:
    from lema.prepare.single_file import break_shared_weights, prepare_monolithic_safetensors

    promised: list[tuple[Any, list[str]]] = [
        (GlobalBinaryIndex, ["path"]),
        (TripleBufferManager, ["gbi", "adapter", "device", "strategy"]),
        (LoRAManager, ["config", "device"]),
        (LemaModel, ["config"]),
        (LemaModel.from_pretrained, ["directory", "overrides"]),
        (LemaModel.get_trainer, ["self", "optimizer"]),
        (LemaTrainer, ["config", "model_adapter", "gbi", "lora_manager", "optimizer", "memory_manager"]),
        (LemaTrainer.train_step, ["self", "inputs", "labels"]),
        (LemaModelAdapter.construct_layer_module, ["self", "layer_id", "flat_buffer", "lora_manager"]),
        (LemaModelAdapter.forward_layer, ["self", "module", "inputs", "kwargs"]),
        (get_adapter, ["model_type", "config_dict"]),
        (register_adapter, ["model_type", "cls"]),
        (prepare_monolithic_safetensors, ["model_name_or_path", "output_path", "device"]),
        (break_shared_weights, ["model"]),
    ]
    for what, names in promised:
        parameters = inspect.signature(what).parameters
        assert list(parameters)[: len(names)] == names, what
    assert inspect.signature(TripleBufferManager).parameters["device"].default == "cuda"
    assert inspect.signature(TripleBufferManager).parameters["strategy"].default is MemoryStrategy.STREAMING
    assert inspect.signature(LoRAManager).parameters["device"].default == "cuda"
    assert inspect.signature(prepare_monolithic_safetensors).parameters["device"].default == "auto"


def test_defaults_of_the_settings() -> None:
    config = LemaConfig("somewhere")
    promised = {
        "model_type": None, "gbi_path": None, "device": "cuda", "strategy": MemoryStrategy.STREAMING,
        "ram_buffer_size": 2, "vram_buffer_size": 1, "use_lora": True, "lora_rank": 16, "lora_alpha": 32,
        "lora_target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        "learning_rate": 1e-4, "batch_size": 1, "gradient_accumulation_steps": 1, "max_seq_length": 512,
        "gradient_checkpointing": False, "save_steps": 500, "output_dir": "output", "dtype": "float16",
    }  # fmt: skip
    assert {name: getattr(config, name) for name in promised} == promised
    assert config.attn_implementation in ("eager", "sdpa"), "the original's, or the better one"
    with pytest.raises(TypeError):
        LemaConfig()  # type: ignore[call-arg]


def test_spellings_of_the_settings() -> None:
    for name in ("streaming", "STREAMING", "Streaming", MemoryStrategy.STREAMING):
        assert LemaConfig("x", strategy=name).strategy is MemoryStrategy.STREAMING  # type: ignore[arg-type]
    assert LemaConfig("x", strategy="Resident").strategy is MemoryStrategy.RESIDENT  # type: ignore[arg-type]
    for name in ("float16", "fp16", "torch.float16", torch.float16):
        assert LemaConfig("x", dtype=name).dtype == "float16"  # type: ignore[arg-type]
    for name in ("eager", "sdpa", "flash_attention_2"):
        assert LemaConfig("x", attn_implementation=name).attn_implementation == name
    assert LemaConfig(Path("a/b"), gbi_path=Path("c")).gbi_path == "c"  # type: ignore[arg-type]
    assert LemaConfig("x", lora_target_modules="q_proj").lora_target_modules == ["q_proj"]


def test_settings_survive_their_file(tmp_path: Path) -> None:
    config = LemaConfig("x", strategy="resident", lora_rank=3, seed=9, dtype="bf16", save_steps=-1)  # type: ignore[arg-type]
    path = config.save_pretrained(tmp_path)
    assert path == tmp_path / "lema_config.json"
    values = json.loads(path.read_text())
    assert values == config.to_dict()
    assert values["strategy"] == "resident"
    assert LemaConfig.from_pretrained(tmp_path) == config
    other = LemaConfig.from_pretrained(tmp_path, lora_rank=5, device="cpu")
    assert other == dataclasses.replace(config, lora_rank=5, device="cpu")
    assert LemaConfig.from_dict(config.to_dict()) == config


def test_lora_managers_defaults() -> None:
    manager = LoRAManager({}, device="cpu")
    assert manager.settings["r"] == 8
    assert manager.settings["lora_alpha"] == 16
    assert manager.settings["target_modules"] == ["c_attn", "c_proj", "c_fc"]


def test_the_index(llama: Path) -> None:
    with pytest.raises(FileNotFoundError):
        GlobalBinaryIndex(str(llama / "none.safetensors"))
    index = GlobalBinaryIndex(str(llama / "model.safetensors"))
    stored = load_file(llama / "model.safetensors")
    assert isinstance(index.keys, list)
    assert set(index.keys) == set(stored)
    names = ["model.norm.weight", "model.layers.2.mlp.up_proj.weight"]
    loaded = index.load_tensors(names, device="cpu")
    assert list(loaded) == names
    assert all(torch.equal(loaded[n], stored[n]) for n in names)
    index.close()


# -- the facade ------------------------------------------------------------------------------------


def test_the_models_attributes(llama: Path) -> None:
    config = lema_config(llama)
    with LemaModel(config) as model:
        assert model.config is config
        assert isinstance(model.gbi, GlobalBinaryIndex)
        assert isinstance(model.adapter, LlamaAdapter)
        assert isinstance(model.lora_manager, LoRAManager)
        assert isinstance(model.memory, TripleBufferManager)
        model.initialize_lora()
        parameters = model.get_trainable_parameters()
        model.initialize_lora()
        again = model.get_trainable_parameters()
        assert len(parameters) == 4 * 7 * 2
        assert all(a is b for a, b in zip(parameters, again, strict=True))
        assert all(p.requires_grad and p.dtype == torch.float32 for p in parameters)
        assert model.to("cpu") is model
        optimizer = torch.optim.AdamW(parameters)
        trainer = model.get_trainer(optimizer)
        assert isinstance(trainer, LemaTrainer)
        assert trainer.optimizer is optimizer
        assert trainer.memory is model.memory
        assert trainer.global_step == 0
        assert trainer.layers == model.adapter.get_layer_metadata()
        assert isinstance(model.get_trainer().optimizer, torch.optim.AdamW)


def test_what_a_step_returns(llama: Path) -> None:
    pair = Pair.of(llama)
    trainer = pair.model.get_trainer()
    batch = padded_batch()
    plain = pair.plain(**batch, use_cache=False)
    before = [p.detach().clone() for p in pair.model.get_trainable_parameters()]

    logits, loss = trainer.train_step(batch["input_ids"], attention_mask=batch["attention_mask"])
    pair.plain.eval()
    assert loss is None
    assert torch.equal(logits, pair.plain(**batch, use_cache=False).logits)
    assert all(torch.equal(a, b) for a, b in zip(before, pair.model.get_trainable_parameters(), strict=True))
    assert trainer.global_step == 0

    logits, loss = trainer.train_step(batch["input_ids"], batch["labels"], batch["attention_mask"], return_logits=True)
    assert isinstance(loss, float)
    assert relative(loss, plain.loss.item()) <= 1e-6
    assert torch.equal(logits, plain.logits)
    assert trainer.global_step == 1
    assert not any(torch.equal(a, b) for a, b in zip(before, pair.model.get_trainable_parameters(), strict=True))

    logits, loss = trainer.train_step(batch)
    assert logits is None
    assert isinstance(loss, float)
    pair.close()


def test_labels_are_shifted_by_the_step(llama: Path) -> None:
    with lema_model(llama) as model:
        trainer = model.get_trainer(Recorder(model.get_trainable_parameters()))
        ids = padded_batch(1, 6)["input_ids"]
        logits, loss = trainer.train_step(ids, ids, return_logits=True)
        assert logits is not None
        assert loss is not None
        assert relative(functional.cross_entropy(logits[0, :-1], ids[0, 1:]).item(), loss) < 1e-6


def test_a_saved_model_is_loaded_by_lema_and_by_peft(llama: Path, tmp_path: Path) -> None:
    batch = padded_batch()
    given = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with lema_model(llama, learning_rate=1e-2) as model:
        trainer = model.get_trainer()
        for _ in range(3):
            trainer.train_step(batch)
        expected = trainer.train_step(given)[0]
        model.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} >= {
        "lema_config.json",
        "adapter_config.json",
        "adapter_model.safetensors",
    }

    with LemaModel.from_pretrained(tmp_path) as again:
        assert again.config == model.config
        assert torch.equal(again.get_trainer().train_step(given)[0], expected)
    with LemaModel.from_pretrained(tmp_path, num_slots=3, strategy="resident", seed=1) as other:
        assert other.config.num_slots == 3
        assert other.config.strategy is MemoryStrategy.RESIDENT
        assert torch.equal(other.get_trainer().train_step(given)[0], expected)

    base = AutoModelForCausalLM.from_pretrained(llama, attn_implementation="eager")
    with torch.no_grad():
        without = base(**given, use_cache=False).logits
        loaded = PeftModel.from_pretrained(base, str(tmp_path)).eval()
        assert torch.equal(loaded(**given, use_cache=False).logits, expected)
    assert not torch.allclose(without, expected, atol=1e-3), "the adapter does nothing, so this test tests nothing"

    shutil.rmtree(tmp_path)
    with pytest.raises(FileNotFoundError):
        LemaModel.from_pretrained(tmp_path)


def test_the_managers_own_files(llama: Path, tmp_path: Path) -> None:
    with lema_model(llama) as model:
        manager = model.lora_manager
        assert manager is not None
        with pytest.raises(FileNotFoundError):
            manager.load_pretrained(tmp_path)
        randomise(model.hf_model)
        manager.save_pretrained(tmp_path)
        saved = [p.detach().clone() for p in manager.get_trainable_parameters()]
        randomise(model.hf_model, seed=2)
        assert not torch.equal(saved[1], manager.get_trainable_parameters()[1])
        manager.load_pretrained(tmp_path)
        assert all(torch.equal(a, b) for a, b in zip(saved, manager.get_trainable_parameters(), strict=True))


def test_without_lora_it_is_the_base(llama: Path, tmp_path: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(llama, attn_implementation="eager").eval()
    batch = padded_batch()
    with LemaModel(lema_config(llama, use_lora=False)) as model:
        assert model.lora_manager is None
        model.initialize_lora()
        assert model.get_trainable_parameters() == []
        with torch.no_grad():
            expected = plain(**batch, use_cache=False)
        trainer = model.get_trainer()
        logits, loss = trainer.train_step(batch["input_ids"], attention_mask=batch["attention_mask"])
        assert loss is None
        assert torch.equal(logits, expected.logits)
        _, loss = trainer.eval_step(batch)
        assert loss is not None
        assert relative(loss, expected.loss.item()) <= 1e-6
        ids = batch["input_ids"][2:3]
        found = model.generate(ids, max_new_tokens=5, do_sample=False)
        assert torch.equal(found, plain.generate(ids, max_new_tokens=5, do_sample=False))
        model.save_pretrained(tmp_path)
    with LemaModel.from_pretrained(tmp_path) as again:
        assert again.lora_manager is None


def test_where_weights_may_be(llama: Path, tmp_path: Path) -> None:
    """A directory and a file elsewhere; a bare file beside its config; a bare file with the adapter given."""
    batch = padded_batch()
    with lema_model(llama) as model:
        expected = lema_step(model, batch)[0]
    weights = tmp_path / "weights.safetensors"
    shutil.copy(llama / "model.safetensors", weights)
    with lema_model(llama, gbi_path=str(weights)) as model:
        assert model.gbi.files == [weights]
        assert lema_step(model, batch)[0] == expected
    with lema_model(llama / "model.safetensors") as model:
        assert lema_step(model, batch)[0] == expected
    values = json.loads((llama / "config.json").read_text())
    with LemaModel(lema_config(weights), adapter=LlamaAdapter(values)) as model:
        assert lema_step(model, batch)[0] == expected


def test_gpt2_has_targets_of_its_own(gpt2: Path) -> None:
    default = LemaConfig("x").lora_target_modules
    with lema_model(gpt2, lora_target_modules=default) as model:
        kinds = {name.split(".lora_")[0].rpartition(".")[2] for name in adapter_of(model.hf_model)}
        assert kinds == {"c_attn", "c_proj", "c_fc"}


# -- checkpoints -----------------------------------------------------------------------------------


def _files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_checkpoints_are_saved_every_save_steps(llama: Path, tmp_path: Path) -> None:
    with lema_model(llama, save_steps=2, output_dir=str(tmp_path / "out"), gradient_accumulation_steps=2) as model:
        trainer = model.get_trainer()
        for _ in range(11):
            trainer.train_step(padded_batch())
    assert trainer.global_step == 5
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["checkpoint-2", "checkpoint-4"]
    saved = {p.name for p in (tmp_path / "out" / "checkpoint-4").iterdir()}
    assert saved >= {"lema_config.json", "adapter_config.json", "adapter_model.safetensors", "optimizer.safetensors"}
    assert LemaConfig.from_pretrained(tmp_path / "out" / "checkpoint-4") == model.config
    with LemaModel.from_pretrained(tmp_path / "out" / "checkpoint-4") as loaded:
        own = {n: p.detach() for n, p in adapter_of(loaded.hf_model).items()}
        assert any(bool(p.any()) for n, p in own.items() if "lora_B" in n)


@pytest.mark.parametrize("save_steps", [0, -1])
def test_automatic_saving_can_be_off(llama: Path, tmp_path: Path, save_steps: int) -> None:
    with lema_model(llama, save_steps=save_steps, output_dir=str(tmp_path / "out")) as model:
        trainer = model.get_trainer()
        for _ in range(3):
            trainer.train_step(padded_batch())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("calls", [4, 5, 6], ids=["whole window", "one into a window", "two into a window"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_resumed_run_is_one_never_stopped(llama: Path, tmp_path: Path, calls: int, dtype: str) -> None:
    settings: dict[str, Any] = {
        "lora_dropout": 0.1, "gradient_accumulation_steps": 3 if calls > 4 else 2, "learning_rate": 1e-2,
        "max_grad_norm": 1.0, "dtype": dtype,
    }  # fmt: skip

    def run(trainer: LemaTrainer, start: int, end: int) -> list[float | None]:
        return [trainer.train_step(padded_batch(2 + i % 2, seed=i))[1] for i in range(start, end)]

    with lema_model(llama, **settings) as model:
        torch.manual_seed(11)
        trainer = model.get_trainer()
        if dtype == "float16":
            trainer.trainables.loss_scale = LossScale(True, 1024.0)  # not the default, so it must be resumed
        expected = run(trainer, 0, 12)
        state = {n: p.detach().clone() for n, p in adapter_of(model.hf_model).items()}
        steps = trainer.global_step
        assert steps > 0
    with lema_model(llama, **settings) as model:
        torch.manual_seed(11)
        trainer = model.get_trainer()
        if dtype == "float16":
            trainer.trainables.loss_scale = LossScale(True, 1024.0)  # not the default, so it must be resumed
        assert run(trainer, 0, calls) == expected[:calls]
        trainer.save_checkpoint(tmp_path / "here")
    torch.manual_seed(999)
    with LemaModel.from_pretrained(tmp_path / "here") as model:
        trainer = model.get_trainer(resume_from=tmp_path / "here")
        assert dtype == "float32" or trainer.loss_scale == 1024.0
        assert run(trainer, calls, 12) == expected[calls:]
        assert trainer.global_step == steps
        assert not differing(state, {n: p.detach() for n, p in adapter_of(model.hf_model).items()})


@pytest.mark.parametrize("where", ["adapter", "first tensors", "json", "last tensors", "flush", "swap"])
def test_a_crash_while_saving_leaves_the_old_checkpoint(
    llama: Path, tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lema.engine import checkpoint
    from lema.storage import atomic as files

    target = tmp_path / "checkpoints" / "here"
    with lema_model(llama, learning_rate=1e-2) as model:
        trainer = model.get_trainer()
        trainer.train_step(padded_batch())
        trainer.save_checkpoint(target)
        before = _files(target)
        trainer.train_step(padded_batch())
        places: dict[str, tuple[Any, str, int]] = {
            "adapter": (LoRAManager, "save_pretrained", 1),
            "first tensors": (checkpoint, "save_file", 1),
            "json": (checkpoint, "_write_json", 2),
            "last tensors": (checkpoint, "save_file", 2),
            "flush": (files, "flush", 3),
            "swap": (files, "_swap", 1),
        }
        owner, name, at = places[where]
        real, count = getattr(owner, name), 0

        def crash(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == at:
                raise OSError(28, "No space left on device")
            return real(*args, **kwargs)

        with monkeypatch.context() as patched:
            patched.setattr(owner, name, crash)
            with pytest.raises(OSError, match="No space left"):
                trainer.save_checkpoint(target)
        assert _files(target) == before
        assert [p.name for p in target.parent.iterdir()] == ["here"], "nothing half written stays"
        trainer.save_checkpoint(target)
        after = _files(target)
        assert after.keys() == before.keys()
        assert after["adapter_model.safetensors"] != before["adapter_model.safetensors"]
        assert [p.name for p in target.parent.iterdir()] == ["here"]
        model.get_trainer(resume_from=target)


# -- the low-level use -----------------------------------------------------------------------------


def _parts(folder: Path) -> tuple[Any, GlobalBinaryIndex]:
    values = json.loads((folder / "config.json").read_text())
    adapter = {"llama": LlamaAdapter, "gpt2": GPT2Adapter}[values["model_type"]](values)
    return adapter, GlobalBinaryIndex(str(folder / "model.safetensors"))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_layers_one_by_one_make_the_whole_model(family: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(family)
    adapter, index = _parts(folder)
    adapter.configure(torch.float32, "eager")
    layers = adapter.get_layer_metadata()
    assert [layer["id"] for layer in layers] == list(range(6))
    assert [layer["type"] for layer in layers] == ["embedding", "block", "block", "block", "block", "head"]
    assert [layer.get("block_index") for layer in layers] == [None, 0, 1, 2, 3, None]
    assert all(layer["name"] for layer in layers)
    assert adapter.hidden_size == 32
    names = [name for layer in layers for name in adapter.get_param_names_for_layer(layer["id"])]
    assert sorted(names) == sorted(set(index.keys))
    batch = padded_batch()
    kwargs = {"attention_mask": batch["attention_mask"]}
    state = batch["input_ids"]
    with torch.no_grad():
        for layer in layers:
            tensors = index.load_tensors(adapter.get_param_names_for_layer(layer["id"]), device="cpu")
            flat = torch.cat([t.reshape(-1) for t in tensors.values()])
            module = adapter.construct_layer_module(layer["id"], flat_buffer=flat)
            state = adapter.forward_layer(module, state, **kwargs)
            kept = state.clone()
            if layer["type"] == "block":
                flat.zero_()  # the buffer's owner overwrites it: parameters are views of it
                assert not any(bool(p.any()) for p in module.parameters())
            adapter.release_layer_module(module)
            state = kept
        plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
        expected = plain(input_ids=batch["input_ids"], **kwargs, use_cache=False).logits
    assert torch.equal(state, expected)
    with pytest.raises(IndexError):
        adapter.get_param_names_for_layer(6)


@pytest.mark.parametrize("given_memory", [False, True], ids=["memory made", "memory given"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_trainer_from_the_parts(family: str, given_memory: bool, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(family)
    adapter, index = _parts(folder)
    targets = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_proj", "c_fc"]}[family]
    manager = LoRAManager({"r": 4, "alpha": 8, "target_modules": targets}, device="cpu")
    config = lema_config(folder, lora_rank=64, lora_alpha=1)
    for layer in adapter.get_layer_metadata():
        if layer["type"] == "block":
            module = adapter.construct_layer_module(layer["id"], lora_manager=manager)
            assert any("lora_" in name for name, _ in module.named_parameters())
            adapter.release_layer_module(module)
    parameters = manager.get_trainable_parameters()
    assert len(parameters) == 4 * 2 * (3 if family == "llama" else 4)
    assert min(parameters[0].shape) == 4, "the manager's rank wins over the config's"
    optimizer = Recorder(parameters)
    memory = None
    if given_memory:
        adapter.configure(torch.float32, "eager")
        memory = TripleBufferManager(index, adapter, device="cpu", strategy=MemoryStrategy.STREAMING)
    trainer = LemaTrainer(config, adapter, index, manager, optimizer, memory)
    if memory is not None:
        assert trainer.memory is memory
    plain = plain_model(folder, targets=targets)
    randomise(plain, trainer.model)
    expected_loss, expected = plain_step(plain, padded_batch())
    _, loss = trainer.train_step(padded_batch())
    assert loss is not None
    assert relative(loss, expected_loss) <= 1e-6
    assert not differing(expected, recorded(trainer, trainer.model))
    assert trainer.global_step == 1
    assert trainer.layers == adapter.get_layer_metadata()
    trainer.memory.close()


# -- a family of one's own -------------------------------------------------------------------------

WIDTH, WORDS, BLOCKS = 16, 50, 3


class Mixer(nn.Module):
    """A block of no known family: a causal mean, then two linear layers around a tanh."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        steps = torch.arange(1, hidden.shape[1] + 1, dtype=hidden.dtype)[:, None]
        return hidden + self.down(torch.tanh(self.up(hidden.cumsum(1) / steps)))


class MixerAdapter(LemaModelAdapter):
    """Just the abstract methods."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.blocks: int = config["blocks"]

    def get_layer_metadata(self) -> list[dict[str, Any]]:
        blocks = [{"id": i + 1, "name": f"b{i}", "type": "block", "block_index": i} for i in range(self.blocks)]
        first, last = {"id": 0, "name": "e", "type": "embedding"}, {"id": self.blocks + 1, "name": "h", "type": "head"}
        return [first, *blocks, last]

    def get_param_names_for_layer(self, layer_id: int) -> list[str]:
        if layer_id == 0:
            return ["words"]
        if layer_id == self.blocks + 1:
            return ["out"]
        return [f"b{layer_id - 1}.{name}" for name in ("up.weight", "up.bias", "down.weight")]

    def construct_layer_module(
        self, layer_id: int, flat_buffer: torch.Tensor | None = None, lora_manager: LoRAManager | None = None
    ) -> nn.Module:
        module: Any
        if layer_id == 0:
            module = nn.Embedding(WORDS, WIDTH)
            places = [(module, "weight")]
        elif layer_id == self.blocks + 1:
            module = nn.Linear(WIDTH, WORDS, bias=False)
            places = [(module, "weight")]
        else:
            module = Mixer()
            places = [(module.up, "weight"), (module.up, "bias"), (module.down, "weight")]
        module = module.to(self.dtype)
        if flat_buffer is not None:
            bind_flat_buffer(places, flat_buffer)
        return module

    def forward_layer(self, module: nn.Module, inputs: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        output: torch.Tensor = module(inputs)
        return output

    def release_layer_module(self, module: nn.Module) -> None:
        pass

    @property
    def hidden_size(self) -> int:
        return WIDTH


class PlainMixer(nn.Module):
    """The same model the ordinary way."""

    def __init__(self, stored: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH, _weight=stored["words"].clone())
        self.layers = nn.ModuleList(Mixer() for _ in range(BLOCKS))
        self.out = stored["out"]
        for i, layer in enumerate(self.layers):
            layer.load_state_dict({n: stored[f"b{i}.{n}"] for n in ("up.weight", "up.bias", "down.weight")})

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.words(ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden @ self.out.T


@pytest.fixture
def mixer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from lema.models import registry

    monkeypatch.setattr(registry, "_ADAPTERS", dict(registry._ADAPTERS))
    register_adapter("mixer", MixerAdapter)
    generator = torch.Generator().manual_seed(0)
    shapes = {"words": (WORDS, WIDTH), "out": (WORDS, WIDTH)}
    for i in range(BLOCKS):
        shapes[f"b{i}.up.weight"], shapes[f"b{i}.up.bias"] = (2 * WIDTH, WIDTH), (2 * WIDTH,)  # type: ignore[assignment]
        shapes[f"b{i}.down.weight"] = (WIDTH, 2 * WIDTH)
    stored = {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}
    save_file(stored, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mixer", "blocks": BLOCKS}))
    return tmp_path


@pytest.mark.parametrize("strategy", ["streaming", "resident"])
def test_a_family_of_ones_own_has_the_gradients_of_autograd(mixer: Path, strategy: str) -> None:
    ids = padded_batch(3, 7, vocabulary=WORDS)["input_ids"]
    config = lema_config(mixer, lora_target_modules=["up", "down"], strategy=strategy)
    plain = get_peft_model(
        PlainMixer(load_file(mixer / "model.safetensors")),  # type: ignore[arg-type]
        LoraConfig(r=4, lora_alpha=8, target_modules=["up", "down"]),
    )
    with LemaModel(config) as model:
        assert isinstance(model.adapter, MixerAdapter)
        parameters = model.get_trainable_parameters()
        own = [p for p in plain.parameters() if p.requires_grad]
        assert [p.shape for p in own] == [p.shape for p in parameters]
        assert len(own) == BLOCKS * 4
        with torch.no_grad():
            for mine, theirs in zip(parameters, own, strict=True):
                mine.copy_(torch.randn(mine.shape, generator=torch.Generator().manual_seed(mine.numel())) * 0.3)
                theirs.copy_(mine)
        logits = plain(ids)
        expected = functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        expected.backward()
        trainer = model.get_trainer(Recorder(parameters))
        for _ in range(2):
            found, loss = trainer.train_step(ids, ids, return_logits=True)
            assert loss is not None
            assert relative(loss, expected.item()) <= 1e-6
            torch.testing.assert_close(found, logits.detach(), rtol=1e-6, atol=1e-6)
            assert isinstance(trainer.optimizer, Recorder)
            for mine, theirs in zip(trainer.optimizer.seen, own, strict=True):
                assert mine is not None
                assert theirs.grad is not None
                torch.testing.assert_close(mine, theirs.grad, rtol=2e-6, atol=1e-8)


def test_a_family_of_ones_own_learns_and_is_saved(mixer: Path, tmp_path: Path) -> None:
    ids = padded_batch(3, 7, vocabulary=WORDS)["input_ids"]
    settings: dict[str, Any] = {"lora_target_modules": ["up", "down"], "learning_rate": 3e-2}
    with LemaModel(lema_config(mixer, **settings)) as model:
        trainer = model.get_trainer()
        losses = [trainer.train_step(ids, ids)[1] for _ in range(30)]
        assert all(loss is not None and math.isfinite(loss) for loss in losses)
        assert losses[-1] < 0.7 * losses[0]  # type: ignore[operator]
        assert model.memory.stats.loads > 0
        expected = trainer.train_step(ids)[0]
        model.save_pretrained(tmp_path / "saved")
    with LemaModel.from_pretrained(tmp_path / "saved") as again:
        assert torch.equal(again.get_trainer().train_step(ids)[0], expected)


def test_a_family_of_ones_own_in_micro_batches_and_half_precision(mixer: Path) -> None:
    ids = padded_batch(4, 4, vocabulary=WORDS)["input_ids"]
    results = []
    for settings in ({}, {"micro_batch_size": 1, "loss_chunk_size": 3}, {"dtype": "bfloat16"}):
        with LemaModel(lema_config(mixer, lora_target_modules=["up", "down"], **settings)) as model:
            randomise(model.hf_model)
            results.append(lema_step(model, {"input_ids": ids, "labels": ids}))
    (loss, gradients), (cut_loss, cut), (half_loss, half) = results
    assert relative(cut_loss, loss) <= 1e-6
    for name, gradient in gradients.items():
        torch.testing.assert_close(cut[name], gradient, rtol=1e-4, atol=1e-7)
        assert (half[name] - gradient).norm() < 0.1 * gradient.norm()
    assert 0 < relative(half_loss, loss) < 0.02


def test_only_adapters_can_be_registered() -> None:
    with pytest.raises(TypeError, match="LemaModelAdapter"):
        register_adapter("bad", nn.Linear)  # type: ignore[arg-type]


def test_hf_model_is_called_and_trained_like_any_other(llama: Path) -> None:
    pair = Pair.of(llama)
    batch = padded_batch()
    for seed in (1, 2):
        batch = padded_batch(seed=seed)
        loss = pair.model.hf_model(**batch).loss
        expected = pair.plain(**batch, use_cache=False).loss
        assert torch.equal(loss, expected)
        loss.backward()
        expected.backward()
    assert not differing(gradients_of(pair.plain), gradients_of(pair.model.hf_model)), "gradients of two calls add up"
    assert lema.__version__
    pair.close()
