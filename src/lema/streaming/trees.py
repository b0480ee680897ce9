"""Tuples, lists and dictionaries of tensors, taken apart by name and put together again.

It knows containers; it knows nothing of layers or of why tensors are wanted apart.
"""

from __future__ import annotations

import copy
from collections import UserDict
from collections.abc import Callable, Iterator
from typing import Any

import torch

_PLACE = object()


def leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """What lies in a value, however deep, under names as code would ask for it."""
    for key, item in _items(value):
        yield from leaves(f"{name}[{key!r}]", item)
    if not isinstance(value, tuple | list | dict | UserDict):
        yield name, value


def changed(name: str, value: Any, change: Callable[[str, Any], Any]) -> Any:
    """The same with other leaves, in containers of its own; called for leaves in the order of `leaves`."""
    if isinstance(value, dict | UserDict):
        other = copy.copy(value)
        for key, item in value.items():
            other[key] = changed(f"{name}[{key!r}]", item, change)
        return other
    if isinstance(value, tuple | list):
        items = [changed(f"{name}[{i}]", item, change) for i, item in enumerate(value)]
        return items if isinstance(value, list) else type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return change(name, value)


def writable(value: Any) -> Iterator[Any]:
    """The lists and dictionaries in a value, which whoever is handed it may write to."""
    if isinstance(value, list | dict | UserDict):
        yield value
    for _, item in _items(value):
        yield from writable(item)


def take_apart(value: Any) -> tuple[Any, list[torch.Tensor]]:
    """A value without its tensors, and these."""
    tensors: list[torch.Tensor] = []

    def take(_: str, leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        tensors.append(leaf)
        return _PLACE

    return changed("", value, take), tensors


def put_together(template: Any, tensors: list[torch.Tensor]) -> Any:
    """A value that was taken apart, of these tensors."""
    rest = iter(tensors)
    return changed("", template, lambda _, leaf: next(rest) if leaf is _PLACE else leaf)


def _items(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, dict | UserDict):
        yield from value.items()
    elif isinstance(value, tuple | list):
        yield from enumerate(value)
