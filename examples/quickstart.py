"""The quick start: a model, a trainer, some steps, a saved adapter. Makes a tiny random model unless given one.

python examples/quickstart.py [MODEL_FOLDER]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

from lema import LemaConfig, LemaModel, MemoryStrategy


def tiny_llama(folder: Path) -> str:
    """A random four-layer Llama, so that this runs anywhere in seconds."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=1000, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def main(model: str | None, output: Path) -> list[float]:
    torch.manual_seed(0)
    config = LemaConfig(
        model_name_or_path=model or tiny_llama(output / "model"),
        device="cpu",
        dtype="float32",
        strategy=MemoryStrategy.STREAMING,
        lora_rank=8,
        lora_alpha=16,
        learning_rate=1e-2,
        output_dir=str(output / "run"),
    )
    losses: list[float] = []
    with LemaModel(config) as lema_model:
        lema_model.initialize_lora()
        optimizer = torch.optim.AdamW(lema_model.get_trainable_parameters(), lr=config.learning_rate)
        trainer = lema_model.get_trainer(optimizer)
        ids = torch.randint(0, 1000, (2, 32))
        for step in range(1, 9):
            _, loss = trainer.train_step(ids, labels=ids)
            assert loss is not None and trainer.last_step is not None
            losses.append(loss)
            print(f"step {step}  loss {loss:.4f}  {trainer.last_step.step_seconds:.2f} s")
        lema_model.save_pretrained(output / "adapter")
    print(f"adapter in {output / 'adapter'}")
    return losses


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None, Path(tempfile.mkdtemp(prefix="lema-quickstart-")))
