"""The binary index against real files, hostile files, and the safetensors library as oracle."""

from __future__ import annotations

import gc
import gzip
import io
import json
import os
import pickle
import struct
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import save_torch_state_dict
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save, save_file
from transformers.modeling_utils import _get_resolved_checkpoint_files

from lema.errors import (
    LemaError,
    MissingTensorError,
    ReadError,
    WeightsError,
    WeightsFormatError,
    WeightsNotFoundError,
)
from lema.storage.header import DTYPES, MAX_HEADER_BYTES
from lema.storage.index import GlobalBinaryIndex, TensorRecord

pytestmark = pytest.mark.timeout(60)

linux = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
fuzz = settings(max_examples=200, deadline=None)

BITS = {name: 4 if name == "F4" else 8 * dtype.itemsize for name, dtype in DTYPES.items()}


# --- files, valid and not ---------------------------------------------------------------------------


def pack(header: object, data: bytes = b"") -> bytes:
    """A safetensors file. `header` is bytes or text as they are, or an object to be written as JSON."""
    if not isinstance(header, (bytes, str)):
        header = json.dumps(header)
    raw = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(raw)) + raw + data


def entry(dtype: object = "U8", shape: object = (4,), offsets: object = (0, 4), **more: object) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


def put(directory: Path, raw: bytes, name: str = "model.safetensors") -> Path:
    file = directory / name
    file.unlink(missing_ok=True)  # a file cut short in place would take the mapping of the last example with it
    file.write_bytes(raw)
    return file


