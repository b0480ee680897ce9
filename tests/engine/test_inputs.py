"""Bad input of every kind: a typed error that says what is wrong, where, and what to do; and Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lema
from families import save_tiny
from helpers import lema_config, lema_model, padded_batch, recording_trainer
from lema import LemaTrainer
from lema.errors import (
    CheckpointError,
    ConfigError,
    DeviceError,
    InputError,
    LemaError,
    MissingTensorError,
    NonFiniteError,
    ShapeMismatchError,
    UnsupportedError,
    WeightsError,
    WeightsNotFoundError,
)
from lema.models import get_adapter
from lema.storage.index import GlobalBinaryIndex

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
]


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A model of the test's own, to be damaged."""
    save_tiny("llama", tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def model(llama: Path) -> Iterator[lema.LemaModel]:
    with lema_model(llama) as model:
        yield model


@pytest.fixture
def trainer(model: lema.LemaModel) -> LemaTrainer:
    return recording_trainer(model)


# -- batches ---------------------------------------------------------------------------------------


def _refused(trainer: LemaTrainer, match: str, *args: Any, **kwargs: Any) -> None:
    with pytest.raises(InputError, match=match):
        trainer.train_step(*args, **kwargs)
    _, loss = trainer.train_step(padded_batch())
    assert loss is not None, "after a refusal the trainer goes on"


@pytest.mark.parametrize("value", [99, 100000, -1])
def test_ids_outside_the_vocabulary(trainer: LemaTrainer, value: int) -> None:
    ids = padded_batch()["input_ids"]
    ids[2, 5] = value
    _refused(trainer, rf"input_ids row 2, position 5 is {value}, .* 99 tokens \(0..98\)", ids, ids.clamp(0, 98))


@pytest.mark.parametrize("value", [99, -1, -101])
def test_labels_outside_the_vocabulary(trainer: LemaTrainer, value: int) -> None:
    batch = padded_batch()
    batch["labels"][3, 4] = value
    _refused(trainer, rf"labels row 3, position 4 is {value}, ", batch)


def test_the_last_token_of_the_vocabulary_is_no_mistake(trainer: LemaTrainer) -> None:
    ids = torch.full((1, 4), 98)
    assert trainer.train_step(ids, ids)[1] is not None


def test_a_sequence_longer_than_the_models_positions(trainer: LemaTrainer) -> None:
    ids = torch.ones(1, 65, dtype=torch.long)
    _refused(trainer, "65 tokens .* 64 positions", ids, ids)
    assert trainer.train_step(ids[:, :64], ids[:, :64])[1] is not None


def test_max_seq_length_is_a_cap_on_data_only(llama: Path) -> None:
    with lema_model(llama, max_seq_length=4) as model:
        assert recording_trainer(model).train_step(padded_batch())[1] is not None


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0,)])
def test_an_empty_batch(trainer: LemaTrainer, shape: tuple[int, ...]) -> None:
    ids = torch.zeros(shape, dtype=torch.long)
    _refused(trainer, r"empty.*shape \[", ids, ids)


def test_no_target(trainer: LemaTrainer) -> None:
    batch = padded_batch()
    labels = torch.full_like(batch["labels"], -100)
    _refused(trainer, "none of the 4 rows has a target", batch["input_ids"], labels)
    labels[:, 0] = 5  # the first position is nobody's target
    _refused(trainer, "none of the 4 rows has a target", batch["input_ids"], labels)
    one = torch.ones(3, 1, dtype=torch.long)
    _refused(trainer, "none of the 3 rows has a target", one, one)


def test_a_single_target_is_enough(trainer: LemaTrainer) -> None:
    batch = padded_batch()
    labels = torch.full_like(batch["labels"], -100)
    labels[2, 3] = 7
    assert trainer.train_step(batch["input_ids"], labels)[1] is not None
    assert trainer.last_step is not None
    assert trainer.last_step.num_targets == 1


def test_shapes_and_types(trainer: LemaTrainer) -> None:
    ids = padded_batch()["input_ids"]
    _refused(trainer, r"labels has shape \[4, 9\], input_ids \[4, 10\]", ids, ids[:, 1:])
    _refused(
        trainer, r"attention_mask has shape \[3, 10\]", ids, ids, attention_mask=torch.ones(3, 10, dtype=torch.long)
    )
    _refused(trainer, r"position_ids has shape \[1, 10\]", ids, ids, position_ids=torch.arange(10))
    _refused(trainer, "input_ids must hold whole numbers", ids.float(), ids)
    _refused(trainer, "labels must hold whole numbers", ids, ids.float())
    _refused(trainer, r"\[batch, seq\]", ids.unsqueeze(0), ids)


def test_keys_of_a_mapping(trainer: LemaTrainer) -> None:
    batch = padded_batch()
    _refused(trainer, "pixel_values", {**batch, "pixel_values": torch.ones(1)})
    _refused(trainer, "no input_ids", {"labels": batch["labels"]})


