"""Fine-tune Llama-2-7B with the high-level parts and a loop of your own: LemaModel, a trainer, train_step.

python tasks/fine_tune_llama_7b.py [--tiny]
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from common import batch, options, questions

from lema import LemaConfig, LemaModel, MemoryStrategy
from lema.run.training import load_tokenizer

ROWS_PER_STEP = 4


def main(arguments: Sequence[str] | None = None) -> list[float]:
    """Train; the loss of every step."""
    given = options(
        __doc__, arguments, model="NousResearch/Llama-2-7b-hf", output="llama-7b-output", learning_rate=1e-4,
        tokens=512, steps=20,
    )  # fmt: skip
    config = LemaConfig(
        model_name_or_path=given.model,
        device=given.device,
        dtype=given.dtype,
        strategy=MemoryStrategy.STREAMING,
        lora_rank=16,
        lora_alpha=32,
        learning_rate=given.learning_rate,
        max_seq_length=given.tokens,
        output_dir=str(given.output),
    )
    tokenizer, rows = load_tokenizer(given.model), questions()
    losses: list[float] = []
    with LemaModel(config) as model:
        model.initialize_lora()
        optimizer = torch.optim.AdamW(model.get_trainable_parameters(), lr=config.learning_rate)
        trainer = model.get_trainer(optimizer)
        for step in range(given.steps):
            first = step * ROWS_PER_STEP % len(rows)
            _, loss = trainer.train_step(batch(tokenizer, rows[first : first + ROWS_PER_STEP], given.tokens))
            assert loss is not None  # labels were given
            losses.append(loss)
            print(f"step {step + 1}  loss {loss:.4f}")
        model.save_pretrained(given.output / "final")
    print(f"adapter in {given.output / 'final'}")
    return losses


if __name__ == "__main__":
    main()
