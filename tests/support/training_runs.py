"""A tiny chat model with a tokenizer and rows, and runs over them that can be stopped and gone on with."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, TrainerCallback

import lema
from families import save_tiny
from helpers import lema_config
from lema.data import DataConfig
from lema.run.training import open_data
from lema.training.config import TrainingConfig
from lema.training.result import TrainResult
from lema.training.run_config import RunConfig

_TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}<e>{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
_WORDS = ["red", "green", "blue", "one", "two", "three", "up", "down", "left", "right", "yes", "no"]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A token a character, 99 in all as the tiny models have."""
    tokens = ["<p>", "<b>", "<e>", "\n", *(chr(code) for code in range(32, 127))]
    assert len(tokens) == 99
    inner = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    inner.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<p>", bos_token="<b>", eos_token="<e>")
    tokenizer.chat_template = _TEMPLATE
    return tokenizer


def make_model(folder: Path, **overrides: Any) -> Path:
    """A tiny llama with the tokenizer beside it."""
    save_tiny("llama", folder, **overrides)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def write_rows(path: Path, count: int = 22, shift: int = 0) -> Path:
    """Chat rows of different lengths."""
    with path.open("w") as file:
        for i in range(count):
            word, other = _WORDS[(i + shift) % 12], _WORDS[(5 * i + 3) % 12]
            said = [
                {"role": "user", "content": f"{word} {other}"[: 4 + i % 7]},
                {"role": "assistant", "content": other},
            ]
            file.write(json.dumps({"messages": said}) + "\n")
    return path


def settings_of(model: Path, rows: Path, out: Path, **more: Any) -> dict[str, Any]:
    """Everything on that could disturb a resume: dropout, packing off or on, evaluation, samples, clipping."""
    values: dict[str, Any] = {
        **lema_config(model).to_dict(), "output_dir": str(out), "train_file": str(rows), "lora_dropout": 0.1,
        "batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 5e-3, "max_grad_norm": 1.0,
        "max_seq_length": 40, "eval_size": 4, "num_train_epochs": 2, "logging_steps": 2, "eval_steps": 3,
        "save_steps": 0, "lr_scheduler_type": "cosine", "warmup_steps": 2, "weight_decay": 0.01,
        "sample_prompts": ["red"], "sample_max_new_tokens": 3,
    }  # fmt: skip
    return {**values, **more}


def train(settings: dict[str, Any], resume: str | os.PathLike[str] | None = None, **options: Any) -> TrainResult:
    """One run of `LemaTrainer.train` from settings as a YAML file has them, in a model of its own."""
    run = RunConfig.from_dict(settings)
    with lema.LemaModel(run.lema) as model:
        trainer = model.get_trainer()
        hook = options.pop("prepare", None)
        if hook is not None:
            hook(trainer)
        return trainer.train(
            run.data.train_file, training=run.training, data=run.data, resume=resume, plain=True, **options
        )


class StopAfter(TrainerCallback):
    """Ctrl-C after some step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Raise the signal."""
        if state.global_step == self.step:
            signal.raise_signal(signal.SIGINT)


def batches_of(settings: dict[str, Any]) -> Any:
    """The data of a run."""
    return open_data(RunConfig.from_dict(settings), tiny_tokenizer())


def adapter_bytes(folder: Path) -> bytes:
    """The adapter's file."""
    return (folder / "adapter_model.safetensors").read_bytes()


def history(folder: Path) -> list[dict[str, Any]]:
    """The log of a checkpoint, without what the clock says."""
    state = json.loads((folder / "trainer_state.json").read_text())
    return [{k: v for k, v in entry.items() if k != "seconds"} for entry in state["log_history"]]


__all__ = ["DataConfig", "StopAfter", "TrainingConfig", "adapter_bytes", "batches_of", "history", "make_model",
           "settings_of", "tiny_tokenizer", "train", "write_rows"]  # fmt: skip


def read_lines(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines that count: where a run was resumed after step N, what was written of later steps before
    does not.

    The last line may be half written and is then left out.
    """
    found: list[dict[str, Any]] = []
    text = Path(path).read_text(encoding="utf-8")
    for line in text.split("\n")[:-1]:
        values = json.loads(line)
        if values.get("event") == "resumed":
            found = [v for v in found if v.get("type") == "event" or v.get("step", 0) <= values["step"]]
        found.append(values)
    return found
