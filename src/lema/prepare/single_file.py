"""One safetensors file from any safetensors checkpoint, and models without shared tensors.

Tensors are names and bytes here, whatever layer they belong to.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from copy import deepcopy
from itertools import chain
from pathlib import Path
from typing import TypeVar

import huggingface_hub
import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import ConfigError, DeviceError, WeightsNotFoundError
from ..storage.index import GlobalBinaryIndex
from ..storage.writer import SafetensorsWriter

__all__ = ["break_shared_weights", "converted", "parse_dtype", "prepare_monolithic_safetensors", "target_type"]

logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound=nn.Module)

_DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}
_ALIASES = {"fp16": "float16", "half": "float16", "bf16": "bfloat16", "fp32": "float32", "fp64": "float64"}
_PIECE_ITEMS = 16 * 2**20  # items converted at a time


def prepare_monolithic_safetensors(
    model_name_or_path: str | os.PathLike[str],
    output_path: str | os.PathLike[str],
    device: str | torch.device = "auto",
    dtype: torch.dtype | str | None = torch.float16,
) -> Path:
    """Write one safetensors file from a sharded or single checkpoint, in about one tensor's memory.

    Floating-point tensors become `dtype`. Integers, booleans and 8-bit floats stay as they are: the latter
    are codes of a quantised model, and their values mean nothing without their scales. A value too large
    for the type becomes infinite; a warning names those tensors and advises bfloat16.

    A checkpoint whose head is tied to its embedding holds one tensor for both, and so does the output:
    `tie_word_embeddings` in the model's config.json says that `lm_head.weight` is missing on purpose.

    Args:
        model_name_or_path: a directory, a `.safetensors` file, an index `*.json`, or the id of a model on
            the hub, which is downloaded first (safetensors and JSON files of its top folder).
        output_path: the file to write; an existing one is replaced only when the new one is complete.
        device: where types are converted; "auto" is the CPU.
        dtype: a floating-point type or its name; None keeps every tensor's own.

    Returns:
        `output_path`.

    Raises:
        ConfigError: an unknown dtype, or the output would replace one of several shards.
        DeviceError: the device is unknown or absent.
        WeightsNotFoundError: nothing at the path, and no such model on the hub.
        WeightsError: the source is damaged, or the disk is full or refuses.
    """
    target = None if dtype is None else parse_dtype(dtype)
    place = _parse_device(device)
    output = Path(output_path)
    with GlobalBinaryIndex(_local_source(model_name_or_path)) as index:
        if len(index.files) > 1 and any(_same_file(output, file) for file in index.files):
            raise ConfigError(f"{output}: is one of the {len(index.files)} files read. Write to another file.")
        types = {name: target_type(index.record(name).dtype, target) for name in index.keys}
        declared = [(name, types[name], index.record(name).shape) for name in types]
        overflowed: dict[str, int] = {}
        with SafetensorsWriter(output, declared, {**index.metadata, "format": "pt"}) as writer:
            for name, wanted in types.items():
                tensor = index.load_tensors([name])[name]
                if tensor.dtype == wanted:
                    writer.write(name, tensor)
                else:
                    writer.write_parts(name, converted(name, tensor, wanted, place, overflowed))
                del tensor  # before the next one is read
            index.check_unchanged()
    if overflowed:
        names = ", ".join(f"{name} ({count})" for name, count in overflowed.items())
        logger.warning(
            "%s: %d finite values became infinite in %s, in %d tensors: %s."
            " Use dtype='bfloat16', which has the range of float32.",
            output, sum(overflowed.values()), target, len(overflowed), names,
        )  # fmt: skip
    return output


def break_shared_weights(model: Model) -> Model:
    """Give every parameter and buffer memory of its own, in place.

    Of tensors that share memory the first in the model's order stays and each later one becomes a copy
    that trains on its own. A submodule registered at two places is copied at the later one. A transformers
    model's `tie_word_embeddings` becomes False, so that `save_pretrained` writes both tensors and loading
    does not tie them again.

    Returns:
        `model` itself. Names of the tensors that are copies now are in the log, at level INFO.
    """
    if copied := [name for name, _ in _repeated(model)]:
        logger.info("tensors that have memory of their own now: %s", ", ".join(copied))
    _separate_modules(model, {id(model)})
    for name, tensor in _repeated(model):
        path, _, local = name.rpartition(".")
        module = model.get_submodule(path)
        fresh = tensor.detach().clone(memory_format=torch.contiguous_format)
        if local in module._parameters:
            module._parameters[local] = nn.Parameter(fresh, requires_grad=tensor.requires_grad)
        else:
            module._buffers[local] = fresh
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module.all_tied_weights_keys:
            module.all_tied_weights_keys = {}
            module.config.tie_word_embeddings = False
            module.config.get_text_config().tie_word_embeddings = False
    return model


def parse_dtype(value: torch.dtype | str) -> torch.dtype:
    """A floating-point type from itself or its name, with or without `torch.` before it; 'bf16' and the like will do.

    Raises:
        ConfigError: another value; those accepted are listed.
    """
    if isinstance(value, str):
        name = value.removeprefix("torch.").lower()
        dtype = _DTYPES.get(_ALIASES.get(name, name))
    else:
        dtype = value
    if dtype is None or dtype not in _DTYPES.values():
        raise ConfigError(f"dtype: {value!r} is none of {', '.join(_DTYPES)}.")
    return dtype


def _local_source(source: str | os.PathLike[str]) -> Path:
    """The path itself where something is there, else the folder a hub model was downloaded to."""
    path = Path(source).expanduser()
    text = os.fspath(source)
    looks_like_path = not isinstance(source, str) or path.is_absolute() or text.startswith((".", "~"))
    if path.exists() or looks_like_path or path.suffix in {".safetensors", ".json"}:
        return path
    try:
        # Other folders hold other formats, and consolidated files hold the same tensors once more.
        folder = huggingface_hub.snapshot_download(
            text,
            allow_patterns=["*.json", "*.safetensors"],
            ignore_patterns=["*/*", "consolidated*.safetensors"],
        )
    except (OSError, huggingface_hub.errors.HFValidationError) as error:
        raise WeightsNotFoundError(
            f"{text}: no such path, and the hub gave no model of this name: {error}"
            " Check the spelling and the network, or give the folder of a downloaded model."
        ) from error
    return Path(folder)


def converted(
    name: str,
    tensor: torch.Tensor,
    dtype: torch.dtype,
    device: torch.device,
    overflowed: dict[str, int],
) -> Iterator[torch.Tensor]:
    """The tensor's pieces in another type; counts finite values that became infinite."""
    for piece in tensor.reshape(-1).split(_PIECE_ITEMS):
        source = piece.to(device)
        result = source.to(dtype)
        infinite = int(result.isinf().count_nonzero())
        if infinite and (lost := infinite - int(source.isinf().count_nonzero())):  # infinite ones stay so
            overflowed[name] = overflowed.get(name, 0) + lost
        yield result


