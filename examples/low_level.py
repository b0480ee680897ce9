"""The parts by hand: an adapter, an index, a LoRA manager, an optimizer and a trainer put together, for GPT-2.

python examples/low_level.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from lema import LemaConfig, LemaTrainer
from lema.models.gpt2 import GPT2Adapter
from lema.models.lora import LoRAManager
from lema.prepare.single_file import break_shared_weights, prepare_monolithic_safetensors
from lema.storage.index import GlobalBinaryIndex


def main(folder: Path) -> list[float]:
    torch.manual_seed(0)
    gpt2 = GPT2Config(n_layer=4, n_embd=64, n_head=4, vocab_size=1000, n_positions=128)
    model = GPT2LMHeadModel(gpt2)
    break_shared_weights(model)
    model.save_pretrained(folder / "model")
    weights = prepare_monolithic_safetensors(folder / "model", folder / "gpt2.safetensors", dtype="float32")

    adapter = GPT2Adapter(gpt2.to_dict())
    lora = LoRAManager({"r": 8, "alpha": 16, "target_modules": ["c_attn", "c_proj", "c_fc"]}, device="cpu")
    for layer in adapter.get_layer_metadata():
        if layer["type"] == "block":
            module = adapter.construct_layer_module(layer["id"], lora_manager=lora)
            adapter.release_layer_module(module)
    optimizer = torch.optim.AdamW(lora.get_trainable_parameters(), lr=1e-2)

    config = LemaConfig(str(weights), device="cpu", dtype="float32", save_steps=0)
    losses: list[float] = []
    with GlobalBinaryIndex(weights) as gbi:
        trainer = LemaTrainer(config, adapter, gbi, lora, optimizer)
        ids = torch.randint(0, 1000, (2, 32))
        for step in range(1, 9):
            _, loss = trainer.train_step(ids, labels=ids)
            assert loss is not None
            losses.append(loss)
            print(f"step {step}  loss {loss:.4f}")
        trainer.memory.close()
    lora.save_pretrained(folder / "adapter")
    print(f"adapter in {folder / 'adapter'}")
    return losses


if __name__ == "__main__":
    main(Path(tempfile.mkdtemp(prefix="lema-low-level-")))
