"""PEFT's own layers, given real weights a block at a time to merge.

How a layer may be cut is known here; where its weights lie, `weights` says.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from peft import get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Linear, ParamWrapper
from peft.tuners.lora.variants import DoraLinearVariant
from torch import nn

from ..errors import CheckpointError, UnsupportedError
from ..models.lora import peft_of_this_transformers, stored_transposed
from ..models.transformers_adapter import TransformersAdapter
from ..storage.index import GlobalBinaryIndex
from .checkpoint import Checkpoint
from .elements import RUN

PREFIX = "base_model.model."
_NAME = "default"
SAFE_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
_REFUSED = {
    "modules_to_save": "fully trained modules",
    "trainable_token_indices": "trained tokens",
    "lora_bias": "a bias in LoRA's B",
    "layer_replication": "replicated layers",
}


class Target:
    """One parameter of the model and the PEFT layer that changes it.

    A block is a run of the parameter's leading dimension: rows of a matrix, experts of a stack. PEFT's `merge`
    is run on the layer with the block as its weight and the adapter's tensors cut to match.
    """

    def __init__(self, path: str, layer: Any, load: Callable[[str], torch.Tensor]) -> None:
        self._layer, self._load = layer, load
        self._leaf: str = getattr(layer, "parameter_name", "weight")
        self._owner: nn.Module = layer.get_base_layer()
        weight: torch.Tensor = getattr(self._owner, self._leaf)
        self.shape = tuple(weight.shape)
        self.name = f"{path.removesuffix('.base_layer')}.{self._leaf}"
        while ".base_layer." in self.name:
            self.name = self.name.replace(".base_layer.", ".")
        self._dora = _NAME in layer.lora_variant
        self.keys = [f"{PREFIX}{path}.lora_A.weight", f"{PREFIX}{path}.lora_B.weight"]
        if self._dora:
            self.keys.append(f"{PREFIX}{path}.lora_magnitude_vector")

    @property
    def scaling(self) -> float:
        """What B A is multiplied with."""
        return float(self._layer.scaling[_NAME])

    @property
    def rank(self) -> int:
        """r of this layer."""
        return int(self._layer.r[_NAME])

    def blocks(self, first: int, last: int) -> list[tuple[int, int]]:
        """Blocks of bounded size that cover the leading indices from `first` to `last`."""
        count = self.shape[0]
        step, least = max(1, RUN // max(1, math.prod(self.shape[1:]))), 1
        if self._dora and self._layer.fan_in_fan_out:
            step = least = count  # its norm runs along the leading dimension
        elif len(self.shape) == 3:
            least = min(2, count)  # PEFT takes a single expert for a plain matrix
        step = max(step, least)
        cuts = [(start, min(start + step, last)) for start in range(first, last, step)]
        return [(max(0, min(start, count - least)), max(stop, min(start + least, count))) for start, stop in cuts]

    def merge(self, block: torch.Tensor, first: int) -> torch.Tensor:
        """The block with the adapter in it, by PEFT's formula.

        Args:
            block: float32 weights `[rows, ...]` from leading index `first` on; taken over.
        """
        layer = self._layer
        a, b, *magnitude = (self._load(key) for key in self.keys)
        last = first + block.shape[0]
        if len(self.shape) == 3:
            rank, count = self.rank, self.shape[0]
            a = a[first * rank : last * rank]
            b = b.reshape(b.shape[0], rank, count)[:, :, first:last].reshape(b.shape[0], -1)
            layer.num_experts = last - first
        elif layer.fan_in_fan_out:
            a = a[:, first:last]
        else:
            b = b[first:last]
            magnitude = [vector[first:last] for vector in magnitude]
        empty = {module: module.weight for module in (layer.lora_A[_NAME], layer.lora_B[_NAME])}
        own = getattr(self._owner, self._leaf)
        layer.lora_A[_NAME].weight, layer.lora_B[_NAME].weight = _frozen(a), _frozen(b)
        if magnitude:
            empty[layer.lora_magnitude_vector[_NAME]] = layer.lora_magnitude_vector[_NAME].weight
            layer.lora_magnitude_vector[_NAME].weight = _frozen(magnitude[0])
        setattr(self._owner, self._leaf, _frozen(block))
        try:
            with torch.no_grad():
                layer.merge()
            merged: torch.Tensor = getattr(self._owner, self._leaf).data
        finally:
            layer.merged_adapters.clear()
            layer._caches.clear()
            setattr(self._owner, self._leaf, own)
            for module, weight in empty.items():
                module.weight = weight
            if len(self.shape) == 3:
                layer.num_experts = self.shape[0]
        return merged

    def expected(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the adapter's tensors for this parameter, by name."""
        modules = [self._layer.lora_A[_NAME], self._layer.lora_B[_NAME]]
        if self._dora:
            modules.append(self._layer.lora_magnitude_vector[_NAME])
        return {key: tuple(module.weight.shape) for key, module in zip(self.keys, modules, strict=True)}