def target_type(stored: torch.dtype, target: torch.dtype | None) -> torch.dtype:
    """The type a stored tensor is written in: codes, integers and booleans stay as they are."""
    return target if target is not None and stored in _DTYPES.values() else stored


def _parse_device(device: str | torch.device) -> torch.device:
    try:
        place = torch.device("cpu" if device == "auto" else device)
        torch.empty(1, device=place)
    except (RuntimeError, AssertionError) as error:  # torch asserts where it was built without the device
        raise DeviceError(f"device {device!r} cannot be used: {error}. Use 'auto' or 'cpu'.") from error
    return place


def _same_file(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        return False


def _repeated(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Parameters, then buffers, whose memory one before them has already."""
    seen: set[tuple[torch.device, int]] = set()
    repeated = []
    for name, tensor in chain(
        model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
    ):
        if tensor.numel() == 0:
            continue
        on_meta = tensor.device.type == "meta"
        key = (tensor.device, id(tensor) if on_meta else tensor.untyped_storage().data_ptr())
        if key in seen:
            repeated.append((name, tensor))
        seen.add(key)
    return repeated


def _separate_modules(module: nn.Module, seen: set[int]) -> None:
    for name, child in module._modules.items():
        if child is None:
            continue
        if id(child) in seen:
            module._modules[name] = child = deepcopy(child)
        seen.add(id(child))
        _separate_modules(child, seen)
