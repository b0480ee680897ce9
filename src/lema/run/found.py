"""What a model is found to be, before a run: its layers, what is left out, where adapters would go, what is refused.

It asks configuration and headers of weight files only; no weights are read, and nothing is planned.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from ..config import LemaConfig
from ..engine.assembly import lora_settings
from ..engine.trial import fault_of_training
from ..errors import ConfigError, LemaError
from ..models.base import LemaModelAdapter
from ..models.locate import adapter_for, local_path
from ..models.lora import LoRAManager
from ..models.transformers_adapter import TransformersAdapter
from ..storage.index import GlobalBinaryIndex


@dataclass
class Found:
    """One model. Where something is refused, what would have been looked at after it is not known, and empty."""

    model: str
    """As it was named."""
    family: str = ""
    """Model type, and the class that transformers makes."""
    dtype: str = ""
    """What it is looked at in: the type its configuration names."""
    parameters: int = 0
    """Of the text model: all that is kept."""
    layers_path: str = ""
    layers: dict[str, int] = field(default_factory=dict)
    """Kinds of layers, and how many of each."""
    left_out: dict[str, tuple[str, int]] = field(default_factory=dict)
    """Towers that rows of text do not reach: path -> class and bytes."""
    head: str = ""
    targets: dict[str, int] = field(default_factory=dict)
    """Modules that adapters take by their last name, and how many of each."""
    adapter_parameters: int = 0
    """Of the rank that was asked for."""
    weights: str = ""
    """Whether the weights are here, and are this model's."""
    refused: list[str] = field(default_factory=list)
    """What is refused, and why; empty: it trains."""


def look_at(config: LemaConfig) -> Found:
    """What the model of these settings is found to be; its type is its own, whatever the settings say.

    Raises:
        WeightsNotFoundError, ConfigError: there is no model.
    """
    found = Found(config.model_name_or_path)
    path = local_path(config.model_name_or_path, "*.json")
    try:
        adapter = adapter_for(config, path)
        found.family = str(getattr(getattr(adapter, "config", None), "model_type", type(adapter).__name__))
        if not isinstance(adapter, TransformersAdapter):
            found.refused.append(f"{type(adapter).__name__} is an adapter of its own, which cannot be looked into")
            return found
        _describe(found, adapter)
        _weights(found, adapter, config, path)
        _adapters(found, adapter, config)
    except (StrictDataclassError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
        if isinstance(error, LemaError):
            raise
        raise ConfigError(f"the config.json of {path} describes no model: {type(error).__name__}: {error}") from error
    except LemaError as error:
        found.refused.append(str(error))
    return found


def describe(adapter: LemaModelAdapter, config: LemaConfig) -> Found:
    """What is known of a model that is accepted, and where adapters of these settings go; of an adapter of one's own no
    more than its name."""
    found = Found(config.model_name_or_path, type(adapter).__name__)
    if isinstance(adapter, TransformersAdapter):
        _describe(found, adapter)
        if config.use_lora:
            manager = LoRAManager(lora_settings(config, adapter), device="cpu", seed=0)
            _count_adapters(found, manager.attach(adapter.apart(), empty=True))
    return found


def _count_adapters(found: Found, adapted: nn.Module) -> None:
    own = {name: p for name, p in adapted.named_parameters() if ".lora_" in name}
    modules = dict.fromkeys(name.partition(".lora_")[0] for name in own)
    found.targets = dict(Counter(name.rpartition(".")[2] for name in modules))
    found.adapter_parameters = sum(p.numel() for p in own.values())


def _describe(found: Found, adapter: TransformersAdapter) -> None:
    model: Any = adapter.model
    lm = adapter.causal_lm()
    found.family = f"{adapter.config.model_type} ({type(model).__name__})"
    found.dtype = str(adapter.dtype).removeprefix("torch.")
    found.parameters = sum(parameter.numel() for parameter in model.parameters())
    blocks = [layer["name"] for layer in adapter.get_layer_metadata() if layer["type"] == "block"]
    found.layers_path = blocks[0].rpartition(".")[0]
    found.layers = dict(Counter(_kinds(adapter)))
    found.left_out = {
        path: (type(tower).__name__, sum(parameter.nbytes for parameter in tower.parameters()))
        for path, tower in lm.left_out.items()
    }
    found.head = _head(model)


def _kinds(adapter: TransformersAdapter) -> Iterator[str]:
    """What each layer is: its class, and what the configuration calls it."""
    layers = adapter.causal_lm().layers
    text = adapter.config.get_text_config()
    called = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None) or ()
    for number, layer in enumerate(layers):
        kind = f" ({called[number]})" if len(called) == len(layers) else ""
        yield f"{type(layer).__name__}{kind}"


def _head(model: Any) -> str:
    head = model.get_output_embeddings()
    if head is None:
        return "none of its own"
    if type(head) is not nn.Linear:
        return f"{type(head).__name__}, which has to stay in memory"
    path = next(name for name, module in model.named_modules() if module is head)
    ties = model.all_tied_weights_keys
    tied = f"{path}.weight" in {*ties, *ties.values()}
    return f"{head.out_features} x {head.in_features}, {'tied to' if tied else 'apart from'} the embedding"


def _weights(found: Found, adapter: TransformersAdapter, config: LemaConfig, path: Path) -> None:
    where = Path(config.gbi_path) if config.gbi_path is not None else path
    if not (where.suffix == ".safetensors" or any(where.glob("*.safetensors"))):
        found.weights = "not here, so their names and shapes are not checked"
        return
    with GlobalBinaryIndex(where) as gbi:
        adapter.checkpoint_map(gbi)
        found.weights = f"{len(gbi.keys)} tensors, and all of the model's are there in their shapes"


def _adapters(found: Found, adapter: TransformersAdapter, config: LemaConfig) -> None:
    manager = LoRAManager(lora_settings(config, adapter), device="cpu", seed=0)
    manager.attach(adapter)
    _count_adapters(found, manager.peft_model)
    with torch.random.fork_rng(devices=[]):
        if fault := fault_of_training(adapter.causal_lm()):
            found.refused.append(fault)
