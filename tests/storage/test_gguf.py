"""GGUF's blocks beside gguf's own decoding, headers that cannot be, and rows put in the model's order."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from codec_helpers import same_bits
from gguf_files import LLAMA_FIELDS, MOE_FIELDS, blocks_of, llama_tensors, mixed_llama, moe_tensors, numbers, write_gguf
from lema.errors import MissingTensorError, UnsupportedError, WeightsError, WeightsFormatError, WeightsNotFoundError
from lema.models.checkpoint import map_checkpoint
from lema.models.gguf import config_in
from lema.models.transformers_adapter import TransformersAdapter
from lema.storage.codecs.gguf import GgufRecord, GgufRows
from lema.storage.codecs.gguf_blocks import BLOCKS
from lema.storage.index import GlobalBinaryIndex
from lema.storage.views import materialize

gguf = pytest.importorskip("gguf")
TYPES = [torch.float32, torch.bfloat16, torch.float16]


def theirs(kind: str, rows: np.ndarray) -> torch.Tensor:
    with np.errstate(all="ignore"):
        return torch.from_numpy(gguf.dequantize(rows, gguf.GGMLQuantizationType[kind]))


def codec_of(kind: str, rows: np.ndarray, order: tuple[int, ...] | None = None) -> GgufRows:
    record = GgufRecord("blk.0.w", Path("m.gguf"), 0, rows.nbytes, torch.uint8, rows.shape, kind)
    return GgufRows(record, 0, len(rows), order)


def ours(kind: str, rows: np.ndarray, dtype: torch.dtype, order: tuple[int, ...] | None = None) -> torch.Tensor:
    codec = codec_of(kind, rows, order)
    out = torch.full(codec.record.values_shape, float("nan"), dtype=dtype)
    codec.decode([torch.from_numpy(rows.reshape(-1))], out)
    return out


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 40), st.integers(1, 3), st.sampled_from(TYPES), st.booleans(), st.integers(0, 2**31))
@pytest.mark.parametrize("kind", BLOCKS)
def test_any_bytes_are_ggufs_values(
    kind: str, rows: int, blocks: int, dtype: torch.dtype, permuted: bool, seed: int
) -> None:
    make = np.random.default_rng(seed)
    codes = make.integers(0, 256, (rows, blocks * BLOCKS[kind].nbytes), np.uint8)
    order = tuple(make.permutation(rows).tolist()) if permuted else None
    expected = theirs(kind, codes)[list(order)] if order is not None else theirs(kind, codes)
    assert same_bits(ours(kind, codes, dtype, order), expected.to(dtype))


@pytest.mark.parametrize("kind", BLOCKS)
def test_every_byte_under_extreme_scales_is_ggufs_value(kind: str) -> None:
    form = BLOCKS[kind]
    for scale in (0.0, -0.0, 6e-8, -6e-8, 65504.0, -65504.0, 1.0):
        codes = np.repeat(np.arange(256, dtype=np.uint8)[:, None], form.nbytes, 1)
        for start in form.halves:
            codes[:, start : start + 2] = np.full((256, 1), scale, np.float16).view(np.uint8)
        assert same_bits(ours(kind, codes, torch.float32), theirs(kind, codes))


def test_more_than_is_decoded_at_a_time_is_decoded_whole() -> None:
    codes = blocks_of("Q4_K", 2100, 512)
    assert same_bits(ours("Q4_K", codes, torch.float32), theirs("Q4_K", codes))


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("scale", [np.nan, np.inf])
def test_scales_that_are_no_numbers_are_refused_by_name(kind: str, scale: float) -> None:
    codes = blocks_of(kind, 2, 256)
    start = BLOCKS[kind].halves[-1]
    codes[1, start : start + 2] = np.array([scale], np.float16).view(np.uint8)
    with pytest.raises(WeightsFormatError, match=r"m\.gguf.*blk\.0\.w.*scale"):
        codec_of(kind, codes).check([torch.from_numpy(codes.reshape(-1))])


# --- files ----------------------------------------------------------------------------------------


def parameters(source: Path, dtype: torch.dtype = torch.float32, **changes: int) -> tuple[dict, dict]:
    """Every parameter as it is read in place, and as transformers reads it."""
    config = config_in(source)
    for name, value in changes.items():
        setattr(config, name, value)
    adapter = TransformersAdapter(config)
    with GlobalBinaryIndex(source) as gbi:
        found = map_checkpoint(adapter.model, adapter.model.state_dict(), gbi, dtype)
        made = {name: materialize(gbi, part) for name, part in found.sources.items() if name not in found.tied}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return made, load_gguf_checkpoint(source, return_tensors=True, model_to_load=model)["tensors"]


def check_equal(made: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> None:
    assert made.keys() == reference.keys()
    wrong = [name for name in made if not same_bits(made[name], reference[name].float())]
    assert not wrong


@pytest.mark.parametrize("quantise", [True, False])
def test_llamas_permuted_rows_are_put_right(tmp_path: Path, quantise: bool) -> None:
    check_equal(*parameters(write_gguf(tmp_path / "m.gguf", "llama", llama_tensors(), quantise, **LLAMA_FIELDS)))


def test_blocks_of_many_kinds_in_one_file(tmp_path: Path) -> None:
    check_equal(*parameters(mixed_llama(tmp_path / "m.gguf")))


def test_fused_experts_are_put_together(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "m.gguf", "qwen3moe", moe_tensors(), **MOE_FIELDS)
    check_equal(*parameters(source, moe_intermediate_size=32))


def test_norms_that_are_stored_with_one_more(tmp_path: Path) -> None:
    tensors = llama_tensors()
    for i in range(2):
        tensors |= {f"blk.{i}.{part}.weight": numbers(32) for part in ("post_attention_norm", "post_ffw_norm")}
    fields = LLAMA_FIELDS | {"attention__key_length": 8, "attention__value_length": 8}
    made, reference = parameters(write_gguf(tmp_path / "m.gguf", "gemma2", tensors, **fields))
    check_equal(made, reference)
    assert same_bits(made["model.norm.weight"], torch.from_numpy(tensors["output_norm.weight"] - 1))


def test_halves_are_read_as_they_are(tmp_path: Path) -> None:
    tensors = {
        name: values.astype(np.float16) if values.ndim > 1 else values for name, values in llama_tensors().items()
    }
    source = write_gguf(tmp_path / "m.gguf", "llama", tensors, quantise=False, **LLAMA_FIELDS)
    check_equal(*parameters(source))
    with GlobalBinaryIndex(source) as gbi:
        assert gbi.record("blk.0.attn_v.weight").dtype == torch.float16


def test_a_split_model_is_read_whole_from_any_of_its_files(tmp_path: Path) -> None:
    tensors = llama_tensors() | {"output.weight": numbers(64, 32)}
    whole = write_gguf(tmp_path / "m.gguf", "llama", tensors, **LLAMA_FIELDS)
    write_gguf(tmp_path / "s.gguf", "llama", tensors, split=7, **LLAMA_FIELDS)
    files = sorted(tmp_path.glob("s-*.gguf"))
    assert len(files) > 2
    assert not config_in(files[1]).tie_word_embeddings, "the head is in another file than the first"
    with GlobalBinaryIndex(files[1]) as split, GlobalBinaryIndex(whole) as one:
        assert split.files == files and set(split.keys) == set(one.keys)
        assert all(torch.equal(split.view(name), one.view(name)) for name in one.keys)
    files[2].unlink()
    with pytest.raises(WeightsNotFoundError, match=files[2].name):
        GlobalBinaryIndex(files[0])


def test_what_is_more_than_an_order_of_rows_is_refused_by_name(tmp_path: Path) -> None:
    tensors = {"token_embd.weight": numbers(64, 32), "position_embd.weight": numbers(64, 32)}
    for part, shape in {
        "attn_qkv": (96, 32),
        "attn_output": (32, 32),
        "ffn_up": (64, 32),
        "ffn_down": (32, 64),
    }.items():
        tensors |= {f"blk.0.{part}.weight": numbers(*shape), f"blk.0.{part}.bias": numbers(shape[0])}
    for part in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        tensors |= {f"{part}.weight": numbers(32), f"{part}.bias": numbers(32)}
    fields = {"block_count": 1, "embedding_length": 32, "feed_forward_length": 64, "attention__head_count": 4}
    source = write_gguf(tmp_path / "m.gguf", "gpt2", tensors, attention__layer_norm_epsilon=1e-5, **fields)
    with pytest.raises(UnsupportedError, match=r"blk\.0\..*lema prepare"):
        parameters(source)


def test_tensors_that_are_left_over_or_missing_are_refused(tmp_path: Path) -> None:
    tensors = llama_tensors() | {"blk.0.attn_sinks.weight": numbers(4)}
    with pytest.raises(UnsupportedError, match=r"attn_sinks"):
        parameters(write_gguf(tmp_path / "m.gguf", "llama", tensors, **LLAMA_FIELDS))
    tensors = {name: values for name, values in llama_tensors().items() if "blk.1.ffn_up" not in name}
    with pytest.raises(MissingTensorError, match=r"layers\.1\.mlp\.up_proj"):
        parameters(write_gguf(tmp_path / "n.gguf", "llama", tensors, **LLAMA_FIELDS))


def test_files_that_cannot_be_are_refused(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "m.gguf", "llama", llama_tensors(), **LLAMA_FIELDS).read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in (0, 3, 20, 400, len(whole) // 2, len(whole) - 1):
        cut.write_bytes(whole[:length])
        with pytest.raises(WeightsError, match=r"cut\.gguf"):
            GlobalBinaryIndex(cut)
    cut.write_bytes(b"NOPE" + whole[4:])
    with pytest.raises(WeightsFormatError, match="no GGUF file"):
        GlobalBinaryIndex(cut)
    kind = {"blk.0.attn_q.weight": "TQ2_0"}
    other = llama_tensors() | {"blk.0.attn_q.weight": np.zeros((32, 66), np.uint8)}
    with pytest.raises(UnsupportedError, match=r"blk\.0\.attn_q\.weight.*TQ2_0"):
        GlobalBinaryIndex(write_gguf(tmp_path / "k.gguf", "llama", other, kinds=kind, **LLAMA_FIELDS))
