"""Code that comes with a model, a tokenizer or an adapter: it is never run, and whoever uses it is told by name.

transformers looks for such code under `auto_map` in config.json and tokenizer_config.json. Every call that could run
any passes `trust_remote_code=False`: without it transformers asks on standard input, and a `y` there runs it.
"""

from __future__ import annotations

import logging
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import ConfigError, LemaError
from ..json_file import read_object

logger = logging.getLogger(__name__)

_FILES = ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json")
_READ = (".json", ".jinja", ".model", ".txt")  # what transformers reads of a folder as it finds it
_told: set[tuple[str, ...]] = set()


def code_in(folder: Path) -> list[str]:
    """The code that files of a folder name: `config.json: AutoConfig from configuration_x.py` and so on."""
    return [line for name in _FILES for line in _named(folder / name)]


def tell_of_code(folder: Path) -> None:
    """Say once what code a folder brings along, and that it is not run."""
    found = tuple(code_in(folder))
    if found and (str(folder), *found) not in _told:
        _told.add((str(folder), *found))
        logger.warning(
            "%s brings code of its own, which is not run (%s); transformers' own classes are taken",
            folder, "; ".join(found),
        )  # fmt: skip


def code_of(values: Mapping[str, Any], file: str = "config.json") -> list[str]:
    """The code that a configuration names."""
    return [f"{file}: {name} from {where}" for name, where in _places(values)]


def refuse_special_files(folder: Path) -> None:
    """`ConfigError` where a file that would be read is a pipe, a device or a socket: reading it might never end."""
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        if path.suffix not in _READ:
            continue
        try:
            mode = path.stat().st_mode
        except OSError:  # a link to nothing: whoever needs it says so
            continue
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise ConfigError(f"{path} is no regular file, so it is not read")


def _named(path: Path) -> list[str]:
    try:
        return code_of(read_object(path), path.name)
    except (OSError, LemaError):  # whoever needs the file says what is wrong with it
        return []


def _places(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Names of classes, and the files they would come from."""
    mapped = values.get("auto_map")
    if isinstance(mapped, dict):
        for name, where in mapped.items():
            parts = where if isinstance(where, (list, tuple)) else [where]
            files = dict.fromkeys(_file(part) for part in parts if isinstance(part, str))
            yield str(name), ", ".join(files) or repr(where)
    elif mapped is not None:
        yield "auto_map", repr(mapped)
    pipelines = values.get("custom_pipelines")
    if isinstance(pipelines, dict):
        for name, what in pipelines.items():
            yield f"pipeline {name}", _file(str(what.get("impl"))) if isinstance(what, dict) else repr(what)


def _file(reference: str) -> str:
    """`repository--module.Class` or `module.Class` as the file that holds it."""
    repository, _, rest = reference.rpartition("--")
    module = rest.rpartition(".")[0] or rest
    return f"{repository}/{module}.py" if repository else f"{module}.py"
