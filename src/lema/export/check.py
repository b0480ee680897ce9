"""What PEFT, vLLM and llama.cpp would say of an adapter, before they are asked.

An adapter's two files are all it takes, neither the base nor those programs. The rules are
those of PEFT's loader, vLLM's `PEFTHelper` and llama.cpp's `convert_lora_to_gguf.py`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

from ..errors import CheckpointError, WeightsError
from ..models.lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from ..storage.index import GlobalBinaryIndex
from .checkpoint import read_settings
from .gguf_adapter import ARCHITECTURES
from .lora_layers import PREFIX, SAFE_STARTS, copies_of_base

READERS = ("PEFT", "vLLM", "llama.cpp")
_MAX_RANK = 16  # of vLLM unless --max-lora-rank says more
_SUFFIXES = (".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector")
_PICKLED = "adapter_model.bin"
_AGAIN = "load the adapter with PEFT and save it again"
_OTHER_COPY = f"{_AGAIN}: {_PICKLED} beside it may be the only copy that is whole"
_BY_CONVERTER = "use `lema export --to gguf-adapter`, which writes the right scale"


@dataclass(frozen=True)
class Finding:
    """One thing a reader of adapters would like or not."""

    reader: str
    """One of `READERS`."""
    level: str
    """'ok', 'warning' or 'problem'."""
    what: str
    """What was found."""
    advice: str = ""
    """What to do; empty where nothing need be done."""


def check_adapter(folder: str | os.PathLike[str]) -> list[Finding]:
    """Every finding on a directory, reader by reader; one that holds no adapter is a problem, not an error."""
    path = Path(folder)
    try:
        settings = read_settings(path)
    except CheckpointError as error:
        return [Finding("PEFT", "problem", str(error), "give a directory that training or `lema export` wrote")]
    found = [*_settings(path, settings), *_tensors(path, settings), *_vllm(settings), *_llama_cpp(settings)]
    for reader in READERS[1:]:
        if not any(finding.reader == reader for finding in found):
            found.append(Finding(reader, "ok", "nothing in the settings is against it"))
    return sorted(found, key=lambda finding: READERS.index(finding.reader))


def refuse_problems(folder: str | os.PathLike[str]) -> None:
    """`CheckpointError` where PEFT would not take an adapter: what `lema adapter check` calls a problem of PEFT's."""
    for finding in check_adapter(folder):
        if finding.reader == "PEFT" and finding.level == "problem":
            raise CheckpointError(f"{folder}: {finding.what}; {finding.advice}")


def _settings(folder: Path, settings: dict[str, Any]) -> Iterator[Finding]:
    if settings.get("peft_type") != "LORA":
        yield Finding("PEFT", "problem", f"peft_type is {settings.get('peft_type')!r}", "only LoRA is understood here")
        return
    try:
        LoraConfig.from_pretrained(str(folder))
    except (TypeError, ValueError, KeyError) as error:
        yield Finding("PEFT", "problem", f"{ADAPTER_CONFIG} is refused: {error}", "save the adapter again")
        return
    for name in ("r", "lora_alpha"):
        value = settings.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            what = f"{ADAPTER_CONFIG} has {name}={value!r}, and PEFT's default need not be what it was trained with"
            yield Finding("PEFT", "problem", what, f"set {name} to what it was trained with")
            return
    yield Finding("PEFT", "ok", f"{ADAPTER_CONFIG}: LoRA, r={settings.get('r')}, alpha={settings.get('lora_alpha')}")
    if not settings.get("target_modules") and not settings.get("target_parameters"):
        yield Finding("PEFT", "problem", "no target_modules, so nothing would be loaded", "name the modules")
    base = settings.get("base_model_name_or_path")
    if not base:
        yield Finding(
            "PEFT", "warning", "base_model_name_or_path is empty", "`lema export --to peft --base ID` sets it"
        )
    elif Path(str(base)).exists() or os.path.isabs(str(base)):
        yield Finding(
            "PEFT", "warning", f"the base is a path on this machine: {base}", "`lema export --base ID` names a hub id"
        )  # fmt: skip
    else:
        yield Finding("PEFT", "ok", f"the base is {base}")
    if not settings.get("inference_mode"):
        yield Finding("PEFT", "warning", "inference_mode is not set", "`lema export --to peft` sets it")
    if settings.get("init_lora_weights", True) not in SAFE_STARTS:
        yield Finding(
            "PEFT", "warning", f"init_lora_weights={settings['init_lora_weights']!r} needs a changed base",
            "save it with path_initial_model_for_weight_conversion",
        )  # fmt: skip


