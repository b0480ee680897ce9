"""`prepare`: from any checkpoint to a transformers folder that streams well, in about one tensor's memory.

It puts the room's parts in order; what each does, they say themselves.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import torch

from ..errors import ConfigError, WeightsError
from ..machine.memory import format_bytes, parse_bytes
from ..storage.index import GlobalBinaryIndex
from .companions import find_companions, read_config, write_companions
from .fit import Fit, check_fit, untied
from .gguf_source import GgufSource
from .locate import free_space, locate, open_source
from .output import FileWriter, OutputFile, plan_output, stored_digest, write_index
from .quantise import QuantisedSource, encoder_of, kinds_of
from .result import Prepared, as_it_is, described, notes
from .single_file import converted, parse_dtype, target_type
from .source import FileWatch, Source
from .work import WorkFolder, Written, check_target

logger = logging.getLogger(__name__)

VERSION = 1  # raise it when other bytes are written for the same source
_SYNC_BYTES = 256 << 20
_COMPANION_BYTES = 64 << 20
"""Set aside for tokenizer and configuration."""

Progress = Callable[[str, int, int], None]
"""Called with "writing" or "verifying", bytes done, and bytes in all."""


def prepare(
    source: str | os.PathLike[str],
    output_dir: str | os.PathLike[str] | None = None,
    *,
    dtype: torch.dtype | str | None = None,
    monolithic: bool = False,
    max_shard_size: int | str = "5GB",
    config: str | None = None,
    file: str | None = None,
    revision: str | None = None,
    quantize: str | None = None,
    quantize_also: Sequence[str] = (),
    progress: Progress | None = None,
) -> Prepared:
    """Make a folder of safetensors, configuration and tokenizer that plain `from_pretrained` and LEMA load.

    Every tensor's bytes are read back from the disk and compared, by a digest, with what was converted from the
    source. The folder appears in one step, complete. An interrupted run is taken up by the same call: tensors it had
    written are verified and kept.

    Args:
        source: a hub id, a directory, or a `.safetensors`, `.bin`, `.pt` or `.gguf` file or index.
        output_dir: the folder to make: absent or empty. None will do where nothing has to be written.
        dtype: floating-point type to write; None: the source's own, float16 for a quantised GGUF.
        monolithic: one weights file rather than shards.
        max_shard_size: bytes of tensors in a file, or '5GB'.
        config: a folder or hub id with config.json and tokenizer, for weights that have none beside them.
        file: which file of a directory or repository.
        revision: of a hub id.
        quantize: 'nf4', 'int8' or 'fp8': matrices of the layers, experts among them, become codes of this format.
        quantize_also: 'router', 'embedding' or 'head', which stay as they are otherwise.

    Raises:
        ConfigError: a bad setting, no configuration, or something is at `output_dir`.
        UnsupportedError: quantised weights, code in a checkpoint, or a model that LEMA cannot stream.
        WeightsError: the source is missing or damaged, the disk full or not writable, or what was read back differs, or
            is further from the source than quantising can bring it.
    """
    encoder = None if quantize is None else encoder_of(quantize)
    kinds = kinds_of(quantize_also)
    wanted = None if dtype is None else parse_dtype(dtype)
    limit = None if monolithic else parse_bytes(max_shard_size, "max_shard_size")
    path = locate(os.fspath(source), file, revision)
    folder = find_companions(path, config)
    with closing(open_source(path, folder if config else None)) as weights:
        gguf = weights if isinstance(weights, GgufSource) else None
        if gguf is not None:
            wanted = wanted or gguf.natural_dtype
            values = gguf.config_values()
            folder = folder if config else None
        else:
            values = read_config(folder, path)
        stored = _main_dtype([(r.dtype, r.nbytes) for r in weights.tensors.values()])
        fit = check_fit(values, weights, wanted or stored or torch.float32)
        types = {
            name: target_type(record.dtype, None if name in fit.in_float32 else wanted)
            for name, record in weights.tensors.items()
            if name not in fit.copies
        }
        quantised = None if encoder is None else QuantisedSource(weights, fit, types, encoder, kinds)
        if quantised is None and folder == path.parent and _streams_already(weights, types, fit, monolithic):
            return as_it_is(weights, types, fit, path)
        if output_dir is None:
            raise ConfigError(f"{source}: has to be written anew: name an output folder")
        values = untied(values) if fit.contradicted else values
        target = Path(output_dir)
        named = wanted or (None if "dtype" in values or "torch_dtype" in values else stored)
        if quantised is None:
            job = _Job(weights, types, fit, target, limit, progress or _silent)
        else:
            job = _Job(quantised, quantised.types, fit, target, limit, progress or _silent)
            values["quantization_config"] = quantised.settings(fit.linear, wanted or stored or torch.float32)
        return job.run(lambda output: write_companions(output, folder, values, named, gguf))


class _Job:
    """One conversion, from the plan of its files to the renamed folder."""

    def __init__(
        self,
        source: Source,
        types: dict[str, torch.dtype],
        fit: Fit,
        target: Path,
        max_shard_size: int | None,
        progress: Progress,
    ) -> None:
        self._source, self._types, self._fit, self._target = source, types, fit, target
        self._limit = max_shard_size
        self._progress = progress
        self._order = {name: position for position, name in enumerate(source.tensors)}
        self._overflowed: dict[str, int] = {}

    def run(self, finish: Callable[[Path], None]) -> Prepared:
        """Write, verify, finish the folder with what stands beside the weights, and put it in place."""
        check_target(self._target)
        watch = FileWatch(self._source.files)
        declared = [(name, dtype, self._source.tensors[name].shape) for name, dtype in self._types.items()]
        planned = plan_output(self._target, declared, self._limit, self._source.metadata)
        self._check_space(planned)
        job = {
            "version": VERSION,
            "sources": watch.states,
            "files": {f.path.name: {n: str(r.dtype) for n, r in f.records.items()} for f in planned},
        }
        with WorkFolder(self._target, job) as work:
            files = plan_output(work.output, declared, self._limit, self._source.metadata)
            if work.restarted:
                logger.warning("%s: an unfinished run for another source or type was there; starting anew", work.path)
            kept = self._verify_kept(work, files)
            self._write(work, files, kept)
            self._verify(work, files, kept)
            watch.check()
            write_index(work.output, files)
            finish(work.output)
            source = self._source
            errors = source.errors(work.output, self._progress) if isinstance(source, QuantisedSource) else {}
            with GlobalBinaryIndex(work.output) as index:  # its headers are checked in full
                if wrong := set(index.keys) ^ set(self._types):
                    raise WeightsError(f"{work.output}: {sorted(wrong)[:3]} were not written as planned. Start again.")
            work.publish()
        return replace(
            described(self._target, self._types, self._source, len(files)),
            written=True,
            kept=len(kept),
            overflowed=self._overflowed,
            errors=errors,
            notes=notes(self._source, self._fit),
        )

    def _check_space(self, files: list[OutputFile]) -> None:
        there = self._target.with_name(f".{self._target.name}.prepare")
        parts = [part for part in there.rglob("*") if part.is_file()] if there.is_dir() else []
        has = sum(part.stat().st_blocks * 512 for part in parts)
        needed = sum(file.nbytes for file in files) + _COMPANION_BYTES
        free = free_space(self._target.parent)
        if needed > free + has:
            raise WeightsError(
                f"{self._target}: needs {format_bytes(needed)} ({needed} bytes), and its disk has {format_bytes(free)} "
                f"({free} bytes) free{f', with {format_bytes(has)} written before' if has else ''}. Free some space, "
                "write elsewhere, or choose a smaller dtype."
            )

    def _verify_kept(self, work: WorkFolder, files: list[OutputFile]) -> set[str]:
        """Tensors an earlier run wrote whose bytes are as it noted; others are forgotten."""
        kept = set()
        records = {name: record for file in files for name, record in file.records.items()}
        done, total = 0, sum(records[name].nbytes for name in work.done if name in records)
        for name, written in list(work.done.items()):
            record = records.get(name)
            if record is not None and _is_there(record.file, record.end) and stored_digest(record) == written.digest:
                kept.add(name)
                if written.overflowed:
                    self._overflowed[name] = written.overflowed
                done += record.nbytes
                self._progress("verifying what is there", done, total)
            else:
                work.drop(name)
        return kept

    def _write(self, work: WorkFolder, files: list[OutputFile], kept: set[str]) -> None:
        total = sum(record.nbytes for file in files for record in file.records.values())
        done = sum(record.nbytes for file in files for name, record in file.records.items() if name in kept)
        for file in files:
            with closing(FileWriter(file)) as writer:
                pending: dict[str, Written] = {}
                unsynced = 0
                for name in sorted(file.records.keys() - kept, key=self._order.__getitem__):
                    digest = writer.write(name, self._pieces(name))
                    pending[name] = Written(digest, self._overflowed.get(name, 0))
                    unsynced += file.records[name].nbytes
                    done += file.records[name].nbytes
                    self._progress("writing", done, total)
                    if unsynced >= _SYNC_BYTES:
                        writer.sync()
                        work.add(pending)
                        pending, unsynced = {}, 0
                writer.sync()
                work.add(pending)

    def _pieces(self, name: str) -> Iterator[torch.Tensor]:
        for piece in self._source.pieces(name):
            if piece.dtype == self._types[name]:
                yield piece
            else:
                yield from converted(name, piece, self._types[name], torch.device("cpu"), self._overflowed)

    def _verify(self, work: WorkFolder, files: list[OutputFile], kept: set[str]) -> None:
        """Read back what this run wrote. What is in `kept` was read back before."""
        todo = [record for file in files for name, record in file.records.items() if name not in kept]
        done, total = 0, sum(record.nbytes for record in todo)
        for record in todo:
            if stored_digest(record) != work.done[record.name].digest:
                work.drop(record.name)
                raise WeightsError(
                    f"{record.file}: tensor {record.name} reads back differently from what was written. Check the disk "
                    "and its cable or memory, and run the same command again."
                )
            done += record.nbytes
            self._progress("verifying", done, total)


def _silent(phase: str, done: int, total: int) -> None:
    """No progress shown."""


def _is_there(file: Path, end: int) -> bool:
    return file.is_file() and file.stat().st_size >= end


def _streams_already(source: Source, types: dict[str, torch.dtype], fit: Fit, monolithic: bool) -> bool:
    return (
        all(file.suffix == ".safetensors" for file in source.files)
        and all(source.tensors[name].dtype == dtype for name, dtype in types.items())
        and not fit.contradicted
        and not (monolithic and len(source.files) > 1)
    )


def _main_dtype(sizes: list[tuple[torch.dtype, int]]) -> torch.dtype | None:
    by_type: Counter[torch.dtype] = Counter()
    for dtype, nbytes in sizes:
        if dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            by_type[dtype] += nbytes
    return max(by_type, key=by_type.__getitem__, default=None)
