"""Files as bitsandbytes saves them, made by hand so that every code and scale is possible, and what they stand for."""

from __future__ import annotations

import inspect
import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def four_bits(
    name: str, codes: torch.Tensor, absmax: torch.Tensor, shape: tuple[int, ...], kind: str, block: int, dtype: str,
    nested: tuple[torch.Tensor, torch.Tensor, float] | None = None,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """Tensors of one weight: uint8 codes `[n / 2]`, scales, and of nested scales their scales, values and offset."""
    from bitsandbytes.functional import get_4bit_type

    state: dict[str, Any] = {"quant_type": kind, "blocksize": block, "dtype": dtype, "shape": list(shape)}
    tensors = {name: codes.view(-1, 1), f"{name}.absmax": absmax, f"{name}.quant_map": get_4bit_type(kind, "cpu")}
    if nested is not None:
        scales, values, offset = nested
        tensors |= {f"{name}.nested_absmax": scales, f"{name}.nested_quant_map": values}
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
    text = json.dumps(state).encode()
    tensors[f"{name}.quant_state.bitsandbytes__{kind}"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return tensors


def decoded(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """What bitsandbytes makes of a 4-bit weight, by its own functions in torch: its kernels for processors with
    AVX-512 round otherwise in some cases, which their source says."""
    from bitsandbytes.backends.default import ops
    from bitsandbytes.functional import QuantState, dequantize_blockwise

    beside = {key.removeprefix(f"{name}."): t.clone() for key, t in tensors.items() if key.startswith(f"{name}.")}
    state = QuantState.from_dict(beside, torch.device("cpu"))
    absmax = state.absmax
    if state.nested:
        absmax = dequantize_blockwise(state.absmax, state.state2) + state.offset
    compute = inspect.unwrap(ops._dequantize_4bit_compute)
    codes = tensors[name].reshape(-1).view(torch.uint8)
    padded = torch.cat([codes, codes.new_zeros(1)])[: -(-math.prod(state.shape) // 2)]
    result: torch.Tensor = compute(padded, absmax, state.code, state.blocksize, state.shape, state.dtype)
    return result


def plain_of(folder: Path, output: Path) -> Path:
    """A folder of the same model in float32 without codes: what bitsandbytes' functions make of them."""
    from bitsandbytes.functional import int8_vectorwise_dequant

    stored = {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}
    plain = {}
    for name, tensor in stored.items():
        scales = stored.get(f"{name.removesuffix('.weight')}.SCB")
        if any(other.startswith(f"{name}.quant_state") for other in stored):
            plain[name] = decoded(stored, name).float()
        elif tensor.dtype == torch.int8 and scales is not None:
            rows = int8_vectorwise_dequant(tensor.view(-1, tensor.shape[-1]), scales)
            plain[name] = rows.view(tensor.shape)
        elif tensor.is_floating_point() and not any(name.startswith(f"{other}.") for other in stored):
            plain |= {} if name.endswith(".SCB") else {name: tensor.float()}
    output.mkdir()
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (output / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    save_file(plain, output / "model.safetensors", {"format": "pt"})
    return output
