"""LoRA adapters: PEFT's injection and PEFT's files, around a model whose base weights come and go.

It knows PEFT's configuration and adapter parameters; it knows nothing of layers' order, slots or training.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from ..compat.adapter_file import load_original
from ..errors import CheckpointError, ConfigError, UnsupportedError
from ..json_file import read_object
from ..typed import shortened
from .trained import HoldsModel, Trained

__all__ = ["LoRAManager"]

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_DEFAULT_TARGETS = ("c_attn", "c_proj", "c_fc")
_NAMES = {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout"}
_PASSED_ON = frozenset(
    ("r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
     "rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights", "fan_in_fan_out")
)  # fmt: skip
_REFUSED = {
    "use_dora": "DoRA",
    "modules_to_save": "modules_to_save",
    "target_parameters": "LoRA on bare parameters",
    "trainable_token_indices": "trainable tokens",
    "loftq_config": "LoftQ",
    "eva_config": "EVA",
    "corda_config": "CorDA",
    "lora_ga_config": "LoRA-GA",
}


_UNPREPARED = (RuntimeError, TypeError, ValueError, LookupError, AttributeError)
"""What code of a linear module of a family's own can raise on an input of a form it is not made for."""


class LoRAManager(Trained):
    """Owner of a model's LoRA parameters.

    Args:
        config: `r` (8), `alpha` (16), `target_modules` (c_attn, c_proj, c_fc; or 'all-linear'), `dropout` (0),
            and PEFT's own `exclude_modules`, `layers_to_transform`, `layers_pattern`, `rank_pattern`,
            `alpha_pattern`, `use_rslora`, `init_lora_weights` (True, False or 'gaussian').
        device: where the adapters live.
        seed: of the initial values; None: torch's global random state as it is.

    Raises:
        ConfigError: an unknown setting.
        UnsupportedError: a kind of adapter that would start from wrong values on a streamed base.
    """

    kind = "LoRA parameters"
    why_none = "the LoRAManager has no parameters"

    def __init__(self, config: Mapping[str, Any], device: str = "cuda", seed: int | None = None) -> None:
        values = {_NAMES.get(name, name): value for name, value in config.items()}
        for name, label in _REFUSED.items():
            if values.pop(name, None):
                raise UnsupportedError(f"{label} ({name}) is not supported on a streamed base; use plain LoRA")
        if unknown := sorted(set(values) - _PASSED_ON):
            close = difflib.get_close_matches(unknown[0], sorted(_PASSED_ON), n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(sorted(_PASSED_ON))}"
            raise ConfigError(f"unknown LoRA setting {unknown[0]!r}{hint}")
        start = values.get("init_lora_weights", True)
        if start not in (True, False, "gaussian"):
            raise UnsupportedError(
                f"init_lora_weights={start!r} starts from the base weights, which are not there when a streamed "
                "model is built; use True, False or 'gaussian'"
            )
        values.setdefault("r", 8)
        values.setdefault("lora_alpha", 16)
        targets = values.setdefault("target_modules", list(_DEFAULT_TARGETS))
        if not isinstance(targets, str):
            values["target_modules"] = list(targets)
        self.settings = values
        self.device = device
        self.seed = seed
        self._peft: PeftModel | None = None
        self._base: nn.Module | None = None
        self._layers: nn.ModuleList | None = None
        self._pending: Path | None = None

    @property
    def attached(self) -> bool:
        """Whether the adapters exist."""
        return self._peft is not None

    @property
    def peft_model(self) -> PeftModel:
        """PEFT's model around the base."""
        if self._peft is None:
            raise ConfigError("the LoRA parameters do not exist yet: attach the manager to a model first")
        return self._peft

    def attach(self, adapter: HoldsModel, empty: bool = False) -> PeftModel:
        """Inject LoRA into the adapter's model, once; further calls return what is there.

        Initial values are PEFT's own for the same random state. With `empty` the parameters have shapes and
        no memory, to be counted only.

        Raises:
            ConfigError: no module matches; those that could are listed.
            UnsupportedError: a match on head or embeddings.
        """
        lm = adapter.causal_lm()
        if self._peft is not None:
            if self._base is not lm.module:
                raise ConfigError("this LoRAManager belongs to another model already; make a new one")
            return self._peft
        base: nn.Module = lm.module
        self._base = base
        has_generation = hasattr(base, "prepare_inputs_for_generation")
        settings = {"fan_in_fan_out": stored_transposed(lm.layers), **self.settings}
        config = LoraConfig(task_type="CAUSAL_LM" if has_generation else None, **settings)
        with self._random_state():
            try:
                with peft_of_this_transformers():
                    if getattr(lm, "left_out", None):  # what is excluded may be gone
                        warnings.filterwarnings("ignore", "You have passed exclude_modules", UserWarning)
                    peft_model: Any = get_peft_model(base, config, low_cpu_mem_usage=empty)
            except ValueError as error:
                raise ConfigError(f"{error}\n{_candidates(lm.layers)}") from error
        self._refuse_outside(base, lm.layers)
        _refuse_unlike_linear(base)
        _keep_off(peft_model.peft_config["default"], getattr(lm, "left_out", {}))
        self._layers = lm.layers
        self._peft = peft_model
        if self._pending is not None:
            self.load_pretrained(self._pending)
        return self.peft_model

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Names within PEFT's model, and parameters."""
        return [(name, p) for name, p in self.peft_model.named_parameters() if p.requires_grad]

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Adapter tensors under the names PEFT's files use."""
        own: dict[str, Any] = {name: p.detach() for name, p in self.named_parameters()}
        result: dict[str, torch.Tensor] = get_peft_model_state_dict(self.peft_model, state_dict=own)
        return result

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write `adapter_config.json` and `adapter_model.safetensors` as PEFT does."""
        own = {name: p.detach() for name, p in self.named_parameters()}
        PeftModel.save_pretrained(self.peft_model, str(directory), state_dict=own, save_embedding_layers=False)

    def load_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Read an adapter saved by PEFT or by `save_pretrained`; before `attach` it is kept for then.

        Raises:
            FileNotFoundError: no adapter there.
            CheckpointError: rank, targets or shapes differ from this manager's, or the file cannot be read.
        """
        folder = Path(directory)
        for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder / name} does not exist: {folder} holds no PEFT adapter")
        if self._peft is None:
            self._pending = folder
            return
        self._pending = None
        try:
            saved = load_file(folder / ADAPTER_WEIGHTS)
        except (SafetensorError, OSError) as error:
            size = (folder / ADAPTER_WEIGHTS).stat().st_size
            raise CheckpointError(
                f"{folder / ADAPTER_WEIGHTS} ({size} bytes) cannot be read: {error}; use another checkpoint, "
                "or save the adapter again"
            ) from error
        own = self.state_dict()
        expected = {name: tuple(t.shape) for name, t in own.items()}
        found = {name: tuple(t.shape) for name, t in saved.items()}
        if expected != found:
            differ = sorted(n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n))
            first = differ[0]
            raise CheckpointError(
                f"{folder / ADAPTER_WEIGHTS} does not fit the adapter: {len(differ)} tensors differ, first {first!r} "
                f"(here {expected.get(first)}, in the file {found.get(first)}). Use the rank and targets it was "
                f"trained with, see {folder / ADAPTER_CONFIG}"
            )
        scale = read_object(folder / ADAPTER_CONFIG)
        for name, default in (("lora_alpha", None), ("use_rslora", False)):
            here, there = self.settings.get(name, default), scale.get(name, default)
            if there is not None and here != there:
                raise CheckpointError(
                    f"{folder / ADAPTER_CONFIG}: {name} is {there}, and here it is {here}, so the adapter would "
                    "count for more or less than it was trained to. Use the settings it was trained with"
                )
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(saved[name])

    def import_original(self, file: str | os.PathLike[str]) -> None:
        """Take over the weights of an adapter saved by the original LEMA (`adapter_model.bin`); see `load_original`."""
        load_original(file, dict(self.named_parameters()), self._layers_path())

    def _layers_path(self) -> str:
        return next(name for name, module in self.peft_model.named_modules() if module is self._layers)

    @staticmethod
    def settings_from(directory: str | os.PathLike[str]) -> dict[str, Any]:
        """Settings of a saved adapter, as this class takes them.

        Raises:
            FileNotFoundError: there is none.
            CheckpointError: its settings cannot be read, or r, lora_alpha or target_modules are missing.
        """
        path = Path(directory) / ADAPTER_CONFIG
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist: {directory} holds no PEFT adapter")
        values = read_object(path)
        if values.get("peft_type", "LORA") != "LORA":
            raise UnsupportedError(f"{path}: is a {values['peft_type']} adapter; only LoRA is understood")
        for name, kind in (("r", int), ("lora_alpha", (int, float)), ("target_modules", (list, str))):
            value = values.get(name)
            if not isinstance(value, kind) or isinstance(value, bool) or not value:
                said = "missing" if value is None else shortened(value)
                raise CheckpointError(
                    f"{path}: {name} is {said}; save the adapter again with PEFT, or set it to what it was trained with"
                )
        return {name: values[name] for name in (*_PASSED_ON, *_REFUSED) if values.get(name) not in (None, {}, [])}

    @contextlib.contextmanager
    def _random_state(self) -> Iterator[None]:
        if self.seed is None:
            yield
            return
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            yield

    def _refuse_outside(self, base: nn.Module, layers: nn.ModuleList) -> None:
        """Refuse head and embeddings; other linear modules around the layers stay and may be trained."""
        inside = {id(module) for module in layers.modules()}
        find_head: Any = getattr(base, "get_output_embeddings", None)
        head = find_head() if find_head is not None else None
        outside = [
            name
            for name, module in base.named_modules()
            if isinstance(module, BaseTunerLayer)
            and id(module) not in inside
            and (head is None or module is head or not isinstance(module.get_base_layer(), nn.Linear))
        ]
        if outside:
            raise UnsupportedError(
                f"LoRA on {', '.join(outside)} is not supported: head and embeddings are not trained. "
                "Leave them out of target_modules, or name them in exclude_modules"
            )


