"""Write a tiny GPT-2 of random weights: 4 layers, 64 wide, 1,000 tokens of vocabulary, the head apart from the table.

python examples/generate_dummy_gpt2.py [FOLDER]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from lema.prepare.single_file import break_shared_weights

SHAPE = {"n_layer": 4, "n_embd": 64, "n_head": 4, "vocab_size": 1000, "n_positions": 1024}


def generate(folder: Path, shape: dict[str, int], seed: int = 0) -> Path:
    """Write `model.safetensors` (float32, `transformer.h.N…` and `lm_head.weight`) and `config.json` into a folder.

    Args:
        shape: what `GPT2Config` takes.

    Returns:
        Path of the weights.
    """
    torch.manual_seed(seed)
    last = shape["vocab_size"] - 1
    model = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=last, eos_token_id=last))
    break_shared_weights(model)
    model.save_pretrained(folder)
    return folder / "model.safetensors"


def main(shape: dict[str, int], folder: str, arguments: Sequence[str] | None, description: str | None) -> Path:
    """The command line of this script and of those with another shape."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("folder", nargs="?", type=Path, default=Path(folder), help="(default: %(default)s)")
    made.add_argument("--tiny", action="store_true", help="the shape of generate_dummy_gpt2.py")
    given = made.parse_args(arguments)
    path = generate(given.folder, SHAPE if given.tiny else shape)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
    return path


if __name__ == "__main__":
    main(SHAPE, "dummy_gpt2", None, __doc__)
