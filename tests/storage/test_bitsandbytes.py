"""bitsandbytes' files against bitsandbytes: every code, any scale, odd sizes, and what is damaged."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

pytest.importorskip("bitsandbytes")
from bitsandbytes.functional import (
    create_dynamic_map,
    dequantize_4bit,
    get_4bit_type,
    int8_vectorwise_dequant,
    int8_vectorwise_quant,
    quantize_4bit,
)

from bnb_files import DTYPES, decoded, four_bits
from lema.errors import LemaError, MissingTensorError, UnsupportedError, WeightsFormatError
from lema.storage.codecs.bitsandbytes import FP4, NF4
from lema.storage.codecs.formats import find_stored
from lema.storage.index import GlobalBinaryIndex
from lema.storage.layout import ParameterSource, SlotLayout
from lema.storage.views import Decoder, materialize, page_aligned

SETTINGS = {"quant_method": "bitsandbytes", "load_in_4bit": True}


def from_file(tensors: dict[str, torch.Tensor], dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """Every tensor of codes that is found in a file of these, decoded, in its own type or another."""
    with tempfile.TemporaryDirectory() as folder:
        save_file(tensors, Path(folder) / "model.safetensors")
        with GlobalBinaryIndex(folder) as gbi:
            found = find_stored({name: gbi.record(name) for name in gbi.keys}, None)
            assert {name for stored in found.values() for name in stored.consumes} == set(tensors)
            return {
                name: materialize(gbi, ParameterSource(name, stored.shape, dtype or stored.dtype, stored.codec)).clone()
                for name, stored in found.items()
            }


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (
        a.dtype == b.dtype and a.shape == b.shape and a.numpy(force=True).tobytes() == b.numpy(force=True).tobytes()
        if a.dtype != torch.bfloat16
        else same_bits(a.view(torch.int16), b.view(torch.int16))
    )


def test_the_tables_are_the_librarys() -> None:
    for values, kind in ((NF4, "nf4"), (FP4, "fp4")):
        assert torch.equal(torch.tensor(values), get_4bit_type(kind, "cpu"))


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 70), min_size=1, max_size=3),
    kind=st.sampled_from(["nf4", "fp4"]),
    block=st.sampled_from([32, 64, 128, 256, 4096]),
    dtype=st.sampled_from(sorted(DTYPES)),
    computed=st.sampled_from([None, torch.float32, torch.bfloat16]),
    nested=st.booleans(),
    storage=st.sampled_from([torch.uint8, torch.bfloat16]),
    seed=st.integers(0, 2**31),
    exponent=st.sampled_from([-45, -38, -3, 0, 3, 37]),
)
def test_four_bits_are_decoded_as_the_library_does(
    shape: list[int], kind: str, block: int, dtype: str, computed: torch.dtype | None, nested: bool,
    storage: torch.dtype, seed: int, exponent: int,
) -> None:  # fmt: skip
    draw = torch.Generator().manual_seed(seed)
    count = math.prod(shape)
    blocks = -(-count // block)
    codes = torch.randint(0, 256, (-(-count // 2),), dtype=torch.uint8, generator=draw)
    if storage != torch.uint8 and codes.numel() % 2:
        storage = torch.uint8
    beside = None
    if nested:
        scales = torch.rand(-(-blocks // 256), generator=draw) * 10.0**exponent
        absmax = torch.randint(0, 256, (blocks,), dtype=torch.uint8, generator=draw)
        beside = (scales, create_dynamic_map(), float(torch.rand((), generator=draw)))
    else:
        absmax = torch.rand(blocks, generator=draw) * 10.0**exponent
        absmax[torch.rand(blocks, generator=draw) < 0.2] = 0.0
    tensors = four_bits("w", codes.view(storage), absmax, tuple(shape), kind, block, dtype, beside)
    expected = decoded(tensors, "w")
    (found,) = from_file(tensors, computed).values()
    assert same_bits(found, expected if computed is None else expected.to(computed))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_what_the_library_quantised_is_what_its_own_kernel_decodes(kind: str, nested: bool) -> None:
    """In chunks and rows of several threads, a last partial block among them."""
    weight = torch.randn(517, 258, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(1))
    codes, state = quantize_4bit(weight, quant_type=kind, compress_statistics=nested)
    beside = {f"w.{name}": tensor.clone() for name, tensor in state.as_dict(packed=True).items()}
    tensors = {"w": codes, **beside}
    threads = torch.get_num_threads()
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            (found,) = from_file(tensors).values()
            assert same_bits(found, decoded(tensors, "w"))
    finally:
        torch.set_num_threads(threads)
    # its kernel for processors has the values of FP4 to four digits only
    if kind == "nf4" and torch.backends.cpu.get_cpu_capability() != "AVX512":
        assert same_bits(found, dequantize_4bit(codes, state))


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 40), columns=st.integers(1, 40), seed=st.integers(0, 2**31),
    exponent=st.sampled_from([-40, 0, 36]), computed=st.sampled_from([None, torch.bfloat16, torch.float16]),
)  # fmt: skip
def test_eight_bits_are_decoded_as_the_library_does(
    rows: int, columns: int, seed: int, exponent: int, computed: torch.dtype | None
) -> None:
    draw = torch.Generator().manual_seed(seed)
    codes = torch.randint(-128, 128, (rows, columns), dtype=torch.int8, generator=draw)
    scales = torch.rand(rows, generator=draw) * 10.0**exponent
    scales[torch.rand(rows, generator=draw) < 0.2] = 0.0
    (found,) = from_file({"a.weight": codes, "a.SCB": scales}, computed).values()
    expected = int8_vectorwise_dequant(codes, scales)
    assert same_bits(found, expected if computed is None else expected.to(computed))


def test_eight_bits_in_chunks_of_rows() -> None:
    weight = torch.randn(300, 2048, generator=torch.Generator().manual_seed(2)).half()
    codes, scales, _ = int8_vectorwise_quant(weight)
    tensors = {"a.weight": codes, "a.SCB": scales, "a.weight_format": torch.tensor(0, dtype=torch.uint8)}
    assert same_bits(from_file(tensors)["a.weight"], int8_vectorwise_dequant(codes, scales))


# --- what is damaged --------------------------------------------------------------------------------


def whole(kind: str = "nf4", nested: bool = False) -> dict[str, torch.Tensor]:
    weight = torch.randn(24, 96, generator=torch.Generator().manual_seed(3))
    codes, state = quantize_4bit(weight, quant_type=kind, compress_statistics=nested)
    beside = {f"a.weight.{name}": tensor.clone() for name, tensor in state.as_dict(packed=True).items()}
    return {"a.weight": codes, **beside}


FORMAT, MISSING, UNKNOWN = WeightsFormatError, MissingTensorError, UnsupportedError
STATE = "a.weight.quant_state.bitsandbytes__nf4"


def without(name: str) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda tensors: tensors.pop(name)


def put(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = make(tensors[name]).contiguous()

    return change


def said(**changes: Any) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        values = json.loads(bytes(tensors[STATE].numpy())) | changes
        tensors[STATE] = torch.frombuffer(bytearray(json.dumps(values).encode()), dtype=torch.uint8)

    return change


def poisoned(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda scales: torch.cat([torch.tensor([value]), scales[1:]])


@pytest.mark.parametrize(
    ("nested", "damage", "error", "named"),
    [
        (False, without("a.weight.absmax"), MISSING, "a.weight.absmax' is not there"),
        (False, without("a.weight.quant_map"), MISSING, "a.weight.quant_map' is not there"),
        (False, without("a.weight"), MISSING, "a.weight' is not there"),
        (False, without(STATE), MISSING, f"{STATE}', which says what they stand for"),
        (True, without("a.weight.nested_absmax"), MISSING, "a.weight.nested_absmax' is not there"),
        (True, without("a.weight.nested_quant_map"), MISSING, "a.weight.nested_quant_map' is not"),
        (False, put("a.weight", lambda t: t[:-1]), FORMAT, "a.weight' holds 1151 bytes of codes, where 1152"),
        (False, put("a.weight.absmax", lambda t: t[:-1]), FORMAT, "absmax' holds 35 values, where 36"),
        (False, put("a.weight.absmax", torch.Tensor.half), FORMAT, "absmax' is of type torch.float16"),
        (True, put("a.weight.absmax", torch.Tensor.float), FORMAT, "absmax' is of type torch.float32"),
        (True, put("a.weight.nested_absmax", lambda t: t.repeat(2)), FORMAT, "nested_absmax' holds 2 values"),
        (True, put("a.weight.nested_quant_map", lambda t: t[:255]), FORMAT, "quant_map' holds 255 values"),
        (False, put("a.weight.quant_map", lambda t: t.flip(0)), UNKNOWN, "a.weight': its values are those of"),
        (False, put("a.weight.quant_map", lambda t: t * math.nan), FORMAT, "quant_map' holds values that are no"),
        (False, put("a.weight.absmax", poisoned(math.nan)), FORMAT, "absmax': 1 of its 36 scales are no finite"),
        (False, put("a.weight.absmax", poisoned(math.inf)), FORMAT, "absmax': 1 of its 36 scales are no finite"),
        (True, put("a.weight.nested_absmax", poisoned(math.nan)), FORMAT, "nested_absmax': 1 of its 1 scales"),
        (False, put(STATE, lambda t: t[:-3]), FORMAT, "is no JSON"),
        (False, put(STATE, lambda t: t * 0 + 255), FORMAT, "is no JSON"),
        (False, said(blocksize=48), FORMAT, "blocksize one of"),
        (False, said(blocksize=0), FORMAT, "blocksize one of"),
        (False, said(shape=[24, -96]), FORMAT, "shape a list of sizes"),
        (False, said(shape=None), FORMAT, "shape a list of sizes"),
        (False, said(shape=[24, 97]), FORMAT, "a.weight' holds 1152 bytes of codes, where 1164"),
        (False, said(dtype="int8"), FORMAT, "dtype one of"),
        (False, said(quant_type="af4"), FORMAT, "quant_type is nf4 or fp4"),
        (False, said(quant_type="fp4"), UNKNOWN, "its values are those of 'fp4'"),
        (True, said(nested_offset="much"), FORMAT, "nested_offset are numbers"),
        (True, said(nested_blocksize=-1), FORMAT, "nested_offset are numbers"),
        (True, said(nested_dtype="float16"), UNKNOWN, "scales decoded to 'float16'"),
    ],
)  # fmt: skip
def test_damage_is_named(
    tmp_path: Path, nested: bool, damage: Callable[[dict[str, torch.Tensor]], Any], error: type[LemaError], named: str
) -> None:
    tensors = whole(nested=nested)
    damage(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with GlobalBinaryIndex(tmp_path) as gbi, pytest.raises(error) as raised:
        found = find_stored({name: gbi.record(name) for name in gbi.keys}, SETTINGS)
        for name, stored in found.items():
            materialize(gbi, ParameterSource(name, stored.shape, stored.dtype, stored.codec))
    assert named in str(raised.value) and "model.safetensors" in str(raised.value)


@pytest.mark.parametrize(
    ("change", "error", "named"),
    [
        ({"a.SCB": None}, MISSING, "a.SCB', which says what they stand for"),
        ({"a.weight": None}, MISSING, "a.weight' is not there"),
        ({"a.SCB": torch.ones(5)}, FORMAT, "a.SCB' holds 5 values, where 6"),
        ({"a.SCB": torch.ones(6).half()}, FORMAT, "a.SCB' is of type torch.float16"),
        ({"a.SCB": torch.full((6,), math.nan)}, FORMAT, "a.SCB': 6 of its 6 scales are no finite numbers"),
        ({"a.weight": torch.zeros(6, 4, dtype=torch.uint8)}, FORMAT, "should be int8 codes"),
        ({"a.weight_format": torch.tensor(2, dtype=torch.uint8)}, UNKNOWN, "a.weight_format' is 2"),
    ],
)
def test_damage_of_eight_bits_is_named(
    tmp_path: Path, change: dict[str, torch.Tensor | None], error: type[LemaError], named: str
) -> None:
    good = {"a.weight": torch.zeros(6, 4, dtype=torch.int8), "a.SCB": torch.ones(6)}
    tensors = {name: tensor for name, tensor in {**good, **change}.items() if tensor is not None}
    save_file(tensors, tmp_path / "model.safetensors")
    with GlobalBinaryIndex(tmp_path) as gbi, pytest.raises(error) as raised:
        found = find_stored({name: gbi.record(name) for name in gbi.keys}, {"quant_method": "bitsandbytes"})
        for name, stored in found.items():
            materialize(gbi, ParameterSource(name, stored.shape, stored.dtype, stored.codec))
    assert named in str(raised.value) and "model.safetensors" in str(raised.value)


def test_what_is_streamed_is_looked_at_once(tmp_path: Path) -> None:
    """Before the first decoding and not again: the same answer would cost every step its time."""
    tensors = whole()
    save_file(tensors, tmp_path / "model.safetensors")
    with GlobalBinaryIndex(tmp_path) as gbi:
        (stored,) = find_stored({name: gbi.record(name) for name in gbi.keys}, None).values()
        source = ParameterSource("a.weight", stored.shape, torch.float32, stored.codec)
        layout = SlotLayout([source])
        slot, scratch = page_aligned(layout.nbytes), page_aligned(layout.scratch_nbytes)
        for run, offset in layout.decoded[0].runs:
            raw = gbi.view(run.record.name).reshape(-1).view(torch.uint8)
            slot[offset : offset + len(raw)] = raw
        scales = layout.decoded[0].runs[1][1]
        good = slot[scales : scales + 4].clone()
        slot[scales : scales + 4] = 255
        decode = Decoder(slot, scratch, layout.decoded)
        with pytest.raises(WeightsFormatError, match=r"a\.weight\.absmax"):
            decode()
        slot[scales : scales + 4] = good
        decode()
        values = scratch.view(torch.float32)[: math.prod(stored.shape)].view(stored.shape)
        assert same_bits(values.clone(), decoded(tensors, "a.weight"))
