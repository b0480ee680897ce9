"""Which weight files a path or hub id means, and the source that reads them.

Names of files and the hub's API decide; no tensor is read.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection
from pathlib import Path, PurePosixPath

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import HTTPError

from ..errors import ConfigError, WeightsError, WeightsNotFoundError
from ..machine.memory import format_bytes
from ..storage.weight_files import named_by_config
from .gguf_source import GgufSource
from .source import SafetensorsSource, Source
from .torch_files import TorchSource

COMPANIONS = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.spm", "*.py")
"""Configuration, tokenizer and templates; everything else in a model's folder is weights or for people."""
_TORCH = (".bin", ".pt", ".pth", ".ckpt")
_WEIGHTS = (".safetensors", ".gguf", *_TORCH)
# Optimizer and the like of a trainer's checkpoint, adapters, and copies of the same weights in other layouts.
_NOT_WEIGHTS = re.compile(
    r"(training_args|optimizer|scheduler|scaler|rng_state\w*|adapter_model|consolidated.*|tf_model.*|flax_model.*)"
    r"\.(bin|pt|pth|safetensors)"
)
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}(\.safetensors|\.bin)")
_SPLIT_GGUF = re.compile(r"-\d{5}-of-(?!00001)\d{5}\.gguf$")


def choose_weights(names: Collection[str], where: object) -> str:
    """The file that stands for a model's weights among the names in its folder, in the order of transformers' own
    `from_pretrained`: one file of its name for them, else an index; else the one file there is.

    Raises:
        ConfigError: several could be meant.
        WeightsNotFoundError: none.
    """
    for name in (
        "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
    ):  # fmt: skip
        if name in names:
            return name
    for suffixes in ((".safetensors",), _TORCH, (".gguf",)):
        found = sorted(n for n in names if n.endswith(suffixes) and not _NOT_WEIGHTS.fullmatch(n) and n[0] != ".")
        if len(found) > 1 and (shard := _SHARD.fullmatch(found[0])):
            raise WeightsNotFoundError(
                f"{where}: {len(found)} shards without {shard[1]}{shard[2]}.index.json, which says what is in which."
                " Download it as well."
            )
        if len(found) > 1:
            raise ConfigError(
                f"{where}: several files could be meant: {', '.join(found)}. Choose one with --file {found[0]}"
            )
        if found:
            return found[0]
    raise WeightsNotFoundError(f"{where}: no {', '.join(_WEIGHTS)} file there. Check the path or the name.")


def locate(source: str, file: str | None = None, revision: str | None = None) -> Path:
    """The weight file or index on this machine; files of a hub id are downloaded first.

    Args:
        source: a directory, a weight file, an index, or a hub id.
        file: which file of the directory or repository.
        revision: of the hub id; None: its main branch.

    Raises:
        WeightsNotFoundError: nothing there, and no such model on the hub.
        ConfigError: it is not clear which file is meant.
        WeightsError: the disk of the hub's cache has too little room.
    """
    path = Path(source).expanduser()
    if path.exists():
        if path.is_file():
            if file is not None:
                raise ConfigError(f"{path} is a file: leave --file out, or give its directory")
            return path
        names = [p.name for p in path.iterdir() if p.is_file()]
        chosen = file or named_by_config(path, names) or choose_weights(names, path)
        if not (path / chosen).is_file():
            raise WeightsNotFoundError(f"{path / chosen}: no such file.")
        return path / chosen
    if path.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1 or path.suffix in _WEIGHTS:
        raise WeightsNotFoundError(f"{source}: no such file or directory.")
    folder, chosen = fetch(source, file, revision)
    return folder / chosen


def fetch(repo_id: str, file: str | None = None, revision: str | None = None) -> tuple[Path, str]:
    """Download the weights and companions of a hub model into the hub's cache; its folder, and the file to open.

    What is in the cache is not fetched again; without a network what is there is used.
    """
    try:
        sizes = _sizes(repo_id, revision)
        if sizes is None:  # no network: what an earlier run brought
            folder = _cached(repo_id, revision or "main")
            names = [p.name for p in folder.iterdir()]
            return folder, file or named_by_config(folder, names) or choose_weights(names, repo_id)
        names = [name for name in sizes if "/" not in name]
        others = [
            n for n in names if n.endswith(".safetensors") and n != "model.safetensors" and not _SHARD.fullmatch(n)
        ]
        if file is None and others and "config.json" in names:  # which may name one of them
            folder = Path(huggingface_hub.snapshot_download(repo_id, revision=revision, allow_patterns=["config.json"]))
            file = named_by_config(folder, names)
        chosen = file or choose_weights(names, repo_id)
        if chosen not in sizes:
            raise WeightsNotFoundError(f"{repo_id}: has no file {chosen}. It has {', '.join(sorted(sizes))}.")
        wanted = _wanted(chosen, sizes)
        _check_room(repo_id, revision, {name: sizes[name] for name in wanted})
        folder = Path(huggingface_hub.snapshot_download(repo_id, revision=revision, allow_patterns=sorted(wanted)))
    except (OSError, HTTPError, huggingface_hub.errors.HFValidationError) as error:
        if isinstance(error, WeightsError):
            raise
        reason = str(error).strip().partition("\n")[0]
        raise WeightsNotFoundError(
            f"{repo_id}: no such path, and the hub gave no model of this name: {reason} Check the spelling, the "
            "network and, for a gated model, your token (`hf auth login`), or give the folder of a downloaded model."
        ) from error
    return folder, chosen


