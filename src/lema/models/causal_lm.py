"""A causal language model cut where training needs it cut: up to the hidden states, and the head alone.

It knows how to run the model's own forward in two halves; it knows nothing of where weights are.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast, ModelOutput

from ..errors import UnsupportedError
from .host_values import HostValues
from .interceptor import Forward, Interceptor
from .masks import padding_known
from .skeleton import stand_in_ids
from .towers import LeftOut, leave_out_unreached


class CausalLM(Protocol):
    """What the engine drives."""

    layers: Any
    """The decoder layers, in order of depth."""
    interceptor: Interceptor
    """Owner of what is put in place of the model's own."""
    router_loss: str | None
    """Entries of the configuration that ask for the routers' auxiliary loss, which is not computed."""

    @property
    def module(self) -> nn.Module:
        """The model itself; calling it runs a whole forward."""

    @property
    def head(self) -> nn.Module | None:
        """The output embedding, where it is a module of its own."""

    @property
    def returns_several(self) -> bool:
        """Whether layers return more than their hidden states, so that a layer may be given another's."""

    @property
    def vocab_size(self) -> int:
        """Size of the vocabulary."""

    @property
    def max_positions(self) -> int | None:
        """Longest sequence in tokens; None: no limit known."""

    def pass_on(self, hidden: torch.Tensor) -> Any:
        """Hidden states in the form the model expects a layer to return them."""

    def replaced_layers(self, forwards: Sequence[Forward]) -> contextlib.AbstractContextManager[None]:
        """Inside the block the layers' forwards are these, which may `pass_on` what they get."""

    def hidden_states(self, **inputs: Any) -> torch.Tensor:
        """Output of the decoder after its final norm, `[batch, seq, hidden]`.

        Args:
            **inputs: `input_ids` and any of `attention_mask` and `position_ids`, each `[batch, seq]`; and `on_host`,
                a mapping with the same of them as tensors of the host, where they are on a device.
        """

    def run_decoder(self, **inputs: Any) -> torch.Tensor:
        """As `hidden_states`, past the hooks of the whole model: no access of it is foreseen, and none may be made."""

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Head of the model with all it does to logits: `[.., n, hidden]` -> `[.., n, vocab]`."""

    def loss(self, logits: torch.Tensor, targets: torch.Tensor, denominator: float) -> torch.Tensor:
        """The model's loss, summed over targets that are not -100 and divided by `denominator`."""


_MOST_ITEMS = 4


def _output(hidden: torch.Tensor, items: int) -> Any:
    """Hidden states as a layer returns them: a tensor (0 items), or a tuple whose other items are empty."""
    return hidden if items == 0 else (hidden, *[None] * (items - 1))


class _Reached(BaseException):
    """Ends a forward at its first layer; not an error, so nothing on the way may take it for one."""


