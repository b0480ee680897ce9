"""`merge`: an adapter into its base, file by file, into a directory that any library loads.

It knows the order of the work: plan, room on the disk, files, what is around them, verification, and only
then the name. What the files hold is made elsewhere.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils.sha import sha_fileobj

from ..errors import ConfigError, WeightsError
from ..machine.heap import apart_from_heap
from ..machine.memory import format_bytes
from ..models.lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from ..prepare import prepare
from ..prepare.quantise import encoder_of
from ..prepare.single_file import parse_dtype
from ..prepare.work import check_target
from ..storage.index import GlobalBinaryIndex
from ..storage.writer import SafetensorsWriter
from .checkpoint import Checkpoint
from .hub import HubUpload
from .shards import INDEX, Shard, index_of, plan_shards
from .staging import Staging, staged
from .surroundings import write_surroundings
from .verify import Comparison, compare
from .weights import MergedWeights

UPLOADED = "uploaded.json"
_CLAIMED, _OVERWRITES = "claimed", "overwrites"  # what a staging is marked with
Progress = Callable[[Shard, int, int, str], None]
"""Called with a shard, its number from 1, how many there are, and 'merged', 'kept', 'uploaded' or 'uploaded before'."""


@dataclass(frozen=True)
class MergeResult:
    """What a merge made."""

    output: Path
    """The directory that was made."""
    shards: list[str]
    """Names of the weights files."""
    nbytes: int
    """Of all weights files' tensors."""
    changed: int
    """Stored tensors that the adapter changed."""
    moved: float | None
    """See `MergedWeights.moved`; None: all files were finished by an earlier run."""
    comparison: Comparison | None
    """None: not verified."""
    repo: str | None
    """Where the weights files are, if not in `output`."""
    errors: dict[str, float] = field(default_factory=dict)
    """Of tensors that were quantised again after the merge: norm of what they are off it, over its own."""


def merge(
    checkpoint: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | str | None = None,
    quantize: str | None = None,
    single_file: bool = False,
    max_shard_size: int | None = None,
    upload: str | None = None,
    overwrite: bool = False,
    verify: bool = True,
    progress: Progress | None = None,
) -> MergeResult:
    """Merge an adapter into its base model, in the memory of a few blocks of one tensor.

    The work is done in `.OUTPUT.partial` beside the output, which appears complete or not at all. A run that was
    stopped goes on where it was when called again with the same arguments. Verification streams both models and
    takes the memory of that.

    Args:
        checkpoint: a directory with a PEFT adapter, such as training writes.
        output: the directory to make.
        base: the base model, where the checkpoint's own note is not right any more.
        dtype: of the merged weights; None: each tensor keeps the base's, and what was codes has the type that its
            configuration names.
        quantize: 'nf4', 'int8' or 'fp8': the merged matrices become codes of this format again, which rounds the
            adapter with them. Needs room for the model in 16 bits meanwhile; not possible with `upload`.
        single_file: one `model.safetensors`; otherwise the base's own cut, unless `max_shard_size` is given.
        max_shard_size: bytes of tensors in a file.
        upload: a repository on the hub: each file goes there as it is made and is then removed here.
        overwrite: let the upload replace weights the repository has; those that do not belong to the new ones are
            removed by its last commit.
        verify: compare logits with base and adapter; not possible with `upload`, as the files are gone then.
        progress: told of every file.

    Raises:
        CheckpointError, UnsupportedError: the adapter is damaged, does not fit, or is of a kind that cannot be merged.
        ConfigError: the output exists, options contradict each other, or the repository has weights already.
        WeightsError: the base is damaged, too little room on the disk, or the result failed verification.
        HubError: the hub refused a file; it is still here.
    """
    if single_file and max_shard_size is not None:
        raise ConfigError("single_file and max_shard_size contradict each other: give one of them")
    if quantize is not None:
        if upload is not None:
            raise ConfigError("quantize and upload contradict each other: merge, quantise, and upload the folder")
        encoder_of(quantize)
        options = {"base": base, "dtype": dtype, "verify": verify, "progress": progress}
        return _quantised(checkpoint, Path(output), quantize, single_file, max_shard_size, options)
    target = None if dtype is None else parse_dtype(dtype)
    source = Checkpoint.open(checkpoint, base)
    with apart_from_heap(), source.base_weights() as weights, source.tensors() as saved:
        source.check_base(weights)
        made = MergedWeights(source, weights, saved)
        decoded = _named_dtype(source.base_config())
        tensors = made.tensors.tensors
        shards = plan_shards(tensors, made.second_copies, target, decoded, single_file, max_shard_size)
        with staged(Path(output), _made_from(source, weights, shards, upload)) as staging:
            hub = _claimed(upload, staging, overwrite) if upload is not None else None
            todo = [shard for shard in shards if not staging.has(shard.name)]
            _check_room(staging, todo, at_once=hub is None)
            for number, shard in enumerate(shards, 1):
                state = _make(shard, made, staging, hub, todo)
                if progress is not None:
                    progress(shard, number, len(shards), state)
            weights.check_unchanged()
            _write_around(source, staging, shards, target)
            comparison = None
            if verify and hub is None:
                comparison = compare(source, staging.folder, _changed_type(made, shards))
                _accept(comparison, staging)
            if hub is not None:
                own = {shard.name for shard in shards} | ({INDEX} if len(shards) > 1 else set())
                stale = [name for name in hub.weights() if name not in own] if staging.marked(_OVERWRITES) else []
                hub.put_rest(staging.folder, remove=stale)
                _write_json(staging.folder / UPLOADED, {"repo": upload, "files": staging.elsewhere})
            placed = staging.publish()
    return MergeResult(
        placed, [s.name for s in shards], sum(s.data_bytes for s in shards), len(made.changed), made.moved,
        comparison, upload,
    )  # fmt: skip


