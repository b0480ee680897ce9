"""What is known of padding: each thread's own, and nobody's mask function is lost."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from lema.models.masks import padding_known

WHOLE, PADDED = torch.tensor([[1, 1]]), torch.tensor([[0, 1]])


@pytest.fixture
def asked() -> Iterator[list[dict[str, Any]]]:
    """What the registered function for sdpa is asked, in the order of the calls."""
    before = dict(ALL_MASK_ATTENTION_FUNCTIONS._local_mapping)
    found: list[dict[str, Any]] = []
    ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] = lambda **kwargs: found.append(kwargs)
    yield found
    ALL_MASK_ATTENTION_FUNCTIONS._local_mapping.clear()
    ALL_MASK_ATTENTION_FUNCTIONS._local_mapping.update(before)


def build(mask: torch.Tensor) -> None:
    ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](attention_mask=mask, allow_is_causal_skip=True)


def test_two_threads_each_know_their_own(asked: list[dict[str, Any]]) -> None:
    both_inside, one_left = threading.Barrier(2, timeout=30), threading.Event()

    def whole() -> None:
        with padding_known(WHOLE):
            both_inside.wait()
            assert one_left.wait(30)
            build(WHOLE)

    thread = threading.Thread(target=whole)
    thread.start()
    with padding_known(PADDED):
        both_inside.wait()
        build(PADDED)
    one_left.set()
    thread.join()
    assert asked[0]["attention_mask"] is PADDED and not asked[0]["allow_is_causal_skip"]
    assert asked[1]["attention_mask"] is None and asked[1]["allow_is_causal_skip"]
    assert len(asked) == 2


def test_outside_of_a_block_and_in_one_inside(asked: list[dict[str, Any]]) -> None:
    with padding_known(PADDED):
        with padding_known(WHOLE):
            build(WHOLE)
        with padding_known(None):
            build(PADDED)
    build(PADDED)
    assert [call["attention_mask"] for call in asked] == [None, PADDED, PADDED]
    assert [call["allow_is_causal_skip"] for call in asked] == [True, False, True]


def test_a_function_that_is_registered_meanwhile_stays(asked: list[dict[str, Any]]) -> None:
    with padding_known(WHOLE):
        pass
    own: list[Any] = []
    ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] = lambda **kwargs: own.append(kwargs["attention_mask"])
    with padding_known(WHOLE):
        build(WHOLE)
    build(PADDED)
    assert own == [None, PADDED] and not asked
