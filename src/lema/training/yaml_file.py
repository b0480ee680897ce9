"""One flat YAML file of settings: its values, and the line each was on.

It knows YAML and what has no place in a flat file; it knows no setting.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml

from ..errors import ConfigError

_MAX_BYTES = 1 << 20
_BOOL = "tag:yaml.org,2002:bool"

NESTED = ("chat_template_kwargs",)
"""Settings whose value is names with values."""


def read_yaml(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, int], dict[str, Any]]:
    """Values and line numbers (from 1) by name, and the words that YAML takes for true and false as they are written.

    `no`, `off`, `yes`, `on` and `true` are words in a setting that takes words; who owns a setting knows that.

    Raises:
        ConfigError: no such file, not YAML, or more than names with single values, lists of them and names for them.
    """
    file = Path(path)
    if file.exists() and not (file.is_file() or file.is_dir()):
        raise ConfigError(f"{file} is a pipe or a device, not a file; write the settings to a file first")
    if not file.is_file():
        raise ConfigError(f"{file} is not a file; `lema init MODEL DATA` writes one")
    if file.stat().st_size > _MAX_BYTES:
        raise ConfigError(f"{file} has {file.stat().st_size} bytes, too many for a file of settings")
    try:
        text = file.read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except RecursionError as error:
        raise ConfigError(f"{file} is nested too deeply; a file of settings has one setting a line") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is not UTF-8 text: {error}") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{file}, line {mark.line + 1}" if mark is not None else str(file)
        raise ConfigError(f"{where} is not valid YAML: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{file} is not valid YAML: {error}") from error
    if root is None:
        raise ConfigError(f"{file} is empty; `lema init MODEL DATA` writes one to begin with")
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{file} must hold one setting a line, as in `learning_rate: 1.0e-4`")
    values: dict[str, Any] = {}
    lines: dict[str, int] = {}
    words: dict[str, Any] = {}
    for key, node in root.value:
        where = f"{file}, line {key.start_mark.line + 1}"
        if not isinstance(key, yaml.ScalarNode) or key.tag != "tag:yaml.org,2002:str":
            raise ConfigError(f"{where}: the name of a setting must be a plain word")
        if key.value in values:
            raise ConfigError(f"{where}: {key.value} is set twice, first on line {lines[key.value]}")
        values[key.value] = _value(where, key.value, node)
        lines[key.value] = key.start_mark.line + 1
        parts = node.value if isinstance(node, yaml.SequenceNode) else [node]
        if any(part.tag == _BOOL for part in parts):
            spelt = [
                part.value if part.tag == _BOOL else value for part, value in zip(parts, _listed(values[key.value]))
            ]
            words[key.value] = spelt if isinstance(node, yaml.SequenceNode) else spelt[0]
    return values, lines, words


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _value(where: str, name: str, node: yaml.Node) -> Any:
    parts = node.value if isinstance(node, yaml.SequenceNode) else [node]
    if isinstance(node, yaml.MappingNode):  # of names, as `columns` has them; whether it may be one its type says
        parts = [part for pair in node.value for part in pair]
    if name not in NESTED and not all(isinstance(part, yaml.ScalarNode) for part in parts):
        raise ConfigError(f"{where}: {name} must be a single value or a list of them; settings are not nested")
    loader = yaml.SafeLoader("")
    try:
        return loader.construct_object(node, deep=True)
    except (
        yaml.YAMLError,
        ValueError,
        TypeError,
        AttributeError,
        LookupError,
        ArithmeticError,
    ) as error:  # tags on texts that are not of them
        problem = getattr(error, "problem", None) or error
        raise ConfigError(f"{where}: {name} has no plain value: {problem}") from error
    finally:
        loader.dispose()