def _tensors(folder: Path, settings: dict[str, Any]) -> Iterator[Finding]:
    try:
        saved = GlobalBinaryIndex(folder / ADAPTER_WEIGHTS)
    except WeightsError as error:
        yield Finding("PEFT", "problem", str(error), _OTHER_COPY if (folder / _PICKLED).is_file() else _AGAIN)
        return
    if (folder / _PICKLED).is_file():
        what = f"there is a pickled {_PICKLED} as well, which some readers may take instead"
        yield Finding("PEFT", "warning", what, "export it, which leaves that file out; keep it until you have compared")
    with saved:
        whole = copies_of_base(saved)
        keys = [key for key in saved.keys if key not in whole]
        if whole:
            first = ", ".join(list(whole.values())[:3])
            advice = "leave head and embeddings out of the targets, or merge"
            yield Finding("vLLM", "problem", f"parameters of the base are in the adapter: {first}", advice)
        strange = [key for key in keys if not key.startswith(PREFIX) or not key.endswith(_SUFFIXES)]
        modules = {key.rpartition(".lora_")[0] for key in keys if key not in strange}
        lonely = [m for m in modules if any(f"{m}{s}" not in saved for s in _SUFFIXES[:2])]
        pairs = [m for m in sorted(modules) if m not in lonely]
        shapes = {
            m: (saved.record(f"{m}{_SUFFIXES[0]}").shape, saved.record(f"{m}{_SUFFIXES[1]}").shape) for m in pairs
        }
        unequal = [m for m, (a, b) in shapes.items() if len(a) != 2 or len(b) != 2 or a[0] != b[1]]
        for names, what in (
            (strange, "tensors are neither A, B nor a magnitude"),
            (lonely, "modules lack A or B"),
            (unequal, "modules have an A and a B of different rank"),
        ):
            if names:
                yield Finding(
                    "PEFT", "problem", f"{len(names)} {what}, first {names[0]}", "save the adapter again with PEFT"
                )
        if not settings.get("rank_pattern") and not settings.get("target_parameters"):
            other = [m for m, (a, _) in shapes.items() if a[0] != settings.get("r") and m not in unequal]
            if other:
                yield Finding(
                    "PEFT", "problem", f"{len(other)} modules are not of rank {settings.get('r')}, first {other[0]}",
                    "set r to what it was trained with",
                )  # fmt: skip
        yield from _values(saved, pairs)


def _values(saved: GlobalBinaryIndex, pairs: list[str]) -> Iterator[Finding]:
    broken, idle = [], 0
    for key in saved.keys:
        tensor = saved.load_tensors([key])[key]
        if not bool(torch.isfinite(tensor.float()).all()):
            broken.append(key)
        elif key.endswith(_SUFFIXES[1]) and not bool(tensor.any()):
            idle += 1
    if broken:
        yield Finding(
            "PEFT", "problem", f"{len(broken)} tensors are not finite, first {broken[0]}", "use an earlier checkpoint"
        )
    if idle:
        level, share = ("warning", "all") if idle == len(pairs) else ("ok", str(idle))
        yield Finding("PEFT", level, f"B is zero in {share} of {len(pairs)} modules: they change nothing", "train it")
    types = sorted({str(saved.record(key).dtype).removeprefix("torch.") for key in saved.keys})
    yield Finding(
        "PEFT", "ok", f"{ADAPTER_WEIGHTS}: {len(pairs)} modules, {saved.total_bytes / 1e6:.1f} MB of {', '.join(types)}"
    )


def _vllm(settings: dict[str, Any]) -> Iterator[Finding]:
    merged = "serve the merged model: `lema merge`"
    if settings.get("modules_to_save"):
        yield Finding("vLLM", "problem", f"modules_to_save={settings['modules_to_save']} is refused", merged)
    if settings.get("use_dora"):
        yield Finding("vLLM", "problem", "DoRA is refused", merged)
    if settings.get("bias", "none") != "none" or settings.get("lora_bias"):
        yield Finding("vLLM", "problem", "trained biases are refused", merged)
    for name in ("rank_pattern", "alpha_pattern"):
        if settings.get(name):
            yield Finding("vLLM", "problem", f"{name} is ignored, so those modules get the wrong scale", merged)
    if settings.get("target_parameters"):
        yield Finding("vLLM", "warning", "LoRA on fused experts (target_parameters) loads for few models", merged)
    rank = max([settings.get("r") or 0, *(settings.get("rank_pattern") or {}).values()])
    if rank > _MAX_RANK:
        yield Finding(
            "vLLM",
            "warning",
            f"rank {rank} is above the default limit of {_MAX_RANK}",
            f"serve with --max-lora-rank {rank}",
        )


def _llama_cpp(settings: dict[str, Any]) -> Iterator[Finding]:
    merged = "merge it and convert the whole model"
    if settings.get("use_dora"):
        yield Finding("llama.cpp", "problem", "DoRA cannot be expressed", merged)
    if settings.get("modules_to_save") or settings.get("trainable_token_indices"):
        yield Finding("llama.cpp", "problem", "whole trained modules or tokens are refused", merged)
    if settings.get("bias", "none") != "none" or settings.get("lora_bias"):
        yield Finding("llama.cpp", "problem", "trained biases are refused", merged)
    if settings.get("target_parameters"):
        yield Finding("llama.cpp", "problem", "LoRA on fused experts (target_parameters) is refused", merged)
    if settings.get("use_rslora"):
        yield Finding(
            "llama.cpp", "warning", "its converter takes rsLoRA for LoRA, with the wrong scale", _BY_CONVERTER
        )
    for name in ("rank_pattern", "alpha_pattern"):
        if settings.get(name):
            yield Finding("llama.cpp", "warning", f"its converter does not read {name}", _BY_CONVERTER)
    families = ", ".join(ARCHITECTURES)
    yield Finding("llama.cpp", "ok", f"`lema export --to gguf-adapter` writes it for {families}")
