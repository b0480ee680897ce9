"""Which class of transformers makes the whole model of a configuration.

It knows transformers' mappings; it builds nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig

_AUTO = ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM")


def auto_class_of(config: PreTrainedConfig) -> Any | None:
    """The auto class whose model is the whole one of a checkpoint with this configuration; None: there is none.

    Of a configuration with several parts transformers may make two models: the text alone, under other names, and the
    whole one, which is what is saved and what PEFT is given. What the checkpoint calls its own (`architectures`)
    decides, and where it says nothing, the whole one.
    """
    made = list(_made_by(type(config)))
    named = set(getattr(config, "architectures", None) or ())
    for auto, names in made:
        if named & names:
            return auto
    wholes = [auto for auto, _ in made if auto.__name__ != "AutoModelForCausalLM"]
    others = [auto for auto, _ in made]
    return next(iter((wholes if is_composite(config) else []) + others), None)


def is_composite(config: PreTrainedConfig) -> bool:
    """Whether the configuration has parts, of which one is the text's or the whole is the text's with towers."""
    return bool(getattr(config, "sub_configs", None))


def known_type(config_class: type) -> bool:
    """Whether transformers makes a model with text for output of such a configuration."""
    return next(_made_by(config_class), None) is not None


def _made_by(config_class: type) -> Iterator[tuple[Any, set[str]]]:
    for name in _AUTO:
        auto: Any = getattr(transformers, name, None)
        if auto is not None and config_class in auto._model_mapping:
            found = auto._model_mapping[config_class]
            classes = found if isinstance(found, list | tuple) else (found,)
            yield auto, {made.__name__ for made in classes}


def class_of(auto: Any, config: PreTrainedConfig) -> Any:
    """The class that an auto class makes of a configuration."""
    found = auto._model_mapping[type(config)]
    if not isinstance(found, list | tuple):
        return found
    named = set(getattr(config, "architectures", None) or ())
    return next((made for made in found if made.__name__ in named), found[0])


def auto_name_of(values: Mapping[str, Any]) -> str:
    """Name of the auto class that loads the whole model of a config.json; that of causal models where none is known."""
    try:
        config = AutoConfig.for_model(**values)
    except (
        StrictDataclassError,
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
    ):  # what no class of transformers takes
        return _AUTO[0]
    auto = auto_class_of(config)
    return _AUTO[0] if auto is None else str(auto.__name__)
