"""Which files of a directory are a model's weights: those that transformers would take, or none.

Names and an index's promises decide; no weight file is opened.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path, PureWindowsPath

from ..errors import WeightsError, WeightsFormatError, WeightsNotFoundError
from .gguf_header import SUFFIX, split_files
from .header import TensorRecord, read_json_object, show

__all__ = ["check_promises", "locate_weights", "read_shard_index"]

logger = logging.getLogger(__name__)

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_ADAPTER = "adapter_model.safetensors"
_NAMED_BY_CONFIG = "transformers_weights"
_TORCH = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_OTHER_FORMATS = (".bin", ".pt", ".pth", ".ckpt", ".gguf")

Located = tuple[list[Path], dict[str, Path]]
"""The weight files, and the file an index promises for each tensor (empty without one)."""


def locate_weights(path: Path) -> Located:
    """The weight files at a path: a weight file (of a split GGUF any of them), an index named `*.json`, or a directory.

    In a directory `from_pretrained` of transformers (`_get_resolved_checkpoint_files`) takes what config.json names as
    `transformers_weights`, else `model.safetensors`, else the shards of `model.safetensors.index.json`, else pickles.
    So is it here; where it would take pickles these are not passed over for another file. Beyond it, a lone
    `*.safetensors` of any name is taken.

    Raises:
        WeightsNotFoundError: nothing there, or a shard is missing.
        WeightsFormatError: an index or config.json that cannot be read, or names files outside of the directory.
        WeightsError: several files and nothing says which, or the directory cannot be listed.
    """
    if not os.path.exists(path):
        raise WeightsNotFoundError(
            f"{path}: no such file or directory. Give a .safetensors file or the directory of a downloaded model."
        )
    if path.suffix == SUFFIX:
        return split_files(path), {}
    if not path.is_dir():
        return read_shard_index(path) if path.suffix == ".json" else ([path], {})
    try:
        names = sorted(os.listdir(path))
    except OSError as error:
        raise WeightsError(f"{path}: cannot be listed: {error.strerror}. Check its permissions.") from error
    if named := named_by_config(path, names):
        return read_shard_index(path / named) if named.endswith(".json") else ([path / named], {})
    if _SINGLE in names:
        if _INDEX in names:
            _say_index_is_left_out(path)
        return [path / _SINGLE], {}
    if _INDEX in names:
        return read_shard_index(path / _INDEX)
    return [path / _lone_file(path, names)], {}


def named_by_config(path: Path, names: Sequence[str]) -> str | None:
    """The weight file or index that the directory's config.json asks for; None: it leaves that open.

    Raises:
        WeightsFormatError: it asks for what is neither, or lies elsewhere.
    """
    if "config.json" not in names or not os.path.isfile(path / "config.json"):
        return None
    try:
        config = json.loads((path / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):  # whoever needs the rest of it says so
        return None
    named = config.get(_NAMED_BY_CONFIG) if isinstance(config, dict) else None
    if named is None:
        return None
    fits = isinstance(named, str) and named.endswith((".safetensors", ".safetensors.index.json"))
    if not fits or not _stays_inside(str(named)):
        raise WeightsFormatError(
            f"{path / 'config.json'}: {_NAMED_BY_CONFIG} is {show(named)}, which is neither a .safetensors file nor a"
            " .safetensors.index.json of this directory. Name one, or take the entry out."
        )
    return str(named)


def _say_index_is_left_out(path: Path) -> None:
    try:
        shards = read_json_object(path / _INDEX).get("weight_map")
    except WeightsError:
        shards = None
    others = {shard for shard in shards.values() if shard != _SINGLE} if isinstance(shards, dict) else {"?"}
    if others:
        logger.warning(
            "%s has %s and %s of other files; the first is taken, as transformers does. Remove what is not meant",
            path, _SINGLE, _INDEX,
        )  # fmt: skip


def _lone_file(path: Path, names: Sequence[str]) -> str:
    found = [name for name in names if name.endswith(".safetensors") and not name.startswith(".")]
    pickles = [name for name in names if name in _TORCH]
    if len(found) > 1 or pickles:
        found = [name for name in found if name != _ADAPTER]
    if found and pickles:
        raise WeightsError(
            f"{path}: transformers would take {pickles[0]} and not {', '.join(found)}, which has no name that it"
            f" knows. Name the one that is meant {_SINGLE}, give its path, or convert the other with lema prepare."
        )
    if len(found) > 1:
        raise WeightsError(
            f"{path}: several weight files and neither {_INDEX} nor {_SINGLE}: {', '.join(found)}."
            " Give the path of the one to use."
        )
    if not found:
        raise WeightsNotFoundError(f"{path}: no .safetensors file in this directory. {_advice(path, names)}.")
    return found[0]


def _advice(path: Path, names: Sequence[str]) -> str:
    """What to do where no weights are found."""
    if others := [name for name in names if name.endswith(_OTHER_FORMATS)]:
        return f"It has {', '.join(others)}: load the model with transformers and call save_pretrained()"
    below = [name for name in names if (path / name).is_dir() and any((path / name).glob("*.safetensors"))]
    if below:
        return f"There are some below, in {', '.join(below)}: give the path of the one to use"
    return "Check the path, or download the model first"


def read_shard_index(index: Path) -> Located:
    """The files an index names, and the one it promises for each tensor.

    Raises:
        WeightsFormatError: it names none, or one outside of its directory. WeightsNotFoundError: one is missing.
    """
    shard_of = read_json_object(index).get("weight_map")
    if not isinstance(shard_of, dict) or not shard_of:
        raise WeightsFormatError(
            f"{index}: has no weight_map from tensor names to files, or an empty one."
            " Download the index again, or give the directory or a .safetensors file."
        )
    for name, shard in shard_of.items():
        if not isinstance(shard, str) or not _stays_inside(shard):
            raise WeightsFormatError(
                f"{index}: weight_map sends tensor {show(name)} to {show(shard)}, which is not"
                " a file below the directory of the index. Download the index again."
            )
    weight_map = {name: index.parent / shard for name, shard in shard_of.items()}
    files = sorted(set(weight_map.values()))
    if missing := [str(file.relative_to(index.parent)) for file in files if not os.path.isfile(file)]:
        raise WeightsNotFoundError(
            f"{index}: {len(missing)} of {len(files)} files it names are missing:"
            f" {', '.join(map(show, missing))}. Download them."
        )
    return files, weight_map


def _stays_inside(shard: str) -> bool:
    # By name only: the Hugging Face cache links shards to files elsewhere. Windows' rules include POSIX's.
    path = PureWindowsPath(shard)
    return bool(path.parts) and not path.anchor and ".." not in path.parts


def check_promises(path: Path, weight_map: Mapping[str, Path], records: Mapping[str, TensorRecord]) -> None:
    """Refuse an index that contradicts its shards. Tensors it does not mention are served all the same.

    Raises:
        WeightsFormatError: lists what is not where the index has it.
    """
    lies = []
    for name, file in weight_map.items():
        record = records.get(name)
        if record is None:
            lies.append(f"{show(name)} is not in {file.name}")
        elif record.file != file:
            lies.append(f"{show(name)} is in {record.file.name}, not in {file.name}")
    if lies:
        raise WeightsFormatError(
            f"{path}: the index contradicts its files: {'; '.join(lies)}. Download index and files from one"
            " revision, or save the model again."
        )
