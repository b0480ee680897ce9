"""Order, packs, cursor and counts: every row once an epoch, in an order that stopping does not change."""

from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_helpers import ByBytes, byte_dataset, chat, make_tokenizer, numbered_rows, write_jsonl
from lema.data import (
    BatchStream,
    DataConfig,
    Dropped,
    EncodedRow,
    ListRows,
    StepBatch,
    TokenDataset,
    collate,
    collate_packed,
    load_data,
)  # fmt: skip
from lema.data.order import epoch_order, permutation, split
from lema.data.packing import pack
from lema.errors import CheckpointError, ConfigError, InputError


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LEMA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


MODES: dict[str, dict[str, Any]] = {
    "shuffled": {}, "in order": {"shuffle": False}, "grouped": {"group_by_length": True}, "packed": {"packing": True},
    "packed in order": {"packing": True, "shuffle": False}, "left": {"padding_side": "left"},
}  # fmt: skip
_MODE = st.sampled_from(list(MODES))
_QUICK = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def stream(rows: int, per_step: int, mode: str, seed: int = 0, **more: Any) -> BatchStream:
    return BatchStream(byte_dataset(numbered_rows(rows)), per_step, seed, **{**MODES[mode], **more})


def take(source: BatchStream, count: int) -> list[StepBatch]:
    return [next(source) for _ in range(count)]


def same(a: StepBatch, b: StepBatch) -> bool:
    return (
        (a.rows, a.tokens, a.targets, a.epoch, a.indices) == (b.rows, b.tokens, b.targets, b.epoch, b.indices)
        and a.inputs.keys() == b.inputs.keys()
        and all(torch.equal(value, b.inputs[name]) for name, value in a.inputs.items())
    )


def learned(batch: StepBatch) -> Counter[tuple[int, int]]:
    """(token, the one before it) of every target, as the loss sees them."""
    ids, labels = batch.inputs["input_ids"], batch.inputs["labels"]
    at = labels[:, 1:] != -100
    assert torch.equal(labels[:, 1:][at], ids[:, 1:][at])
    return Counter(zip(ids[:, 1:][at].tolist(), ids[:, :-1][at].tolist(), strict=True))


@_QUICK
@given(rows=st.integers(1, 60), per_step=st.integers(1, 9), mode=_MODE, seed=st.integers(0, 5))
def test_every_row_is_seen_exactly_once_an_epoch(rows: int, per_step: int, mode: str, seed: int) -> None:
    source = stream(rows, per_step, mode, seed)
    orders = []
    for epoch in range(2):
        batches = take(source, source.steps_per_epoch)
        seen = [i for batch in batches for i in batch.indices]
        assert sorted(seen) == list(range(rows))
        assert batches[-1].epoch == epoch + 1 == source.epoch
        assert sum(batch.rows for batch in batches) == rows
        orders.append(seen)
    if rows > 20 and source.steps_per_epoch > 4:
        assert (orders[0] == orders[1]) == (not MODES[mode].get("shuffle", True))


@_QUICK
@given(
    rows=st.integers(1, 40), per_step=st.integers(1, 6), mode=_MODE, stop=st.integers(0, 30), more=st.integers(1, 12)
)
def test_a_stream_resumed_anywhere_goes_on_as_if_never_stopped(
    rows: int, per_step: int, mode: str, stop: int, more: int
) -> None:
    whole = stream(rows, per_step, mode)
    expected = take(whole, stop + more)
    stopped = stream(rows, per_step, mode)
    take(stopped, stop)
    state = json.loads(json.dumps(stopped.state_dict()))
    resumed = stream(rows, per_step, mode)
    take(resumed, more)  # wherever it was before
    resumed.load_state_dict(state)
    assert resumed.epoch == stopped.epoch
    assert all(same(a, b) for a, b in zip(take(resumed, more), expected[stop:], strict=True))
    assert resumed.counts == whole.counts


