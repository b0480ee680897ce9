"""Write a GPT-2 of random weights in the shape of the 124M model, the head apart from the table (652 MB).

python examples/generate_medium_gpt2.py [FOLDER] [--tiny]
"""

from __future__ import annotations

from generate_dummy_gpt2 import main

SHAPE = {"n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50257, "n_positions": 1024}

if __name__ == "__main__":
    main(SHAPE, "medium_gpt2", None, __doc__)
