"""A plan with all it was made from: settings and a machine, held against a model and its weights where they are.

It knows where models lie and what a machine has; what to keep where is the planning room's to say.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from ..config import LemaConfig
from ..engine.assembly import StoredModel, assemble_lora
from ..engine.outlook import Outlook
from ..errors import ConfigError, LemaError, WeightsNotFoundError
from ..machine.device import default_device
from ..machine.memory import format_bytes
from ..models.base import LemaModelAdapter
from ..models.locate import adapter_for, local_path, weights_path
from ..models.transformers_adapter import TransformersAdapter
from ..planning.hardware import Hardware
from ..planning.plan import MemoryPlan
from ..planning.policy import plan_for
from ..prepare.cached import cached_folder
from ..prepare.encoders import ENCODERS
from ..storage.index import GlobalBinaryIndex
from .found import Found, describe

_WEIGHTS = (".safetensors", ".gguf")


@dataclass(frozen=True)
class Planned:
    """A plan with all it was made from."""

    config: LemaConfig
    """Its budgets are as they were asked for."""
    plan: MemoryPlan
    """With bytes and seconds predicted for it, where the model can be looked into."""
    outlook: Outlook | None
    """What it was found from, for steps of other lengths under it; None: let go, as it is some megabytes."""
    hardware: Hardware
    stated: bool
    """The hardware was given, and is not this machine as measured."""
    ram_budget: int | None
    """Bytes; None: no limit."""
    vram_budget: int | None
    weights: bool
    """Sizes are those of the weight files; False: they follow from the model's configuration alone."""
    adapter: LemaModelAdapter
    """The model without its weights."""

    @property
    def found(self) -> Found:
        """What the model is found to be, and where its adapters go."""
        return describe(self.adapter, self.config)


def for_windows(config: LemaConfig) -> LemaConfig:
    """The settings to plan a run by, whose engine gets a whole accumulation window at once.

    Layers run `batch_size` rows at once as without accumulation; under a budget the plan decides.
    """
    on_cpu = torch.device(config.device).type == "cpu"
    budgeted = config.ram_budget is not None or (config.vram_budget is not None and not on_cpu)
    micro = config.micro_batch_size
    if micro is None and not budgeted and config.gradient_accumulation_steps > 1:
        micro = config.batch_size
    rows = config.batch_size * config.gradient_accumulation_steps
    return config.replace(batch_size=rows, gradient_accumulation_steps=1, micro_batch_size=micro)


def make(
    values: Mapping[str, Any], spec: str | None = None, probe: bool = False, to_run: bool = False
) -> Planned:  # fmt: skip
    """Plan for settings by name, on the machine a specification describes or on this one.

    Nothing is made for it: weights that `quantize` asks for and nobody has made yet count as they will be.

    Args:
        to_run: the weights have to be there, and are fetched if they are the hub's, so that the plan is one to run by.

    Raises:
        LemaError: settings, model, machine or budgets are not good, or nothing fits.
    """
    if str(values.get("device")).lower() == "auto":  # that of the machine meant
        values = {name: value for name, value in values.items() if name != "device"}
    config = LemaConfig.from_dict(values)
    machine = Hardware.parse(spec) if spec is not None else None
    if "device" not in values:
        config = config.replace(device=machine.device if machine is not None else default_device())
    elif machine is not None and config.device.partition(":")[0] != machine.device:
        raise ConfigError(f"device={config.device!r} is not what {machine.name} computes on: {machine.device}")
    with _opened(config, to_run) as model:
        outlook = Outlook(config, model, machine, probe)
        ram, vram = outlook.budgets
        machine = outlook.hardware
        _check_budget("ram_budget", ram, machine.ram_bytes, machine.name)
        _check_budget("vram_budget", vram, machine.vram_bytes, machine.name)
        plan = plan_for(outlook)
        if isinstance(model.adapter, TransformersAdapter):
            plan = outlook.counted(plan)
    return Planned(config, plan, outlook, machine, spec is not None, ram, vram, model.gbi is not None, model.adapter)


def _check_budget(name: str, budget: int | None, there: int, machine: str) -> None:
    if budget is not None and budget > there:
        raise ConfigError(f"{name} of {format_bytes(budget)} is more than the {format_bytes(there)} that {machine} has")


@contextlib.contextmanager
def _opened(config: LemaConfig, to_run: bool) -> Iterator[StoredModel]:
    """The model, and the index of its weights where they are on this machine, or have to be."""
    given = Path(config.model_name_or_path)
    if given.suffix == ".json" and not given.exists():
        raise WeightsNotFoundError(f"{given} does not exist: give a model's directory, its config.json or a hub id")
    if given.is_file() and given.name != "config.json" and given.suffix not in _WEIGHTS:
        raise ConfigError(f"{given} is neither a directory, a .safetensors or .gguf file nor a config.json")
    adapter = adapter_of(config)
    if config.quantize is not None:
        made = _quantised_already(config)
        if made is None:
            if isinstance(adapter, TransformersAdapter):
                adapter.config.quantization_config = ENCODERS[config.quantize].settings(adapter.dtype, ())
            yield StoredModel(adapter, None)
            return
        config = config.replace(gbi_path=str(made), quantize=None)
    where = weights_path(config) if to_run else Path(config.gbi_path or given)
    if to_run or config.gbi_path or where.suffix in _WEIGHTS or any(where.glob("*.safetensors")):
        with GlobalBinaryIndex(where) as gbi:
            yield StoredModel(adapter, gbi)
    else:
        yield StoredModel(adapter, None)


def _quantised_already(config: LemaConfig) -> Path | None:
    """The weights that `quantize` asks for, where an earlier run has made them of weights that are here."""
    source = Path(config.gbi_path or config.model_name_or_path)
    if not (source.suffix in _WEIGHTS or any(source.glob("*.safetensors"))):
        return None
    folder = cached_folder(config)
    return folder if folder.is_dir() else None


def check_adapters(config: LemaConfig, adapter: LemaModelAdapter) -> None:
    """Refuse adapters that the model cannot have: they are put into it without memory, and it is of no use afterwards.

    Raises:
        ConfigError: no module matches. WeightsNotFoundError, FileNotFoundError: no adapter to train further is there.
        UnsupportedError: a kind of adapter, or a place for one, that cannot be trained here.
    """
    lora = assemble_lora(config, adapter)
    if lora is not None:
        lora.attach(adapter, empty=True)


def adapter_of(config: LemaConfig) -> LemaModelAdapter:
    """The model of a configuration, built once so that what is wrong with the configuration shows here."""
    path = local_path(config.model_name_or_path, "config.json")
    try:
        adapter = adapter_for(config, path)
        adapter.configure(getattr(torch, config.dtype), config.attn_implementation)
        if isinstance(adapter, TransformersAdapter):
            adapter.causal_lm()
    except (StrictDataclassError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
        if isinstance(error, LemaError):
            raise
        raise ConfigError(
            f"the config.json of {config.model_name_or_path} describes no model: {type(error).__name__}: {error}"
        ) from error
    return adapter
