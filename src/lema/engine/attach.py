"""Attaches a model to its weights: lays them out as a plan says, and lets its layers wait for them.

It knows a model's parts, a plan and the store; it knows nothing of losses, optimizers or text.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from ..config import LemaConfig
from ..errors import PlanError, StreamingError, UnsupportedError, WeightsNotFoundError
from ..machine.heap import HeapGuard, give_back_idle_heap, resident_bytes
from ..models.base import LemaModelAdapter
from ..models.causal_lm import CausalLM
from ..models.trained import Trained
from ..planning.plan import MemoryPlan
from ..planning.policy import plan_for, with_steps
from ..storage.index import GlobalBinaryIndex
from ..streaming.accelerator import AcceleratorBackend
from ..streaming.arguments import BatchRules
from ..streaming.draws import Draws
from ..streaming.layer_call import Batching
from ..streaming.recompute import StreamedLayer
from ..streaming.schedule import AccessSchedule
from ..streaming.weight_store import WeightStore
from .assembly import StoredModel, compute_dtype
from .device_memory import explained
from .guards import guard, guard_peft
from .joining import Joining
from .loss.streamed_head import streamed_forward
from .outlook import Outlook
from .trial import fault_of_training, kinds_of

logger = logging.getLogger(__name__)

_REFUSED_OUTPUTS = {
    "output_attentions": "attention weights",
    "output_router_logits": "router logits and their auxiliary loss",
}
_NAMES = ("decoder", "layers", "head", "epilogue", "sweeps", "guards", "adapters")


def attach(
    model: StoredModel, plan: MemoryPlan, device: str | None = None, *, num_readers: int = 2,
    prefetch_depth: int | None = None, floor: int | None = None, leave_out_router_loss: bool = False,
) -> Attachment:  # fmt: skip
    """Lay a model's weights out as a plan says, and let its layers wait for them.

    Afterwards the model is called, given adapters, trained and generated with like any other, by whatever trainer: its
    own forward calls its layers, and each call of the whole model tells the store which accesses to expect.

    Args:
        model: its compute type and attention are set.
        plan: made for it, and held against it.
        device: one of the plan's kind, as 'cuda:1'; None: the current one.
        num_readers, prefetch_depth, floor: as `WeightStore` takes them.
        leave_out_router_loss: see `Attachment`.

    Raises:
        PlanError: the plan is for another model or device.
        WeightsError, UnsupportedError: the files do not hold the model.
        DeviceMemoryError: the device has no room for it.
    """
    if model.gbi is None:
        raise WeightsNotFoundError(f"the weights of this {type(model.adapter).__name__} are not on this machine")
    place = device or plan.device
    if (kind := place.partition(":")[0]) != plan.device:
        raise PlanError(f"device={plan.device!r}, and this model computes on {kind!r}: make a plan for that device")
    backend = None if kind == "cpu" else AcceleratorBackend(place)
    with explained(place, plan):
        store = WeightStore(
            model.gbi, model.adapter, plan, place, num_readers=num_readers, prefetch_depth=prefetch_depth,
            backend=backend, floor=floor,
        )  # fmt: skip
    return Attachment(model.adapter, store, leave_out_router_loss)


def attach_parts(
    config: LemaConfig, adapter: LemaModelAdapter, gbi: GlobalBinaryIndex, store: WeightStore | None = None
) -> Attachment:
    """Attach parts that were put together by hand, by settings.

    Args:
        store: where the weights lie already; what its plan leaves open of a step, the settings say.
    """
    if store is not None:
        store.plan = with_steps(store.plan, config)
        return Attachment(adapter, store, config.leave_out_router_loss)
    floor = resident_bytes()  # making a plan leaves something behind, which the plan counts as overhead
    adapter.configure(compute_dtype(config), config.attn_implementation)
    model = StoredModel(adapter, gbi)
    plan = plan_for(Outlook(config, model))
    return attach(
        model, plan, config.device, num_readers=config.num_readers, prefetch_depth=config.prefetch_depth, floor=floor,
        leave_out_router_loss=config.leave_out_router_loss,
    )  # fmt: skip


class Attachment:
    """A model whose layers wait for their weights. `attach` makes it.

    Everything that is put in place of the model's own lies with its interceptor, under one name a part: the forwards of
    the layers, of the head where it streams and of the decoder; hooks of the whole model; what keeps weights that are
    not there from being cast, merged or saved. What an earlier attachment put there comes off first.

    Args:
        adapter: the model.
        memory: where its weights lie, by the plan that has the say here as well.
        leave_out_router_loss: train a mixture without the auxiliary loss that its configuration adds.
    """

    def __init__(self, adapter: LemaModelAdapter, memory: WeightStore, leave_out_router_loss: bool = False) -> None:
        lm = adapter.causal_lm()
        lm.interceptor.take_off(*_NAMES)
        if leave_out_router_loss:
            lm.router_loss = None
        self.adapter = adapter
        self.lm = lm
        self.memory = memory
        self.fault = ""
        """Why this model is not to be trained, though it can be asked; empty if it may be. Known with its adapters."""
        self._tried: nn.Module | None = None
        self._trying = False
        plan = memory.plan
        self.batching = Batching(None if plan.whole_batch else plan.micro_batch_size, lambda: BatchRules.learn(lm))
        self.heap = HeapGuard(memory.heap_limit, plan.keeps_idle_heap)
        self.draws = Draws(lm.layers)
        self.layers = [
            StreamedLayer(unit, layer, memory, self.batching, self.heap, self.draws)
            for unit, layer in enumerate(lm.layers)
        ]
        for unit in plan.keep_activations:
            self.layers[unit].keeps_graph = True
        self._closed = False
        self._told = False
        self._put_in_place()
        self.guard()

    def _put_in_place(self) -> None:
        lm, own = self.lm, self.lm.interceptor
        for streamed, layer in zip(self.layers, lm.layers, strict=True):
            own.replace("layers", layer, "forward", streamed)
        if lm.head is not None and (forward := streamed_forward(lm.head, self.memory)) is not None:
            own.replace("head", lm.head, "forward", forward)
        own.replace("sweeps", lm.module, "forward", self._given_back(lm.module.forward))
        own.hook("sweeps", lm.module.register_forward_pre_hook(self._begin, with_kwargs=True))
        own.hook("sweeps", lm.module.register_forward_hook(self._end))
        own.hook("sweeps", lm.module.register_forward_hook(self._give_turn, always_call=True))

    def give(self, trained: Trained) -> nn.Module:
        """Give the model what is trained, once, and guard that as well.

        Returns:
            The module to call, whose mode is switched: PEFT's around transformers', or the bare one.
        """
        model = trained.attach(self.adapter)
        if model is not self.lm.module:
            self.guard(model)
        return model

    def guard(self, peft_model: nn.Module | None = None) -> None:
        """Keep weights from being cast, merged and saved. Adapters that come later are seen when they do.

        Args:
            peft_model: PEFT's model around it, if it was there before.
        """
        self.lm.interceptor.take_off("guards", "adapters")
        guard(self.lm, self.memory)
        tuner: BaseTuner | None = None
        if isinstance(peft_model, PeftModel) and isinstance(peft_model.base_model, BaseTuner):
            tuner = peft_model.base_model
            guard_peft(self.lm.interceptor, peft_model, tuner)
        self.joining = Joining(self.lm, self.memory, tuner)
        """Told of adapters that are put into the model."""
        if peft_model is not None:
            self._try(peft_model)

    def _try(self, peft_model: nn.Module) -> None:
        """Find out, once, whether the model with its adapters would be trained rightly; no layer is accessed."""
        if self._tried is peft_model:
            return
        self._trying = True
        try:
            self.fault = fault_of_training(self.lm)
        finally:
            self._trying = False
        self._tried = peft_model

    def detach(self) -> None:
        """Leave the model as it was before `attach`; its weights are then wherever they happen to be.

        Raises:
            BindingError: somebody has replaced the same since; nothing was taken off.
        """
        self.lm.interceptor.take_off(*_NAMES)
        self.heap.close()

    def close(self) -> None:
        """End the reading threads and give the files back; the model cannot be called any more."""
        self._closed = True
        self.memory.close()
        self.memory.gbi.close()
        self.heap.close()

    def prepare(self) -> None:
        """Learn how to cut the arguments of layers where they may be cut: no forward runs inside another."""
        if self.batching.micro_batch_size is not None:
            _ = self.batching.rules

    def trim(self) -> None:
        """Between two phases of a step, memory of the last one goes back to the system where memory is short."""
        if self.memory.heap_limit is not None:
            self.heap.relieve()
        elif self.memory.streamed:
            give_back_idle_heap()

    def lowest_trainable(self) -> int:
        """The deepest layer a gradient has to reach; the number of layers if there is none."""
        find = getattr(self.lm.module, "get_input_embeddings", None)
        if find is not None and any(parameter.requires_grad for parameter in find().parameters()):
            return 0
        return next((s.unit for s in self.layers if s.trainables()), len(self.layers))

    def _lay_out_head(self) -> None:
        """For TRL's forward that reads the head's weight past its module; `UnsupportedError` where that streams."""
        if self.memory.plan.head in ("streamed", "chunked"):
            raise UnsupportedError(
                f"TRL reads the weight of the head itself (fused_lm_head), which is not there while the head is "
                f"{self.memory.plan.head}; open the model with lema.from_pretrained, whose head stays, or set "
                "head='resident'"
            )
        if self.memory.plan.head == "resident":  # it is read when it is first used
            with self.memory.use(self.memory.head_unit):
                pass

    def _tell_of_unused(self) -> None:
        """Say once, when there has been a backward, to which adapters of layers no gradient leads."""
        if self._told or all(layer.unused is None for layer in self.layers):
            return
        self._told = True
        without = {id(p) for layer in self.layers for p in (layer.unused or {}).values()}
        inside = {id(p) for layer in self.layers for p in layer.trainables()}
        named = [(n, id(p)) for n, p in self.lm.module.named_parameters() if id(p) in inside] if without else []
        if unused := kinds_of(n for n, p in named if p in without) - kinds_of(n for n, p in named if p not in without):
            logger.warning(
                "no gradient leads to %s: adapters there learn nothing, as with transformers + PEFT; leave them out "
                "with exclude_modules", ", ".join(sorted(unused)),
            )  # fmt: skip

    def _begin(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if self._trying:
            return args, kwargs
        self.memory.turn.take("the model")
        if self._closed:
            raise StreamingError(
                f"this {type(module).__name__} was closed, and its weights are not there: open it anew"
            )
        self.joining.let_go()
        _refuse_outputs(getattr(module, "config", None), kwargs)
        if kwargs.get("fused_lm_head"):
            self._lay_out_head()
        if kwargs.get("labels") is not None and kwargs.get("output_router_logits") is None:
            check_router_loss(self.lm)
        self.memory.check_bindings()
        self.memory.gbi.check_unchanged()
        count = len(self.layers)
        lowest = self.lowest_trainable() if torch.is_grad_enabled() else count
        if lowest < count:
            self._tell_of_unused()
            kwargs.setdefault("use_cache", False)
            self.memory.predict(AccessSchedule.training(count, lowest))
            self.draws.begin(self.memory.compute_device)
        else:
            self.memory.predict(AccessSchedule.inference(count))
        return args, kwargs

    def _given_back(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """A forward that gives the turn back where Ctrl-C ends it: torch runs no hook for what is no `Exception`."""

        @functools.wraps(forward)
        def run(*args: Any, **kwargs: Any) -> Any:
            try:
                return forward(*args, **kwargs)
            except BaseException as ended:
                if not isinstance(ended, Exception):
                    self._give_turn()
                    if not self.memory.turn.held:  # else whoever holds it cleans up
                        self.memory.abort()
                raise

        return run

    def _end(self, *_: Any) -> None:
        if not self._trying:
            self.draws.end()

    def _give_turn(self, *_: Any) -> None:
        if not self._trying:
            self.memory.turn.give()


def _refuse_outputs(config: Any, kwargs: dict[str, Any]) -> None:
    for name, label in _REFUSED_OUTPUTS.items():
        if kwargs.get(name) or (kwargs.get(name) is None and getattr(config, name, False)):
            raise UnsupportedError(
                f"{name}=True asks for {label}, which are not right while layers are streamed; set it to False"
            )


def check_router_loss(lm: CausalLM) -> None:
    """Refuse to train a mixture whose configuration adds its routers' auxiliary loss, unless that is left out.

    Raises:
        UnsupportedError: says how to train without it.
    """
    router_loss = getattr(lm, "router_loss", None)
    if router_loss is not None:
        raise UnsupportedError(
            f"{type(lm.module).__name__}'s configuration adds the auxiliary loss of its routers ({router_loss}), which "
            "is not computed while layers are streamed. Set leave_out_router_loss: true to train without it"
        )