def as_bytes(tensor: torch.Tensor) -> bytes:
    """For comparing types that torch.equal does not know, and NaNs."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
    assert as_bytes(ours) == as_bytes(theirs)


def three_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "model.embed_tokens.weight": torch.randn(11, 6, generator=generator),
        "model.layers.0.self_attn.q_proj.weight": torch.randn(6, 6, generator=generator).bfloat16(),
        "model.norm.weight": torch.randn(6, generator=generator),
    }


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    return three_tensors()


@pytest.fixture
def single(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    file = tmp_path / "model.safetensors"
    save_file(tensors, file, metadata={"format": "pt"})
    return file


@pytest.fixture
def sharded(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """Three files and their index, written by huggingface_hub as transformers does."""
    directory = tmp_path / "sharded"
    directory.mkdir()
    save_torch_state_dict(tensors, directory, max_shard_size=80)
    return directory


def edit_index(directory: Path, change: Callable[[dict[str, str]], None]) -> Path:
    file = directory / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    change(index["weight_map"])
    file.write_text(json.dumps(index))
    return file


def shard_of(directory: Path, name: str) -> str:
    return json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"][name]


# --- what it serves ---------------------------------------------------------------------------------


def test_records_say_where_the_bytes_are(single: Path, tensors: dict[str, torch.Tensor]) -> None:
    gbi = GlobalBinaryIndex(single)
    raw = single.read_bytes()
    assert isinstance(gbi.keys, list)
    assert sorted(gbi.keys) == sorted(tensors)
    assert len(gbi) == 3
    assert gbi.path == single
    assert gbi.files == [single]
    assert gbi.metadata == {"format": "pt"}
    assert gbi.total_bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert "model.norm.weight" in gbi
    assert "norm" not in gbi
    assert 3 not in gbi
    assert "3 tensors in 1 files" in repr(gbi)
    for name, tensor in tensors.items():
        record = gbi.record(name)
        assert record == TensorRecord(name, single, record.offset, tensor.nbytes, tensor.dtype, tuple(tensor.shape))
        assert raw[record.offset : record.end] == as_bytes(tensor)
    offsets = [gbi.record(name).offset for name in gbi.keys]
    assert offsets == sorted(offsets)


@pytest.mark.parametrize("name", sorted(DTYPES))
def test_every_dtype_as_the_library_reads_it(tmp_path: Path, name: str) -> None:
    size = 8 * BITS[name] // 8
    data = bytes(range(7, 7 + size)) if name != "BOOL" else bytes([0, 1] * 4)
    header = {"t": entry(name, [2, 4], [0, size]), "none": entry(name, [0, 2], [size, size])}
    if name != "F4":
        header["scalar"] = entry(name, [], [size, size + BITS[name] // 8])
        data += data[: BITS[name] // 8]
    file = put(tmp_path, pack(json.dumps(header).ljust(256), data))
    expected = load_file(file)
    gbi = GlobalBinaryIndex(file)
    loaded = gbi.load_tensors(gbi.keys)
    assert loaded.keys() == expected.keys()
    for key, tensor in expected.items():
        assert_same(loaded[key], tensor)
        assert_same(gbi.view(key), tensor)


def test_written_by_the_library_read_by_us(tmp_path: Path) -> None:
    unwritable = {torch.float4_e2m1fn_x2} if hasattr(torch, "float4_e2m1fn_x2") else set()
    tensors = {
        name: torch.arange(6).to(torch.uint8).repeat(dtype.itemsize).view(dtype)
        for name, dtype in DTYPES.items()
        if dtype not in unwritable and name != "BOOL"
    }
    tensors["BOOL"] = torch.tensor([True, False, True])
    save_file(tensors, tmp_path / "all.safetensors")
    gbi = GlobalBinaryIndex(tmp_path)
    for key, tensor in load_file(tmp_path / "all.safetensors").items():
        assert_same(gbi.view(key), tensor)


def test_load_tensors_owns_its_memory(single: Path, tensors: dict[str, torch.Tensor]) -> None:
    gbi = GlobalBinaryIndex(single)
    names = ["model.norm.weight", "model.embed_tokens.weight", "model.norm.weight"]
    loaded = gbi.load_tensors(names)
    assert list(loaded) == names[:2]
    for name, tensor in loaded.items():
        assert_same(tensor, tensors[name])
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
        assert tensor.data_ptr() != gbi.view(name).data_ptr()
    loaded["model.norm.weight"].zero_()
    assert_same(gbi.view("model.norm.weight"), tensors["model.norm.weight"])
    assert gbi.load_tensors(iter(names[:1]), device=torch.device("meta"))["model.norm.weight"].is_meta
    assert gbi.load_tensors([]) == {}


@pytest.mark.parametrize("suffix", ["weights.bin", "weights", "a.b.safetensors"])
def test_suffix_does_not_matter(single: Path, suffix: str) -> None:
    assert len(GlobalBinaryIndex(single.rename(single.with_name(suffix)))) == 3


def test_path_may_be_a_string(single: Path) -> None:
    assert GlobalBinaryIndex(str(single)).path == single


def test_header_padded_to_a_page(tmp_path: Path) -> None:
    file = put(tmp_path, pack(json.dumps({"a": entry()}).ljust(4096 - 8), b"abcd"))
    gbi = GlobalBinaryIndex(file)
    assert gbi.record("a").offset == 4096
    assert bytes(gbi.view("a").tolist()) == b"abcd"


def test_no_tensors_at_all(tmp_path: Path) -> None:
    gbi = GlobalBinaryIndex(put(tmp_path, pack({})))
    assert gbi.keys == []
    assert gbi.total_bytes == 0
    assert gbi.metadata == {}


def test_missing_tensors_are_listed_with_what_is_similar(single: Path) -> None:
    gbi = GlobalBinaryIndex(single)
    for lookup in (gbi.record, gbi.view, gbi.advise_random, gbi.evict):
        with pytest.raises(MissingTensorError) as caught:
            lookup("layers.0.self_attn.q_proj.weight")
        text = str(caught.value)
        assert str(single) in text
        assert "'layers.0.self_attn.q_proj.weight'" in text
        assert "'model.layers.0.self_attn.q_proj.weight'" in text
    with pytest.raises(MissingTensorError) as caught:
        gbi.load_tensors(["zzzz", "model.norm.weight", "yyyy"])
    assert "'zzzz', 'yyyy'" in str(caught.value)
    assert "Nothing is similar" in str(caught.value)
    assert isinstance(caught.value, KeyError)


# --- views ------------------------------------------------------------------------------------------


def mappings_of(file: Path) -> list[tuple[int, int]]:
    """Address ranges at which this process has a file mapped."""
    ranges = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(str(file)):
            low, high = line.split()[0].split("-")
            ranges.append((int(low, 16), int(high, 16)))
    return ranges


@linux
def test_view_is_the_mapped_file(single: Path, tensors: dict[str, torch.Tensor]) -> None:
    gbi = GlobalBinaryIndex(single)
    assert mappings_of(single) == []  # made when first needed
    for name, tensor in tensors.items():
        view = gbi.view(name)
        assert_same(view, tensor)
        assert view.data_ptr() == gbi.view(name).data_ptr()
        ((low, high),) = mappings_of(single)
        assert low <= view.data_ptr() < high
        assert view.data_ptr() - low == gbi.record(name).offset


def test_a_write_stays_in_the_mapping(single: Path, tensors: dict[str, torch.Tensor]) -> None:
    before = single.read_bytes()
    name = "model.norm.weight"
    gbi = GlobalBinaryIndex(single)
    gbi.view(name).fill_(7.0)
    assert gbi.view(name).tolist() == [7.0] * 6
    assert single.read_bytes() == before
    gbi.check_unchanged()
    assert_same(gbi.load_tensors([name])[name], tensors[name])
    assert_same(GlobalBinaryIndex(single).view(name), tensors[name])


def test_live_view_survives_close(single: Path, tensors: dict[str, torch.Tensor]) -> None:
    gbi = GlobalBinaryIndex(single)
    view = gbi.view("model.norm.weight")
    gbi.close()
    gbi.close()
    del gbi
    gc.collect()
    view[0] = view[0].clone()
    assert_same(view, tensors["model.norm.weight"])
    if sys.platform == "linux":
        assert len(mappings_of(single)) == 1
        del view
        gc.collect()
        assert mappings_of(single) == []


@pytest.mark.parametrize(
    "use",
    [
        lambda gbi: gbi.keys,
        lambda gbi: gbi.files,
        lambda gbi: gbi.metadata,
        lambda gbi: gbi.total_bytes,
        lambda gbi: len(gbi),
        lambda gbi: "model.norm.weight" in gbi,
        lambda gbi: gbi.record("model.norm.weight"),
        lambda gbi: gbi.view("model.norm.weight"),
        lambda gbi: gbi.load_tensors(["model.norm.weight"]),
        lambda gbi: gbi.load_tensors([]),
        lambda gbi: gbi.advise_random("model.norm.weight"),
        lambda gbi: gbi.check_unchanged(),
        lambda gbi: gbi.__enter__(),
    ],
)
def test_nothing_works_after_close(single: Path, use: Callable[[GlobalBinaryIndex], object]) -> None:
    with GlobalBinaryIndex(single) as gbi:
        use(gbi)
    with pytest.raises(WeightsError, match="was closed") as caught:
        use(gbi)
    assert str(single) in str(caught.value)
    assert "closed" in repr(gbi)


def test_unaligned_tensors_come_as_copies(tmp_path: Path) -> None:
    header = json.dumps({"byte": entry("U8", [1], [0, 1]), "f": entry("F32", [2], [1, 9])}).ljust(120)
    file = put(tmp_path, pack(header, b"\xff" + struct.pack("<2f", 1.5, -2.0)))
    gbi = GlobalBinaryIndex(file)
    assert gbi.view("f").tolist() == [1.5, -2.0]
    assert gbi.view("f").data_ptr() % 4 == 0
    assert gbi.view("byte").tolist() == [255]
    assert gbi.load_tensors(["f"])["f"].tolist() == [1.5, -2.0]


@linux
def test_a_file_larger_than_memory_can_be_mapped(tmp_path: Path) -> None:
    size = 1 << 41
    raw = pack(json.dumps({"huge": entry("U8", [size], [0, size])}).ljust(4088))
    file = put(tmp_path, raw)
    try:
        os.truncate(file, len(raw) + size)
    except OSError:
        pytest.skip("no sparse files of 2 TiB here")
    if Path("/proc/sys/vm/overcommit_memory").read_text().strip() == "2":
        pytest.skip("the system promises no memory it does not have")
    view = GlobalBinaryIndex(file).view("huge")
    assert view.shape == (size,)
    assert view[-1] == 0


@linux
def test_advise_random_covers_the_pages_of_one_tensor(tmp_path: Path) -> None:
    page = os.sysconf("SC_PAGESIZE")
    half = 8 * page
    header = {"a": entry("U8", [half], [0, half]), "b": entry("U8", [half], [half, 2 * half])}
    header["none"] = entry("U8", [0], [2 * half, 2 * half])
    file = put(tmp_path, pack(json.dumps(header).ljust(page - 8), bytes(2 * half)))
    gbi = GlobalBinaryIndex(file)
    gbi.advise_random("none")
    gbi.advise_random("b")
    random_bytes = 0
    lines = Path("/proc/self/smaps").read_text().splitlines()
    at = 0
    for line in lines:
        if "-" in line.split()[0]:
            at = int(line.split("-")[0], 16) if line.endswith(str(file)) else 0
            length = int(line.split()[0].split("-")[1], 16) - at
        elif at and line.startswith("VmFlags:") and " rr" in line:
            random_bytes += length
            assert at == gbi.view("b").data_ptr()
    assert random_bytes == half


@linux
def test_evicted_pages_are_gone_and_come_back(tmp_path: Path) -> None:
    header = {"a": entry("U8", [1 << 20], [0, 1 << 20])}
    file = put(tmp_path, pack(json.dumps(header).ljust(os.sysconf("SC_PAGESIZE") - 8), bytes([7]) * (1 << 20)))
    gbi = GlobalBinaryIndex(file)

    def resident_kib() -> int:
        lines = Path("/proc/self/smaps").read_text().splitlines()
        at = next(number for number, line in enumerate(lines) if line.endswith(str(file)))
        return next(int(line.split()[1]) for line in lines[at:] if line.startswith("Rss:"))

    assert int(gbi.view("a").to(torch.int64).sum()) == 7 << 20
    assert resident_kib() >= 1 << 10
    gbi.evict("a")
    assert resident_kib() <= 64
    assert int(gbi.view("a").to(torch.int64).sum()) == 7 << 20


def test_threads_share_one_mapping(single: Path) -> None:
    def look(gbi: GlobalBinaryIndex, barrier: threading.Barrier) -> torch.Tensor:
        barrier.wait()
        return gbi.view("model.norm.weight")

    with ThreadPoolExecutor(8) as pool:
        for _ in range(20):
            gbi, barrier = GlobalBinaryIndex(single), threading.Barrier(8)
            views = [pool.submit(look, gbi, barrier) for _ in range(8)]
            assert len({view.result().data_ptr() for view in views}) == 1


# --- files that change ------------------------------------------------------------------------------

USES = [
    lambda gbi: gbi.check_unchanged(),
    lambda gbi: gbi.view("model.norm.weight"),
    lambda gbi: gbi.load_tensors(["model.norm.weight"]),
    lambda gbi: gbi.advise_random("model.norm.weight"),
]


@pytest.mark.parametrize("use", USES)
def test_a_file_cut_short_later(single: Path, use: Callable[[GlobalBinaryIndex], object]) -> None:
    gbi = GlobalBinaryIndex(single)
    use(gbi)
    size = single.stat().st_size
    os.truncate(single, size - 5)
    with pytest.raises(WeightsError, match=f"size from {size} to {size - 5} bytes") as caught:
        use(gbi)
    assert str(single) in str(caught.value)
    assert "Open the weights again" in str(caught.value)


@pytest.mark.parametrize("use", USES)
def test_a_file_written_again(single: Path, use: Callable[[GlobalBinaryIndex], object]) -> None:
    gbi = GlobalBinaryIndex(single)
    os.utime(single, ns=(0, 1234))
    with pytest.raises(WeightsError, match=r"modification time from [0-9]+ to 1234 ns"):
        use(gbi)


@pytest.mark.parametrize("use", USES)
def test_a_file_taken_away(single: Path, use: Callable[[GlobalBinaryIndex], object]) -> None:
    gbi = GlobalBinaryIndex(single)
    single.unlink()
    with pytest.raises(WeightsError, match="gone since it was opened"):
        use(gbi)


def test_cut_short_between_the_check_and_the_read(single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gbi = GlobalBinaryIndex(single)
    last = gbi.keys[-1]
    monkeypatch.setattr(GlobalBinaryIndex, "_check_file", lambda self, file: None)
    os.truncate(single, single.stat().st_size - 5)
    nbytes = gbi.record(last).nbytes
    with pytest.raises(ReadError, match=f"{last}.*{nbytes - 5} of {nbytes} bytes"):
        gbi.load_tensors([last])
    with pytest.raises(ReadError, match="cannot be mapped"):
        gbi.view(last)


# --- where files are looked for ---------------------------------------------------------------------


def test_missing_path(tmp_path: Path) -> None:
    for path in (tmp_path / "no", tmp_path / "no.safetensors", "org/model", "a\0b"):
        with pytest.raises(WeightsNotFoundError) as caught:
            GlobalBinaryIndex(path)
        assert isinstance(caught.value, FileNotFoundError)
        assert str(path) in str(caught.value)


def test_directory_without_weights(tmp_path: Path) -> None:
    with pytest.raises(WeightsNotFoundError, match=r"no \.safetensors file"):
        GlobalBinaryIndex(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK\x03\x04")
    with pytest.raises(WeightsNotFoundError, match=r"pytorch_model\.bin.*save_pretrained"):
        GlobalBinaryIndex(tmp_path)


def test_one_file_by_any_name(single: Path) -> None:
    single.rename(single.with_name("tiny.safetensors"))
    (single.parent / "._tiny.safetensors").write_bytes(b"left by a Mac")
    assert GlobalBinaryIndex(single.parent).files == [single.with_name("tiny.safetensors")]


def test_several_files_are_ambiguous(single: Path) -> None:
    raw = single.read_bytes()
    single.unlink()
    put(single.parent, raw, "one.safetensors")
    put(single.parent, raw, "two.safetensors")
    with pytest.raises(WeightsError, match=r"several.*one\.safetensors, two\.safetensors") as caught:
        GlobalBinaryIndex(single.parent)
    assert str(single.parent) in str(caught.value)


def test_adapter_beside_a_model_is_not_the_model(single: Path) -> None:
    raw = single.read_bytes()
    single.unlink()
    adapter = put(single.parent, raw, "adapter_model.safetensors")
    assert GlobalBinaryIndex(single.parent).files == [adapter]
    model = put(single.parent, raw, "base.safetensors")
    assert GlobalBinaryIndex(single.parent).files == [model]


def test_model_file_comes_before_others(single: Path) -> None:
    put(single.parent, single.read_bytes(), "other.safetensors")
    assert GlobalBinaryIndex(single.parent).files == [single]


def test_directory_that_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: object) -> list[str]:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(WeightsError, match="cannot be listed: Permission denied"):
        GlobalBinaryIndex(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs")
def test_a_fifo_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(WeightsNotFoundError, match="no such regular file"):
        GlobalBinaryIndex(tmp_path)


# --- shards -----------------------------------------------------------------------------------------


def test_sharded_directory_or_its_index(sharded: Path, tensors: dict[str, torch.Tensor]) -> None:
    for path in (sharded, sharded / "model.safetensors.index.json"):
        gbi = GlobalBinaryIndex(path)
        assert gbi.files == sorted(sharded.glob("model-0000?-of-00003.safetensors"))
        assert len(gbi.files) == 3
        assert sorted(gbi.keys) == sorted(tensors)
        assert gbi.metadata == {"format": "pt"}
        loaded = gbi.load_tensors(tensors)
        assert list(loaded) == list(tensors)
        for name, tensor in tensors.items():
            assert_same(loaded[name], tensor)
            assert_same(gbi.view(name), tensor)
            assert gbi.record(name).file.name == shard_of(sharded, name)


def transformers_takes(directory: Path) -> list[str] | str:
    """Names of the weight files that `from_pretrained` would read; the error's where it reads none."""
    config = directory / "config.json"
    named = json.loads(config.read_text()).get("transformers_weights") if config.is_file() else None
    try:
        found, _ = _get_resolved_checkpoint_files(str(directory), None, None, None, None, False, named)
    except (OSError, ValueError) as error:
        return type(error).__name__
    return sorted(Path(file).name for file in found or ())