@_QUICK
@given(rows=st.integers(1, 40), per_step=st.integers(1, 6), mode=_MODE)
def test_what_is_learned_does_not_depend_on_the_mode(rows: int, per_step: int, mode: str) -> None:
    plain, other = stream(rows, 1, "in order"), stream(rows, per_step, mode)
    expected = sum((learned(b) for b in take(plain, plain.steps_per_epoch)), Counter())
    batches = take(other, other.steps_per_epoch)
    assert sum((learned(b) for b in batches), Counter()) == expected
    assert sum(b.targets for b in batches) == expected.total()
    for batch in batches:
        assert learned(batch).total() == batch.targets
        if "attention_mask" in batch.inputs:
            assert int(batch.inputs["attention_mask"].sum()) == batch.tokens


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(0, 50), max_size=80), capacity=st.integers(50, 70))
def test_packs_hold_every_row_once_and_never_too_much(lengths: list[int], capacity: int) -> None:
    packs = pack(np.array(lengths, dtype=np.int32), capacity)
    members = [packs[i].tolist() for i in range(len(packs))]
    assert sorted(row for rows in members for row in rows) == [i for i, n in enumerate(lengths) if n]
    assert all(0 < sum(lengths[i] for i in rows) <= capacity for rows in members)
    assert len(members) <= 2 * sum(lengths) // capacity + 1  # any two packs together are more than one


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=4))
def test_a_packed_batch_tells_its_rows_apart(lengths: list[list[int]]) -> None:
    packs = [[EncodedRow([7] * n, [7] * n) for n in pack] for pack in lengths]
    batch = collate_packed(packs, pad_token_id=1)
    assert "attention_mask" not in batch
    for i, rows in enumerate(lengths):
        starts = (batch["position_ids"][i] == 0).nonzero().flatten().tolist()
        begins = np.cumsum([0, *rows]).tolist()
        assert starts == [b for b in begins if b < batch["input_ids"].shape[1]]
        assert all(batch["labels"][i, b] == -100 for b in starts)
        assert int((batch["labels"][i] != -100).sum()) == sum(n - 1 for n in rows)
        assert (batch["labels"][i, begins[-1] :] == -100).all()


def test_left_padding_has_positions_that_begin_with_the_row() -> None:
    rows = [EncodedRow([5, 6, 7], [-100, 6, 7]), EncodedRow([8], [8])]
    left, right = collate(rows, 0, "left"), collate(rows, 0)
    assert left["input_ids"].tolist() == [[5, 6, 7], [0, 0, 8]] and right["input_ids"].tolist() == [
        [5, 6, 7],
        [8, 0, 0],
    ]
    assert left["position_ids"].tolist() == [[0, 1, 2], [0, 0, 0]] and "position_ids" not in right
    assert left["labels"].tolist() == [[-100, 6, 7], [-100, -100, -100]]


def test_the_order_is_the_same_for_ever() -> None:
    """Stored numbers: a run resumed with another numpy must find its rows in the same order."""
    assert permutation(10, 42, 0).tolist() == STORED_ORDER
    assert sorted(epoch_order(7, 1, 3, shuffle=True, rows_per_step=2, lengths=lambda: np.arange(7))) == list(range(7))
    train, held_out = split(100, 30, 5)
    assert len(held_out) == 30 and sorted([*train, *held_out]) == list(range(100))


def test_grouping_brings_rows_of_a_length_together() -> None:
    def padding(source: BatchStream) -> float:
        batches = take(source, source.steps_per_epoch)
        return 1 - sum(b.tokens for b in batches) / sum(b.inputs["input_ids"].numel() for b in batches)

    plain, grouped = padding(stream(400, 8, "shuffled")), padding(stream(400, 8, "grouped"))
    assert grouped < plain / 4, (grouped, plain)
    lengths = [next(s).inputs["input_ids"].shape[1] for s in [stream(400, 8, "grouped")] for _ in range(10)]
    assert lengths != sorted(lengths)  # steps stay in random order


# -- rows that are lost --------------------------------------------------------------------------


def lossy(rows: int, short: int, long: int = 0, limit: int = 10, too_long: str = "truncate") -> TokenDataset:
    """Rows of 4 bytes, of which some have no target (1 byte) and some are too long (12)."""
    texts = ["x" * (1 if i < short else 12 if i < short + long else 4) for i in range(rows)]
    return byte_dataset([{"text": text} for text in texts], limit, too_long)


@pytest.mark.parametrize("packing", [False, True])
def test_lost_rows_are_counted_and_said(packing: bool, caplog: pytest.LogCaptureFixture) -> None:
    source = BatchStream(lossy(40, 2, 6), 4, packing=packing, max_dropped=0.1)
    with caplog.at_level(logging.WARNING):
        batches = take(source, source.steps_per_epoch)
    assert source.counts == Counter({"rows": 40, "truncated": 6, "no target": 2})
    assert "of 40 rows 6 (15.0%) were truncated to 10 tokens and 2 (5.0%) dropped (2 no target)" in caplog.text
    assert sum(b.rows for b in batches) == 38 and sum(b.truncated for b in batches) == 6
    assert all(b.inputs["input_ids"].shape[1] <= 10 for b in batches)


