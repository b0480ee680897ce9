"""A plan with all it was made from: settings and a machine, held against a model and its weights where they are.

It knows where models lie and what a machine has; plans are made by the engine, from a configuration and no weights.
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
from ..engine.assembly import Outlook, resolve_budgets
from ..errors import ConfigError, LemaError, WeightsNotFoundError
from ..machine.device import default_device
from ..machine.memory import format_bytes
from ..models.base import LemaModelAdapter
from ..models.locate import adapter_for, local_path
from ..models.transformers_adapter import TransformersAdapter
from ..planning import probe as probing
from ..planning.hardware import Hardware
from ..planning.plan import MemoryPlan
from ..storage.index import GlobalBinaryIndex
from .found import Found, describe


@dataclass(frozen=True)
class Planned:
    """A plan with all it was made from."""

    config: LemaConfig
    """Its budgets are as they were asked for."""
    plan: MemoryPlan
    outlook: Outlook | None
    """What it was found from, for steps of other lengths under it; None: let go, as it is some megabytes."""
    hardware: Hardware
    stated: bool
    """The hardware was given, and is not this machine as measured."""
    ram_budget: int | None
    """Bytes; None: no limit."""
    vram_budget: int | None
    weights: bool
    """Sizes are those of the weight files; False: they follow from the model's configuration."""
    adapter: LemaModelAdapter
    """The model without its weights."""

    @property
    def found(self) -> Found:
        """What the model is found to be, and where its adapters go."""
        adapted = self.outlook.run.lm.module if self.outlook is not None else None
        return describe(self.adapter, self.config.model_name_or_path, adapted)

    @property
    def sized(self) -> LemaConfig:
        """The settings with what automatic budgets came to."""
        return self.config.replace(ram_budget=self.ram_budget, vram_budget=self.vram_budget)


def make(values: Mapping[str, Any], spec: str | None = None, probe: bool = False) -> Planned:
    """Plan for settings by name, on the machine a specification describes or on this one.

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
    with _opened(config) as (adapter, gbi):
        # Before anything is measured: what measuring takes is given back, but not at once.
        ram, vram = resolve_budgets(config, machine)
        if machine is None:
            machine = probing.profile(config.device, gbi.path if gbi is not None else None, refresh=probe)
        _check_budget("ram_budget", ram, machine.ram_bytes, machine.name)
        _check_budget("vram_budget", vram, machine.vram_bytes, machine.name)
        outlook = Outlook.of(config.replace(ram_budget=ram, vram_budget=vram), adapter, gbi, machine)
        plan = outlook.plan()
    return Planned(config, plan, outlook, machine, spec is not None, ram, vram, gbi is not None, adapter)


def _check_budget(name: str, budget: int | None, there: int, machine: str) -> None:
    if budget is not None and budget > there:
        raise ConfigError(f"{name} of {format_bytes(budget)} is more than the {format_bytes(there)} that {machine} has")


@contextlib.contextmanager
def _opened(config: LemaConfig) -> Iterator[tuple[LemaModelAdapter, GlobalBinaryIndex | None]]:
    """The model's adapter, and the index of its weights where they are on this machine."""
    given = Path(config.model_name_or_path)
    if given.suffix == ".json" and not given.exists():
        raise WeightsNotFoundError(f"{given} does not exist: give a model's directory, its config.json or a hub id")
    if given.is_file() and given.name != "config.json" and given.suffix != ".safetensors":
        raise ConfigError(f"{given} is neither a directory, a .safetensors file nor a config.json")
    adapter = adapter_of(config)
    where = Path(config.gbi_path) if config.gbi_path is not None else given
    if config.gbi_path is None and not (where.suffix == ".safetensors" or any(where.glob("*.safetensors"))):
        yield adapter, None
        return
    gbi = GlobalBinaryIndex(where)
    try:
        yield adapter, gbi
    finally:
        gbi.close()


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
