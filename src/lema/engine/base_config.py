"""The base model's configuration, as far as numbers depend on it: kept with a checkpoint, compared at resume.

It knows configurations of transformers; it knows nothing of weights or of how a checkpoint is stored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import CheckpointError
from ..typed import shortened

_VERSION = "transformers_version"
# What a configuration also holds: names, how outputs are handed over, how new weights begin, generation. The type is
# a setting of the run and compared there.
_IRRELEVANT = {
    "_name_or_path", "architectures", "bos_token_id", "dtype", "eos_token_id", "id2label", "initializer_range",
    "label2id", "output_attentions", "output_hidden_states", "pad_token_id", "problem_type", "return_dict",
    "torch_dtype", "use_cache",
}  # fmt: skip


def config_facts(model: nn.Module) -> dict[str, Any]:
    """A model's configuration, flat and JSON-ready: `rope_parameters.rope_theta` and so on; empty if it has none."""
    config: Any = getattr(model, "config", None)
    if config is None:
        return {}
    values = json.loads(json.dumps(config.to_dict(), default=str))
    return dict(sorted(_flat({k: v for k, v in values.items() if k not in _IRRELEVANT}).items()))


def check_config(folder: Path, saved: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """`CheckpointError` unless a checkpoint's base was configured as the one of now; names the keys that differ.

    Another version of transformers may know other keys: then those that both have are compared.
    """
    keys = {*saved} | {*here} if saved.get(_VERSION) == here.get(_VERSION) else {*saved} & {*here}
    differ = [key for key in sorted(keys - {_VERSION}) if saved.get(key) != here.get(key)]
    if differ:
        listed = ", ".join(f"{key} was {shortened(saved.get(key))} and is {shortened(here.get(key))}" for key in differ)
        raise CheckpointError(
            f"{folder} was trained on a base with another config.json: {listed}. Give the config.json it was trained "
            "with, or start a new run in another output_dir"
        )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