def set_of_files(sharded: Path, case: str) -> Path:
    """A sharded model with other weights beside it."""
    index, other = sharded / "model.safetensors.index.json", sharded / "config.json"
    whole = save({"a": torch.ones(2)}, {"format": "pt"})
    if "single" in case:
        put(sharded, whole)
    if "pickles" in case:
        (sharded / "pytorch_model.bin").write_bytes(b"PK\x03\x04")
    if "original" in case:
        put(sharded, whole, "consolidated.safetensors")
    if "adapter" in case:
        put(sharded, whole, "adapter_model.safetensors")
    if "variant" in case:
        put(sharded, whole, "model.fp16.safetensors")
    if "below" in case:
        (sharded / "unet").mkdir()
        put(sharded / "unet", whole)
    if "named" in case:
        put(sharded, whole, "chosen.safetensors")
        other.write_text('{"transformers_weights": "chosen.safetensors"}')
    if "no index" in case:
        index.unlink()
        for shard in sharded.glob("model-*"):
            shard.unlink()
    return sharded


@pytest.mark.parametrize(
    "case",
    ["index", "single", "pickles", "original", "variant", "below", "named", "single named", "no index named",
     "no index single pickles", "no index original pickles", "no index variant pickles", "no index single original",
     "no index pickles", "no index adapter pickles", "no index below", "no index original variant",
     "single original variant pickles below"],
)  # fmt: skip
def test_the_files_that_transformers_takes_or_none(sharded: Path, case: str) -> None:
    directory = set_of_files(sharded, case)
    theirs = transformers_takes(directory)
    if isinstance(theirs, list) and all(name.endswith(".safetensors") for name in theirs):
        assert [file.name for file in GlobalBinaryIndex(directory).files] == theirs
    else:
        with pytest.raises(WeightsError) as caught:
            GlobalBinaryIndex(directory)
        assert str(directory) in str(caught.value)


