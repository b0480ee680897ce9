"""The one adapter for every transformers decoder: units are its layers, the rest is what is around them.

It knows which parameters a layer has and how to bind them; it knows nothing of slots, sweeps or training.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from ..errors import UnsupportedError
from ..storage.index import GlobalBinaryIndex
from ..storage.layout import ParameterSource
from .base import LemaModelAdapter, bind_flat_buffer
from .causal_lm import TransformersCausalLM
from .checkpoint import CheckpointMap, map_checkpoint
from .embedding import gathered_rows
from .families import is_composite
from .interceptor import Gate
from .lora import LoRAManager
from .outputs import router_loss_of
from .quantised import coded_tensors, refuse_codes, refuse_unknown
from .skeleton import build_skeleton, find_layers, refuse_other_layers
from .stages import EmbeddingStage, HeadStage, layer_arguments, split_rest


class TransformersAdapter(LemaModelAdapter):
    """Adapter for any language model of transformers with one list of decoder layers.

    Of a composite model, text with towers for images and sound, it is the whole model under its own names but for the
    towers: what a row of text does not reach is left out.

    Args:
        config: the model's configuration, as a dict with `model_type` or as transformers' object.

    Raises:
        UnsupportedError: transformers does not know the type, or the model has no single list of layers.
    """

    packs_units = False

    def __init__(self, config: Mapping[str, Any] | PreTrainedConfig) -> None:
        if isinstance(config, PreTrainedConfig):
            self.config = copy.deepcopy(config)
        else:
            values = dict(config)
            model_type = values.pop("model_type", None)
            if not model_type:
                raise UnsupportedError("the model's configuration has no model_type: say which family it is")
            self.config = AutoConfig.for_model(model_type, **values)
        refuse_unknown(self.config.to_dict(), self.config.name_or_path or self.config.model_type)
        stored = getattr(self.config, "dtype", None)
        self.dtype = stored if isinstance(stored, torch.dtype) else torch.float32
        self._attn: str | None = None
        self._model: PreTrainedModel | None = None
        self._lm: TransformersCausalLM
        self._places: dict[str, tuple[nn.Module, str]] = {}
        self._expected: dict[str, torch.Tensor] = {}
        self._unit_paths: list[str] = []
        self._hollow: list[nn.Parameter] = []
        self._shared: frozenset[str] = frozenset()
        self._map: tuple[GlobalBinaryIndex, CheckpointMap] | None = None
        self._streamed_head: str | None = None

    # -- the skeleton ----------------------------------------------------------------------------

    def configure(self, dtype: torch.dtype, attn_implementation: str | None = None) -> None:
        """Set compute type and attention. A skeleton built before keeps its modules and takes new buffers."""
        if self._model is None:
            self.dtype, self._attn = dtype, attn_implementation
            return
        if attn_implementation is not None:
            self._model.set_attn_implementation(self._supported_attention(attn_implementation))
        if dtype != self.dtype:
            fresh = build_skeleton(copy.deepcopy(self.config), dtype, attn_implementation)
            state = fresh.state_dict()
            for name, buffer in fresh.named_buffers():
                path, _, leaf = name.rpartition(".")
                if path in self._modules:  # towers are not
                    self._modules[path]._buffers[leaf] = buffer
            self._expected = {name: state[name] for name in self._expected}
            self._map = None
            self.dtype = dtype

    def _supported_attention(self, name: str) -> str:
        supported = name != "sdpa" or getattr(type(self.model), "_supports_sdpa", False)
        return name if supported else "eager"

    @property
    def model(self) -> PreTrainedModel:
        """The skeleton: transformers' model, its weights bound or still empty."""
        return self._build()

    def _build(self) -> PreTrainedModel:
        """Make the skeleton and what is known of it, unless it is there."""
        if self._model is None:
            model = build_skeleton(copy.deepcopy(self.config), self.dtype, self._attn)
            path, layers = find_layers(model)
            self._lm = TransformersCausalLM(model, layers, router_loss_of(self.config))
            if is_composite(self.config):
                self._lm.leave_out_towers()
            refuse_other_layers(model, path)
            self._unit_paths = [f"{path}.{i}" for i, layer in enumerate(layers) if layer in set(self._lm.layers)]
            self._modules = dict(model.named_modules())
            self._expected = dict(model.state_dict())
            for name in self._expected:
                path, _, leaf = name.rpartition(".")
                self._places[name] = (self._modules[path], leaf)
            self._shared = self._shared_by_layers(model)
            self._model = model
            self._hollow = list(model.parameters())
        return self._model

    @property
    def in_use(self) -> bool:
        """Whether the skeleton was given weights or adapters."""
        now = list(self.model.parameters())
        return len(now) != len(self._hollow) or any(a is not b for a, b in zip(now, self._hollow, strict=True))

    def apart(self) -> TransformersAdapter:
        """This model once more, without weights and to be changed; a copy of the skeleton unless that is in use."""
        if self.in_use:
            other = TransformersAdapter(self.config)
            other.configure(self.dtype, self._attn)
            return other
        memo: dict[int, Any] = {id(tensor): tensor for tensor in (*self._hollow, *self._expected.values())}
        memo[id(self._map)] = None
        return copy.deepcopy(self, memo)

    def causal_lm(self) -> TransformersCausalLM:
        """The whole model, its layers ready to be driven."""
        self._build()
        return self._lm

    @property
    def hidden_size(self) -> int:
        size: int = self.config.get_text_config().hidden_size
        return size

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return len(self.causal_lm().layers)

    @property
    def left_out(self) -> dict[str, nn.Module]:
        """Towers of a composite model, which rows of text do not reach, by path; their tensors are not read."""
        return self.causal_lm().left_out

    # -- where tensors go ------------------------------------------------------------------------

    def checkpoint_map(self, gbi: GlobalBinaryIndex) -> CheckpointMap:
        """Sources of every parameter in this index; see `map_checkpoint` for what it raises."""
        if self._map is None or self._map[0] is not gbi:
            coded = coded_tensors(self.config.to_dict(), gbi)
            self._map = (gbi, map_checkpoint(self.model, self._expected, gbi, self.dtype, coded, self.left_out))
            refuse_codes(self._map[1].sources.values(), gbi.path)
        return self._map[1]

    def _unit_names(self, unit: int) -> list[str]:
        prefix = f"{self._unit_paths[unit]}."
        return [name for name in self._expected if name.startswith(prefix) and name not in self._shared]

    def _rest_names(self) -> list[str]:
        layers = self._in_layers()
        return [name for name in self._expected if not name.startswith(layers) or name in self._shared]

    def _in_layers(self) -> tuple[str, ...]:
        return tuple(f"{path}." for path in self._unit_paths)

    def _shared_by_layers(self, model: PreTrainedModel) -> frozenset[str]:
        """Parameters that more than one layer has, as Zamba's blocks are: they stay, for no slot is theirs alone."""
        tied = (name for pair in model.all_tied_weights_keys.items() for name in pair)
        return frozenset(name for name in tied if name.startswith(self._in_layers()))

    def unit_sources(self, gbi: GlobalBinaryIndex) -> list[list[ParameterSource]]:
        """Sources of each layer's parameters."""
        sources = self.checkpoint_map(gbi).sources
        return [
            [sources[name] for name in self._unit_names(unit) if self._is_parameter(name)]
            for unit in range(self.num_layers)
        ]

    def placed_sources(self, gbi: GlobalBinaryIndex) -> list[tuple[nn.Module, str, ParameterSource]]:
        """Module, name in it, and source of everything that the files hold."""
        return [(*self._places[name], source) for name, source in self.checkpoint_map(gbi).sources.items()]

    def rest_sources(self, gbi: GlobalBinaryIndex) -> list[ParameterSource]:
        """Sources of what stays: everything outside the layers, and persistent buffers inside them."""
        found = self.checkpoint_map(gbi)
        around = frozenset(self._rest_names())
        stays = [name for name in self._expected if name in around or not self._is_parameter(name)]
        left_out = {*self._ties(), self._streamed_head}
        return [found.sources[name] for name in stays if name not in left_out]

    def _ties(self) -> dict[str, str]:
        """Names that are one tensor; a streamed head is a tensor of its own."""
        assert self._map is not None
        return {a: b for a, b in self._map[1].tied.items() if self._streamed_head not in (a, b)}

    def head_source(self, gbi: GlobalBinaryIndex) -> ParameterSource | None:
        """The output embedding's weight, if it is a plain linear layer stored in the compute type."""
        name = self._head_name()
        source = self.checkpoint_map(gbi).sources[name] if name is not None else None
        return source if source is not None and source.plain else None

    def bind_head(self, view: torch.Tensor) -> None:
        """Make the head's weight of this tensor, apart from the embedding."""
        self._streamed_head = self._head_name()
        assert self._streamed_head is not None
        self._bind(self._streamed_head, view)

    def _head_name(self) -> str | None:
        head = self.model.get_output_embeddings()
        found = [n for n, (module, leaf) in self._places.items() if module is head and leaf == "weight"]
        return found[0] if found and type(head) is nn.Linear else None

    def gathered_by_rows(self) -> frozenset[str]:
        """The tables of tokens, but not one that is the head as well."""
        tied = self._ties()
        return frozenset(name for name in self._tables() if name not in tied and name not in tied.values())

    def _tables(self) -> list[str]:
        """The input embedding's weight, and those of embeddings of its kind that are larger still, as Gemma's of all
        layers; another kind, as OPT's of positions, may look up other rows than it is asked for."""
        embedding = self.model.get_input_embeddings()
        sizes = {
            name: self._expected[name].nbytes
            for name in self._rest_names()
            if type(self._places[name][0]) is type(embedding) and self._is_parameter(name)
        }
        own = sum(nbytes for name, nbytes in sizes.items() if self._places[name][0] is embedding)
        return [name for name, nbytes in sizes.items() if nbytes > own or self._places[name][0] is embedding]

    def _is_parameter(self, name: str) -> bool:
        module, leaf = self._places[name]
        return leaf in module._parameters

    def bind_unit(self, unit: int, views: Mapping[str, torch.Tensor], flat: torch.Tensor | None) -> None:
        """Make the layer's parameters of these tensors."""
        for name, view in views.items():
            self._bind(name, view)

    def bound_tensors(self, unit: int) -> list[torch.Tensor]:
        """The layer's parameters as they are now."""
        places = [self._places[name] for name in self._unit_names(unit) if self._is_parameter(name)]
        return [parameter for module, leaf in places if (parameter := module._parameters[leaf]) is not None]

    def bind_rest(self, views: Mapping[str, torch.Tensor], device: torch.device) -> None:
        """Make everything that stays of these tensors; tied names get the same parameter."""
        assert self._map is not None
        self._lm.interceptor.take_off("embedding")
        for part in self.model.modules():
            for name, buffer in part._buffers.items():
                part._buffers[name] = None if buffer is None else buffer.to(device)
        for name, view in views.items():
            module, _ = self._places[name]
            source = self._map[1].sources[name]
            if name in self.gathered_by_rows() and (view.dtype, view.device) != (source.dtype, device):
                assert isinstance(module, nn.Embedding)
                self._bind(name, torch.zeros((), dtype=source.dtype, device=device).expand(source.shape))
                rows = gathered_rows(module, view, source.dtype, device, self._lm.host_values)
                self._lm.interceptor.replace("embedding", module, "forward", rows)
            else:
                self._bind(name, view)
        for name, partner in self._ties().items():
            module, leaf = self._places[name]
            partner_module, partner_leaf = self._places[partner]
            module._parameters[leaf] = partner_module._parameters[partner_leaf]

    def _bind(self, name: str, tensor: torch.Tensor) -> None:
        module, leaf = self._places[name]
        if leaf in module._parameters:
            module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
        else:
            module._buffers[leaf] = tensor

    # -- sizes -----------------------------------------------------------------------------------

    def unit_tensors(self) -> list[list[torch.Tensor]]:
        """Each layer's parameters as the skeleton has them."""
        count = self.num_layers
        return [
            [self._expected[name] for name in self._unit_names(unit) if self._is_parameter(name)]
            for unit in range(count)
        ]

    def around(self) -> tuple[int, int, int]:
        """Bytes of the head, of tables of tokens that are not the head as well, and of all else that stays."""
        head_name = self._head_name()
        tied = frozenset(self.model.all_tied_weights_keys)
        shared = tied.union(self.model.all_tied_weights_keys.values())
        head = self._expected[head_name].nbytes if head_name is not None else 0
        tables = self._tables()
        rows = sum(self._expected[name].nbytes for name in tables if head_name is None or name not in shared)
        left_out = {*tied, *tables, head_name}
        names = [name for name in self._rest_names() if self._is_parameter(name) and name not in left_out]
        total = sum(self._expected[name].nbytes for name in names)
        return head, rows, total

    # -- a layer alone ---------------------------------------------------------------------------

    def get_layer_metadata(self) -> list[dict[str, Any]]:
        """Embedding 0, blocks 1..n, head n + 1."""
        count = self.num_layers
        blocks = [
            {"id": i + 1, "name": path, "type": "block", "block_index": i} for i, path in enumerate(self._unit_paths)
        ]
        return [
            {"id": 0, "name": "embedding", "type": "embedding"},
            *blocks,
            {"id": count + 1, "name": "head", "type": "head"},
        ]

    def get_param_names_for_layer(self, layer_id: int) -> list[str]:
        """Names of a layer's parameters as transformers saves them; ids outside 0..n+1 are an `IndexError`."""
        count = self.num_layers
        if 1 <= layer_id <= count:
            return [name for name in self._unit_names(layer_id - 1) if self._is_parameter(name)]
        if layer_id not in (0, count + 1):
            raise IndexError(f"layer id {layer_id} is outside 0..{count + 1}")
        before, after = split_rest(self.causal_lm(), self._rest_names(), self._places)
        return before if layer_id == 0 else after

    def construct_layer_module(
        self, layer_id: int, flat_buffer: torch.Tensor | None = None, lora_manager: LoRAManager | None = None
    ) -> nn.Module:
        """A copy of the layer over the bytes given; its LoRA parameters are the manager's own, shared by all copies.

        Embedding and head are the model's own forward up to the first layer and after the last.
        """
        if lora_manager is not None:
            lora_manager.attach(self)
        names = self.get_param_names_for_layer(layer_id)
        block = 1 <= layer_id <= self.num_layers
        original: nn.Module = self.causal_lm().layers[layer_id - 1] if block else self.model
        memo: dict[int, Any] = {id(p): p for n, p in original.named_parameters() if "lora_" in n}
        module = _copied(original, memo)
        if flat_buffer is not None:
            places = [self._places[name] for name in names]
            bind_flat_buffer([(memo[id(owner)], leaf) for owner, leaf in places], flat_buffer)
        if block:
            module.__dict__["lema_unit"] = layer_id - 1
            return module
        layers = memo[id(self.causal_lm().layers)]
        stage = EmbeddingStage if layer_id == 0 else HeadStage
        return stage(module, layers, self.causal_lm())

    def forward_layer(self, module: nn.Module, inputs: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Run a constructed layer. Masks and positions of a block are made by the model's own forward."""
        if isinstance(module, EmbeddingStage | HeadStage):
            output: torch.Tensor = module(inputs, **kwargs)
            return output
        unit = module.__dict__["lema_unit"]
        args, named = layer_arguments(self.causal_lm(), unit, inputs.shape[:2], **kwargs)
        result = module(inputs, *args[1:], **named)
        return result[0] if isinstance(result, tuple) else result

    def release_layer_module(self, module: nn.Module) -> None:
        """Drop the module's hold on its bytes; its LoRA parameters live on in the manager."""
        for part in module.modules():
            for name, parameter in part._parameters.items():
                if parameter is not None and "lora_" not in name and not parameter.requires_grad:
                    part._parameters[name] = nn.Parameter(
                        torch.zeros((), dtype=parameter.dtype).expand(parameter.shape), requires_grad=False
                    )


def _copied(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A deep copy without the engine's replaced forwards, whose closures must not be copied."""
    for part in module.modules():
        forward = part.__dict__.get("forward")
        if forward is not None and not isinstance(forward, Gate):
            raise UnsupportedError("construct layers alone before the model is driven by a trainer, not after")
    return copy.deepcopy(module, memo)
