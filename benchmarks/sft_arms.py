"""One trainer of the comparison with TRL in its own process: the same rows, the same settings; prints its losses.

It knows how the two are told the same thing; it knows nothing of what their losses should be.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

KINDS = ("lema", "trl")
RANK, ALPHA, LEARNING_RATE, WARMUP, SEED = 16, 32, 5e-4, 5, 7


def rows_of_steps(options: argparse.Namespace, tokenizer: Any) -> list[dict[str, Any]]:
    """The batches of all steps `[rows, seq]`, as LEMA's data room makes them."""
    from lema.data import DataConfig, load_data

    stream = load_data(
        DataConfig(train_file=str(options.data)), tokenizer, max_seq_length=options.tokens,
        rows_per_step=options.batch * options.accumulation, seed=SEED,
    ).train  # fmt: skip
    return [dict(next(stream).inputs) for _ in range(options.steps)]


def lema_losses(options: argparse.Namespace, output: str) -> list[float]:
    """By `LemaTrainer.train`, layers streamed from disk."""
    import lema
    from lema.data import DataConfig
    from lema.training import TrainingConfig

    config = lema.LemaConfig(
        str(options.folder), device="cpu", dtype="float32", lora_rank=RANK, lora_alpha=ALPHA,
        lora_target_modules="all-linear", learning_rate=LEARNING_RATE, max_grad_norm=1.0, batch_size=options.batch,
        gradient_accumulation_steps=options.accumulation, max_seq_length=options.tokens, seed=SEED, output_dir=output,
        save_steps=0, attn_implementation="sdpa",
    )  # fmt: skip
    training = TrainingConfig(
        max_steps=options.steps, lr_scheduler_type="linear", warmup_steps=WARMUP, weight_decay=0.01, logging_steps=1,
        eval_strategy="no",
    )  # fmt: skip
    with lema.LemaModel(config) as model:
        model.get_trainer().train(str(options.data), training=training, data=DataConfig(), plain=True)
    lines = [json.loads(line) for line in (Path(output) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line["loss"] for line in lines if line["type"] == "train"]


def trl_losses(options: argparse.Namespace, output: str) -> list[float]:
    """By TRL's `SFTTrainer` on plain PEFT."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(options.folder, trust_remote_code=False)
    steps = rows_of_steps(options, tokenizer)
    halves = [
        {name: value[i : i + options.batch] for name, value in step.items()}
        for step in steps
        for i in range(0, len(step["input_ids"]), options.batch)
    ]

    class SameRows(SFTTrainer):
        def get_train_dataloader(self) -> Any:
            return DataLoader(halves, batch_size=None)

    base = AutoModelForCausalLM.from_pretrained(
        options.folder, dtype=torch.float32, attn_implementation="sdpa", trust_remote_code=False
    )
    torch.manual_seed(SEED)
    model = get_peft_model(
        base, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    settings = SFTConfig(
        output_dir=output, per_device_train_batch_size=options.batch,
        gradient_accumulation_steps=options.accumulation, max_steps=options.steps, learning_rate=LEARNING_RATE,
        lr_scheduler_type="linear", warmup_steps=WARMUP, weight_decay=0.01, max_grad_norm=1.0, logging_steps=1,
        save_strategy="no", report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False, seed=SEED,
        optim="adamw_torch", disable_tqdm=True, max_length=None, remove_unused_columns=False,
    )  # fmt: skip
    unused = Dataset.from_list([{"input_ids": [1, 2], "labels": [1, 2]}])
    trainer = SameRows(model=model, args=settings, train_dataset=unused, processing_class=tokenizer)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def parser() -> argparse.ArgumentParser:
    """The arm's options."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.sft_arms", description=__doc__.splitlines()[0])
    made.add_argument("kind", choices=KINDS)
    made.add_argument("--folder", type=Path, required=True)
    made.add_argument("--data", type=Path, required=True)
    made.add_argument("--steps", type=int, default=50)
    made.add_argument("--tokens", type=int, default=128)
    made.add_argument("--batch", type=int, default=2)
    made.add_argument("--accumulation", type=int, default=2)
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    """Train and print the losses."""
    options = parser().parse_args(arguments)
    warnings.filterwarnings("ignore")
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as output:
        losses = (lema_losses if options.kind == "lema" else trl_losses)(options, output)
    print(json.dumps({"losses": losses, "seconds": round(time.perf_counter() - started, 1)}), flush=True)


if __name__ == "__main__":
    sys.exit(main())
