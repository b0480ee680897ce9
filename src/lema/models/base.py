"""`LemaModelAdapter`: what LEMA has to know of a model family, and the defaults for a family of one's own.

It knows layers by number and their tensors by name; it knows nothing of slots, sweeps or training.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..errors import MissingTensorError, UnsupportedError
from ..storage.index import GlobalBinaryIndex
from ..storage.layout import ParameterSource, whole_tensor
from .causal_lm import CausalLM, ComposedCausalLM
from .lora import LoRAManager


class LemaModelAdapter(ABC):
    """A model family as an embedding, a list of blocks and a head.

    Subclass it and implement the abstract methods to train a model that transformers does not know;
    `register_adapter` makes it known by name. A family of transformers needs no adapter of its own.

    Layer ids run from 0 (embedding) over 1..n (blocks) to n + 1 (head).
    """

    packs_units = True
    """Whether `construct_layer_module` wants a layer's tensors back to back in one flat buffer."""
    default_target_modules: tuple[str, ...] | None = None
    """LoRA targets used in place of the configuration's default list; None: that list."""

    dtype: torch.dtype = torch.float32
    """Floating parameters are computed in this type."""
    _composed: ComposedCausalLM | None = None

    @abstractmethod
    def get_layer_metadata(self) -> list[dict[str, Any]]:
        """One dict a layer: `id`, `name`, `type` ('embedding', 'block' or 'head'); blocks have `block_index`."""

    @abstractmethod
    def get_param_names_for_layer(self, layer_id: int) -> list[str]:
        """Names of the layer's tensors in the weight files, in the order they fill the layer's module."""

    @abstractmethod
    def construct_layer_module(
        self, layer_id: int, flat_buffer: torch.Tensor | None = None, lora_manager: LoRAManager | None = None
    ) -> nn.Module:
        """A module that runs the layer.

        Args:
            layer_id: 0..n+1.
            flat_buffer: the layer's weights back to back, one-dimensional, in the order of
                `get_param_names_for_layer`; parameters become views of it and its owner may overwrite the
                bytes between uses. None: parameters without usable values.
            lora_manager: gives the layer its LoRA parameters, made on first use.
        """

    @abstractmethod
    def forward_layer(self, module: nn.Module, inputs: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Run one layer.

        Args:
            module: made by `construct_layer_module`.
            inputs: ids `[batch, seq]` for the embedding, else hidden states `[batch, seq, hidden]`.
            **kwargs: `attention_mask` and `position_ids`, each `[batch, seq]`, or absent.

        Returns:
            Hidden states `[batch, seq, hidden]`, or logits `[batch, seq, vocab]` of the head.
        """

    @abstractmethod
    def release_layer_module(self, module: nn.Module) -> None:
        """The module is not needed any more."""

    @property
    @abstractmethod
    def hidden_size(self) -> int:
        """Width of the hidden states."""

    # -- what the engine asks, built on the above ------------------------------------------------

    def configure(self, dtype: torch.dtype, attn_implementation: str | None = None) -> None:
        """Set the compute type, and the attention implementation where the family has a choice."""
        self.dtype = dtype

    def causal_lm(self) -> CausalLM:
        """The whole model, its layers ready to be driven. Needs bound weights."""
        if self._composed is None:
            self._composed = ComposedCausalLM(self, len(self._ids("block")))
        return self._composed

    def unit_sources(self, gbi: GlobalBinaryIndex) -> list[list[ParameterSource]]:
        """Parameter sources of every block, in order."""
        return [self._sources(gbi, layer_id) for layer_id in self._ids("block")]

    def rest_sources(self, gbi: GlobalBinaryIndex) -> list[ParameterSource]:
        """Parameter sources of embedding and head."""
        return [source for layer_id in self._rest_ids() for source in self._sources(gbi, layer_id)]

    def gathered_by_rows(self) -> frozenset[str]:
        """Nothing: the adapter's own modules read their weights as they please."""
        return frozenset()

    def bind_unit(self, unit: int, views: Mapping[str, torch.Tensor], flat: torch.Tensor | None) -> None:
        """Construct the block over its flat buffer."""
        composed = self.causal_lm()
        assert isinstance(composed, ComposedCausalLM)
        composed.layers[unit].module = self.construct_layer_module(self._ids("block")[unit], flat)

    def bound_tensors(self, unit: int) -> list[torch.Tensor]:
        """The block's base parameters as they are now."""
        composed = self.causal_lm()
        assert isinstance(composed, ComposedCausalLM)
        module: nn.Module = composed.layers[unit].module
        return [p for name, p in module.named_parameters() if "lora_" not in name]

    def head_source(self, gbi: GlobalBinaryIndex) -> ParameterSource | None:
        """None: the adapter's own head stays."""
        return None

    def bind_head(self, view: torch.Tensor) -> None:
        """Never called, as `head_source` gives none."""
        raise UnsupportedError(f"{type(self).__name__} has no head that can be streamed")

    def bind_rest(self, views: Mapping[str, torch.Tensor], device: torch.device) -> None:
        """Construct embedding and head over copies of their weights."""
        composed = self.causal_lm()
        assert isinstance(composed, ComposedCausalLM)
        embedding, head = self._rest_ids()
        composed.embedding = self.construct_layer_module(embedding, self._flat(embedding, views))
        composed.head = self.construct_layer_module(head, self._flat(head, views))
        for parameter in (*composed.embedding.parameters(), *composed.head.parameters()):
            parameter.requires_grad_(False)

    def _ids(self, kind: str) -> list[int]:
        return [layer["id"] for layer in self.get_layer_metadata() if layer["type"] == kind]

    def _rest_ids(self) -> tuple[int, int]:
        return self._ids("embedding")[0], self._ids("head")[0]

    def _sources(self, gbi: GlobalBinaryIndex, layer_id: int) -> list[ParameterSource]:
        names = self.get_param_names_for_layer(layer_id)
        if missing := [name for name in names if name not in gbi]:
            raise MissingTensorError(f"{gbi.path} lacks tensors of layer {layer_id}: {', '.join(missing)}")
        records = [gbi.record(name) for name in names]
        return [whole_tensor(r.name, r, self.dtype if r.dtype.is_floating_point else None) for r in records]

    def _flat(self, layer_id: int, views: Mapping[str, torch.Tensor]) -> torch.Tensor:
        parts = [views[name].reshape(-1).view(torch.uint8) for name in self.get_param_names_for_layer(layer_id)]
        return torch.cat(parts)


def bind_flat_buffer(tensors: Sequence[tuple[nn.Module, str]], flat_buffer: torch.Tensor) -> None:
    """Make parameters views of a flat buffer, one after the other.

    Args:
        tensors: (module, parameter name) in the order of the buffer; each parameter has its final shape and type.
        flat_buffer: one-dimensional and contiguous, of any type; only its bytes count.

    Raises:
        ValueError: the buffer is too short, or an offset does not fit a parameter's type.
    """
    from ..storage.views import typed_view

    buffer = flat_buffer.detach().view(torch.uint8) if flat_buffer.dtype != torch.uint8 else flat_buffer
    offset = 0
    for module, name in tensors:
        empty = module._parameters.get(name)
        like = empty if empty is not None else module._buffers[name]
        assert like is not None
        end = offset + like.numel() * like.dtype.itemsize
        if end > buffer.numel() or (buffer.storage_offset() + offset) % like.dtype.itemsize:
            raise ValueError(
                f"flat_buffer of {buffer.numel()} bytes does not hold parameter {name!r} {list(like.shape)} "
                f"({like.dtype}) at bytes {offset}..{end}"
            )
        view = typed_view(buffer, offset, like.dtype, like.shape)
        if empty is not None:
            module._parameters[name] = nn.Parameter(view, requires_grad=False)
        else:
            module._buffers[name] = view
        offset = end