class TransformersCausalLM:
    """A transformers model driven in two halves by its own `forward`.

    There is a gate before the decoder's forward: for the first half it runs and hands on no rows, so the
    head does nothing; for the second half the rows it is given stand in for it. So whatever a family does
    between decoder and logits (soft caps, scales, slices) is done by the family's code.
    """

    def __init__(self, model: PreTrainedModel, layers: nn.ModuleList, router_loss: str | None = None) -> None:
        self._model = model
        self.layers: Any = layers
        self.router_loss = router_loss
        self.interceptor = Interceptor()
        self.host_values = HostValues()
        """What of a running forward's inputs is on the host."""
        self._output: type[ModelOutput] = BaseModelOutputWithPast
        self.left_out: dict[str, nn.Module] = {}
        """What rows of text do not reach, towers mostly, by path; it is no part of the model here."""

    @functools.cached_property
    def _decoder(self) -> nn.Module:
        """What is between the model's own forward and its layers: the outermost module that has these, has no head and
        is called (OPT's and composite models reach past one)."""
        models = [module for module in self._model.modules() if isinstance(module, PreTrainedModel)]
        heads = {id(head) for model in models if (head := model.get_output_embeddings()) is not None}
        around = [
            module
            for module in self._model.modules()
            if module is not self._model
            and any(part is self.layers[0] for part in module.modules())
            and heads.isdisjoint(map(id, module.modules()))
        ]
        called: list[nn.Module] = []
        handles = [module.register_forward_pre_hook(lambda m, _: called.append(m)) for module in around]

        def reached(*_: Any, **__: Any) -> Any:
            raise _Reached

        forwards = [reached] * len(self.layers)
        try:
            with self.interceptor.replaced(self.layers, forwards), torch.no_grad(), torch.random.fork_rng(devices=[]):
                self._model.forward(input_ids=stand_in_ids(self._model, 2, 3), use_cache=False)
        except _Reached:
            pass
        finally:
            for handle in handles:
                handle.remove()
        if not called:
            raise UnsupportedError(f"{type(self._model).__name__} does not call its decoder the way LEMA expects")
        return called[0]

    def leave_out_towers(self) -> None:
        """Take out what a row of text does not reach, before anything is bound or adapted."""

        def run() -> None:
            passing = [lambda hidden, *_, **__: self.pass_on(hidden)] * len(self.layers)
            with self.replaced_layers(passing), torch.no_grad(), torch.random.fork_rng(devices=[]):
                self._first_half(self._model.forward, input_ids=stand_in_ids(self._model, 2, 3))

        self.left_out = leave_out_unreached(self._model, self.layers, run)
        self.layers = nn.ModuleList(layer for layer in self.layers if not isinstance(layer, LeftOut))

    @property
    def module(self) -> PreTrainedModel:
        return self._model

    @property
    def head(self) -> nn.Module | None:
        head: nn.Module | None = self._model.get_output_embeddings()
        return head

    @property
    def vocab_size(self) -> int:
        size: int = self._model.config.get_text_config().vocab_size
        return size

    @property
    def max_positions(self) -> int | None:
        return getattr(self._model.config.get_text_config(), "max_position_embeddings", None)

    def pass_on(self, hidden: torch.Tensor) -> Any:
        return _output(hidden, self._items)

    @contextlib.contextmanager
    def replaced_layers(self, forwards: Sequence[Forward]) -> Iterator[None]:
        _ = self._items  # found out by the model's own forward, which is not to run inside of another
        with self.interceptor.replaced(self.layers, forwards):
            yield

    @property
    def returns_several(self) -> bool:
        """Whether layers return more than their hidden states, so that a layer may be given another's."""
        return self._items > 1

    @functools.cached_property
    def _items(self) -> int:
        """Items that a layer returns; 0: a bare tensor."""
        return next((items for items in range(_MOST_ITEMS + 1) if self._takes(items)), 1)

    def _takes(self, items: int) -> bool:
        """Whether layers return so many items; with one too few a dimension gets lost on the way, or it cannot be
        taken apart."""
        ids = stand_in_ids(self._model, 2, 3)
        passing = [lambda hidden, *_, **__: _output(hidden, items)] * len(self.layers)
        with self.interceptor.replaced(self.layers, passing), torch.no_grad(), torch.random.fork_rng(devices=[]):
            try:
                hidden = self._first_half(self._model.forward, input_ids=ids)
            except (AttributeError, LookupError, RuntimeError, TypeError, ValueError):
                return False
        return tuple(hidden.shape[:2]) == (2, 3)

    def hidden_states(self, on_host: Mapping[str, torch.Tensor] | None = None, **inputs: Any) -> torch.Tensor:
        known = on_host or {}
        with self.host_values.known({name: (inputs[name], value) for name, value in known.items()}):
            return self._first_half(self._model, known.get("attention_mask"), **inputs)

    def run_decoder(self, **inputs: Any) -> torch.Tensor:
        return self._first_half(self._model.forward, **inputs)

    def _first_half(
        self, forward: Callable[..., Any], host_mask: torch.Tensor | None = None, **inputs: Any
    ) -> torch.Tensor:
        gate = self.interceptor.gate("decoder", self._decoder)
        captured: list[Any] = []

        def first_half(*args: Any, **kwargs: Any) -> ModelOutput:
            output = gate.own(*args, **kwargs)
            captured.append(output)
            return type(output)(last_hidden_state=output.last_hidden_state.detach()[:, :0])

        with gate.taken_by(first_half), padding_known(host_mask):
            forward(**inputs, use_cache=False)
        if not captured:
            raise UnsupportedError(f"{type(self._model).__name__} does not call its decoder the way LEMA expects")
        self._output = type(captured[0])
        hidden: torch.Tensor = captured[0].last_hidden_state
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        rows = self._output(last_hidden_state=hidden)
        ids = stand_in_ids(self._model, *hidden.shape[:-1])  # Gemma 4 looks at their shape
        with self.interceptor.gate("decoder", self._decoder).taken_by(lambda *_, **__: rows):
            logits: torch.Tensor = self._model.forward(input_ids=ids, use_cache=False).logits
        return logits

    def loss(self, logits: torch.Tensor, targets: torch.Tensor, denominator: float) -> torch.Tensor:
        loss: torch.Tensor = self._model.loss_function(
            logits=logits,
            labels=None,
            shift_labels=targets,
            vocab_size=self.vocab_size,
            num_items_in_batch=denominator,
        )
        return loss


