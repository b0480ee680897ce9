"""Containers of tensors taken apart and put together, and what layers may hand to each other through them."""

from __future__ import annotations

from collections import UserDict, namedtuple
from typing import Any

import pytest
import torch

from lema.errors import UnsupportedError
from lema.streaming.arguments import BatchRules, changed_leaves, containers, of_a_layer, take_hidden
from lema.streaming.trees import changed, leaves, put_together, take_apart, writable

Pair = namedtuple("Pair", "keys values")


def made() -> dict[str, Any]:
    return {
        "tuple": (torch.tensor(1), None, [torch.tensor(2), "eager"]),
        "shared": UserDict({"full": Pair(torch.tensor(3), torch.tensor(4))}),
        "number": 5,
    }


def test_leaves_have_the_names_code_would_ask_for_them_by() -> None:
    names = [name for name, _ in leaves("x", made())]
    assert names == [
        "x['tuple'][0]", "x['tuple'][1]", "x['tuple'][2][0]", "x['tuple'][2][1]", "x['shared']['full'][0]",
        "x['shared']['full'][1]", "x['number']",
    ]  # fmt: skip


def test_taken_apart_and_put_together_it_is_the_same_in_other_containers() -> None:
    value = made()
    template, tensors = take_apart(value)
    assert [int(t) for t in tensors] == [1, 2, 3, 4]
    again = put_together(template, tensors)
    assert again["tuple"][2][0] is value["tuple"][2][0] and again["tuple"][2] is not value["tuple"][2]
    assert type(again["shared"]) is UserDict and again["shared"] is not value["shared"]
    assert type(again["shared"]["full"]) is Pair and again["number"] == 5
    doubled = changed("", value, lambda _, leaf: leaf * 2 if isinstance(leaf, torch.Tensor) else leaf)
    assert int(doubled["shared"]["full"].values) == 8 and int(value["shared"]["full"].values) == 4


def test_what_a_layer_may_write_to_is_found_but_not_its_arguments_by_name() -> None:
    value = made()
    found = list(writable(value))
    assert [id(each) for each in found] == [id(value), id(value["tuple"][2]), id(value["shared"])]
    assert containers(((torch.ones(1),), {"positions": (torch.ones(1),), "scale": 1.0})) == []
    (container,) = containers(((value["shared"],), {}))
    assert container is value["shared"]


def test_hidden_states_may_have_their_rows_in_another_dimension() -> None:
    rules = BatchRules()
    rules._add(("hidden states", 4), (2, 2, 5, 8), (2, 3, 5, 8))
    assert rules.of_hidden(torch.ones(2, 7, 5, 8)) == 1
    with pytest.raises(UnsupportedError, match=r"\[7, 5, 8\]"):
        rules.of_hidden(torch.ones(7, 5, 8))


def test_what_a_layer_made_is_cut_by_its_first_dimension_wherever_it_lies() -> None:
    rules = BatchRules()
    rules._add(("masks['causal']", 2), (2, 5), (3, 5))
    keys = of_a_layer(torch.arange(12).view(4, 3))
    arguments = ((), {"masks": {"causal": torch.ones(4, 5)}, "shared": {"full": (keys,)}})
    _, cut = rules.rows(arguments, 4, 1, 3)
    assert cut["masks"]["causal"].shape == (2, 5)
    assert cut["shared"]["full"][0].flatten().tolist() == [3, 4, 5, 6, 7, 8]
    assert arguments[1]["shared"]["full"][0] is keys
    with pytest.raises(UnsupportedError, match=r"shared\['full'\]\[0\].* has 4 rows for a batch of 5"):
        rules.rows(((), {"shared": {"full": (keys,)}}), 5, 0, 1)


def test_hidden_states_come_first_or_by_name() -> None:
    hidden = torch.ones(1)
    assert take_hidden((hidden, 2), {"a": 3}) == (hidden, ((2,), {"a": 3}))
    assert take_hidden((), {"hidden_states": hidden, "a": 3}) == (hidden, ((), {"a": 3}))
    assert changed_leaves(((1, [2]), {"a": (3,)}), lambda _, leaf: leaf + 1) == ((2, [3]), {"a": (4,)})
