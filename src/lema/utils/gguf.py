"""A GGUF file made into a standard transformers folder, one tensor at a time.

It knows GGUF and what transformers knows of it: names, permutations, configuration, tokenizer. It knows
nothing of streaming. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import errno
import importlib.util
import os
import secrets
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
)
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
    load_gguf_checkpoint,
)

from ..core.safetensors_header import show
from ..errors import (
    ConfigError,
    MissingTensorError,
    ShapeMismatchError,
    UnsupportedError,
    WeightsError,
    WeightsFormatError,
    WeightsNotFoundError,
)
from .model_utils import parse_dtype
from .safetensors_writer import SafetensorsWriter, sync_directory

__all__ = ["convert_gguf"]


def convert_gguf(
    gguf_path: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    dtype: torch.dtype | str = "float32",
) -> Path:
    """Make a transformers folder from a GGUF file: configuration, one weights file, tokenizer.

    Quantised tensors are dequantised. At most one tensor is held at a time (for fused experts, one layer's).
    The folder appears in one step, complete, or not at all. The dequantised weights are those of the file,
    with the loss that its quantisation brought.

    Args:
        gguf_path: a GGUF file of a causal language model that transformers knows.
        output_dir: the folder to make; must not exist, or be empty.
        dtype: type of the weights written.

    Returns:
        `output_dir`.

    Raises:
        ConfigError: an unknown dtype, or `output_dir` has something in it.
        WeightsNotFoundError: no such file.
        WeightsFormatError: not a GGUF file, or a damaged one.
        UnsupportedError: an architecture that transformers cannot read from GGUF, or tensors in the file
            that it would leave out.
        MissingTensorError: tensors of the model that the file lacks.
        WeightsError: the `gguf` package is not installed, or the disk is full or refuses.
    """
    source, output, target = Path(gguf_path), Path(output_dir), parse_dtype(dtype)
    _check_source(source)
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ConfigError(f"{output}: exists already. Remove it, or choose another folder.")
    temporary = output.with_name(f".{output.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.mkdir(parents=True)
        _write_folder(source, temporary, target)
        sync_directory(temporary)
        _move_into_place(temporary, output)
    except OSError as error:
        if isinstance(error, WeightsError):
            raise
        raise WeightsError(f"{output}: writing failed: {error}. Check the disk and its permissions.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return output


def _check_source(source: Path) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise WeightsError("Reading GGUF needs the gguf package. Install it: pip install 'lema[gguf]'.")
    if not source.is_file():
        raise WeightsNotFoundError(f"{source}: no such file.")
    with open(source, "rb") as stream:
        if stream.read(4) != b"GGUF":
            raise WeightsFormatError(f"{source}: does not begin with GGUF, so it is no GGUF file.")


def _write_folder(source: Path, folder: Path, dtype: torch.dtype) -> None:
    reader = _open(source)
    config = _read_config(source)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    config.architectures = [type(model).__name__]
    config.dtype = dtype
    _write_weights(source, reader, model, folder / "model.safetensors", dtype)
    config.save_pretrained(folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(folder)


def _open(source: Path) -> Any:
    from gguf import GGUFReader

    try:
        return GGUFReader(source)
    except (ValueError, IndexError, KeyError) as error:  # numpy's and gguf's own, on a file cut short
        raise WeightsFormatError(f"{source}: a damaged GGUF file: {error}. Download or install it again.") from error


def _read_config(source: Path) -> PretrainedConfig:
    try:
        config = AutoConfig.from_pretrained(source.parent, gguf_file=source.name)
    except (ValueError, KeyError, IndexError) as error:
        raise UnsupportedError(
            f"{source}: transformers cannot read this model from GGUF: {error}"
            " Take the model's safetensors files instead."
        ) from error
    for leftover in ("quantization_config", "_model_name_or_path"):
        vars(config).pop(leftover, None)
    return config


def _write_weights(source: Path, reader: Any, model: Any, output: Path, dtype: torch.dtype) -> None:
    """Dequantise tensor by tensor; what several tensors of the file make up is written when all are in."""
    from gguf import dequantize

    architecture = str(reader.fields["general.architecture"].contents())
    settings = load_gguf_checkpoint(source)["config"]
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=settings)
    names = get_gguf_hf_weights_map(model, processor)
    target_of = {tensor.name: _target(tensor.name, names) for tensor in reader.tensors}
    _check_all_used(source, reader.tensors, target_of)
    awaited = Counter(name for name in target_of.values() if name is not None)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    _check_all_there(source, model, shapes, awaited)

    made: dict[str, Any] = {}  # where processors put what they assemble themselves
    with SafetensorsWriter(output, [(name, dtype, shapes[name]) for name in awaited]) as writer:
        for tensor in reader.tensors:
            name = target_of[tensor.name]
            if name is None:
                continue
            result = processor.process(
                weights=dequantize(tensor.data, tensor.tensor_type),
                name=tensor.name,
                tensor_key_mapping=names,
                parsed_parameters={"tensors": made},
            )
            awaited[name] -= 1
            if result.name is not None:
                made[name] = torch.from_numpy(np.require(result.weights, requirements=["C", "W"]))
            if awaited[name] == 0:
                values = made.pop(name)
                if tuple(values.shape) != shapes[name]:
                    raise ShapeMismatchError(
                        f"{source}: {show(name)} has shape {tuple(values.shape)}, where the configuration"
                        f" in the file asks for {shapes[name]}."
                    )
                writer.write(name, values.to(dtype))


def _target(name: str, names: dict[str, str]) -> str | None:
    """The parameter a tensor belongs to; experts that processors assemble are mapped without a suffix."""
    return names.get(name) or names.get(name.rpartition(".")[0])


def _check_all_used(source: Path, tensors: list[Any], target_of: dict[str, str | None]) -> None:
    unused = [t.name for t in tensors if target_of[t.name] is None and not _is_neutral(t)]
    if unused:
        raise UnsupportedError(
            f"{source}: transformers has no place for {len(unused)} tensors:"
            f" {', '.join(map(show, unused[:12]))}."
            " Leaving them out would give another model; take the model's safetensors files instead."
        )


def _is_neutral(tensor: Any) -> bool:
    """Frequency factors of 1 change nothing."""
    return tensor.name == "rope_freqs.weight" and bool((np.asarray(tensor.data) == 1).all())


def _check_all_there(source: Path, model: Any, shapes: dict[str, Any], found: Counter[str]) -> None:
    needed = [name for name in shapes if name not in model.all_tied_weights_keys]
    if missing := [name for name in needed if name not in found]:
        raise MissingTensorError(
            f"{source}: lacks {len(missing)} of the model's {len(needed)} tensors: "
            f"{', '.join(map(show, missing[:12]))}."
        )


def _move_into_place(temporary: Path, output: Path) -> None:
    try:
        os.rename(temporary, output)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise ConfigError(f"{output}: was made by another process meanwhile.") from error
        raise
    sync_directory(output.parent)