def _claimed(repo: str, staging: Staging, overwrite: bool) -> HubUpload:
    """The repository, once it is sure that no weights in it are replaced or mixed with ours unasked."""
    hub = HubUpload(repo)
    if overwrite and not staging.marked(_OVERWRITES):
        staging.mark(_OVERWRITES)
    if not staging.marked(_CLAIMED):
        there = hub.weights()
        if there and not overwrite:
            raise ConfigError(
                f"{hub.repo} has weights already: {', '.join(there[:4])}{', ...' if len(there) > 4 else ''}. Give "
                "another repository, or --overwrite, which replaces them and removes what does not belong any more"
            )
        staging.mark(_CLAIMED)
    return hub


def _make(shard: Shard, made: MergedWeights, staging: Staging, hub: HubUpload | None, todo: list[Shard]) -> str:
    """Finish one file, unless an earlier run did; returns what was done."""
    path, state = staging.folder / shard.name, "kept"
    if shard.name in staging.elsewhere:
        path.unlink(missing_ok=True)
        return "uploaded before"
    if shard in todo:
        declared = [(name, dtype, record.shape) for name, (record, dtype) in shard.tensors.items()]
        with SafetensorsWriter(path, declared) as writer:
            for name, (record, dtype) in shard.tensors.items():
                writer.write_parts(name, made.parts(record, dtype))
        state = "merged"
    if hub is not None:
        staging.note(shard.name, hub.put(path))
        path.unlink()
        state = "uploaded"
    return state


def _made_from(
    source: Checkpoint, weights: GlobalBinaryIndex, shards: list[Shard], upload: str | None
) -> dict[str, Any]:
    """Everything the files' bytes follow from."""
    files = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in weights.files]
    adapter = [_sha256(source.folder / name) for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)]
    cut = [[shard.name, sorted((name, str(dtype)) for name, (_, dtype) in shard.tensors.items())] for shard in shards]
    return {"format": 1, "base": files, "adapter": adapter, "shards": cut, "upload": upload}


def _check_room(staging: Staging, todo: list[Shard], at_once: bool) -> None:
    sizes = [shard.nbytes for shard in todo]
    needed = sum(sizes) if at_once else max(sizes, default=0)
    free = shutil.disk_usage(staging.folder).free
    if needed > free:
        count = "together" if at_once else "each at most"
        how = "free some space, choose another disk"
        how += ", or send each file away as it is made with --upload" if at_once else ", or cut by --max-shard-size"
        raise WeightsError(
            f"{staging.target}: {len(todo)} files of {format_bytes(needed)} {count} are to be written, and the "
            f"disk has {format_bytes(free)} free: {how}"
        )


def _changed_type(made: MergedWeights, shards: list[Shard]) -> torch.dtype:
    """The coarsest type among the tensors the adapter changed, as they are written."""
    types = {name: dtype for shard in shards for name, (_, dtype) in shard.tensors.items()}
    return max((types[name] for name in made.changed if name in types), key=lambda dtype: torch.finfo(dtype).eps)


def _named_dtype(config: Mapping[str, Any]) -> torch.dtype:
    """The type that a configuration names for its weights; bfloat16 where it names none."""
    named = str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch.")
    return {"float16": torch.float16, "float32": torch.float32}.get(named, torch.bfloat16)


def _quantised(
    checkpoint: str | os.PathLike[str],
    output: Path,
    quantize: str,
    single_file: bool,
    max_shard_size: int | None,
    options: dict[str, Any],
) -> MergeResult:
    """Merge beside the output, and quantise what was merged."""
    check_target(output)
    whole = output.absolute().with_name(f".{output.absolute().name}.merged")
    shutil.rmtree(whole, ignore_errors=True)
    result = merge(checkpoint, whole, max_shard_size=max_shard_size, **options)
    size = max_shard_size or max(result.nbytes, 1)
    made = prepare(whole, output, quantize=quantize, monolithic=single_file, max_shard_size=size)
    shutil.rmtree(whole)
    names = sorted(path.name for path in made.path.glob("*.safetensors"))
    return replace(result, output=made.path, shards=names, nbytes=made.nbytes, errors=made.errors)


def _write_around(source: Checkpoint, staging: Staging, shards: list[Shard], dtype: torch.dtype | None) -> None:
    if len(shards) > 1:
        _write_json(staging.folder / INDEX, index_of(shards))
    write_surroundings(source, staging.folder, None if dtype is None else str(dtype).removeprefix("torch."))


def _accept(comparison: Comparison, staging: Staging) -> None:
    if not comparison.good:
        raise WeightsError(
            f"{staging.target}: was not made: the merged model's logits are {comparison.error:.2g} of their norm from "
            f"those of base and adapter, {comparison.allowed:.2g} would be rounding. The files are in "
            f"{staging.folder}; a wider --dtype rounds less, and --no-verify takes them as they are"
        )


def _write_json(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _sha256(path: Path) -> str:
    with open(path, "rb") as stream:
        return sha_fileobj(stream).hex()
