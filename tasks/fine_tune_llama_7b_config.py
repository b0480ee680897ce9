"""Fine-tune Llama-2-7B with the parts put together by hand: adapter, index, LoRA manager, optimizer, trainer.

python tasks/fine_tune_llama_7b_config.py [--tiny]
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from common import batch, options, questions
from transformers import AutoConfig

from lema import LemaConfig, LemaTrainer
from lema.models.llama import LlamaAdapter
from lema.models.lora import LoRAManager
from lema.prepare.single_file import prepare_monolithic_safetensors
from lema.run.training import load_tokenizer
from lema.storage.index import GlobalBinaryIndex

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ROWS_PER_STEP = 4


def main(arguments: Sequence[str] | None = None) -> list[float]:
    """Train; the loss of every step."""
    given = options(
        __doc__, arguments, model="NousResearch/Llama-2-7b-hf", output="llama-7b-output", learning_rate=1e-4,
        tokens=512, steps=20,
    )  # fmt: skip
    given.output.mkdir(parents=True, exist_ok=True)
    weights = given.output / "weights.safetensors"
    if not weights.exists():
        prepare_monolithic_safetensors(given.model, weights, dtype=given.dtype)

    adapter = LlamaAdapter(AutoConfig.from_pretrained(given.model).to_dict())
    lora = LoRAManager({"r": 16, "alpha": 32, "target_modules": TARGETS}, device=given.device)
    for layer in adapter.get_layer_metadata():
        if layer["type"] == "block":
            adapter.release_layer_module(adapter.construct_layer_module(layer["id"], lora_manager=lora))
    optimizer = torch.optim.AdamW(lora.get_trainable_parameters(), lr=given.learning_rate)

    config = LemaConfig(str(weights), device=given.device, dtype=given.dtype, save_steps=0)
    tokenizer, rows = load_tokenizer(given.model), questions()
    losses: list[float] = []
    with GlobalBinaryIndex(weights) as gbi:
        trainer = LemaTrainer(config, adapter, gbi, lora, optimizer)
        for step in range(given.steps):
            first = step * ROWS_PER_STEP % len(rows)
            _, loss = trainer.train_step(batch(tokenizer, rows[first : first + ROWS_PER_STEP], given.tokens))
            assert loss is not None  # labels were given
            losses.append(loss)
            print(f"step {step + 1}  loss {loss:.4f}")
        trainer.memory.close()
    lora.save_pretrained(given.output / "final")
    print(f"adapter in {given.output / 'final'}")
    return losses


if __name__ == "__main__":
    main()
