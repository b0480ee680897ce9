"""`RunConfig`: all settings of a run in one flat file, each owned by its room.

It knows whose a setting is, aliases and overrides; which values are good the three configurations say.
"""

from __future__ import annotations

import dataclasses
import glob
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..config import LemaConfig
from ..data.config import DataConfig
from ..errors import ConfigError, LemaError
from ..paths import PATH, expanded
from ..storage.atomic import write_text
from ..typed import as_flag, close_to, fields_with, kinds_of, parse_text, role_of, shortened
from .config import TrainingConfig
from .yaml_file import read_yaml

RUN_FILE = "run.yaml"
ALIASES = {
    "per_device_train_batch_size": "batch_size", "max_length": "max_seq_length", "cutoff_len": "max_seq_length",
    "lora_r": "lora_rank", "target_modules": "lora_target_modules", "evaluation_strategy": "eval_strategy",
    "lr_scheduler": "lr_scheduler_type", "num_epochs": "num_train_epochs", "base_model": "model_name_or_path",
    "warmup_ratio": "warmup_steps",
}  # fmt: skip
TARGETS = ("lora_target_modules", "exclude_modules")
_ELSEWHERE = {
    "bf16": "dtype: bfloat16", "fp16": "dtype: float16", "torch_dtype": "dtype",
    "train_on_inputs": "train_on_prompt", "val_set_size": "eval_size", "sequence_len": "max_seq_length",
    "model_max_length": "max_seq_length", "sample_packing": "packing", "iters": "max_steps",
    "global_batch_size": "batch_size x gradient_accumulation_steps, the rows of a step",
    "gradient_clipping": "max_grad_norm", "lora_target_linear": "lora_target_modules: all-linear",
    "lora_model_dir": "adapter_name_or_path", "logging_strategy": "logging_steps",
}  # fmt: skip
_OWNERS: tuple[tuple[str, type], ...] = (("lema", LemaConfig), ("data", DataConfig), ("training", TrainingConfig))
_PATHS = tuple(name for _, owner in _OWNERS for name in fields_with(owner, PATH))


@dataclass
class RunConfig:
    """The settings of a run: the engine's, the data's and the training's."""

    lema: LemaConfig
    """The engine's settings."""
    data: DataConfig = field(default_factory=DataConfig)
    """The data's."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """The loop's."""
    given: frozenset[str] = field(default=frozenset(), compare=False, repr=False)
    """Names, aliases among them, that somebody wrote in a file or on the command line."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunConfig:
        """The settings of a flat mapping, aliases included.

        Raises:
            ConfigError: an unknown name (with a suggestion), one given twice, or a bad value.
        """
        return cls._of(_by_name(values))

    @classmethod
    def from_yaml(
        cls,
        path: str | os.PathLike[str],
        overrides: Mapping[str, str] | None = None,
        defaults: Mapping[str, Any] | None = None,
    ) -> RunConfig:
        """Read a flat YAML file.

        Files it names are looked for in the working folder first, and then beside it.

        Args:
            overrides: texts by name, as typed; they come before what the file says.
            defaults: values for what neither says.

        Raises:
            ConfigError: as `from_dict`; says the line where it is one of the file.
        """
        raw, lines, words = read_yaml(path)
        raw |= {name: text for name, text in words.items() if _takes_words(name)}
        typed = parse_overrides(overrides or {})
        try:
            values = {**(defaults or {}), **_beside(Path(path).parent, _by_name(raw)), **typed}
            run = cls._of(values)
            run.given = frozenset({*raw, *(overrides or {})})
            return run
        except LemaError as error:
            name = setting_named(error)
            line = next((n for key, n in lines.items() if name in (key, ALIASES.get(key))), None)
            if line is None or name in typed:
                raise
            raise type(error)(f"{path}, line {line}: {error}") from error

    @classmethod
    def _of(cls, values: Mapping[str, Any]) -> RunConfig:
        if "model_name_or_path" not in values:
            raise ConfigError("model_name_or_path is missing: give a hub id, a directory or a .safetensors file")
        parts: dict[str, Any] = {}
        for part, owner in _OWNERS:
            kinds = kinds_of(owner)
            own = {name: value for name, value in values.items() if name in kinds}
            parts[part] = owner(**{n: as_flag(v) if bool in kinds[n] else v for n, v in own.items()})
        return cls(**parts)

    def replace(self, **changes: Any) -> RunConfig:
        """A copy with some settings changed, checked like a new one."""
        return self.from_dict({**self.to_dict(), **changes})

    def to_dict(self) -> dict[str, Any]:
        """All settings, flat and JSON-ready."""
        values = self.lema.to_dict()
        for part in (self.data, self.training):
            values |= dataclasses.asdict(part)
        return values

    def resolved(self) -> RunConfig:
        """A copy whose paths of existing files are absolute, so that it means the same from anywhere."""
        values = self.to_dict()
        for name in _PATHS:
            value = values.get(name)
            if isinstance(value, str) and (name == "output_dir" or Path(value).exists()):
                values[name] = str(Path(value).absolute())
        return self.from_dict(values)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write `run.yaml` into a folder, made if missing; returns the file's path."""
        path = Path(folder) / RUN_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True))
        return path

    @property
    def rows_per_step(self) -> int:
        """Rows an optimizer step is made of."""
        return self.lema.rows_per_step