def test_an_index_beside_a_single_file_is_named(sharded: Path, caplog: pytest.LogCaptureFixture) -> None:
    put(sharded, pack({}))
    assert GlobalBinaryIndex(sharded).files == [sharded / "model.safetensors"]
    assert "model.safetensors.index.json" in caplog.text and "transformers" in caplog.text


def test_an_index_of_the_single_file_is_no_other(single: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = dict.fromkeys(GlobalBinaryIndex(single).keys, single.name)
    (single.parent / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    assert GlobalBinaryIndex(single.parent).files == [single]
    assert not caplog.text


@pytest.mark.parametrize("named", ["../x.safetensors", "/x.safetensors", "weights.bin", 3, ""])
def test_files_named_by_a_configuration_stay_in_its_directory(single: Path, named: object) -> None:
    (single.parent / "config.json").write_text(json.dumps({"transformers_weights": named}))
    with pytest.raises(WeightsFormatError, match=r"config\.json.*transformers_weights"):
        GlobalBinaryIndex(single.parent)


def test_shards_linked_from_a_cache(sharded: Path) -> None:
    blobs = sharded.parent / "blobs"
    blobs.mkdir()
    for number, file in enumerate(sharded.iterdir()):
        file.rename(blobs / str(number))
        file.symlink_to(Path("..") / "blobs" / str(number))
    assert len(GlobalBinaryIndex(sharded)) == 3


def test_tensors_unknown_to_the_index_are_served(sharded: Path) -> None:
    edit_index(sharded, lambda weight_map: weight_map.pop("model.norm.weight"))
    name = "model.layers.0.self_attn.q_proj.weight"
    file = sharded / shard_of(sharded, name)
    save_file({**load_file(file), "rotary.inv_freq": torch.ones(3)}, file)
    gbi = GlobalBinaryIndex(sharded)
    assert gbi.view("rotary.inv_freq").tolist() == [1.0] * 3
    assert name in gbi


def test_missing_shards_are_listed(sharded: Path) -> None:
    lost = sorted(sharded.glob("*.safetensors"))[1:]
    for file in lost:
        file.unlink()
    with pytest.raises(WeightsNotFoundError, match="2 of 3 files") as caught:
        GlobalBinaryIndex(sharded)
    assert str(sharded / "model.safetensors.index.json") in str(caught.value)
    assert all(file.name in str(caught.value) for file in lost)


def test_index_that_promises_too_much(sharded: Path) -> None:
    name = "model.norm.weight"
    shard = shard_of(sharded, name)
    edit_index(sharded, lambda weight_map: weight_map.update({"lm_head.weight": shard, "extra.bias": shard}))
    with pytest.raises(WeightsFormatError) as caught:
        GlobalBinaryIndex(sharded)
    assert f"'lm_head.weight' is not in {shard}" in str(caught.value)
    assert f"'extra.bias' is not in {shard}" in str(caught.value)


def test_index_that_names_the_wrong_shard(sharded: Path) -> None:
    right = shard_of(sharded, "model.norm.weight")
    wrong = shard_of(sharded, "model.embed_tokens.weight")
    edit_index(sharded, lambda weight_map: weight_map.update({"model.norm.weight": wrong}))
    # Only a shard that the index names at all is read.
    edit_index(sharded, lambda weight_map: weight_map.update({"model.layers.0.self_attn.q_proj.weight": right}))
    with pytest.raises(WeightsFormatError) as caught:
        GlobalBinaryIndex(sharded)
    assert f"'model.norm.weight' is in {right}, not in {wrong}" in str(caught.value)


@pytest.mark.parametrize("name", ["model.norm.weight", "unknown.to.the.index"])
def test_tensor_in_two_shards(sharded: Path, name: str) -> None:
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    for file in (first, second):
        save_file({**load_file(file), name: torch.ones(2)}, file)
    with pytest.raises(WeightsFormatError) as caught:
        GlobalBinaryIndex(sharded)
    assert f"'{name}' is in {first.name} and in {second.name}" in str(caught.value)


@pytest.mark.parametrize(
    "shard",
    [
        "../x.safetensors",
        "a/../../x",
        "/etc/passwd",
        "C:\\x",
        "\\\\host\\x",
        "..\\x",
        "",
        ".",
        3,
        None,
        ["a"],
    ],
)
def test_shards_stay_in_the_directory(sharded: Path, shard: Any) -> None:
    edit_index(sharded, lambda weight_map: weight_map.update({"model.norm.weight": shard}))
    with pytest.raises(WeightsFormatError, match=r"weight_map sends tensor 'model\.norm\.weight'") as caught:
        GlobalBinaryIndex(sharded)
    assert repr(shard) in str(caught.value)


@pytest.mark.parametrize("shard", ["a\0b.safetensors", "x" * 5000])
def test_shard_names_no_system_can_open(sharded: Path, shard: str) -> None:
    edit_index(sharded, lambda weight_map: weight_map.update({"model.norm.weight": shard}))
    with pytest.raises(WeightsNotFoundError, match="missing"):
        GlobalBinaryIndex(sharded)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "its content is not JSON"),
        (b"[]", r"its content is \[\], not an object"),
        (b"\xff{}", "not valid UTF-8"),
        (b"{}", "no weight_map"),
        (b'{"weight_map": {}}', "no weight_map"),
        (b'{"weight_map": []}', "no weight_map"),
        (b'{"weight_map": {"a": "x", "a": "y"}}', "'a' appears twice"),
        (b'{"weight_map": {"a": "\\ud800"}}', "not valid UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_damaged_index(tmp_path: Path, content: bytes, says: str) -> None:
    file = put(tmp_path, content, "model.safetensors.index.json")
    with pytest.raises(WeightsFormatError, match=says) as caught:
        GlobalBinaryIndex(tmp_path)
    assert str(file) in str(caught.value)


def test_index_above_the_cap(tmp_path: Path) -> None:
    file = put(tmp_path, b"{", "model.safetensors.index.json")
    os.truncate(file, MAX_HEADER_BYTES + 1)
    with pytest.raises(WeightsFormatError, match=f"longer than {MAX_HEADER_BYTES} bytes"):
        GlobalBinaryIndex(tmp_path)


# --- hostile headers --------------------------------------------------------------------------------

JUNK: list[object] = [None, True, 1, 1.5, "4", {}, {"U8": None}]

HOSTILE: dict[str, tuple[bytes, list[str]]] = {
    "empty file": (b"", ["empty", "0 bytes"]),
    "shorter than 8": (b"abc", ["3 bytes are too few", "8 bytes"]),
    "header beyond the file": (struct.pack("<Q", 500) + b"{}", ["header of 500 bytes", "only 2 follow"]),
    "header above the cap": (
        struct.pack("<Q", MAX_HEADER_BYTES + 1) + b"{}",
        [str(MAX_HEADER_BYTES + 1), f"cap of {MAX_HEADER_BYTES}"],
    ),
    "header of 2**64 - 1": (b"\xff" * 8 + b"{}", [str(2**64 - 1)]),
    "all zeros": (bytes(64), ["its header is not JSON"]),
    "not UTF-8": (pack(b'{"\xff": 1}'), ["header is not valid UTF-8"]),
    "UTF-8 surrogate": (pack(b'{"\xed\xa0\x80": 1}'), ["not valid UTF-8"]),
    "half a surrogate pair": (pack({"\ud800": entry()}, b"1234"), ["not valid UTF-8", "surrogates"]),
    "not JSON": (pack("{nonsense}"), ["header is not JSON"]),
    "byte order mark": (pack("\ufeff{}"), ["header is not JSON"]),
    "trailing NUL": (pack(b"{}\0\0"), ["header is not JSON"]),
    "JSON cut": (pack('{"a": {"dtype"'), ["header is not JSON"]),
    "not an object": (pack("[1, 2]"), ["header is [1, 2], not an object"]),
    "nesting bomb": (pack("[" * 200_000), ["nested too deeply"]),
    "nesting bomb of objects": (pack('{"a":' * 200_000), ["nested too deeply"]),
    "nested to the brim": (pack('{"a":' + "[" * 500 + "]" * 500 + "}"), ["'a'", "not an object"]),
    "5000 digits": (
        pack('{"a": %s}' % ("9" * 5000)),
        ["'a'"] if sys.version_info < (3, 10, 7) else ["digits"],
    ),
    "tensor twice": (
        pack('{"a": %s, "a": %s}' % ((json.dumps(entry()),) * 2), b"1234"),
        ["'a' appears twice"],
    ),
    "tensor twice, once escaped": (
        pack('{"a": %s, "\\u0061": %s}' % ((json.dumps(entry()),) * 2), b"1234"),
        ["'a' appears twice"],
    ),
    "field twice": (pack('{"a": {"dtype": "U8", "dtype": "U8"}}'), ["'dtype' appears twice"]),
    "metadata twice": (pack('{"__metadata__": {}, "__metadata__": {}}'), ["'__metadata__' appears twice"]),
    "metadata not an object": (pack({"__metadata__": [1]}), ["__metadata__ is [1]"]),
    "metadata not of strings": (pack({"__metadata__": {"k": 7}}), ["__metadata__ has 7 under 'k'"]),
    "entry a list": (pack({"a": ["U8", [4], [0, 4]]}, b"1234"), ["'a'", "not an object"]),
    "entry null": (pack({"a": None}), ["'a'", "None, not an object"]),
    "entry empty": (pack({"a": {}}), ["'a'", "has the fields []", "data_offsets"]),
    "field missing": (
        pack({"a": {"dtype": "U8", "shape": [4]}}),
        ["'a'", "['dtype', 'shape']", "data_offsets"],
    ),
    "field that is no JSON": (pack({"a": entry(more=[float("nan")])}, b"1234"), ["'a'", "'more'", "nan"]),
    "field nested deeply": (
        pack(json.dumps({"a": entry(more=0)}).replace('"more": 0', '"more": ' + "[" * 200 + "]" * 200), b"1234"),
        ["'a'", "'more'"],
    ),
    "unknown dtype": (pack({"a": entry("C128")}, b"1234"), ["'a'", "'C128'", "BF16", "F8_E4M3"]),
    "torch's name": (pack({"a": entry("float32")}, b"1234"), ["'float32'", "F32"]),
    "dimension negative": (pack({"a": entry(shape=[-4])}, b"1234"), ["'a'", "[-4]"]),
    "dimension a float": (pack({"a": entry(shape=[4.0])}, b"1234"), ["'a'", "[4.0]"]),
    "dimension a bool": (pack({"a": entry(shape=[4, True])}, b"1234"), ["'a'", "[4, True]"]),
    "dimension NaN": (pack({"a": entry(shape=[float("nan")])}, b"1234"), ["'a'", "[nan]"]),
    "dimension above int64": (pack({"a": entry(shape=[2**63])}, b"1234"), ["'a'", str(2**63)]),
    "shape overflows": (pack({"a": entry(shape=[2**62, 2**62])}, b"1234"), ["'a'", "overflows"]),
    "shape overflows to zero": (
        pack({"a": entry(shape=[0, 2**62, 2**62], offsets=[0, 0])}),
        ["'a'", "overflows"],
    ),
    "shape a bomb": (pack({"a": entry(shape=[2**62] * 100_000)}, b"1234"), ["'a'", "overflows"]),
    "offset negative": (pack({"a": entry(offsets=[-4, 0])}, b"1234"), ["'a'", "[-4, 0]"]),
    "offset a bool": (pack({"a": entry(shape=[1], offsets=[False, 1])}, b"1"), ["'a'", "[False, 1]"]),
    "offset a float": (pack({"a": entry(offsets=[0, 4.0])}, b"1234"), ["'a'", "[0, 4.0]"]),
    "offset huge": (pack({"a": entry(offsets=[0, 10**30])}, b"1234"), ["'a'", str(10**30)]),
    "one offset": (pack({"a": entry(offsets=[0])}, b"1234"), ["'a'", "[0]", "two integers"]),
    "three offsets": (pack({"a": entry(offsets=[0, 4, 4])}, b"1234"), ["'a'", "[0, 4, 4]"]),
    "begin after end": (pack({"a": entry(offsets=[4, 0])}, b"1234"), ["'a'", "[4, 0]", "begin <= end"]),
    "wrong length": (
        pack({"a": entry("F32", [2, 3], [0, 20])}, bytes(20)),
        ["'a'", "F32", "[2, 3]", "24 bytes", "hold 20"],
    ),
    "too long": (
        pack({"a": entry("F32", [2, 3], [0, 28])}, bytes(28)),
        ["'a'", "24 bytes", "hold 28"],
    ),
    "F4 odd": (pack({"a": entry("F4", [4, 3], [0, 6])}, bytes(6)), ["'a'", "even", "[4, 3]"]),
    "F4 scalar": (pack({"a": entry("F4", [], [0, 1])}, bytes(1)), ["'a'", "even"]),
    "overlap": (
        pack({"a": entry(), "b": entry(offsets=[2, 6])}, bytes(6)),
        ["'b'", "overlaps", "'a'", "begins at byte", "ends at byte"],
    ),
    "same bytes twice": (pack({"a": entry(), "b": entry()}, bytes(4)), ["'b'", "overlaps", "'a'"]),
    "empty tensor inside another": (
        pack({"a": entry(), "b": entry(shape=[0], offsets=[2, 2])}, bytes(4)),
        ["'b'", "overlaps", "'a'"],
    ),
    "hole at the beginning": (
        pack({"a": entry(offsets=[1, 5])}, bytes(5)),
        ["'a'", "leaves a hole after the header"],
    ),
    "hole between": (
        pack({"a": entry(), "b": entry(offsets=[5, 9])}, bytes(9)),
        ["'b'", "leaves a hole after", "'a'"],
    ),
    "data far outside": (pack({"a": entry(shape=[2**50], offsets=[0, 2**50])}, b"12"), ["'a'", "cut short"]),
    "trailing bytes": (pack({"a": entry()}, b"123456"), ["2 bytes belong to no tensor", "'a'"]),
    "bytes but no tensors": (pack({}, b"123"), ["3 bytes belong to no tensor", "the header"]),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_header(tmp_path: Path, case: str) -> None:
    raw, says = HOSTILE[case]
    file = put(tmp_path, raw)
    with pytest.raises(WeightsFormatError) as caught:
        GlobalBinaryIndex(file)
    text = str(caught.value)
    assert str(file) in text
    for words in says:
        assert words in text
    assert text.endswith(".")
    assert "again" in text or "Convert" in text  # what to do next
    assert len(text) < 1500


@pytest.mark.parametrize("field", ["dtype", "shape", "data_offsets"])
@pytest.mark.parametrize("value", JUNK, ids=repr)
def test_field_of_another_type(tmp_path: Path, field: str, value: object) -> None:
    file = put(tmp_path, pack({"a": {**entry(), field: value}}, b"1234"))
    with pytest.raises(WeightsFormatError, match="tensor 'a'") as caught:
        GlobalBinaryIndex(file)
    assert field in str(caught.value)


def test_file_cut_short(single: Path) -> None:
    gbi = GlobalBinaryIndex(single)
    cut, last = (gbi.record(name) for name in gbi.keys[-2:])
    os.truncate(single, cut.end - 3)
    with pytest.raises(WeightsFormatError, match="cut short") as caught:
        GlobalBinaryIndex(single)
    text = str(caught.value)
    assert f"tensor '{cut.name}' ends at byte {cut.end}" in text
    assert f"{cut.end - 3} of {last.end} bytes" in text


def test_names_from_hostile_files_do_not_flood_the_terminal(tmp_path: Path) -> None:
    file = put(tmp_path, pack({"n" * 100_000 + "\x1b[2J\n": entry("X" * 100_000)}, b"1234"))
    with pytest.raises(WeightsFormatError) as caught:
        GlobalBinaryIndex(file)
    assert len(str(caught.value)) < 1500
    assert "\x1b" not in str(caught.value)


# --- files of other kinds ---------------------------------------------------------------------------


def saved(save: Callable[[io.BytesIO], object]) -> bytes:
    buffer = io.BytesIO()
    save(buffer)
    return buffer.getvalue()


WEIGHTS = {"w": torch.zeros(400)}
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
OTHERS: dict[str, tuple[bytes, list[str]]] = {
    "torch": (saved(lambda out: torch.save(WEIGHTS, out)), ["PyTorch checkpoint", "save_pretrained"]),
    "old torch": (
        saved(lambda out: torch.save(WEIGHTS, out, _use_new_zipfile_serialization=False)),
        ["pickle", "save_pretrained"],
    ),
    **{
        f"pickle {protocol}": (pickle.dumps({"w": [0.5] * 400}, protocol), ["pickle", "save_pretrained"])
        for protocol in (2, 3, 4, 5)
    },
    "gguf": (b"GGUF" + struct.pack("<IQQ", 3, 291, 24) + bytes(100), ["GGUF", "safetensors files"]),
    "html": (b"<!DOCTYPE html>\n<html><title>Log in</title></html>", ["web page", "login", "access"]),
    "html after a mark": (b"\xef\xbb\xbf\r\n <html lang='en'>", ["web page"]),
    "xml": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', ["web page", "error page"]),
    "git lfs": (POINTER, ["Git LFS pointer", "git lfs pull"]),
    "gzip": (gzip.compress(os.urandom(3000)), ["gzip", "Unpack"]),
    "gzip without a date": (gzip.compress(os.urandom(600_000), mtime=0), ["gzip", "Unpack"]),
    "npy": (saved(lambda out: np.save(out, np.zeros(9))), ["NumPy .npy", "save_file"]),
    "json": (b'{\n  "architectures": ["LlamaForCausalLM"]\n}', ["JSON text", "directory"]),
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_kinds_of_files_are_named(tmp_path: Path, case: str) -> None:
    raw, says = OTHERS[case]
    file = put(tmp_path, raw)
    with pytest.raises(WeightsFormatError) as caught:
        GlobalBinaryIndex(file)
    for words in [str(file), "not safetensors", *says]:
        assert words in str(caught.value)


@pytest.mark.parametrize("length", [0x0280, 0x7B, 0x3C, 0x00088B1F])
def test_header_lengths_that_look_like_other_kinds(tmp_path: Path, length: int) -> None:
    file = put(tmp_path, pack(json.dumps({"a": entry(shape=[1], offsets=[0, 1])}).ljust(length), b"x"))
    assert GlobalBinaryIndex(file).keys == ["a"]
    put(tmp_path, pack("damaged".ljust(length), b"x"))
    if length < 0x10000:
        with pytest.raises(WeightsFormatError, match="header is not JSON"):
            GlobalBinaryIndex(file)


# --- against the library ----------------------------------------------------------------------------


def read_with_library(file: Path) -> dict[str, torch.Tensor] | None:
    """What safetensors itself makes of a file; None if it refuses."""
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, TypeError, RuntimeError, OSError):  # torch refuses what the header allowed
        return None


# The library accepts these and we do not, on purpose: a second entry of one name, serde's other spellings of an entry
# and of a dtype, half a surrogate pair where nobody reads it, and empty tensors whose shape has no 64-bit strides.
STRICTER = ["appears twice", "not an object.", "unknown dtype {", "overflows 64 bits", "surrogates"]


def read_with_lema(file: Path) -> dict[str, torch.Tensor] | LemaError:
    """What we make of a file, as copies and as views, or why we refuse it."""
    size = file.stat().st_size
    try:
        with GlobalBinaryIndex(file) as gbi:
            tensors = gbi.load_tensors(gbi.keys)
            records = {name: gbi.record(name) for name in tensors}
            views = {name: gbi.view(name) for name in tensors}
    except LemaError as error:
        return error
    for name, record in records.items():
        assert 0 <= record.offset <= record.end <= size
        assert_same(views[name], tensors[name])
    return tensors


def compare_with_library(file: Path) -> bool:
    """Whether both accept the file. Fails where they differ."""
    ours, theirs = read_with_lema(file), read_with_library(file)
    if isinstance(ours, LemaError):
        assert str(file) in str(ours)
        assert theirs is None or any(words in str(ours) for words in STRICTER), ours
        return False
    assert theirs is not None, "accepted what the library refuses"
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert_same(ours[name], tensor)
    return True


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@fuzz
@given(raw=st.binary(max_size=200))
@example(raw=b"")
@example(raw=bytes(8))
def test_random_bytes(workshop: Path, raw: bytes) -> None:
    compare_with_library(put(workshop, raw))


@fuzz
@given(header=st.binary(max_size=100), data=st.binary(max_size=8))
def test_random_header_bytes(workshop: Path, header: bytes, data: bytes) -> None:
    compare_with_library(put(workshop, pack(header, data)))


VALID = pack(
    {
        "__metadata__": {"format": "pt"},
        "a.weight": entry("F32", [2, 3], [0, 24]),
        "b": entry("BF16", [], [24, 26]),
        "c": entry("U8", [0, 7], [26, 26]),
        "é": entry("I16", [10, 1], [26, 46]),
    },
    bytes(range(46)),
)
HEADER_END = len(VALID) - 46


@st.composite
def mutated_files(draw: st.DrawFn) -> bytes:
    raw = bytearray(VALID)
    keep_length_true = draw(st.booleans())
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, HEADER_END - 1) | st.integers(0, max(len(raw) - 1, 0)))
        telling = st.sampled_from(b'0123456789-.eE[]{}",: \\u\0\xffUIF')
        some = bytes(draw(st.lists(telling | st.integers(0, 255), min_size=1, max_size=3)))
        match draw(st.sampled_from(["replace", "insert", "delete", "truncate"])):
            case "replace":
                raw[at : at + len(some)] = some
            case "insert":
                raw[at:at] = some
            case "delete":
                del raw[at : at + len(some)]
            case "truncate":
                del raw[at:]
    if keep_length_true and len(raw) > 60:
        raw[:8] = struct.pack("<Q", len(raw) - 8 - 46)
    return bytes(raw)


@fuzz
@given(raw=mutated_files())
@example(raw=VALID)
def test_mutated_files(workshop: Path, raw: bytes) -> None:
    compare_with_library(put(workshop, raw))


sizes = st.integers(0, 3) | st.sampled_from([2**31, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, -1, True, 1.0])
junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | sizes,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=5,
)


