"""`LemaConfig`: every setting of a run, typed and checked when it is made.

It knows names, defaults and bounds; it knows nothing of torch, files' contents or devices.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from .errors import ConfigError
from .json_file import read_object
from .machine.choices import DTYPES, default_device
from .paths import expanded
from .targets import as_targets
from .typed import check_types

__all__ = ["LemaConfig", "MemoryStrategy"]

CONFIG_NAME = "lema_config.json"
_DTYPE_ALIASES = {"fp16": "float16", "half": "float16", "bf16": "bfloat16", "fp32": "float32", "float": "float32"}
ATTENTION = ("eager", "sdpa", "flash_attention_2")
HEAD_PLACES = ("resident", "streamed", "chunked")
PLACES = ("device", "host")
PATHS = ("model_name_or_path", "gbi_path", "adapter_name_or_path", "output_dir")
"""Settings that are paths, or may be one."""
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


@dataclass
class LemaConfig:
    """Settings of one fine-tuning run. Bad values raise `ConfigError` at construction."""

    model_name_or_path: str
    """Hub id, directory, or a single `.safetensors` file."""
    model_type: str | None = None
    """Adapter name; None: read from the model's own config."""
    gbi_path: str | None = None
    """Weights, when they are not where the model is: a `.safetensors` file or a directory."""
    device: str = "cuda"
    """Where layers are computed: 'cpu', or an accelerator as torch names it: 'cuda', 'cuda:1', 'xpu'; 'auto': the
    accelerator that is there, else the CPU, and the field then says which."""
    strategy: MemoryStrategy = MemoryStrategy.STREAMING
    """'streaming' or 'resident', in any case."""
    ram_buffer_size: int = 2
    """Host slots wanted by the original's setting; `num_slots` is at least this."""
    vram_buffer_size: int = 1
    """Device slots wanted by the original's setting; at least 2 are used, or nothing could overlap."""

    ram_budget: int | str | None = None
    """Host memory to stay within, above what importing takes: bytes, '3GB', '900MiB' or 'auto'; None: no plan is made
    for it, and the strategy's plain behaviour holds."""
    vram_budget: int | str | None = None
    """Device memory to stay within, in the same forms; without meaning on CPU."""
    ram_layers: int | None = None
    """Layers whose weights stay in RAM; None: as the budget allows, or the strategy's own."""
    device_layers: int | None = None
    """Layers whose weights stay on the device; None: as the budget allows."""
    keep_activations: int | None = None
    """Layers that are not recomputed in the backward; None: as the budget allows, none without one."""
    head: str | None = None
    """'resident', 'streamed' (whole, while it is used) or 'chunked' (by runs of the vocabulary); None: as the plan has
    it, or by its size."""
    boundaries: str | None = None
    """Where layers' inputs wait for the backward: 'device' or 'host'; None: as the plan has it."""
    optimizer_place: str | None = None
    """Where the optimizer's state and fp32 masters live: 'device' or 'host'; None: as the plan has it."""

    use_lora: bool = True
    """False: inference only."""
    lora_rank: int = 16
    """r of LoRA."""
    lora_alpha: float = 32
    """LoRA scaling is alpha / r."""
    lora_dropout: float = 0.0
    """Dropout on the adapter's input, in [0, 1)."""
    lora_target_modules: list[str] | str = field(default_factory=lambda: list(LLAMA_TARGETS))
    """Module names as PEFT matches them, or 'all-linear'. Several may stand in one text with commas between them, and
    a regular expression is matched with the whole path of a module."""
    exclude_modules: list[str] | str | None = None
    """Modules that get no LoRA although they are among the targets, in the same forms."""
    adapter_name_or_path: str | None = None
    """Directory of an adapter to train further: its weights, rank, alpha and targets are taken, dropout is the
    config's. None: a new adapter."""

    learning_rate: float = 1e-4
    """Of the AdamW built when no optimizer is given."""
    batch_size: int = 1
    """Rows a step, for loaders built from this config; `train_step` takes what it is given."""
    micro_batch_size: int | None = None
    """Rows run at once inside each layer; None: the whole batch."""
    gradient_accumulation_steps: int = 1
    """`train_step` calls to one optimizer step, normalised by all their target tokens."""
    max_grad_norm: float | None = None
    """Clip the global gradient norm to this; None: no clipping."""
    loss_chunk_size: int | str | None = "auto"
    """Target positions a piece of the loss, which then goes through the vocabulary in pieces as well; 'auto': pieces
    where all logits at once would be large; None, 'none' or 'exact': the model's own loss on all rows at once."""
    max_seq_length: int = 512
    """A cap on data in tokens; inputs are checked against the model's own positions."""
    leave_out_router_loss: bool = False
    """True: a mixture whose own configuration adds its routers' auxiliary loss (`output_router_logits`) is trained
    without it; False: it is refused, as that loss is not computed."""
    gradient_checkpointing: bool = False
    """True: every layer is recomputed in the backward even where memory would allow to keep it."""
    seed: int = 42
    """Initial adapter weights and data order."""

    save_steps: int = 500
    """Optimizer steps between automatic checkpoints; 0 or less: none."""
    output_dir: str = "output"
    """Where `checkpoint-<step>` directories go."""
    dtype: str = "float16"
    """Compute type of the base: float16, bfloat16, float32. Adapters are float32."""
    attn_implementation: str = "sdpa"
    """eager, sdpa, flash_attention_2; sdpa falls back to eager for models without it."""

    num_slots: int = 2
    """Units of weights in memory at once, 2 or more."""
    num_readers: int = 2
    """Threads reading the disk, 1 or more."""
    prefetch_depth: int | None = None
    """Units read ahead of the computation; None: as many as the slots allow, 0: read on demand."""

    def __post_init__(self) -> None:
        self.strategy = MemoryStrategy.parse(self.strategy)
        self.model_name_or_path = os.fspath(self.model_name_or_path)
        if not isinstance(self.model_name_or_path, str) or not self.model_name_or_path:
            raise ConfigError("model_name_or_path is empty: give a hub id, a directory or a .safetensors file")
        for name in ("gbi_path", "adapter_name_or_path"):
            if getattr(self, name) is not None:
                setattr(self, name, os.fspath(getattr(self, name)))
        self.output_dir = os.fspath(self.output_dir)
        for name in PATHS:
            if isinstance(value := getattr(self, name), str):
                setattr(self, name, expanded(name, value))
        self.device = default_device() if str(self.device).lower() == "auto" else str(self.device)
        self.dtype = self._parse_dtype(self.dtype)
        if self.attn_implementation not in ATTENTION:
            raise ConfigError(self._one_of("attn_implementation", ATTENTION))
        self.lora_target_modules = as_targets("lora_target_modules", self.lora_target_modules)
        if self.use_lora and not self.lora_target_modules:
            raise ConfigError("lora_target_modules is empty: name modules, or say 'all-linear'")
        if self.exclude_modules is not None:
            self.exclude_modules = as_targets("exclude_modules", self.exclude_modules) or None
        check_types(self)
        for name, lowest in (
            ("ram_buffer_size", 1), ("vram_buffer_size", 1), ("lora_rank", 1), ("batch_size", 1),
            ("gradient_accumulation_steps", 1), ("max_seq_length", 1), ("num_slots", 2), ("num_readers", 1),
        ):  # fmt: skip
            self._check_int(name, lowest)
        for name, lowest in (
            ("micro_batch_size", 1),
            ("prefetch_depth", 0),
            ("ram_layers", 0),
            ("device_layers", 0),
            ("keep_activations", 0),
        ):
            if getattr(self, name) is not None:
                self._check_int(name, lowest)
        for name, values in (("head", HEAD_PLACES), ("boundaries", PLACES), ("optimizer_place", PLACES)):
            if getattr(self, name) is not None and getattr(self, name) not in values:
                raise ConfigError(self._one_of(name, values))
        self._check_loss_chunk_size()
        self._check_int("save_steps", None)
        self._check_int("seed", 0)
        if not self.learning_rate >= 0:
            raise ConfigError(f"learning_rate={self.learning_rate!r} must be 0 or more")
        if not self.lora_alpha > 0:
            raise ConfigError(f"lora_alpha={self.lora_alpha!r} must be more than 0")
        if not 0 <= self.lora_dropout < 1:
            raise ConfigError(f"lora_dropout={self.lora_dropout!r} must be at least 0 and less than 1")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ConfigError(f"max_grad_norm={self.max_grad_norm!r} must be more than 0, or None for no clipping")

    def _one_of(self, name: str, values: Sequence[str]) -> str:
        close = difflib.get_close_matches(str(getattr(self, name)), values, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        return f"{name}={getattr(self, name)!r} is unknown: choose one of {', '.join(values)}{hint}"

    def _parse_dtype(self, value: object) -> str:
        name = str(value).removeprefix("torch.").lower()
        name = _DTYPE_ALIASES.get(name, name)
        if name not in DTYPES:
            raise ConfigError(self._one_of("dtype", DTYPES))
        return name

    def _check_loss_chunk_size(self) -> None:
        if isinstance(self.loss_chunk_size, str):
            word = self.loss_chunk_size.strip().lower()
            if word in ("none", "exact", "no", "off", "false"):
                self.loss_chunk_size = None
            elif word.isdecimal():
                self.loss_chunk_size = int(word)
            elif word != "auto":
                raise ConfigError(
                    self._one_of("loss_chunk_size", ("auto", "exact")) + ", or give a number of positions"
                )
        if isinstance(self.loss_chunk_size, int):
            self._check_int("loss_chunk_size", 1)

    def _check_int(self, name: str, lowest: int | None) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise ConfigError(f"{name}={value!r} must be a whole number")
        if lowest is not None and value < lowest:
            raise ConfigError(f"{name}={value} must be {lowest} or more")

    @property
    def slots(self) -> int:
        """Host slots in use: `num_slots`, or the original's `ram_buffer_size` where that asks for more."""
        return max(self.num_slots, self.ram_buffer_size)

    def to_dict(self) -> dict[str, Any]:
        """All settings as JSON-ready values."""
        values = dataclasses.asdict(self)
        values["strategy"] = self.strategy.value
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LemaConfig:
        """The config for a mapping of settings; an unknown name is a `ConfigError` that suggests one."""
        known = [f.name for f in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"
                raise ConfigError(f"unknown setting {name!r}{hint}")
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
