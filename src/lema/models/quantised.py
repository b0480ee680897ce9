"""Quantised checkpoints: their tensors as the known formats find them; others are refused by name, as codes read as
weights are wrong numbers.

It knows how configurations and types give them away; it knows nothing of how codes become weights.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch

from ..errors import UnsupportedError
from ..storage.codecs import Stored
from ..storage.codecs.formats import bits_of, find_stored, methods
from ..storage.index import GlobalBinaryIndex
from ..storage.layout import ParameterSource

_DEQUANTISE = (
    "or load it once with transformers, call model.dequantize() and then save_pretrained(), where there is memory for "
    "it"
)
_ON_LOADING = (
    "or load it once with transformers and quantization_config={}(dequantize=True), then call save_pretrained(), "
    "where there is memory for it"
)
_ADVICE = {
    "bitsandbytes": _DEQUANTISE,
    "bitsandbytes_4bit": _DEQUANTISE,
    "bitsandbytes_8bit": _DEQUANTISE,
    "fp8": _ON_LOADING.format("FineGrainedFP8Config"),
    "mxfp4": _ON_LOADING.format("Mxfp4Config"),
}
_PACKED: tuple[tuple[str, tuple[str, ...], str], ...] = (
    (".qweight", (".qzeros", ".scales"), "GPTQ or AWQ"),
    (".weight", (".scales", ".biases"), "MLX"),
    (".weight", (".absmax", ".quant_map"), "bitsandbytes (4 bit)"),
    (".weight", (".SCB",), "bitsandbytes (8 bit)"),
    (".weight", (".weight_scale_inv",), "FP8 in blocks"),
    (".weight", (".weight_scale",), "FP8"),
    (".weight_packed", (".weight_scale",), "compressed-tensors"),
    ("_blocks", ("_scales",), "MXFP4"),
    (".W_q", (".scale", ".zero"), "HQQ"),
    (".weight", (".scales",), "MLX"),
    (".codes", (".codebooks",), "AQLM"),
    (".weight._data", (".weight._scale",), "quanto"),
)
"""How codes are named, how what turns them into weights is named beside them, and whose names these are."""
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def quantisation_settings(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """`quantization_config` of a model's configuration, or of its text decoder's; None without one."""
    for part in (config, config.get("text_config")):
        settings = (
            part.get("quantization_config") or part.get("compression_config") if isinstance(part, Mapping) else None
        )
        if settings is not None:
            return settings if isinstance(settings, Mapping) else vars(settings)
    return None


def quantisation_of(config: Mapping[str, Any]) -> str | None:
    """The method a model's configuration names ("gptq", "bitsandbytes" …); None for plain weights."""
    settings = quantisation_settings(config)
    if settings is None:
        parts = [part.get("quantization") for part in (config, config.get("text_config")) if isinstance(part, Mapping)]
        return "MLX" if any(isinstance(mlx, Mapping) and "bits" in mlx for mlx in parts) else None
    in_bits = settings.get("load_in_4bit") or settings.get("load_in_8bit")
    method = settings.get("quant_method") or ("bitsandbytes" if in_bits else "an unnamed method")
    return str(getattr(method, "value", method))


def stored_bits(config: Mapping[str, Any], dims: int) -> float | None:
    """Bits a value of a layer's matrix takes in the model's files, as its configuration says; None: those it is
    computed in, or not known.

    Args:
        dims: of the matrix: experts in one tensor have three.
    """
    settings, method = quantisation_settings(config), quantisation_of(config)
    return None if settings is None or method is None else bits_of(method, settings, dims)


def coded_tensors(config: Mapping[str, Any], gbi: GlobalBinaryIndex) -> dict[str, Stored]:
    """Tensors that the files keep as codes of a known format, by the name they have in files without.

    Args:
        config: the model's config.json as a dict.
        gbi: its weights.

    Raises:
        UnsupportedError: codes of another format, or a configuration that says of plain weights that they are codes.
        WeightsFormatError, MissingTensorError: codes that are damaged or incomplete.
    """
    found = find_stored({name: gbi.record(name) for name in gbi.keys}, quantisation_settings(config))
    method = quantisation_of(config)
    if method is not None and not found:
        raise UnsupportedError(
            f"{gbi.path}: config.json says that the weights are quantised with {method}, and no tensor here holds "
            "codes of it. Take quantization_config out of config.json to compute with them as they are"
        )
    refuse_packed(gbi, {name for stored in found.values() for name in stored.consumes})
    return found


def refuse_unknown(config: Mapping[str, Any], where: object) -> None:
    """Raise `UnsupportedError` if the configuration names a way of quantising that no format here decodes."""
    refuse_quantised(config, where, methods())


def refuse_quantised(config: Mapping[str, Any], where: object, known: Collection[str] = ()) -> None:
    """Raise `UnsupportedError` if the configuration says that the weights are quantised.

    Args:
        config: the model's config.json as a dict.
        where: what to name in the message: a path or a hub id.
        known: methods that are not refused.
    """
    method = quantisation_of(config)
    if method is None or method in known:
        return
    others = f", {_ADVICE[method]}" if method in _ADVICE else ""
    entry = "quantization" if method == "MLX" else "quantization_config"
    raise UnsupportedError(
        f"{where}: its weights are quantised with {method} ({entry} in config.json). LEMA trains over "
        f"plain float16, bfloat16 or float32 weights: take the model it was made from{others}"
    )


def refuse_packed(gbi: GlobalBinaryIndex, known: Collection[str] = ()) -> None:
    """Raise `UnsupportedError` if the files hold codes, whatever the configuration says: older MLX
    checkpoints have no `quantization_config`, and to a model their tensors are missing ones or of a wrong shape.

    Args:
        known: tensors whose codes a format has claimed.
    """
    for name in gbi.keys:
        if name in known:
            continue
        for codes, beside, method in _PACKED:
            stem = name.removesuffix(codes)
            if stem == name or gbi.record(name).dtype in _FLOATS:
                continue
            if any(stem + other in gbi or name + other in gbi for other in beside):
                raise UnsupportedError(
                    f"{gbi.path}: its weights are quantised, by their names with {method}: {name} holds codes "
                    f"({gbi.record(name).dtype}), though config.json has no quantization_config. LEMA trains over "
                    "plain float16, bfloat16 or float32 weights: take the model it was made from"
                )


def refuse_codes(sources: Iterable[ParameterSource], where: object) -> None:
    """Raise `UnsupportedError` if a floating parameter would be filled from integers or 8-bit floats."""
    found = [
        f"{source.name} from {piece.record.name} ({piece.record.dtype})"
        for source in sources
        if source.dtype.is_floating_point
        for piece in source.pieces[:1]
        if piece.record.dtype not in _FLOATS
    ]
    if found:
        raise UnsupportedError(
            f"{where}: {len(found)} parameters are stored as codes of a quantised model: {', '.join(found[:3])}"
            f"{', …' if len(found) > 3 else ''}. Take the model it was made from, in float16, bfloat16 or float32"
        )
