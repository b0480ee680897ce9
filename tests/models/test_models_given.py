"""Models as they are given: what their configuration and folder say is followed, refused by name, or measured."""

from __future__ import annotations

import json
import math
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import lema
from data_helpers import CHATML, VOCABULARY, make_tokenizer, write_jsonl
from families import save_tiny
from helpers import (
    Pair,
    differing,
    errors,
    gradients_of,
    lema_config,
    lema_model,
    lema_step,
    padded_batch,
    plain_step,
    recording_trainer,
)
from lema.cli.app import app
from lema.engine.dry_run import DryRun
from lema.errors import ConfigError, LemaError, StreamingError, UnsupportedError
from lema.models import get_adapter
from lema.models.stages import layer_arguments
from lema.models.transformers_adapter import TransformersAdapter

pytestmark = pytest.mark.timeout(300)

BUDGET: dict[str, Any] = {"ram_budget": "2GB", "batch_size": 4, "max_seq_length": 10}
ROWS = [{"prompt": f"{n}?", "completion": f" {n}!"} for n in range(8)]


def edit(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def run_file(folder: Path, model: Path, **changes: Any) -> Path:
    values = {
        "model_name_or_path": str(model), "train_file": str(write_jsonl(folder / "rows.jsonl", ROWS)),
        "output_dir": str(folder / "out"), "device": "cpu", "dtype": "float32", "lora_target_modules": "all-linear",
        "max_seq_length": 32, "lora_rank": 4, "ram_budget": "2GB", "max_steps": 2, **changes,
    }  # fmt: skip
    path = folder / "run.yaml"
    path.write_text(json.dumps(values))
    return path


def command(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


# --- configurations ---------------------------------------------------------------------------------

DYNAMIC = {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}


def test_dynamic_rope_is_planned_and_trained(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tmp_path / "model"
    save_tiny("llama", model, vocab_size=VOCABULARY, max_position_embeddings=512)
    make_tokenizer(CHATML).save_pretrained(model)
    edit(model, **DYNAMIC, rope_parameters=None)
    assert command("plan", model, "--hardware", "cpu")[0] in (0, 1, 2)
    file = run_file(tmp_path, model)
    status, said = command("train", file, "--dry-run")
    assert status == 0, said
    status, said = command("train", file, "--plain")
    assert status == 0, said


@pytest.mark.parametrize("settings", [{}, BUDGET], ids=["plain", "budget"])
def test_dynamic_rope_has_plain_gradients(tmp_path: Path, settings: dict[str, Any]) -> None:
    save_tiny("llama", tmp_path, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    pair = Pair.of(tmp_path, **settings, loss_chunk_size=None)
    assert not differing(plain_step(pair.plain, padded_batch())[1], lema_step(pair.model, padded_batch())[1])
    pair.close()


@pytest.mark.parametrize("raised", [RuntimeError, ValueError, NotImplementedError, AssertionError, KeyError, TypeError])
def test_what_cannot_be_run_without_memory_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, raised: type[Exception]
) -> None:
    save_tiny("llama", tmp_path)
    adapter = TransformersAdapter(get_adapter("llama", json.loads((tmp_path / "config.json").read_text())).config)  # type: ignore[attr-defined]
    run = DryRun(adapter, {"target_modules": "all-linear"})
    layer, loss = run.layer(2, 8), run.loss(16)
    without = torch._subclasses.fake_tensor.FakeTensorMode.dispatch

    def refuse(self: Any, func: Any, *args: Any, **kwargs: Any) -> Any:
        if "mm" in str(func):
            raise raised("not prepared")
        return without(self, func, *args, **kwargs)

    monkeypatch.setattr(torch._subclasses.fake_tensor.FakeTensorMode, "dispatch", refuse)
    again = TransformersAdapter(adapter.config)
    found = DryRun(again, {"target_modules": "all-linear"})
    assert found.layer(2, 8) == layer
    assert found.loss(16).peak == pytest.approx(loss.peak, rel=0.05)
    assert "measured with real tensors" in caplog.text and raised.__name__ in caplog.text


@pytest.fixture
def mixture(tmp_path: Path) -> Path:
    model = tmp_path / "model"
    save_tiny("mixtral", model, vocab_size=VOCABULARY, max_position_embeddings=512)
    make_tokenizer(CHATML).save_pretrained(model)
    return edit(model, output_router_logits=True, router_aux_loss_coef=0.01)


def test_a_router_loss_is_refused_by_name(mixture: Path, tmp_path: Path) -> None:
    file = run_file(tmp_path, mixture, lora_target_modules=["q_proj"])
    for more in ([], ["--dry-run"]):
        status, said = command("train", file, *more)
        assert status == 1
        assert "output_router_logits" in said and "leave_out_router_loss" in said
    with lema.LemaModel(lema_config(mixture, lora_target_modules=["q_proj"])) as model:
        with pytest.raises(UnsupportedError, match="leave_out_router_loss"):
            model.get_trainer()
        with pytest.raises(UnsupportedError, match="leave_out_router_loss"):
            model.hf_model(**padded_batch())
        assert model.hf_model(input_ids=padded_batch()["input_ids"]).logits is not None


@pytest.mark.parametrize("settings", [{"leave_out_router_loss": True}, {}], ids=["left out", "weight 0"])
def test_a_mixture_is_trained_without_its_router_loss(mixture: Path, settings: dict[str, Any]) -> None:
    edit(mixture, router_aux_loss_coef=0.01 if settings else 0.0)
    plain = edit(Path(shutil.copytree(mixture, mixture.parent / "plain")), output_router_logits=False)
    pair = Pair.of(plain, lora_target_modules=["q_proj"], loss_chunk_size=None)
    with lema_model(mixture, lora_target_modules=["q_proj"], loss_chunk_size=None, **settings, **BUDGET) as model:
        model.hf_model.load_state_dict({n: p for n, p in pair.plain.state_dict().items() if "lora" in n}, strict=False)
        assert not differing(plain_step(pair.plain, padded_batch())[1], lema_step(model, padded_batch())[1])
    pair.close()


def test_outputs_a_configuration_asks_for_change_nothing(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    edit(tmp_path, output_hidden_states=True, output_attentions=True, return_dict=False)
    with lema_model(tmp_path, **BUDGET) as model:
        assert lema_step(model, padded_batch())[0] > 0


# --- layers that return several things --------------------------------------------------------------

SEVERAL = ("bamba", "xlstm")


@pytest.mark.parametrize("settings", [{**BUDGET, "ram_layers": 0}, {**BUDGET, "keep_activations": 2}, {}],
                         ids=["budget", "kept", "plain"])  # fmt: skip
@pytest.mark.parametrize("micro", [None, 1, 3])
@pytest.mark.parametrize("family", SEVERAL)
@pytest.mark.long
def test_layers_that_return_several_things(tmp_path: Path, family: str, micro: int | None, settings: Any) -> None:
    save_tiny(family, tmp_path)
    targets = ["q_proj", "down_proj", "q"]
    pair = Pair.of(tmp_path, **settings, micro_batch_size=micro, loss_chunk_size=None, lora_target_modules=targets)
    expected, found = plain_step(pair.plain, padded_batch())[1], lema_step(pair.model, padded_batch())[1]
    if micro is None:
        assert not differing(expected, found)
    else:
        assert max(errors(expected, found).values()) < 1e-4
    pair.close()


# --- folders ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tmp_path_factory.mktemp("given") / "model"
    save_tiny("llama", model, vocab_size=VOCABULARY)
    make_tokenizer(CHATML).save_pretrained(model)
    return model


@pytest.fixture
def folders(good: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Folders that are no model, by name."""

    def make(kind: str) -> Path:
        folder = tmp_path / kind.replace(" ", "-")
        with lema.LemaModel(lema_config(good)) as model:
            model.save_pretrained(tmp_path / "adapter")
        if kind == "adapter":
            return tmp_path / "adapter"
        folder.mkdir()
        if kind == "run":
            (folder / "run.yaml").write_text("{}")
            for name in ("checkpoint-2", "final"):
                shutil.copytree(tmp_path / "adapter", folder / name)
        elif kind == "model with an adapter":
            shutil.copytree(good, folder, dirs_exist_ok=True)
            shutil.copy(tmp_path / "adapter" / "adapter_config.json", folder)
        elif kind == "pipeline":
            (folder / "model_index.json").write_text("{}")
        elif kind == "gguf":
            (folder / "model-Q4.gguf").write_bytes(b"GGUF")
        return folder

    return make


def test_the_file_of_an_adapter_is_named(folders: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigError, match="folder of an adapter"):
        lema.LemaModel(lema_config(folders("adapter") / "adapter_model.safetensors"))


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("adapter", "folder of an adapter"), ("run", "folder of a run"), ("pipeline", "pipeline of diffusers"),
        ("model with an adapter", "a model and an adapter"), ("gguf", "GGUF"),
    ],
)  # fmt: skip
def test_folders_that_are_no_model_are_named(
    folders: Callable[[str], Path], good: Path, tmp_path: Path, kind: str, says: str
) -> None:
    folder = folders(kind)
    with pytest.raises(ConfigError, match=says) as caught:
        lema.LemaModel(lema_config(folder))
    assert str(folder) in str(caught.value)
    if kind in ("adapter", "run", "model with an adapter"):
        assert str(good) in str(caught.value)
    (tmp_path / "work").mkdir()
    for words in (["train", run_file(tmp_path / "work", folder)], ["plan", folder]):
        status, said = command(*words)
        assert status == 1
        assert says.split()[-1] in said.replace("\n", " ")


def gptq(tensors: dict[str, torch.Tensor], name: str, weight: torch.Tensor) -> None:
    out, into = weight.shape
    tensors[f"{name}.qweight"] = torch.zeros(into // 8, out, dtype=torch.int32)
    tensors[f"{name}.qzeros"] = torch.zeros(1, out // 8, dtype=torch.int32)
    tensors[f"{name}.scales"] = torch.ones(1, out, dtype=torch.float16)


def mlx(tensors: dict[str, torch.Tensor], name: str, weight: torch.Tensor) -> None:
    tensors[f"{name}.weight"] = torch.zeros(weight.shape[0], weight.shape[1] // 8, dtype=torch.uint32)
    tensors[f"{name}.scales"] = tensors[f"{name}.biases"] = torch.ones(weight.shape[0], 1)
    tensors[f"{name}.biases"] = torch.zeros(weight.shape[0], 1)


def bitsandbytes(tensors: dict[str, torch.Tensor], name: str, weight: torch.Tensor) -> None:
    tensors[f"{name}.weight"] = torch.zeros(weight.numel() // 2, 1, dtype=torch.uint8)
    tensors[f"{name}.weight.absmax"] = torch.zeros(4)


def fp8(tensors: dict[str, torch.Tensor], name: str, weight: torch.Tensor) -> None:
    tensors[f"{name}.weight"] = weight.to(torch.float8_e4m3fn)
    tensors[f"{name}.weight_scale_inv"] = torch.ones(1, 1)


def compressed(tensors: dict[str, torch.Tensor], name: str, weight: torch.Tensor) -> None:
    tensors[f"{name}.weight_packed"] = torch.zeros(weight.shape[0], weight.shape[1] // 8, dtype=torch.int32)
    tensors[f"{name}.weight_scale"] = torch.ones(weight.shape[0], 1)
    tensors[f"{name}.weight_shape"] = torch.tensor(weight.shape)


def with_codes(good: Path, folder: Path, codes: Any) -> Path:
    """A copy of a model whose linear modules' weights are made codes."""
    shutil.copytree(good, folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        codes(tensors, name.removesuffix(".weight"), tensors.pop(name))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("codes", [gptq, fp8, compressed])
def test_codes_without_a_quantization_config_are_found(good: Path, tmp_path: Path, codes: Any) -> None:
    with lema_model(with_codes(good, tmp_path / "model", codes)) as model:
        loss, gradients = lema_step(model, padded_batch())
    assert math.isfinite(loss) and all(bool(gradient.isfinite().all()) for gradient in gradients.values())


@pytest.mark.parametrize(("codes", "named"), [(mlx, "MLX"), (bitsandbytes, "bitsandbytes")])
def test_codes_without_a_quantization_config_are_named(good: Path, tmp_path: Path, codes: Any, named: str) -> None:
    folder = with_codes(good, tmp_path / "model", codes)
    with pytest.raises(UnsupportedError, match=rf"quantised.*{named}.*take the model it was made from"):
        lema.LemaModel(lema_config(folder)).initialize_lora()
    status, said = command("train", run_file(tmp_path, folder), "--dry-run")
    assert status == 1 and named in said.replace("\n", " ")


def test_mlx_is_named_by_its_configuration(good: Path, tmp_path: Path) -> None:
    folder = edit(Path(shutil.copytree(good, tmp_path / "model")), quantization={"group_size": 64, "bits": 4})
    with pytest.raises(UnsupportedError, match=r"MLX \(quantization in config.json\)"):
        lema.LemaModel(lema_config(folder))


# --- threads and autograd ---------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {**BUDGET, "ram_layers": 0}], ids=["plain", "budget"])
def test_a_second_thread_gets_one_error_and_disturbs_nothing(good: Path, settings: dict[str, Any]) -> None:
    batch = padded_batch()
    with lema_model(good, loss_chunk_size=None, **settings) as model:
        expected = lema_step(model, batch)
        trainer = recording_trainer(model)
        inside, done, raised, losses = threading.Event(), threading.Event(), [], []
        layer = model.attachment.layers[1]
        run = layer.run

        def slow(*args: Any) -> Any:
            inside.set()
            assert done.wait(60)
            return run(*args)

        layer.run = slow  # type: ignore[method-assign]
        first = threading.Thread(target=lambda: losses.append(lema_step(model, batch, trainer)))
        first.start()
        assert inside.wait(60)
        attempts: list[Callable[[], Any]] = [
            lambda: trainer.train_step(batch), lambda: trainer.eval_step(batch), lambda: trainer.train_window([batch]),
            lambda: model.hf_model(**batch), lambda: model.generate(batch["input_ids"][:1], max_new_tokens=1),
            lambda: trainer.finish(), lambda: recording_trainer(model).train_step(batch),
        ]  # fmt: skip
        for attempt in attempts:
            with pytest.raises(StreamingError, match="another thread is in train_step"):
                attempt()
            raised.append(attempt)
        done.set()
        first.join()
        del layer.run
        assert len(raised) == len(attempts)
        assert losses[0][0] == expected[0] and not differing(expected[1], losses[0][1])
        assert not differing(expected[1], lema_step(model, batch)[1])


def test_many_threads_that_step_at_once(good: Path) -> None:
    batch = padded_batch()
    with lema_model(good, loss_chunk_size=None) as model:
        expected = lema_step(model, batch)
        trainer = recording_trainer(model)
        wrong: list[BaseException] = []

        def steps() -> None:
            for _ in range(4):
                try:
                    trainer.train_step(batch)
                except StreamingError:
                    pass
                except BaseException as error:
                    wrong.append(error)

        threads = [threading.Thread(target=steps) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []
        assert not differing(expected[1], lema_step(model, batch, trainer)[1])


@pytest.mark.parametrize("off", [torch.inference_mode, torch.no_grad])
def test_a_step_without_autograd_says_so(good: Path, off: Any) -> None:
    batch = padded_batch()
    with lema_model(good) as model:
        trainer = recording_trainer(model)
        with off(), pytest.raises(UnsupportedError, match=off.__name__):
            trainer.train_step(batch)
        with off():
            assert trainer.eval_step(batch)[1] is not None
        assert trainer.train_step(batch)[1] is not None
        gradients_of(model.hf_model)


def test_a_model_made_under_inference_mode_says_so(good: Path) -> None:
    with torch.inference_mode():
        model = lema.LemaModel(lema_config(good))
        model.initialize_lora()
    with model, pytest.raises(LemaError, match="inference_mode"):
        model.get_trainer().train_step(padded_batch())


def test_a_step_ended_by_ctrl_c_gives_its_turn_back(good: Path) -> None:
    with lema_model(good, loss_chunk_size=None) as model:
        batch, trainer = padded_batch(), recording_trainer(model)
        layer = model.attachment.layers[1]
        run = layer.run

        def interrupted(*args: Any) -> Any:
            raise KeyboardInterrupt

        layer.run = interrupted  # type: ignore[method-assign]
        for attempt in (
            lambda: trainer.train_step(batch),
            lambda: model.generate(batch["input_ids"], max_new_tokens=1),
        ):
            with pytest.raises(KeyboardInterrupt):
                attempt()
        layer.run = run  # type: ignore[method-assign]
        losses: list[Any] = []
        other = threading.Thread(target=lambda: losses.append(trainer.train_step(batch)[1]))
        other.start()
        other.join(60)
        assert len(losses) == 1 and losses[0] is not None


def test_what_a_layer_is_given_is_looked_at_without_taking_the_turn(good: Path) -> None:
    with lema_model(good) as model:
        assert model.adapter.causal_lm() is not None
        layer_arguments(model.adapter.causal_lm(), 1, (1, 4))  # type: ignore[arg-type]
        assert model.memory.turn._owner is None
