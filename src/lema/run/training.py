"""What a run is put together from, whoever asks: its data, its tokenizer, what is refused before it starts.

It knows what a run needs and where it is to be had; it knows nothing of what happens in one.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch

from ..data import Data, load_data
from ..data.limits import ModelLimits
from ..engine.attach import check_router_loss
from ..engine.generation import end_tokens
from ..engine.packing import check_packing
from ..engine.trainer import LemaTrainer
from ..errors import ConfigError, WeightsNotFoundError
from ..models.causal_lm import CausalLM
from ..models.folder import refuse_other_folders
from ..models.gguf import tokenizer_in
from ..storage.gguf_header import is_gguf
from ..storage.strangers import code_in, refuse_special_files, tell_of_code
from ..training.checkpoints import CheckpointFolder
from ..training.panel import View
from ..training.reporters import check_reporters
from ..training.result import TrainResult
from ..training.run import RunData, check_evaluation, run_training
from ..training.run_config import RunConfig
from ..training.sampling import Sampler
from ..training.start import Start


def train_run(
    trainer: LemaTrainer, run: RunConfig, data: Data | RunData, tokenizer: Any, folder: CheckpointFolder, start: Start,
    view: View, callbacks: Sequence[Any] = (),
) -> TrainResult:  # fmt: skip
    """Train a run whose folder is open and whose start is chosen; `ConfigError` if there is nothing to train."""
    trainer.trainables.require("nothing can be trained")
    ask = _asker(data, tokenizer)
    sampler = None
    if run.training.sample_prompts:
        if ask is None:
            raise ConfigError("sample_prompts need a tokenizer: give train(..., tokenizer=...)")
        ends = end_tokens(trainer.lm.module) | {*(data.renderer.end_tokens if isinstance(data, Data) else ())}
        sampler = Sampler(
            tokenizer, ask, run.training.sample_prompts, run.training.sample_max_new_tokens, sorted(ends)
        )  # fmt: skip
    if isinstance(data, Data):  # which may have been made elsewhere
        limits_of(trainer.lm).check_length(run.lema.max_seq_length)
    if start.checkpoint is None:
        _seed(run.lema.seed)
    return run_training(
        trainer, RunData(data.train, data.eval, data.summary), run, folder, start, view=view,
        sampler=sampler, write_tokenizer=None if tokenizer is None else tokenizer.save_pretrained,
        callbacks=callbacks, always={"processing_class": tokenizer, "tokenizer": tokenizer},
    )  # fmt: skip


def check_run(run: RunConfig, lm: CausalLM | None, has_evaluation: bool) -> None:
    """What is refused before a row is read: `lema train`, its dry run and `lema data check RUN.YAML` all ask here.

    Args:
        lm: the run's model, whose weights need not be there; None: nothing is known of it.

    Raises:
        ConfigError: rows longer than the model takes, evaluations without rows, trackers that are not installed.
        UnsupportedError: the model adds a loss that is not computed, or cannot keep packed rows apart.
    """
    check_evaluation(run.training, has_evaluation)
    check_reporters(run.training.report_to)
    if lm is None:
        return
    limits_of(lm).check_length(run.lema.max_seq_length)
    check_router_loss(lm, run.lema.leave_out_router_loss)
    if run.data.packing:
        check_packing(lm)


def limits_of(lm: CausalLM) -> ModelLimits:
    """What a model can take."""
    return ModelLimits(lm.vocab_size, lm.max_positions)


def open_data(
    run: RunConfig, tokenizer: Any, dataset: Any = None, eval_dataset: Any = None, lm: CausalLM | None = None
) -> Data | RunData:
    """Batches of what was given; without it, of the configuration's files."""
    if isinstance(dataset, (Data, RunData)):
        return dataset
    if has_batches(dataset):
        return RunData(dataset, eval_dataset)
    return load_rows(run, tokenizer, dataset, eval_dataset, lm)


def load_rows(
    run: RunConfig, tokenizer: Any, rows: Any = None, eval_rows: Any = None, lm: CausalLM | None = None
) -> Data:
    """Batches of rows, of the file at a path, or of the configuration's files; see `check_run` for what is refused."""
    check_run(run, lm, bool(run.data.eval_file or run.data.eval_size or eval_rows is not None))
    named = isinstance(rows, (str, os.PathLike))
    config = run.replace(train_file=os.fspath(rows)).data if named else run.data
    return load_data(
        config, tokenizer, max_seq_length=run.lema.max_seq_length, rows_per_step=run.rows_per_step,
        seed=run.lema.seed, train_rows=None if named else rows, eval_rows=eval_rows,
        limits=ModelLimits() if lm is None else limits_of(lm),
    )  # fmt: skip


def load_tokenizer(model: str | os.PathLike[str]) -> Any:
    """The tokenizer where a model is.

    Raises:
        WeightsNotFoundError: a path at which there is nothing.
        ConfigError: there is a model without one.
    """
    from transformers import AutoTokenizer

    path = Path(model)
    could_be_hub_id = str(model).count("/") <= 1 and not path.is_absolute() and not str(model).startswith(".")
    if not path.exists() and not could_be_hub_id:
        raise WeightsNotFoundError(f"{model} does not exist: give a directory, a .safetensors file or a hub id")
    if is_gguf(path):
        return tokenizer_in(path)
    where = path.parent if path.suffix == ".safetensors" else model
    refuse_special_files(Path(where))
    tell_of_code(Path(where))
    try:
        return AutoTokenizer.from_pretrained(str(where), trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if "trust_remote_code" in str(error):
            named = "; ".join(code_in(Path(where))) or "auto_map in its configuration"
            raise ConfigError(
                f"{where} has a tokenizer that is code of its own ({named}), which LEMA does not run: convert it to a "
                "tokenizer.json, or give a model whose tokenizer is one of transformers"
            ) from error
        refuse_other_folders(Path(where))
        raise ConfigError(f"{where} has no tokenizer that can be loaded: {error}") from error


def has_batches(dataset: Any) -> bool:
    return isinstance(dataset, (Data, RunData)) or hasattr(dataset, "steps_per_epoch")


def _asker(data: Data | RunData, tokenizer: Any) -> Callable[[str], Sequence[int]] | None:
    if isinstance(data, Data):
        return data.renderer.ask
    return None if tokenizer is None else lambda text: list(tokenizer(text)["input_ids"])


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
