"""`LemaConfig`: every setting of the engine, typed and checked when it is made, and grouped by what it belongs to.

It knows names, defaults and bounds; it knows nothing of torch, files' contents or devices.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge
from pydantic import BeforeValidator, ValidationInfo

from .errors import ConfigError
from .json_file import read_object
from .machine.choices import DTYPES, default_device
from .paths import MaybePath, PathText
from .targets import as_targets
from .typed import (
    PLANNED,
    SAME_NUMBERS,
    WHOLE,
    Amount,
    Count,
    Flag,
    NotNegative,
    Positive,
    Share,
    Whole,
    check_choice,
    close_to,
    kinds_of,
    one_of,
    settings,
    whole,
)

__all__ = ["LemaConfig", "MemoryStrategy"]

CONFIG_NAME = "lema_config.json"
_DTYPE_ALIASES = {"fp16": "float16", "half": "float16", "bf16": "bfloat16", "fp32": "float32", "float": "float32"}
LLAMA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class MemoryStrategy(str, Enum):
    """Where base weights live between their uses."""

    STREAMING = "streaming"
    """Disk -> RAM slots -> compute: smallest footprint, models larger than RAM."""
    RESIDENT = "resident"
    """Weights stay in RAM: needs the model's size in RAM, reads the disk once."""

    @classmethod
    def _missing_(cls, value: object) -> MemoryStrategy | None:
        if isinstance(value, str):
            return next((member for member in cls if member.value == value.lower()), None)
        return None

    @classmethod
    def parse(cls, value: MemoryStrategy | str) -> MemoryStrategy:
        """The member for a member or its name in any case; `ConfigError` otherwise."""
        try:
            return cls(value)
        except ValueError:
            raise ConfigError(f"strategy={value!r} is unknown: choose 'streaming' or 'resident'") from None


def _device(value: Any) -> str:
    return default_device() if str(value).lower() == "auto" else str(value)


def _dtype(value: Any) -> str:
    name = str(value).removeprefix("torch.").lower()
    return _DTYPE_ALIASES.get(name, name)


def _targets(value: Any, info: ValidationInfo) -> Any:
    return value if value is None else as_targets(str(info.field_name), value)


def _loss_chunk(value: Any) -> Any:
    if not isinstance(value, str):
        return whole(value)
    word = value.strip().lower()
    if word in ("none", "exact", "no", "off", "false"):
        return None
    if word.isdecimal():
        return whole(word)
    if word != "auto":
        check_choice(word, ("auto", "exact"), ", or give a number of positions")
    return word


QUANTIZED = ("nf4", "int8", "fp8")
"""Formats that weights can be made into; see `prepare`."""
Size = Annotated[int | str | None, BeforeValidator(lambda value: value if isinstance(value, str) else whole(value))]
Place = Annotated[str, one_of("device", "host")]
Slots = Annotated[int, Ge(2), WHOLE]


@dataclass
class ModelSettings:
    """Which model, and where and in which type it computes."""

    model_name_or_path: Annotated[PathText, SAME_NUMBERS]
    """Hub id, directory, or a single `.safetensors` file."""
    model_type: str | None = None
    """Adapter name; None: read from the model's own config."""
    gbi_path: Annotated[MaybePath, SAME_NUMBERS] = None
    """Weights, when they are not where the model is: a `.safetensors` file or a directory."""
    quantize: Annotated[str, one_of(*QUANTIZED)] | None = None
    """'nf4', 'int8' or 'fp8': the layers' matrices as codes of this format, made of the model's weights once and kept
    in a cache; None: the weights as they are, codes or not."""
    device: Annotated[str, BeforeValidator(_device), SAME_NUMBERS] = "cuda"
    """Where layers are computed: 'cpu', or an accelerator as torch names it: 'cuda', 'cuda:1', 'xpu'; 'auto': the
    accelerator that is there, else the CPU, and the field then says which."""
    dtype: Annotated[str, BeforeValidator(_dtype), one_of(*DTYPES)] = "float16"
    """Compute type of the base: float16, bfloat16, float32. Adapters are float32."""
    attn_implementation: Annotated[str, one_of("eager", "sdpa", "flash_attention_2")] = "sdpa"
    """eager, sdpa, flash_attention_2; sdpa falls back to eager for models without it."""
    leave_out_router_loss: Flag = False
    """True: a mixture whose own configuration adds its routers' auxiliary loss (`output_router_logits`) is trained
    without it; False: it is refused, as that loss is not computed."""