def test_nothing_can_be_trained_without_lora(llama: Path) -> None:
    with lema_model(llama, use_lora=False) as model:
        trainer = model.get_trainer()
        with pytest.raises(ConfigError, match="use_lora is off"):
            trainer.train_step(padded_batch())
        with pytest.raises(ConfigError, match="use_lora is off"):
            trainer.save_checkpoint("never")
        with pytest.raises(ConfigError, match="use_lora is off"):
            trainer.load_checkpoint("never")


def test_an_optimizer_of_another_model(model: lema.LemaModel) -> None:
    with pytest.raises(ConfigError, match="get_trainable_parameters"):
        model.get_trainer(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0))


# -- settings --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"dtype": "float8"}, "dtype='float8' is unknown: choose one of float16, bfloat16, float32"),
        ({"dtype": "flaot16"}, "did you mean 'float16'"),
        ({"strategy": "stream"}, "strategy='stream' is unknown: choose 'streaming' or 'resident'"),
        ({"strategy": 3}, "strategy=3"),
        ({"attn_implementation": "flash"}, "attn_implementation='flash' is unknown"),
        ({"lora_rank": 0}, "lora_rank=0 must be 1 or more"),
        ({"lora_rank": 2.5}, "lora_rank=2.5 must be a whole number"),
        ({"lora_rank": True}, "lora_rank=True"),
        ({"lora_alpha": 0}, "lora_alpha=0"),
        ({"lora_dropout": 1.0}, "lora_dropout=1.0"),
        ({"lora_dropout": -0.1}, "lora_dropout=-0.1"),
        ({"lora_target_modules": []}, "lora_target_modules is empty"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
        ({"max_grad_norm": 0.0}, "max_grad_norm=0.0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"micro_batch_size": 0}, "micro_batch_size=0"),
        ({"loss_chunk_size": 0}, "loss_chunk_size=0"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps=0"),
        ({"num_slots": 1}, "num_slots=1 must be 2 or more"),
        ({"num_readers": 0}, "num_readers=0"),
        ({"prefetch_depth": -1}, "prefetch_depth=-1"),
        ({"ram_buffer_size": 0}, "ram_buffer_size=0"),
        ({"vram_buffer_size": 0}, "vram_buffer_size=0"),
        ({"max_seq_length": 0}, "max_seq_length=0"),
        ({"save_steps": "often"}, "save_steps='often'"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_bad_settings(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match) as caught:
        lema.LemaConfig("somewhere", **settings)
    assert isinstance(caught.value, ValueError)


def test_an_empty_model_path() -> None:
    with pytest.raises(ConfigError, match="model_name_or_path"):
        lema.LemaConfig("")
    with pytest.raises(ConfigError, match="model_name_or_path"):
        lema.LemaConfig.from_dict({"device": "cpu"})


def test_an_unknown_setting_is_named_and_one_suggested() -> None:
    with pytest.raises(ConfigError, match="unknown setting 'lora_rnk'; did you mean 'lora_rank'"):
        lema.LemaConfig.from_dict({"model_name_or_path": "x", "lora_rnk": 4})
    with pytest.raises(ConfigError, match="unknown setting 'zzz'; known: model_name_or_path, "):
        lema.LemaConfig.from_dict({"model_name_or_path": "x", "zzz": 4})
    with pytest.raises(ConfigError, match="did you mean 'dtype'"):
        lema.LemaConfig("x").replace(dtyp="float32")


def test_a_settings_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"lema_config\.json"):
        lema.LemaConfig.from_pretrained(tmp_path)
    for text, match in (
        ("{", "not valid JSON"),
        ("[1]", "holds list"),
        ('{"model_name_or_path": "x", "a_b": 1}', "a_b"),
    ):
        (tmp_path / "lema_config.json").write_text(text)
        with pytest.raises(ConfigError, match=match):
            lema.LemaConfig.from_pretrained(tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_names_the_choice(llama: Path) -> None:
    with pytest.raises(DeviceError, match="choose device='cpu'"):
        lema.LemaModel(lema_config(llama, device="cuda"))
    with lema_model(llama) as model:
        assert model.to("cpu") is model
        with pytest.raises(DeviceError, match="device='cuda'"):
            model.to("cuda")


def test_unknown_lora_targets_list_the_candidates(llama: Path) -> None:
    with pytest.raises(
        ConfigError, match="Modules of this model that can have LoRA: q_proj, k_proj, v_proj, o_proj, "
    ) as caught:
        lema_model(llama, lora_target_modules=["c_attn"])
    assert "c_attn" in str(caught.value)


def test_an_unknown_lora_setting_is_named() -> None:
    from lema.models.lora import LoRAManager

    with pytest.raises(ConfigError, match="'lora_dropuot'; did you mean 'lora_dropout'"):
        LoRAManager({"lora_dropuot": 0.1}, device="cpu")


# -- files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["missing", "missing/model.safetensors"])
def test_a_path_that_does_not_exist(tmp_path: Path, name: str) -> None:
    with pytest.raises(WeightsNotFoundError, match="missing") as caught:
        lema.LemaModel(lema_config(tmp_path / name))
    assert isinstance(caught.value, FileNotFoundError)
    with pytest.raises(FileNotFoundError):
        GlobalBinaryIndex(str(tmp_path / name))


def test_weights_that_do_not_exist(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors"):
        lema.LemaModel(lema_config(llama, gbi_path=str(tmp_path / "none.safetensors")))


def test_all_missing_tensors_are_listed_at_once(own: Path) -> None:
    path = own / "model.safetensors"
    stored = load_file(path)
    gone = ["model.layers.1.mlp.up_proj.weight", "model.layers.3.self_attn.q_proj.weight", "model.norm.weight"]
    for name in gone:
        del stored[name]
    save_file(stored, path, metadata={"format": "pt"})
    with pytest.raises(MissingTensorError, match="3 tensors") as caught:
        lema_model(own)
    assert all(name in str(caught.value) for name in gone)
    assert str(path) in str(caught.value) or str(own) in str(caught.value)


def test_all_wrong_shapes_are_listed_at_once(own: Path) -> None:
    values = json.loads((own / "config.json").read_text())
    values["intermediate_size"] = 64
    (own / "config.json").write_text(json.dumps(values))
    with pytest.raises(ShapeMismatchError, match="12 tensors differ in shape") as caught:
        lema_model(own)
    assert "model.layers.0.mlp.gate_proj.weight: stored [48, 32], configured [64, 32]" in str(caught.value)


def test_more_layers_configured_than_stored(own: Path) -> None:
    values = json.loads((own / "config.json").read_text())
    values["num_hidden_layers"] = 5
    values.pop("layer_types", None)
    (own / "config.json").write_text(json.dumps(values))
    with pytest.raises(MissingTensorError, match=r"model\.layers\.4\."):
        lema_model(own)


def test_several_weight_files_without_an_index(own: Path) -> None:
    stored = load_file(own / "model.safetensors")
    os.remove(own / "model.safetensors")
    save_file(dict(list(stored.items())[:3]), own / "a.safetensors")
    save_file(dict(list(stored.items())[3:]), own / "b.safetensors")
    with pytest.raises(WeightsError, match=r"a\.safetensors") as caught:
        lema_model(own)
    assert "b.safetensors" in str(caught.value)


def test_a_file_that_is_no_safetensors(own: Path) -> None:
    (own / "model.safetensors").write_bytes(b"PK\x03\x04 a pickle of old" * 10)
    with pytest.raises(WeightsError, match=r"model\.safetensors"):
        lema_model(own)


def test_a_file_cut_short(own: Path) -> None:
    path = own / "model.safetensors"
    os.truncate(path, path.stat().st_size - 1000)
    with pytest.raises(WeightsError, match=r"model\.safetensors"):
        lema_model(own)


def test_a_file_without_a_configuration(own: Path) -> None:
    os.remove(own / "config.json")
    with pytest.raises(ConfigError, match=r"config\.json does not exist.*gbi_path"):
        lema.LemaModel(lema_config(own / "model.safetensors"))


def test_an_unknown_model_type_names_those_registered(own: Path) -> None:
    for type_ in ("no_such_family", "t5"):
        with pytest.raises(ValueError, match="gpt2, llama") as caught:
            get_adapter(type_, {})
        assert isinstance(caught.value, UnsupportedError)
        assert type_ in str(caught.value)
    values = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps({**values, "model_type": "no_such_family"}))
    with pytest.raises(UnsupportedError, match="no_such_family"):
        lema.LemaModel(lema_config(own))
    del values["model_type"]
    (own / "config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match="model_type"):
        lema.LemaModel(lema_config(own))
    lema.LemaModel(lema_config(own, model_type="llama")).close()


def test_weights_that_are_not_finite_are_found_in_their_layer(own: Path) -> None:
    path = own / "model.safetensors"
    stored = load_file(path)
    stored["model.layers.2.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(stored, path, metadata={"format": "pt"})
    with lema_model(own) as model:
        trainer = recording_trainer(model)
        with pytest.raises(NonFiniteError, match="loss is nan at step 1, first seen in the output of layer 2"):
            trainer.train_step(padded_batch())
        assert trainer.optimizer.steps == 0  # type: ignore[attr-defined]
        assert trainer.global_step == 0


def test_gradients_that_are_not_finite_do_not_reach_the_optimizer(llama: Path) -> None:
    with lema_model(llama) as model:
        trainer = recording_trainer(model)
        bad = next(p for n, p in model.hf_model.named_parameters() if "layers.1.mlp.up_proj.lora_B" in n)
        handle = bad.register_hook(lambda gradient: gradient * float("inf"))
        with pytest.raises(NonFiniteError, match=r"layer 1, mlp\.up_proj\.lora_B"):
            trainer.train_step(padded_batch())
        assert trainer.optimizer.steps == 0  # type: ignore[attr-defined]
        handle.remove()
        assert trainer.train_step(padded_batch())[1] is not None
        assert trainer.global_step == 1


# -- checkpoints -----------------------------------------------------------------------------------


def test_checkpoints_that_are_none(llama: Path, model: lema.LemaModel, tmp_path: Path) -> None:
    trainer = model.get_trainer()
    with pytest.raises(CheckpointError, match="does not exist"):
        trainer.load_checkpoint(tmp_path / "missing")
    with pytest.raises(CheckpointError, match="COMPLETE"):
        trainer.load_checkpoint(llama)
    trainer.train_step(padded_batch())
    trainer.save_checkpoint(tmp_path / "whole")
    state = tmp_path / "whole" / "optimizer.safetensors"
    whole = state.read_bytes()
    state.write_bytes(whole[:-10])
    with pytest.raises(CheckpointError, match="damaged"):
        trainer.load_checkpoint(tmp_path / "whole")
    state.write_bytes(whole)
    with lema_model(llama, lora_rank=8) as other:
        with pytest.raises(CheckpointError, match="does not fit the adapter"):
            other.get_trainer(resume_from=tmp_path / "whole")


def test_every_error_is_one_family() -> None:
    import lema.errors

    kinds = [e for e in vars(lema.errors).values() if isinstance(e, type) and issubclass(e, Exception)]
    assert len(kinds) > 10
    assert all(issubclass(kind, LemaError) for kind in kinds)


# -- Ctrl-C ----------------------------------------------------------------------------------------

_INTERRUPTED = """
    import os, signal, sys, threading, time
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit that it is ignored
    sys.path.insert(0, {tests!r})
    from helpers import lema_model, padded_batch, recording_trainer

    model = lema_model({folder!r})
    trainer = recording_trainer(model)
    batch = padded_batch()
    _, first = trainer.train_step(batch)
    gradients = [g.clone() for g in trainer.optimizer.seen]
    preadv = os.preadv
    def slow(*args):  # so that a step is longer than any delay, and the signal never falls between two steps
        time.sleep(0.6)
        return preadv(*args)
    for step in [trainer.train_step, trainer.eval_step] * 3:
        os.preadv = slow
        try:
            print("ready", flush=True)
            while True:
                step(batch)
        except KeyboardInterrupt:
            names = [t.name for t in threading.enumerate()]
            os.preadv = preadv
            _, loss = trainer.train_step(batch)
            same = loss == first and all(bool((a == b).all()) for a, b in zip(trainer.optimizer.seen, gradients))
            print("interrupted", names, same, flush=True)
"""


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.long
def test_ctrl_c_in_a_step_ends_every_thread_and_the_next_step_is_undisturbed(llama: Path) -> None:
    code = textwrap.dedent(_INTERRUPTED).format(tests=str(Path(__file__).parents[1] / "support"), folder=str(llama))
    source = str(Path(lema.__file__).parents[1])
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": source},
    )  # fmt: skip
    said = []
    try:
        assert process.stdout is not None
        for delay in (0.2, 0.25, 0.33, 0.4, 0.6, 0.7):
            assert process.stdout.readline().strip() == "ready"
            time.sleep(delay)
            process.send_signal(signal.SIGINT)
            said.append(process.stdout.readline().strip())
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert said == ["interrupted ['MainThread'] True"] * 6, err
    assert process.returncode == 0, err


def test_ctrl_c_in_an_answer_of_the_bare_model_leaves_it_usable(llama: Path) -> None:
    ids, threads = torch.tensor([[3, 4, 5]]), {*threading.enumerate()}
    with lema_model(llama) as model:
        module: Any = model.hf_model
        answer = lambda: module.generate(input_ids=ids, max_new_tokens=3, do_sample=False)  # noqa: E731
        before = answer()
        calls = 0

        def interrupt(*_: Any) -> None:
            nonlocal calls
            calls += 1
            if calls == 6:  # in the second token
                raise KeyboardInterrupt

        handle = model.adapter.causal_lm().layers[1].mlp.register_forward_hook(interrupt)
        for call in (answer, lambda: module(input_ids=ids)):
            calls = 4
            with pytest.raises(KeyboardInterrupt):
                call()
                call()
            assert {*threading.enumerate()} <= threads
        handle.remove()
        with ThreadPoolExecutor(1) as pool:  # nobody holds the model's turn
            assert torch.equal(pool.submit(answer).result(), before)
