"""A GGUF file made into a standard transformers folder, one tensor at a time.

Names, permutations, configuration and tokenizer are read as transformers reads them.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import errno
import os
from collections.abc import Container
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
)
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
    load_gguf_checkpoint,
)

from ..errors import (
    ConfigError,
    MissingTensorError,
    ShapeMismatchError,
    UnsupportedError,
    WeightsError,
)
from ..models.gguf import config_in
from ..storage.atomic import new_directory
from ..storage.gguf_header import check_gguf, open_gguf
from ..storage.header import show
from ..storage.writer import SafetensorsWriter
from .single_file import parse_dtype

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
    check_gguf(source)
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ConfigError(f"{output}: exists already. Remove it, or choose another folder.")
    try:
        with new_directory(output) as fresh:
            _write_folder(source, fresh, target)
    except WeightsError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise ConfigError(f"{output}: was made by another process meanwhile.") from error
        raise WeightsError(f"{output}: writing failed: {error}. Check the disk and its permissions.") from error
    return output


def _write_folder(source: Path, folder: Path, dtype: torch.dtype) -> None:
    reader = open_gguf(source)
    config = config_in(source)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    model.tie_weights()
    config.architectures = [type(model).__name__]
    config.dtype = dtype
    _write_weights(source, reader, model, folder / "model.safetensors", dtype)
    config.save_pretrained(folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name, trust_remote_code=False)
    tokenizer.save_pretrained(folder)


def _write_weights(source: Path, reader: Any, model: Any, output: Path, dtype: torch.dtype) -> None:
    """Dequantise tensor by tensor."""
    tensors = GgufTensors(source, reader, model)
    with SafetensorsWriter(output, [(name, dtype, shape) for name, shape in tensors.shapes.items()]) as writer:
        for name in tensors.shapes:
            writer.write(name, tensors.read(name).to(dtype))


class GgufTensors:
    """A model's parameters as a GGUF file has them, made when asked for.

    Args:
        source: the file, for messages.
        reader: gguf's reader of it.
        model: transformers' model for its configuration, on the meta device.

    Raises:
        UnsupportedError: tensors that transformers has no place for, or of a type gguf cannot dequantise.
        MissingTensorError: tensors of the model that the file lacks.
    """

    def __init__(self, source: Path, reader: Any, model: Any) -> None:
        architecture = str(reader.fields["general.architecture"].contents())
        settings = load_gguf_checkpoint(source)["config"]
        self._source = source
        self._processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=settings)
        self._names = get_gguf_hf_weights_map(model, self._processor)
        target_of = {tensor.name: _target(tensor.name, self._names) for tensor in reader.tensors}
        _check_all_used(source, reader.tensors, target_of)
        _check_types(source, reader.tensors)
        self._parts: dict[str, list[Any]] = {}
        for tensor in reader.tensors:
            name = target_of[tensor.name]
            if name is not None:
                self._parts.setdefault(name, []).append(tensor)
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        _check_all_there(source, model, shapes, self._parts)
        self.shapes: dict[str, tuple[int, ...]] = {name: shapes[name] for name in self._parts}
        """Of every parameter the file gives, by transformers' name, in the file's order."""
        self.types = {tensor.tensor_type.name for tensor in reader.tensors}
        """gguf's names of the types in the file: F32, F16, BF16, Q4_K …"""

    def read(self, name: str) -> torch.Tensor:
        """One parameter in float32, put together from all tensors of the file that make it up.

        Raises:
            ShapeMismatchError: it has another shape than the configuration in the file asks for.
        """
        from gguf import dequantize

        made: dict[str, Any] = {}  # where processors put what they assemble themselves
        for tensor in self._parts[name]:
            result = self._processor.process(
                weights=dequantize(tensor.data, tensor.tensor_type),
                name=tensor.name,
                tensor_key_mapping=self._names,
                parsed_parameters={"tensors": made},
            )
            if result.name is not None:
                made[name] = torch.from_numpy(np.require(result.weights, requirements=["C", "W"]))
            del result
        values: torch.Tensor = made[name]
        if tuple(values.shape) != self.shapes[name]:
            raise ShapeMismatchError(
                f"{self._source}: {show(name)} has shape {tuple(values.shape)}, where the configuration"
                f" in the file asks for {self.shapes[name]}."
            )
        return values


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


def _check_types(source: Path, tensors: list[Any]) -> None:
    from gguf import GGML_QUANT_SIZES, dequantize

    for kind, name in {tensor.tensor_type: tensor.name for tensor in tensors}.items():
        try:
            dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except (NotImplementedError, KeyError) as error:
            raise UnsupportedError(
                f"{source}: tensor {show(name)} is of type {kind.name}, which the gguf package cannot dequantise."
                " Take another quantisation of the model, or its safetensors files."
            ) from error


def _is_neutral(tensor: Any) -> bool:
    """Frequency factors of 1 change nothing."""
    return tensor.name == "rope_freqs.weight" and bool((np.asarray(tensor.data) == 1).all())


def _check_all_there(source: Path, model: Any, shapes: dict[str, Any], found: Container[str]) -> None:
    needed = [name for name in shapes if name not in model.all_tied_weights_keys]
    if missing := [name for name in needed if name not in found]:
        raise MissingTensorError(
            f"{source}: lacks {len(missing)} of the model's {len(needed)} tensors: "
            f"{', '.join(map(show, missing[:12]))}."
        )