def fetch_companions(repo_id: str) -> Path:
    """The folder with a hub model's configuration and tokenizer, downloaded without weights."""
    try:
        return Path(
            huggingface_hub.snapshot_download(repo_id, allow_patterns=list(COMPANIONS), ignore_patterns=["*/*"])
        )
    except (OSError, HTTPError, huggingface_hub.errors.HFValidationError) as error:
        raise WeightsNotFoundError(
            f"{repo_id}: neither a folder nor a model the hub gave: {str(error).partition(chr(10))[0]}"
        ) from error


def _sizes(repo_id: str, revision: str | None) -> dict[str, int] | None:
    """Bytes of every file of a repository; None where the hub cannot be reached or is not to be asked."""
    if constants.HF_HUB_OFFLINE:
        return None
    try:
        info = huggingface_hub.HfApi().model_info(repo_id, revision=revision, files_metadata=True)
    except huggingface_hub.errors.HfHubHTTPError:
        raise
    except HTTPError:
        return None
    return {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or ()}


def _cached(repo_id: str, revision: str) -> Path:
    """The folder of what earlier downloads brought; `WeightsNotFoundError` if there is none."""
    root = Path(constants.HF_HUB_CACHE) / f"models--{repo_id.replace('/', '--')}"
    named = root / "refs" / revision
    commit = named.read_text(encoding="utf-8").strip() if named.is_file() else revision
    folder = root / "snapshots" / commit
    if not folder.is_dir():
        raise WeightsNotFoundError(
            f"{repo_id}: no such path, the hub cannot be asked, and {root} has nothing of revision {revision}. "
            "Connect, or unset HF_HUB_OFFLINE, or give the folder of a downloaded model."
        )
    return folder


def _wanted(chosen: str, sizes: Collection[str]) -> set[str]:
    """The chosen file, with the shards of an index, and the companions beside it."""
    parent = PurePosixPath(chosen).parent
    beside = [name for name in sizes if PurePosixPath(name).parent in (parent, PurePosixPath())]
    wanted = {name for name in beside if any(PurePosixPath(name).match(pattern) for pattern in COMPANIONS)}
    wanted |= {name for name in sizes if name.startswith("additional_chat_templates/")}
    if chosen.endswith(".index.json"):
        stem, suffix = chosen.removesuffix(".index.json").rsplit(".", 1)
        wanted |= {name for name in beside if re.fullmatch(rf"{re.escape(stem)}-\d+-of-\d+\.{suffix}", name)}
    return {name for name in wanted if not name.endswith(".index.json")} | {chosen}


def _check_room(repo_id: str, revision: str | None, sizes: dict[str, int]) -> None:
    """Refuse a download that the disk cannot hold."""
    cache = Path(constants.HF_HUB_CACHE)
    missing = sum(
        size
        for name, size in sizes.items()
        if not isinstance(huggingface_hub.try_to_load_from_cache(repo_id, name, revision=revision), str)
    )
    free = free_space(cache)
    if missing > free:
        raise WeightsError(
            f"{repo_id}: {format_bytes(missing)} ({missing} bytes) are to be downloaded, and the disk of {cache} has "
            f"{format_bytes(free)} ({free} bytes) free. Free some space, or set HF_HOME to a larger disk."
        )


def free_space(folder: Path) -> int:
    """Free bytes of the disk a folder is on, or will be when it is made."""
    folder = folder.absolute()
    return shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists())).free


def open_source(path: Path, config: Path | None = None) -> Source:
    """The source that reads a weight file or index, by its beginning where its name does not say.

    Args:
        config: a folder whose config.json is to be believed rather than what a GGUF file says.
    """
    if path.name.endswith(".json"):
        return SafetensorsSource(path) if ".safetensors" in path.name else TorchSource(path)
    if _SPLIT_GGUF.search(path.name):
        raise ConfigError(f"{path}: is one of several parts. Join them with llama-gguf-split --merge first.")
    with open(path, "rb") as stream:
        head = stream.read(4)
    if head == b"GGUF" or path.suffix == ".gguf":
        return GgufSource(path, config)
    if path.suffix in _TORCH or head == b"PK\x03\x04":
        return TorchSource(path)
    return SafetensorsSource(path)
