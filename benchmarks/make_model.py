"""Writes a Llama of random weights as safetensors, tensor by tensor, for runs where only the shape matters.

It knows shapes; it knows nothing of what is measured. One tensor at a time is in memory.
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def _shape(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocab: int, positions: int, tied: bool
           ) -> dict[str, Any]:  # fmt: skip
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": positions,
        "tie_word_embeddings": tied,
    }


PRESETS = {
    "tiny": _shape(64, 128, 6, 4, 2, 256, 512, True),
    "small": _shape(512, 1408, 8, 8, 4, 4096, 1024, True),
    "tinyllama": _shape(2048, 5632, 22, 32, 4, 32000, 2048, False),
    "1.7b": _shape(2048, 8192, 24, 32, 32, 49152, 2048, True),
    "7b": _shape(4096, 11008, 32, 32, 32, 32000, 4096, False),
    "13b": _shape(5120, 13824, 40, 40, 40, 32000, 4096, False),
}
NAMES = {"tiny": "tiny", "small": "small", "tinyllama": "TinyLlama", "1.7b": "1.7B", "7b": "7B", "13b": "13B"}
"""What the shapes are called in reports."""
DEVIATION = 0.02  # of the normal distribution the matrices are drawn from
FILES = ("model.safetensors", "config.json", "generation_config.json")
"""What a folder made here may hold."""


def parameters(shape: dict[str, Any]) -> int:
    """How many numbers a Llama of this shape has."""
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    kv = hidden // shape["num_attention_heads"] * shape["num_key_value_heads"]
    layer = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * inner + 2 * hidden
    tables = shape["vocab_size"] * hidden * (1 if shape["tie_word_embeddings"] else 2)
    return int(layer * shape["num_hidden_layers"] + tables + hidden)


def make_model(folder: Path, shape: dict[str, Any], dtype: str = "bfloat16", device: str = "cpu", seed: int = 0) -> int:
    """Write config.json and model.safetensors into a folder, made if missing.

    Args:
        device: where random numbers are drawn; a GPU is faster.

    Returns:
        Bytes of the weights file.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from lema.storage.writer import SafetensorsWriter

    kind = getattr(torch, dtype)
    config = LlamaConfig(**shape, dtype=kind, architectures=["LlamaForCausalLM"])
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    sizes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del sizes["lm_head.weight"]
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator(device).manual_seed(seed)
    with SafetensorsWriter(folder / FILES[0], [(name, kind, size) for name, size in sizes.items()]) as writer:
        for name, size in sizes.items():
            tensor = torch.ones(size, dtype=kind, device=device)
            if "norm" not in name:
                tensor.normal_(0, DEVIATION, generator=generator)
            writer.write(name, tensor)
    config.save_pretrained(folder)  # last: a folder with it is complete
    return writer.total_bytes


def shorten(whole: Path, folder: Path, layers: int) -> None:
    """Make a folder with the first layers of a model: a config of its own and the same weights file, not copied."""
    import json

    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((whole / "config.json").read_text(encoding="utf-8"))
    config["num_hidden_layers"] = layers
    try:
        os.link(whole / FILES[0], folder / FILES[0])
    except OSError:  # a file system without links
        shutil.copyfile(whole / FILES[0], folder / FILES[0])
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.make_model", description=__doc__.splitlines()[0])
    made.add_argument("preset", choices=list(PRESETS))
    made.add_argument("folder", type=Path)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    made.add_argument("--device", default="cpu", help="where random numbers are drawn; a GPU is faster")
    options = made.parse_args(arguments)
    total = make_model(options.folder, PRESETS[options.preset], options.dtype, options.device, options.seed)
    print(f"{total / 1e9:.2f} GB of weights")


if __name__ == "__main__":
    main()