def _refuse_unlike_linear(base: nn.Module) -> None:
    """Refuse modules that are linear by name and compute something else, such as routers that return their choice as
    well: PEFT adds to one output, of the linear's shape."""
    adapted = ((n, module.get_base_layer()) for n, module in base.named_modules() if isinstance(module, BaseTunerLayer))
    own = {name: linear for name, linear in adapted if isinstance(linear, nn.Linear)}
    unlike = {
        name: type(linear).__name__
        for name, linear in own.items()
        if type(linear).forward is not nn.Linear.forward and not _is_like_linear(linear)
    }
    if unlike:
        name, kind = next(iter(unlike.items()))
        raise UnsupportedError(
            f"LoRA on {name} ({kind}) and {len(unlike) - 1} more is not possible: they do not return one output of a "
            f"linear module's shape, and PEFT fails on that. Leave them out: exclude_modules: "
            f"[{name.rpartition('.')[2]}]"
        )


def _is_like_linear(module: nn.Linear) -> bool:
    shapes = {name: t.to("meta") for name, t in (*module.named_parameters(), *module.named_buffers())}
    given = torch.empty(1, 2, module.in_features, dtype=module.weight.dtype, device="meta")
    with torch.no_grad():
        try:
            output = functional_call(module, shapes, (given,))
        except _UNPREPARED:
            return False
    return isinstance(output, torch.Tensor) and tuple(output.shape) == (1, 2, module.out_features)