@dataclass
class AdapterSettings:
    """The LoRA adapters."""

    use_lora: Flag = True
    """False: inference only."""
    lora_rank: Count = 16
    """r of LoRA."""
    lora_alpha: Positive = 32.0
    """LoRA scaling is alpha / r."""
    lora_dropout: Share = 0.0
    """Dropout on the adapter's input, in [0, 1)."""
    lora_target_modules: Annotated[list[str] | str, BeforeValidator(_targets)] = field(
        default_factory=lambda: list(LLAMA_TARGETS)
    )
    """Module names as PEFT matches them, or 'all-linear'. Several may stand in one text with commas between them, and
    a regular expression is matched with the whole path of a module."""
    exclude_modules: Annotated[list[str] | str | None, BeforeValidator(_targets)] = None
    """Modules that get no LoRA although they are among the targets, in the same forms."""
    adapter_name_or_path: Annotated[MaybePath, SAME_NUMBERS] = None
    """Directory or hub id of an adapter to train further: its weights, rank, alpha and targets are taken, dropout is
    the config's. None: a new adapter."""


@dataclass
class MemorySettings:
    """What is kept where, between the disk and where it is computed with."""

    strategy: Annotated[MemoryStrategy, BeforeValidator(MemoryStrategy.parse), SAME_NUMBERS] = MemoryStrategy.STREAMING
    """'streaming' or 'resident', in any case."""
    ram_buffer_size: Annotated[Count, SAME_NUMBERS] = 2
    """Host slots wanted by the original's setting; `num_slots` is at least this."""
    vram_buffer_size: Annotated[Count, SAME_NUMBERS] = 1
    """Device slots wanted by the original's setting; at least 2 are used, or nothing could overlap."""
    num_slots: Annotated[Slots, SAME_NUMBERS] = 2
    """Units of weights in memory at once, 2 or more."""
    num_readers: Annotated[Count, SAME_NUMBERS] = 2
    """Threads reading the disk, 1 or more."""
    prefetch_depth: Annotated[Amount | None, SAME_NUMBERS] = None
    """Units read ahead of the computation; None: as many as the slots allow, 0: read on demand."""

    ram_budget: Annotated[Size, PLANNED] = None
    """Host memory to stay within, above what importing takes: bytes, '3GB', '900MiB' or 'auto'; None: nothing is
    searched for it, and the strategy's plain behaviour holds."""
    vram_budget: Annotated[Size, PLANNED] = None
    """Device memory to stay within, in the same forms; without meaning on CPU."""
    ram_layers: Annotated[Amount | None, PLANNED] = None
    """Layers whose weights stay in RAM; None: as the budget allows, or the strategy's own."""
    device_layers: Annotated[Amount | None, PLANNED] = None
    """Layers whose weights stay on the device; None: as the budget allows."""
    keep_activations: Annotated[Amount | None, PLANNED] = None
    """Layers that are not recomputed in the backward; None: as the budget allows, none without one."""
    head: Annotated[Annotated[str, one_of("resident", "streamed", "chunked")] | None, PLANNED] = None
    """'resident', 'streamed' (whole, while it is used) or 'chunked' (by runs of the vocabulary); None: as the plan has
    it, or by its size."""
    boundaries: Annotated[Place | None, PLANNED] = None
    """Where layers' inputs wait for the backward: 'device' or 'host'; None: as the plan has it."""
    optimizer_place: Annotated[Place | None, PLANNED] = None
    """Where the optimizer's state and fp32 masters live: 'device' or 'host'; None: as the plan has it."""
    gradient_checkpointing: Annotated[Flag, SAME_NUMBERS] = False
    """True: every layer is recomputed in the backward even where memory would allow to keep it."""

    @property
    def slots(self) -> int:
        """Host slots in use: `num_slots`, or the original's `ram_buffer_size` where that asks for more."""
        return max(self.num_slots, self.ram_buffer_size)