def setting_named(error: LemaError) -> str:
    """The setting an error is about: its message begins with it."""
    word = re.match(r"(?:unknown setting )?'?(\w+)", str(error))
    return word[1] if word else ""


def owner_of(name: str) -> type | None:
    """The configuration class that has a setting of this name."""
    return next((owner for _, owner in _OWNERS if name in kinds_of(owner)), None)


def affects_numerics(name: str) -> bool:
    """Whether a run with another value of this setting is another run; true of a name that is not known."""
    owner = owner_of(name)
    return owner is None or role_of(owner, name).affects_numerics


_LIST = re.compile(r"""\[\s*["\]]""")  # of JSON; other brackets begin a pattern


def parse_overrides(overrides: Mapping[str, str]) -> dict[str, Any]:
    """Values by name of texts as someone types them.

    Raises:
        ConfigError: an unknown name, or a text that is no list where it begins as one.
    """
    found: dict[str, Any] = {}
    for name, text in _by_name(overrides).items():
        owner = owner_of(name)
        assert owner is not None
        kinds = kinds_of(owner)[name]
        if list[str] in kinds and text.startswith("[") and (name not in TARGETS or _LIST.match(text)):
            found[name] = _json_list(name, text)
        elif name == "sample_prompts":  # a prompt may have commas
            found[name] = [text] if text else []
        else:
            found[name] = parse_text(text, kinds)
    return found


def _takes_words(name: str) -> bool:
    """Whether a setting of this name takes words, and neither true nor false."""
    name = ALIASES.get(name, name)
    owner = owner_of(name)
    if owner is None:
        return False
    kinds = kinds_of(owner)[name]
    return bool not in kinds and (str in kinds or list[str] in kinds)


def _json_list(name: str, text: str) -> list[Any]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{name}={shortened(text)} is not a JSON list: {error}") from error
    return list(values)


def _by_name(values: Mapping[str, Any]) -> dict[str, Any]:
    """Aliases resolved; an unknown name is refused."""
    found: dict[str, Any] = {}
    for given, value in values.items():
        name = ALIASES.get(given, given)
        if owner_of(name) is None:
            raise ConfigError(f"unknown setting {given!r}{_suggestion(given)}")
        if name in found:
            raise ConfigError(f"{given} and {name} are the same setting, and both are given")
        if given == "warmup_ratio" and not _is_share(value):
            raise ConfigError(f"warmup_ratio={value} must be 0 or more and less than 1; warmup_steps takes steps")
        found[name] = value
    return found


def _beside(folder: Path, values: dict[str, Any]) -> dict[str, Any]:
    """Values, with files that lie in the folder of the YAML file, and not in the working folder, named as there."""
    found = dict(values)
    for name in _PATHS:
        value = values.get(name)
        if not isinstance(value, str) or not value:
            continue
        found[name] = value = expanded(name, value)
        if name != "output_dir" and not Path(value).exists() and _is_there(folder / value):
            found[name] = str(folder / value)
    return found


def _is_there(path: Path) -> bool:
    """Whether there is such a file, or one that fits where it is a pattern."""
    return path.is_file() or next(glob.iglob(str(path), recursive=True), None) is not None


def _is_share(value: Any) -> bool:
    try:
        return 0 <= float(value) < 1
    except (TypeError, ValueError):
        return True  # no number at all: its type is checked later


def _suggestion(name: str) -> str:
    if name in _ELSEWHERE:
        return f"; here it is {_ELSEWHERE[name]}"
    known = [*(n for _, owner in _OWNERS for n in kinds_of(owner)), *ALIASES]
    return close_to(name, known) or "; `lema init MODEL DATA` writes a file with those there are"
