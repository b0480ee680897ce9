"""Weights in quantised formats, made by hand so that every code and scale is possible, and what they stand for; and
whole models of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from families import save_tiny
from gguf_files import mixed_llama
from lema.models.gguf import config_in


def integers(bits: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, 1 << bits, shape, dtype=torch.int64)


def packed(values: torch.Tensor, bits: int, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """Integers along the last dimension in words, one bit field after the other; `order[place]` lies at a place."""
    fit = 32 // bits
    grouped = values.reshape(*values.shape[:-1], -1, fit)
    if order is not None:
        grouped = grouped[..., list(order)]
    words = sum(grouped[..., place] << (bits * place) for place in range(fit))
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32).contiguous()


def scales_of(dtype: torch.dtype, *shape: int, extremes: bool = True) -> torch.Tensor:
    """Small numbers, and among them zero, the smallest and a large one, unless those are not wanted."""
    scales = (torch.randn(shape) * 0.01).to(dtype)
    if not extremes:
        return scales
    values = torch.tensor([0.0, 6e-8, 100.0], dtype=dtype)[: scales.numel()]
    scales.view(-1)[: len(values)] = values
    return scales


def by_the_formula(
    codes: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, group: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """`[out, in]`: code less zero, exact, times scale in the scales' type."""
    each = scales[:, group]
    return ((codes - zeros[:, group]).to(each.dtype) * each).to(dtype)


def gptq(
    bits: int,
    rows: int,
    columns: int,
    group: torch.Tensor,
    scale: torch.dtype = torch.float16,
    less: int = 1,
    extremes: bool = True,
) -> tuple[dict[str, torch.Tensor], Callable[[torch.dtype], torch.Tensor]]:
    groups = int(group.max()) + 1
    codes, stored, scales = (
        integers(bits, rows, columns),
        integers(bits, rows, groups),
        scales_of(scale, rows, groups, extremes=extremes),
    )
    tensors = {
        "a.qweight": packed(codes, bits).t().contiguous(),
        "a.qzeros": packed(stored.t(), bits),
        "a.scales": scales.t().contiguous(),
        "a.g_idx": group.to(torch.int32),
    }
    zeros = (stored + less) % (1 << bits)
    return tensors, lambda dtype: by_the_formula(codes, zeros, scales, group, dtype)


def awq(
    rows: int, columns: int, groups: int, extremes: bool = True
) -> tuple[dict[str, torch.Tensor], Callable[[torch.dtype], torch.Tensor]]:
    codes, zeros, scales = (
        integers(4, rows, columns),
        integers(4, rows, groups),
        scales_of(torch.float16, rows, groups, extremes=extremes),
    )
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    tensors = {
        "a.qweight": packed(codes.t(), 4, order), "a.qzeros": packed(zeros.t(), 4, order),
        "a.scales": scales.t().contiguous(),
    }  # fmt: skip
    group = torch.arange(columns) // (columns // groups)
    return tensors, lambda dtype: by_the_formula(codes, zeros, scales, group, dtype)


def compressed(
    bits: int,
    rows: int,
    columns: int,
    groups: int,
    symmetric: bool,
    scale: torch.dtype,
    whole: bool,
    extremes: bool = True,
) -> Any:
    """A weight as the library compresses it, and what the library decompresses it to."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    grouped = {"strategy": "group", "group_size": columns // groups} if groups > 1 else {"strategy": "channel"}
    args = QuantizationArgs(num_bits=bits, type="int", symmetric=symmetric, **grouped)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    compressor = BaseCompressor.get_value_from_registry("int-quantized" if whole else "pack-quantized")
    state = {
        "weight": torch.randn(rows, columns).to(scale),
        "weight_scale": scales_of(scale, rows, groups, extremes=extremes).abs() + 1e-3,
    }
    state["weight_scale"] = state["weight_scale"].to(scale)
    low = -(1 << (bits - 1))
    state["weight_zero_point"] = torch.randint(low, -low, (rows, groups), dtype=torch.int8)
    if symmetric:
        state["weight_zero_point"].zero_()
    state = {name: part for name, part in compressor.compress(state, scheme).items() if part is not None}
    if not whole:  # any codes, and not only those that a weight came to
        state["weight_packed"] = torch.randint(-(1 << 31), 1 << 31, state["weight_packed"].shape).to(torch.int32)
    plain = compressor.decompress(dict(state), scheme)["weight"]
    shape = state.get("weight_shape")
    if shape is not None:
        state["weight_shape"] = torch.as_tensor(shape, dtype=torch.int64)
    return {f"a.{name}": part for name, part in state.items()}, plain


# --- models ---------------------------------------------------------------------------------------

Coded = dict[str, torch.Tensor]

DEEPSEEK = {
    "num_hidden_layers": 3, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 8, "n_routed_experts": 4, "n_group": 2, "topk_group": 1,
    "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1, "n_shared_experts": 1,
}  # fmt: skip


def matrices(state: Mapping[str, torch.Tensor]) -> Iterator[str]:
    """Names of the linear modules' weights in the layers; routers are none."""
    for name, tensor in state.items():
        if ".layers." in name and name.endswith("proj.weight") and tensor.dim() == 2:
            yield name


