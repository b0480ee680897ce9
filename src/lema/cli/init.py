"""`lema init`: a YAML file to begin with, for a model and a data file.

It knows which settings a person changes and good values to begin with; what they mean is their owners'.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ConfigError
from ..storage.atomic import replaced_file

_TEMPLATE = """\
# Written by `lema init`. Every setting may also be given as --set name=value.
# Costs beforehand: lema train {file} --dry-run     Start: lema train {file}     Go on: lema train {file} --resume auto

# -- model
model_name_or_path: {model}
dtype: {dtype}                    # float16, bfloat16 or float32: {dtype_why}
device: {device}
lora_rank: 16
lora_alpha: 32
lora_dropout: 0.0
lora_target_modules: all-linear

# -- data: {found}
train_file: {data}
data_format: {kind}               # messages, conversations, prompt_completion, instruction, text or auto
eval_size: {eval_size}            # rows held out: a number, or a share below 1; or name a file as eval_file
max_seq_length: {length}          # tokens of a row{length_why}
too_long: truncate                # truncate, drop or error
train_on_prompt: false            # true: learn the prompts too
packing: false                    # true: several rows in one, without attention between them
group_by_length: false            # true: rows of similar length together, less padding

# -- training
num_train_epochs: 1
max_steps: -1                     # more than 0: comes before the epochs
batch_size: 1                     # rows that fit at once, without a budget; a budget decides for itself
gradient_accumulation_steps: 8    # rows of a step are batch_size times this; weights are read once a step
learning_rate: 0.0002
lr_scheduler_type: cosine         # linear, cosine or constant
warmup_steps: 0.03                # below 1: a share of all steps
weight_decay: 0.0
max_grad_norm: 1.0
seed: 42

# -- what is seen and kept
output_dir: {output}
logging_steps: {logging}
eval_strategy: auto               # no, steps, epoch; auto: every epoch, or every eval_steps
eval_steps: {eval_steps}
save_steps: {save}
save_total_limit: 3
load_best_model_at_end: false
sample_prompts: []                # answered before the first step and at every evaluation
report_to: none                   # none, tensorboard, wandb, trackio

# -- memory: sizes as in 8GB, or auto: what is free, less a margin
ram_budget: auto
vram_budget: auto
"""


def init(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A directory, a .safetensors file or a hub id.")],
    data: Annotated[Path, typer.Argument(metavar="DATA", help="JSONL, JSON, CSV, Parquet or a datasets directory.")],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="FILE", help="File to write.")] = Path("run.yaml"),
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
) -> None:
    """Write a commented YAML file for MODEL and DATA, with values to begin with.

    Example: lema init HuggingFaceTB/SmolLM2-135M-Instruct chat.jsonl -o run.yaml
    """
    if out.exists() and not force:
        raise ConfigError(f"{out} is there already: give another name with -o, or --force to replace it")
    from ..data import detect_format, open_rows
    from ..training.run_config import RunConfig

    rows = open_rows(data)
    kind = detect_format(rows)
    longest = _positions(model)
    device, dtype, why = _device()
    steps = max(len(rows) // 8, 1)
    file = shlex.quote(str(out))
    text = _TEMPLATE.format(
        file=file, model=_yaml(model), data=_yaml(str(data)), kind=kind, found=f"{len(rows):,} rows of the form {kind}",
        device=device, dtype=dtype, dtype_why=why, length=min(512, longest or 512),
        length_why=f"; the model takes {longest:,}" if longest else "", output=_yaml(_output(out)),
        eval_size=0.05 if len(rows) >= 100 else 0, logging=1 if steps < 100 else 10,
        eval_steps=max(steps // 4, 1) if steps >= 20 else "null", save=max(min(steps // 4, 200), 1),
    )  # fmt: skip
    text = _aligned(text)
    out.parent.mkdir(parents=True, exist_ok=True)
    with replaced_file(out) as aside:
        aside.write_text(text, encoding="utf-8")
        RunConfig.from_yaml(aside)
    typer.echo(f"{out}: {len(rows):,} rows of the form {kind}, {dtype} on {device}")
    if len(rows) < 100:
        typer.echo("fewer than 100 rows: none is held out to evaluate on; eval_size or eval_file changes that")
    typer.echo(f"next:\n  lema data check {file}\n  lema train {file} --dry-run\n  lema train {file}")


def _device() -> tuple[str, str, str]:
    """Device, type and why that type."""
    from ..machine.device import default_device, device_name, supports_bfloat16

    device = default_device()
    if device == "cpu":
        return device, "float32", "exact; `lema doctor` measures whether bfloat16 is faster"
    if supports_bfloat16(device):
        return device, "bfloat16", f"{device_name(device)} computes in it"
    return device, "float16", f"{device_name(device)} has no bfloat16 arithmetic"


def _positions(model: str) -> int | None:
    """Tokens the model takes; None where its configuration does not say, or there is none."""
    from transformers import PreTrainedConfig

    from ..models.locate import local_path

    path = local_path(model, "config.json")
    folder = path if path.is_dir() else path.parent
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder} has no config.json: give a model's directory, its .safetensors file or a hub id")
    values: dict[str, Any] = PreTrainedConfig.get_config_dict(folder)[0]
    values = {**values, **values.get("text_config", {})}
    found = values.get("max_position_embeddings", values.get("n_positions"))
    return found if isinstance(found, int) else None


def _output(out: Path) -> str:
    return "output" if out.stem == "run" else f"output-{out.stem}"


def _aligned(text: str) -> str:
    """Comments behind values in one column."""
    parts = [re.match(r"(\w+: .*?\S) +(# .*)", line) or line for line in text.splitlines()]
    width = max(len(part[1]) for part in parts if isinstance(part, re.Match) and len(part[1]) < 40)
    lines = [part if isinstance(part, str) else f"{part[1]:{width}}  {part[2]}" for part in parts]
    return "\n".join(lines) + "\n"


def _yaml(text: str) -> str:
    """A text as YAML writes it, quoted: JSON's form is YAML's too."""
    return json.dumps(text, ensure_ascii=False)