def test_rows_lost_before_packing_count_against_all_rows() -> None:
    source = BatchStream(lossy(400, 30), 4, packing=True, max_dropped=0.1)
    assert sum(batch.rows for batch in take(source, source.steps_per_epoch)) == 370


@pytest.mark.parametrize("packing", [False, True])
def test_too_many_lost_rows_stop_the_run_with_numbers_and_a_way_out(packing: bool) -> None:
    with pytest.raises(
        InputError, match=r"8 of 40 rows \(20.0%\) are dropped \(8 too long\).*max_dropped=0.1.*max_seq_length"
    ):
        source = BatchStream(lossy(40, 0, 8, too_long="drop"), 4, packing=packing, max_dropped=0.1)
        take(source, source.steps_per_epoch)
    with pytest.raises(InputError, match=r"20 of 20 rows .*nothing is left to learn"):
        source = BatchStream(lossy(20, 20), 4, packing=packing)
        take(source, source.steps_per_epoch)


def test_a_run_that_loses_most_rows_does_not_wait_for_the_end_of_the_epoch() -> None:
    source = BatchStream(lossy(10_000, 9000), 4, max_dropped=0.1)
    with pytest.raises(InputError, match="are dropped"):
        take(source, 30)


def test_a_step_whose_rows_are_all_dropped_is_empty_and_says_so() -> None:
    source = BatchStream(lossy(8, 2), 2, shuffle=False)
    first, second = take(source, 2)
    assert (first.rows, first.targets, first.dropped, first.inputs) == (0, 0, 2, {}) and second.rows == 2


def test_rows_too_long() -> None:
    dataset = lossy(3, 0, 3)
    row = dataset[0]
    assert isinstance(row, EncodedRow) and len(row.input_ids) == 10 and row.cut_from == 12
    assert lossy(3, 0, 3, too_long="drop")[0] == Dropped("too long")
    with pytest.raises(InputError, match=r"dataset, row 1 has 12 tokens, more than max_seq_length=10"):
        lossy(3, 0, 3, too_long="error")[0]
    prompted = TokenDataset(ListRows([{"text": "x" * 12}]), ByBytes(masked=11), max_seq_length=10)
    assert prompted[0] == Dropped("no target")


# -- the cursor ----------------------------------------------------------------------------------


def test_a_cursor_of_something_else_is_refused() -> None:
    source = stream(20, 3, "shuffled")
    state = source.state_dict()
    for other, words in (
        (stream(20, 3, "shuffled", seed=1), "seed: 0 then, 1 now"),
        (stream(20, 4, "shuffled"), "rows_per_step: 3 then, 4"),
        (stream(20, 3, "packed"), "packing: False then, True now"),
        (stream(20, 3, "grouped"), "order: shuffle then, length"),
        (stream(21, 3, "shuffled"), "20 rows then, 21 now"),
    ):  # fmt: skip
        with pytest.raises(CheckpointError, match=words):
            other.load_state_dict(state)
    for broken in ({}, {**state, "step": 99}, {**state, "epoch": -1}, {**state, "counts": 3}, {**state, "order": None}):
        with pytest.raises(CheckpointError, match="cursor"):
            source.load_state_dict(broken)


def test_a_stream_for_evaluation_is_one_epoch_again_and_again() -> None:
    source = BatchStream(byte_dataset(numbered_rows(10)), 4, shuffle=False, repeat=False)
    first = list(source)
    next(iter(source))  # left in the middle
    again = list(source)
    assert [b.rows for b in first] == [4, 4, 2] and all(same(a, b) for a, b in zip(first, again, strict=True))


# -- from settings -------------------------------------------------------------------------------


def chat_file(path: Path, rows: int) -> Path:
    return write_jsonl(path, [{"messages": chat(f"question {i}", f"answer {i}")} for i in range(rows)])


def texts(source: BatchStream, tokenizer: Any) -> set[str]:
    count = source.steps_per_epoch
    return {tokenizer.decode(row) for batch in take(source, count) for row in batch.inputs["input_ids"]}