def _renamed(tensors: Coded, stem: str) -> Coded:
    return {stem + name.removeprefix("a"): tensor for name, tensor in tensors.items()}


def mxfp4_model(folder: Path) -> tuple[Path, Path]:
    """gpt_oss with its experts in MXFP4."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    save_tiny("gpt_oss", folder / "source", intermediate_size=64, num_hidden_layers=3)
    coded, plain = dict(state := load_file(folder / "source" / "model.safetensors")), dict(state)
    for name, tensor in state.items():
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, inner, rows = tensor.shape
            del coded[name]
            blocks = torch.randint(0, 256, (experts, rows, inner // 32, 16), dtype=torch.uint8)
            scales = torch.randint(120, 124, (experts, rows, inner // 32), dtype=torch.uint8)
            coded |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            plain[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    return _written(folder, coded, plain, {"quant_method": "mxfp4"})


def fp8_model(folder: Path) -> tuple[Path, Path]:
    """deepseek_v3 in FP8 with block scales, its experts one by one, as in its own files."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    save_tiny("deepseek_v3", folder / "source", **DEEPSEEK)
    coded, plain = dict(state := load_file(folder / "source" / "model.safetensors")), dict(state)
    assert sum("experts.3." in name for name in state) == 2 * 3, "experts are apart in the file"
    for name in matrices(state):
        rows, columns = state[name].shape
        scales = torch.rand(rows // 8, columns // 16) * 1e-3 + 1e-4
        each = scales.repeat_interleave(8, 0).repeat_interleave(16, 1)
        codes = (state[name] / each).clamp(-448, 448).to(torch.float8_e4m3fn)
        coded |= {name: codes, f"{name}_scale_inv": scales}
        plain[name] = Fp8Dequantize(None)._dequantize_one(codes, scales, output_dtype=torch.float32)
    return _written(folder, coded, plain, {"quant_method": "fp8", "weight_block_size": [8, 16]})


def llama_model(
    folder: Path, settings: dict[str, Any], make: Callable[[int, int], tuple[Coded, torch.Tensor]]
) -> tuple[Path, Path]:
    """llama with every linear module's weight as `make(rows, columns)` gives it: its tensors and what they are."""
    save_tiny("llama", folder / "source", num_hidden_layers=3)
    coded, plain = dict(state := load_file(folder / "source" / "model.safetensors")), dict(state)
    for name in matrices(state):
        tensors, plain[name] = make(*state[name].shape)
        del coded[name]
        coded |= _renamed(tensors, name.removesuffix(".weight"))
    return _written(folder, coded, plain, settings)


def gptq_model(folder: Path, bits: int = 4) -> tuple[Path, Path]:
    """llama in GPTQ, its groups out of order."""

    def make(rows: int, columns: int) -> tuple[Coded, torch.Tensor]:
        group = (torch.arange(columns) // 8)[torch.randperm(columns)]
        tensors, expected = gptq(bits, rows, columns, group, extremes=False)
        return tensors, expected(torch.float32)

    return llama_model(folder, {"quant_method": "gptq", "bits": bits, "group_size": 8, "desc_act": True}, make)


def awq_model(folder: Path) -> tuple[Path, Path]:
    """llama in AWQ."""

    def make(rows: int, columns: int) -> tuple[Coded, torch.Tensor]:
        tensors, expected = awq(rows, columns, columns // 16, extremes=False)
        return tensors, expected(torch.float32)

    return llama_model(folder, {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm"}, make)


def compressed_model(folder: Path, bits: int, symmetric: bool) -> tuple[Path, Path]:
    """llama in integers of compressed-tensors."""

    def make(rows: int, columns: int) -> tuple[Coded, torch.Tensor]:
        tensors, plain = compressed(
            bits, rows, columns, columns // 16, symmetric, torch.bfloat16, False, extremes=False
        )
        return tensors, plain.float()

    return llama_model(folder, {"quant_method": "compressed-tensors", "format": "pack-quantized"}, make)


def gguf_model(folder: Path) -> tuple[Path, Path]:
    """llama in blocks of many kinds in a GGUF file, and as transformers dequantises it."""
    source = mixed_llama(folder / "model.gguf")
    return source, dequantised(source, folder / "plain")


def dequantised(source: Path, output: Path) -> Path:
    """A folder of the float32 model that transformers makes of a GGUF file."""
    theirs = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    model = AutoModelForCausalLM.from_config(config_in(source), dtype=torch.float32)
    model.load_state_dict(theirs.state_dict())
    model.save_pretrained(output)
    return output


def _written(folder: Path, coded: Coded, plain: Coded, settings: Mapping[str, Any]) -> tuple[Path, Path]:
    """A folder of codes and one of what they stand for."""
    config = json.loads((folder / "source" / "config.json").read_text())
    for name, tensors, more in (("codes", coded, {"quantization_config": dict(settings)}), ("plain", plain, {})):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps({**config, **more}))
        save_file(tensors, folder / name / "model.safetensors", {"format": "pt"})
    return folder / "codes", folder / "plain"