class RunsLayers(Protocol):
    """What a composed model asks of its adapter."""

    dtype: torch.dtype

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states."""

    def forward_layer(self, module: nn.Module, inputs: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Run one layer, as `LemaModelAdapter` says."""


class ComposedBlock(nn.Module):
    """One block of an adapter's own family."""

    module: nn.Module

    def __init__(self, adapter: RunsLayers) -> None:
        super().__init__()
        self._adapter: RunsLayers
        self.__dict__["_adapter"] = adapter  # not a submodule

    def forward(self, hidden: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """`[batch, seq, hidden]` -> the same shape."""
        return self._adapter.forward_layer(self.module, hidden, **kwargs)


class ComposedCausalLM(nn.Module):
    """Embedding, blocks and head of an adapter's own family, run one after the other."""

    embedding: nn.Module
    head: Any

    def __init__(self, adapter: RunsLayers, num_blocks: int) -> None:
        super().__init__()
        self._adapter: RunsLayers
        self.__dict__["_adapter"] = adapter  # not a submodule
        self.router_loss: str | None = None
        self.interceptor = Interceptor()
        self.layers: Any = nn.ModuleList(ComposedBlock(adapter) for _ in range(num_blocks))
        self._vocab_size: int | None = None
        self.returns_several = False

    @property
    def module(self) -> nn.Module:
        return self

    @property
    def vocab_size(self) -> int:
        if self._vocab_size is None:
            with torch.no_grad():
                self._vocab_size = self.logits(torch.zeros(1, 1, self._adapter.hidden_size)).shape[-1]
        return self._vocab_size

    @property
    def max_positions(self) -> int | None:
        return getattr(self._adapter, "max_positions", None)

    def pass_on(self, hidden: torch.Tensor) -> Any:
        return hidden

    def replaced_layers(self, forwards: Sequence[Forward]) -> contextlib.AbstractContextManager[None]:
        return self.interceptor.replaced(self.layers, forwards)

    def hidden_states(self, on_host: Mapping[str, torch.Tensor] | None = None, **inputs: Any) -> torch.Tensor:
        """Runs through `__call__`, so that hooks of the whole model see it."""
        hidden: torch.Tensor = self(**inputs, _head=False)
        return hidden

    def run_decoder(self, **inputs: Any) -> torch.Tensor:
        """Past the hooks."""
        hidden: torch.Tensor = self.forward(**inputs, _head=False)
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[.., n, hidden]` -> `[.., n, vocab]`."""
        return self._adapter.forward_layer(self.head, hidden.to(self._adapter.dtype))

    def loss(self, logits: torch.Tensor, targets: torch.Tensor, denominator: float) -> torch.Tensor:
        """Cross entropy summed over targets that are not -100, divided by `denominator`."""
        count: Any = denominator
        return ForCausalLMLoss(logits, None, logits.shape[-1], num_items_in_batch=count, shift_labels=targets)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool = False,
        _head: bool = True,
    ) -> Any:
        """Ids `[batch, seq]` -> an output with `logits` `[batch, seq, vocab]` and, with labels, `loss`."""
        given = {"attention_mask": attention_mask, "position_ids": position_ids}
        kwargs = {name: value for name, value in given.items() if value is not None}
        hidden = self._adapter.forward_layer(self.embedding, input_ids, **kwargs)
        for layer in self.layers:
            hidden = layer(hidden, **kwargs)
        if not _head:
            return hidden
        logits = self.logits(hidden)
        loss = None if labels is None else ForCausalLMLoss(logits, labels, logits.shape[-1])
        return CausalLMOutputWithPast(loss=loss, logits=logits)
