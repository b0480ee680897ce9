"""What PEFT and wrappers of data parallelism make of a streamed model, seen as it happens and held to what is right.

torch tells of every module that becomes part of another one; so adapters are seen whoever brings them, and when. It
knows PEFT's modules by their classes; it knows nothing of slots.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

from peft import PeftModel, PeftType
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ..errors import UnsupportedError
from ..models.causal_lm import CausalLM
from ..streaming.schedule import AccessSchedule
from ..streaming.weight_store import WeightStore
from .guards import guard_peft, refuse_merge

_WRAPPERS = (DataParallel, DistributedDataParallel)
_STARTS = (True, False, "gaussian", "orthogonal")


class Joining:
    """Told of every module that becomes part of another, while the model lives.

    Layout: `_units` has each module of a streamed layer, and each adapter layer that was put around one; `_added`
    the containers in which an adapter layer keeps the parameters of its adapters, by name.

    Mechanics: PEFT goes through a model in the order of its layers, and an adapter layer announces its new adapter
    before that is given its values. Where those depend on the base, as DoRA's do, the layer's weights are brought and
    held until another layer is asked for: one sweep.

    Args:
        lm: the model.
        memory: where its weights lie.
        tuner: PEFT's, if the model has adapters already.
    """

    def __init__(self, lm: CausalLM, memory: WeightStore, tuner: BaseTuner | None = None) -> None:
        self._lm = lm
        self._memory = memory
        self._units: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
        self._added: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
        for unit in memory.streamed:
            for module in lm.layers[unit].modules():
                self._units[module] = unit
                if issubclass(type(module), LoraLayer):
                    self._added[module.lora_A] = unit
        self._tuner = None if tuner is None else weakref.ref(tuner)
        self._held: int | None = None
        _listen(self)
        lm.interceptor.hook("guards", _Listening(self))

    def let_go(self) -> None:
        """Nothing begins from base weights any more; those that were held may go."""
        if self._held is not None:
            held, self._held = self._held, None
            self._memory.release(held)

    def hears(self, parent: nn.Module, name: str, part: nn.Module) -> None:
        """A module becomes part of another one."""
        if isinstance(parent, BaseTunerLayer):
            self._in_adapter_layer(parent, name, part)
        elif parent in self._added:
            self._begins(name, self._added[parent])
        elif isinstance(parent, BaseTuner):
            if part is self._lm.module:
                self._tuner = weakref.ref(parent)
        elif isinstance(parent, PeftModel):
            if isinstance(part, BaseTuner) and part.model is self._lm.module:
                guard_peft(self._lm.interceptor, parent, part)
        elif isinstance(parent, AuxiliaryTrainingWrapper):
            if name == "original_module" and self._is_of_model(part):
                raise UnsupportedError(
                    f"modules_to_save and trainable tokens train a copy of {type(part).__name__}, which is not "
                    "supported on a streamed model: leave them out of the adapter's configuration, or use LoRA there"
                )
        elif isinstance(parent, _WRAPPERS) and any(module is self._lm.module for module in part.modules()):
            raise UnsupportedError(
                f"{type(parent).__name__} copies weights between processes or devices, and those of a streamed model "
                "are in memory a few layers at a time: train it in one process on one device (CUDA_VISIBLE_DEVICES=0)"
            )

    def _is_of_model(self, part: nn.Module) -> bool:
        return part in self._units or any(module is part for module in self._lm.module.modules())

    def _in_adapter_layer(self, layer: nn.Module, name: str, part: nn.Module) -> None:
        if name == "base_layer" and isinstance(part, nn.Embedding) and self._is_of_model(part) and self._is_dora():
            raise UnsupportedError(
                "DoRA on embeddings starts from all their rows, of which a streamed model reads those that it needs: "
                "leave embeddings out of target_modules, or use LoRA without use_dora"
            )
        if name == "base_layer" and part in self._units:
            self._refuse_kinds()
            self._units[layer] = self._units[part]
            self._lm.interceptor.replace("guards", layer, "merge", refuse_merge)
        elif name == "lora_A" and layer in self._units:
            self._added[part] = self._units[layer]

    def _refuse_kinds(self) -> None:
        kinds = {config.peft_type for config in self._configs.values()} - {PeftType.LORA}
        if kinds:
            raise UnsupportedError(
                f"{', '.join(sorted(str(getattr(kind, 'value', kind)) for kind in kinds))} adapters are not supported "
                "on a streamed model, only LoRA with its variants: use peft.LoraConfig"
            )

    @property
    def _configs(self) -> dict[str, Any]:
        tuner = self._tuner() if self._tuner is not None else None
        return {} if tuner is None else tuner.peft_config

    def _is_dora(self) -> bool:
        return any(getattr(config, "use_dora", False) for config in self._configs.values())

    def _begins(self, adapter: str, unit: int) -> None:
        """An adapter is about to be given its first values."""
        config = self._configs.get(adapter)
        if config is None:
            return
        start = config.init_lora_weights
        if start not in _STARTS:
            raise UnsupportedError(
                f"init_lora_weights={start!r} changes the base weights it starts from, and those of a streamed model "
                f"stay as their files have them: use one of {', '.join(map(repr, _STARTS))}"
            )
        if config.use_dora and unit != self._held:
            self._hold(unit)

    def _hold(self, unit: int) -> None:
        if self._held is None:
            self._memory.predict(AccessSchedule.inference(len(self._lm.layers)))
        self.let_go()
        self._memory.acquire(unit)
        self._held = unit


_told: weakref.WeakSet[Joining] = weakref.WeakSet()
_registering = threading.Lock()
_registered = False


def _listen(joining: Joining) -> None:
    """Tell it of modules. torch is asked once and for good: it goes through its hooks while modules are made, and a
    model may be collected, and leave, in the midst of that."""
    global _registered
    with _registering:
        if not _registered:
            register_module_module_registration_hook(_tell)
            _registered = True
    _told.add(joining)


def _tell(parent: nn.Module, name: str, part: nn.Module | None) -> None:
    if part is not None:
        for joining in list(_told):
            joining.hears(parent, name, part)


class _Listening:
    """What an interceptor takes off to end it."""

    def __init__(self, joining: Joining) -> None:
        self._joining = weakref.ref(joining)

    def remove(self) -> None:
        if (joining := self._joining()) is not None:
            _told.discard(joining)