@st.composite
def structured_files(draw: st.DrawFn) -> bytes:
    """A valid file, or one with a few of its header's values bent."""
    header: dict[str, Any] = {}
    cursor = 0
    for name in draw(st.lists(st.text(max_size=6), max_size=5, unique=True)):
        if name == "__metadata__":
            continue
        dtype = draw(st.sampled_from(sorted(DTYPES)))
        shape = draw(st.lists(st.integers(0, 3), max_size=4))
        bits = BITS[dtype]
        for dimension in shape:
            bits *= dimension
        end = cursor + (bits + 7) // 8
        header[name] = entry(dtype, shape, [cursor, end])
        cursor = end
    if draw(st.booleans()):
        header["__metadata__"] = draw(st.dictionaries(st.text(max_size=4), st.text(max_size=4), max_size=2))
    data = draw(st.binary(min_size=cursor, max_size=cursor))
    targets = [fields for name, fields in header.items() if name != "__metadata__"]
    for _ in range(draw(st.sampled_from([0, 0, 1, 1, 2])) if targets else 0):
        target = draw(st.sampled_from(targets))
        match draw(st.sampled_from(["offset", "shape", "field", "extra", "drop", "entry", "data", "meta"])):
            case "offset":
                target["data_offsets"] = [draw(sizes | st.integers(0, cursor + 2)) for _ in range(2)]
            case "shape":
                target["shape"] = draw(st.lists(sizes, max_size=4))
            case "field":
                target[draw(st.sampled_from(["dtype", "shape", "data_offsets"]))] = draw(junk)
            case "extra":
                target[draw(st.text(max_size=3))] = draw(junk)
            case "drop":
                target.pop(draw(st.sampled_from(["dtype", "shape", "data_offsets"])), None)
            case "entry":
                header[draw(st.text(max_size=3))] = draw(junk)
            case "data":
                data = data[: draw(st.integers(0, cursor))] + draw(st.binary(max_size=2))
            case "meta":
                header["__metadata__"] = draw(junk)
    text = json.dumps(header, ensure_ascii=draw(st.booleans()))
    return pack(text.encode("utf-8", "replace") + b" " * draw(st.integers(0, 9)), data)