@pytest.mark.parametrize("size", [7, 0.1])
def test_rows_are_held_out_of_training(size: float, tmp_path: Path) -> None:
    path = chat_file(tmp_path / "rows.jsonl", 70)
    tokenizer = make_tokenizer()

    def load(seed: int = 3) -> Any:
        config = DataConfig(train_file=str(path), eval_size=size)
        return load_data(config, tokenizer, max_seq_length=64, rows_per_step=1, seed=seed)

    data = load()
    train, held_out = texts(data.train, tokenizer), texts(data.eval, tokenizer)
    assert len(train) == 63 and len(held_out) == 7 and not train & held_out
    assert texts(load().eval, tokenizer) == held_out != texts(load(seed=4).eval, tokenizer)
    assert data.summary["train"]["rows"] == 63 and data.summary["eval"]["rows"] == 7
    assert data.summary["train"]["format"] == "messages" and data.summary["train"]["steps_per_epoch"] == 63
    assert 0 < data.summary["train"]["sample"]["trained_share"] < 1
    json.dumps(data.summary)
    with pytest.raises(CheckpointError, match="held out"):
        load(seed=4).train.load_state_dict(data.train.state_dict())


def test_data_from_python_and_a_file_for_evaluation(tmp_path: Path) -> None:
    rows = [{"messages": chat(f"question {i}", f"answer {i}")} for i in range(5)]
    config = DataConfig(eval_file=str(write_jsonl(tmp_path / "eval.jsonl", [{"prompt": "a", "completion": "b"}])))
    data = load_data(config, make_tokenizer(), max_seq_length=64, rows_per_step=2, seed=0, train_rows=rows)
    assert data.train.steps_per_epoch == 3 and data.eval is not None
    assert data.summary["eval"]["format"] == "prompt_completion" and [b.rows for b in data.eval] == [1]


def test_what_load_data_refuses(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = chat_file(tmp_path / "rows.jsonl", 4)

    def load(tokenizer: Any = None, **settings: Any) -> Any:
        config = DataConfig(**{"train_file": str(path), **settings})
        return load_data(config, tokenizer or make_tokenizer(), max_seq_length=64, rows_per_step=2, seed=0)

    with pytest.raises(ConfigError, match="train_file is missing"):
        load(train_file=None)
    with pytest.raises(ConfigError, match="holds out 4 of the 4 rows"):
        load(eval_size=4)
    with pytest.raises(InputError, match=r"line 1: the field 'text' is missing.*4 of 4 rows looked at are bad"):
        load(data_format="text")
    with pytest.raises(InputError, match="no chat template"):
        load(make_tokenizer(None))
    endless = make_tokenizer("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    load(endless)
    assert "no answer ends in a special token" not in caplog.text
    endless.eos_token = None
    load(endless)
    assert "no answer ends in a special token" in caplog.text


def test_sizes_for_packing_are_counted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = chat_file(tmp_path / "rows.jsonl", 30)
    asked: list[int] = []
    measured = TokenDataset.measured
    monkeypatch.setattr(TokenDataset, "measured", lambda self, i: asked.append(i) or measured(self, i))
    config = DataConfig(train_file=str(path), packing=True)

    def load(**changes: Any) -> tuple[Any, int]:
        asked.clear()
        values = {"max_seq_length": 64, "rows_per_step": 2, "seed": 0, **changes}
        data = load_data(config, make_tokenizer(), **values)
        return data, len(asked) - 30  # the summary's sample

    data, counted = load()
    assert counted == 30 and load()[1] == 0 and load(seed=5)[1] == 0 and load(max_seq_length=65)[1] == 30
    assert data.summary["train"]["steps_per_epoch"] == data.train.steps_per_epoch < 15


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"data_format": "mesages"}, "did you mean 'messages'"), ({"too_long": "cut"}, "choose one of truncate"),
        ({"eval_size": 1.5}, "whole rows"), ({"eval_size": -1}, "0 or more"), ({"max_dropped": 1.5}, "1 or less"),
        ({"packing": 1}, "true or false"), ({"packing": True, "group_by_length": True}, "no padding to save"),
        ({"shuffle": False, "group_by_length": True}, "choose one"), ({"eval_file": "a", "eval_size": 3}, "one place"),
        ({"train_on_prompt": True, "mask_history": True}, "choose one"), ({"data_seed": -1}, "0 or more"),
        ({"train_file": 3}, "must be a path"), ({"max_dropped": float("nan")}, "0 or more"),
    ],
)  # fmt: skip
def test_settings_that_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        DataConfig(**values)


STORED_ORDER = [4, 8, 1, 9, 3, 6, 0, 7, 2, 5]
