"""A tiny random model with a tokenizer, made on the spot: for trying things without a download.

Of one of two families; what is written has learned nothing and says nothing of sense.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ..errors import ConfigError

__all__ = ["KINDS", "tiny_model", "tiny_tokenizer"]

KINDS = ("llama", "gpt2")
VOCABULARY, WIDTH, LAYERS, HEADS, POSITIONS = 512, 64, 4, 4, 512
SPREAD = 0.2
"""Of the random weights; ten times the usual, so that adapters alone can teach such a small model something."""
_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_model(folder: str | os.PathLike[str], kind: str = "llama", seed: int = 0) -> Path:
    """Write a transformers folder: config, float32 weights (under 2 MB) and a tokenizer with a chat template.

    The same seed gives the same weights. torch's random state is left as it was.

    Args:
        kind: llama or gpt2.

    Raises:
        ConfigError: another kind.
    """
    if kind not in KINDS:
        raise ConfigError(f"kind={kind!r} is unknown: choose one of {', '.join(KINDS)}")
    end = _SPECIAL.index("<|im_end|>")
    common: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": end, "pad_token_id": end, "initializer_range": SPREAD}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "gpt2":
            gpt2 = GPT2Config(
                vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, n_positions=POSITIONS, **common
            )  # fmt: skip
            model: GPT2LMHeadModel | LlamaForCausalLM = GPT2LMHeadModel(gpt2)
        else:
            llama = LlamaConfig(
                vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=LAYERS,
                num_attention_heads=HEADS, num_key_value_heads=HEADS // 2, max_position_embeddings=POSITIONS, **common,
            )  # fmt: skip
            model = LlamaForCausalLM(llama)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return Path(folder)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A token a byte and three special ones; conversations are written in the ChatML form."""
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(BPE({token: number for number, token in enumerate([*_SPECIAL, *bytes_])}, []))
    core.add_special_tokens([AddedToken(token, special=True) for token in _SPECIAL])
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=_SPECIAL[0], eos_token=_SPECIAL[2], pad_token=_SPECIAL[2],
        chat_template=_TEMPLATE,
    )  # fmt: skip