@fuzz
@given(raw=structured_files())
def test_structured_headers(workshop: Path, raw: bytes) -> None:
    compare_with_library(put(workshop, raw))


HANDMADE: dict[str, tuple[bytes, bool]] = {
    "leading space": (pack(b' \t{"a":%s}' % json.dumps(entry()).encode(), b"1234"), True),
    "trailing newlines": (pack(json.dumps({"a": entry()}) + "\n\r\t ", b"1234"), True),
    "metadata null": (pack({"__metadata__": None, "a": entry()}, b"1234"), True),
    "empty name": (pack({"": entry()}, b"1234"), True),
    "name with NUL": (pack({"a\0b": entry()}, b"1234"), True),
    "pair of surrogates": (pack({"\U0001f600": entry()}, b"1234"), True),
    "not in order": (
        pack({"b": entry(shape=[2], offsets=[2, 4]), "a": entry(shape=[2], offsets=[0, 2])}, b"1234"),
        True,
    ),
    "empty tensors at the edges": (
        pack(
            {
                "z": entry(shape=[0], offsets=[4, 4]),
                "a": entry(),
                "b": entry(shape=[0, 2**62], offsets=[0, 0]),
            },
            b"1234",
        ),
        True,
    ),
    "many dimensions": (pack({"a": entry(shape=[1] * 200 + [4])}, b"1234"), True),
    "control character": (pack(b'{"a\nb": %s}' % json.dumps(entry()).encode(), b"1234"), False),
    "twice": (pack('{"a": %s, "a": %s}' % ((json.dumps(entry()),) * 2), b"1234"), False),
    "type as an object": (pack({"a": entry({"U8": None})}, b"1234"), False),
    "F6": (pack({"a": entry("F6_E2M3", [4], [0, 3])}, b"123"), False),
    "field too many": (pack({"a": entry(stride=[1], more={"b": [None, 1.5, "x"]})}, b"1234"), True),
    "field with an infinite number": (
        pack(json.dumps({"a": entry(x=0)}).replace('"x": 0', '"x": 1e999'), b"1234"),
        False,
    ),
    "huge beside nothing": (pack({"a": entry(shape=[2, 2**62, 0], offsets=[0, 0])}), True),
    "huge before nothing": (pack({"a": entry(shape=[2**62, 4, 0], offsets=[0, 0])}), False),
    "huge after nothing": (pack({"a": entry(shape=[0, 2**62, 2**62], offsets=[0, 0])}), False),
    "field escaped": (pack(json.dumps({"a": entry()}).replace("dtype", "d\\u0074ype"), b"1234"), True),
    "minus zero in a field": (pack(json.dumps({"a": entry(x=0)}).replace('"x": 0', '"x": -0'), b"1234"), True),
    "minus zero": (pack('{"a": {"dtype":"U8","shape":[-0],"data_offsets":[0,0]}}'), False),
}


@pytest.mark.parametrize("case", HANDMADE)
def test_the_library_agrees(tmp_path: Path, case: str) -> None:
    raw, accepted = HANDMADE[case]
    assert compare_with_library(put(tmp_path, raw)) is accepted