@dataclass
class StepSettings:
    """A step: its rows, how they are cut, its loss and its update. Cutting them changes the last bits of sums alone."""

    learning_rate: NotNegative = 1e-4
    """Of the AdamW built when no optimizer is given."""
    batch_size: Annotated[Count, SAME_NUMBERS] = 1
    """Rows a step, for loaders built from this config; `train_step` takes what it is given."""
    micro_batch_size: Annotated[Count | None, SAME_NUMBERS] = None
    """Rows run at once inside each layer; None: the whole batch."""
    gradient_accumulation_steps: Annotated[Count, SAME_NUMBERS] = 1
    """`train_step` calls to one optimizer step, normalised by all their target tokens."""
    max_grad_norm: Positive | None = None
    """Clip the global gradient norm to this; None: no clipping."""
    loss_chunk_size: Annotated[Annotated[int, Ge(1)] | str | None, BeforeValidator(_loss_chunk), SAME_NUMBERS] = "auto"
    """Target positions a piece of the loss, which then goes through the vocabulary in pieces as well; 'auto': pieces
    where all logits at once would be large; None, 'none' or 'exact': the model's own loss on all rows at once."""
    max_seq_length: Count = 512
    """A cap on data in tokens; inputs are checked against the model's own positions."""
    seed: Amount = 42
    """Initial adapter weights and data order."""


@settings
class LemaConfig(StepSettings, MemorySettings, AdapterSettings, ModelSettings):
    """Settings of one fine-tuning run. Bad values raise `ConfigError` at construction.

    Names are flat; what takes only a part of them may ask for that part by its type.
    """

    POSITIONAL = (
        "model_name_or_path", "model_type", "gbi_path", "device", "strategy", "ram_buffer_size", "vram_buffer_size",
    )  # fmt: skip
    """Settings that may be given without their names, in the original's order."""

    save_steps: Annotated[Whole, SAME_NUMBERS] = 500
    """Optimizer steps between automatic checkpoints; 0 or less: none."""
    output_dir: Annotated[PathText, SAME_NUMBERS] = "output"
    """Where `checkpoint-<step>` directories go."""

    def __post_init__(self) -> None:
        if self.use_lora and not self.lora_target_modules:
            raise ConfigError("lora_target_modules is empty: name modules, or say 'all-linear'")
        self.exclude_modules = self.exclude_modules or None

    def to_dict(self) -> dict[str, Any]:
        """All settings as JSON-ready values."""
        values = dataclasses.asdict(self)
        values["strategy"] = self.strategy.value
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LemaConfig:
        """The config for a mapping of settings; an unknown name is a `ConfigError` that suggests one."""
        known = kinds_of(cls)
        for name in values:
            if name not in known:
                raise ConfigError(f"unknown setting {name!r}{close_to(name, known) or '; known: ' + ', '.join(known)}")
        if "model_name_or_path" not in values:
            raise ConfigError("model_name_or_path is missing: give a hub id, a directory or a .safetensors file")
        return cls(**values)

    def replace(self, **overrides: Any) -> LemaConfig:
        """A copy with some settings changed, checked like a new one."""
        return self.from_dict({**self.to_dict(), **overrides})

    def save_pretrained(self, directory: str | os.PathLike[str]) -> Path:
        """Write `lema_config.json` into a directory, made if missing; returns the file's path."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / CONFIG_NAME
        path.write_text(json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n", encoding="utf-8")
        return path

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str], **overrides: Any) -> LemaConfig:
        """Read `lema_config.json` from a directory; `FileNotFoundError` without one."""
        path = Path(directory)
        path = path if path.name == CONFIG_NAME else path / CONFIG_NAME
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist: {directory} is not a directory saved by LEMA")
        return cls.from_dict({**read_object(path, ConfigError), **overrides})
