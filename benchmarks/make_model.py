"""Writes a Llama of random weights as bf16 safetensors, tensor by tensor, for runs where only the shape matters.

It knows shapes; it knows nothing of what is measured. One tensor at a time is in memory.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "1.7b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 49152,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
    },
    "7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    },
}
DEVIATION = 0.02  # of the normal distribution the matrices are drawn from


def make_model(folder: Path, shape: dict[str, Any], seed: int = 0) -> int:
    """Write config.json and model.safetensors into a folder, made if missing.

    Returns:
        Bytes of the weights file.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from lema.utils.safetensors_writer import SafetensorsWriter

    config = LlamaConfig(**shape, dtype=torch.bfloat16, architectures=["LlamaForCausalLM"])
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    declared = [(name, torch.bfloat16, sizes) for name, sizes in shapes.items()]
    with SafetensorsWriter(folder / "model.safetensors", declared) as writer:
        for name, sizes in shapes.items():
            tensor = torch.ones(sizes, dtype=torch.bfloat16)
            if "norm" not in name:
                tensor.normal_(0, DEVIATION, generator=generator)
            writer.write(name, tensor)
    config.save_pretrained(folder)  # last: a folder with it is complete
    return writer.total_bytes


def main() -> None:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.make_model", description=__doc__.splitlines()[0])
    made.add_argument("preset", choices=sorted(PRESETS))
    made.add_argument("folder", type=Path)
    made.add_argument("--seed", type=int, default=0)
    options = made.parse_args()
    total = make_model(options.folder, PRESETS[options.preset], options.seed)
    print(f"{total / 1e9:.2f} GB of weights")


if __name__ == "__main__":
    main()