def _keep_off(config: LoraConfig, left_out: Mapping[str, nn.Module]) -> None:
    """Name the targets of a model without its towers so that in the whole model they are the same modules.

    Where PEFT has made adapters on parameters of fused experts out of names, it takes a pattern apart into names, so
    there the towers are excluded.
    """
    towers = [re.escape(path) for path, tower in left_out.items() if _takes_any(config, path, tower)]
    targets = config.target_modules
    if not towers or targets is None:
        return
    if config.target_parameters is not None:
        own = [_as_pattern(config.exclude_modules)] if config.exclude_modules else []
        config.exclude_modules = "|".join([*own, rf"(?:{'|'.join(towers)})(?:\..*)?"])
    else:
        config.target_modules = rf"(?!(?:{'|'.join(towers)})(?:\.|$)){_as_pattern(targets)}"


def _as_pattern(names: str | Collection[str]) -> str:
    """Of whole paths, for names as PEFT compares them with the ends of paths."""
    if isinstance(names, str):
        return f"(?:{names})"
    return rf"(?:.*\.)?(?:{'|'.join(re.escape(name) for name in sorted(names))})"


def _takes_any(config: LoraConfig, path: str, tower: nn.Module) -> bool:
    names = (f"{path}.{name}" if name else path for name, module in tower.named_modules())
    return any(check_target_module_exists(config, name) for name in names)


@contextlib.contextmanager
def peft_of_this_transformers() -> Iterator[None]:
    """Around PEFT's building of a model: it asks for a property by a name that transformers deprecates."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def stored_transposed(layers: nn.Module) -> bool:
    """Whether all that can have LoRA is stored as [in, out]: it is GPT-2's Conv1D. PEFT calls it `fan_in_fan_out`."""
    kinds = {type(module) for module in layers.modules() if isinstance(module, nn.Linear | Conv1D)}
    return kinds == {Conv1D}


def _candidates(layers: nn.ModuleList) -> str:
    leaves: dict[str, None] = {}
    for name, module in layers.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            leaves.setdefault(name.rpartition(".")[2])
    return f"Modules of this model that can have LoRA: {', '.join(leaves) or 'none'}"