def find_targets(checkpoint: Checkpoint, adapter: TransformersAdapter, saved: GlobalBinaryIndex) -> dict[str, Target]:
    """What an adapter changes in a model, by the parameters' names. The model gets PEFT's layers, without memory.

    Raises:
        UnsupportedError: a kind of adapter that cannot be merged block by block; it is named.
        CheckpointError: the adapter's tensors are not those its settings ask for on this model.
    """
    config = checkpoint.lora_config()
    refuse_unmergeable(checkpoint)
    config.inference_mode, config.init_lora_weights, config.base_model_name_or_path = True, True, None
    try:
        config.fan_in_fan_out = stored_transposed(adapter.causal_lm().layers)
        with peft_of_this_transformers():
            model: Any = get_peft_model(adapter.model, config, low_cpu_mem_usage=True)
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.folder} does not fit {checkpoint.base}: {error}") from error
    load = functools.lru_cache(maxsize=3)(lambda key: saved.load_tensors([key])[key].float())
    targets: dict[str, Target] = {}
    for path, layer in model.base_model.model.named_modules():
        if isinstance(layer, LoraLayer):
            _refuse_layer(path, layer)
            target = Target(path, layer, load)
            targets[target.name] = target
    _check_tensors(checkpoint, targets, saved)
    return targets


def copies_of_base(saved: GlobalBinaryIndex) -> dict[str, str]:
    """Parameters of the base that PEFT has put beside the adapter, such as a head with LoRA: stored name -> name."""
    own = [key for key in saved.keys if key.startswith(PREFIX) and ".lora_" not in key]
    return {key: key.removeprefix(PREFIX).replace(".base_layer.", ".") for key in own}


def refuse_unmergeable(checkpoint: Checkpoint) -> None:
    """Refuse, by name, settings under which the adapter is more than matrices to add."""
    settings, where = checkpoint.settings, checkpoint.folder
    for name, label in _REFUSED.items():
        if settings.get(name):
            raise UnsupportedError(f"{where}: {label} ({name}) cannot be merged shard by shard; use PEFT's own merge")
    if settings.get("bias", "none") != "none":
        raise UnsupportedError(f"{where}: trained biases (bias={settings['bias']!r}) cannot be merged shard by shard")
    start = settings.get("init_lora_weights", True)
    if start not in SAFE_STARTS:
        raise UnsupportedError(
            f"{where}: init_lora_weights={start!r} changed the base when training began. Save the adapter with PEFT's "
            "save_pretrained(path_initial_model_for_weight_conversion=...), which makes it plain LoRA"
        )


def _refuse_layer(path: str, layer: Any) -> None:
    base = layer.get_base_layer()
    plain = type(layer) is Linear and (isinstance(base, nn.Linear) or type(base).__name__ == "Conv1D")
    if not plain and type(layer) is not ParamWrapper:
        raise UnsupportedError(f"{path}: LoRA on {type(base).__name__} ({type(layer).__name__}) cannot be merged")
    for variant in layer.lora_variant.values():
        if type(variant) is not DoraLinearVariant:
            raise UnsupportedError(f"{path}: {type(variant).__name__} cannot be merged; only plain LoRA and DoRA can")


def _check_tensors(checkpoint: Checkpoint, targets: dict[str, Target], saved: GlobalBinaryIndex) -> None:
    expected = {key: shape for target in targets.values() for key, shape in target.expected().items()}
    found = {key: saved.record(key).shape for key in saved.keys if key not in copies_of_base(saved)}
    if differ := sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key)):
        first = differ[0]
        raise CheckpointError(
            f"{checkpoint.folder} does not fit {checkpoint.base}: {len(differ)} tensors differ, first {first!r} "
            f"(asked for {expected.get(first)}, in the file {found.get(first)}). Give the model it was trained on with "
            "--base; an adapter from older versions may have to be loaded and saved again with PEFT"
        )


def _frozen(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
