"""What is put in place of a model's own forwards and methods, and how it comes off again.

It knows modules and names of attributes; what the replacements do is their makers' affair.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from ..errors import BindingError

Forward = Callable[..., Any]

_NOTHING = object()


class Removable(Protocol):
    """As torch's handles of hooks."""

    def remove(self) -> None:
        """Take it off; again is no error."""


class Gate:
    """A module's forward that another one may stand in for, at the cost of an assignment.

    It may be copied with its module, whose copy then has one of its own.
    """

    def __init__(self, module: nn.Module) -> None:
        self.own: Forward = module.forward
        """The forward that was there before."""
        self.__wrapped__ = self.own  # whoever asks for the signature gets that of the forward
        self._now = self.own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._now(*args, **kwargs)

    @contextlib.contextmanager
    def taken_by(self, forward: Forward) -> Iterator[None]:
        """Inside the block calls go to this one."""
        before, self._now = self._now, forward
        try:
            yield
        finally:
            self._now = before


@dataclass(frozen=True, slots=True)
class _Replaced:
    """An attribute of a module, and what its `__dict__` held in its place."""

    module: nn.Module
    attribute: str
    value: Any
    before: Any

    def check(self) -> None:
        if self.module.__dict__.get(self.attribute) is not self.value:
            raise BindingError(
                f"{self.attribute} of {type(self.module).__name__} was replaced by something else since the model was "
                "attached; take that off first"
            )

    def remove(self) -> None:
        if self.before is _NOTHING:
            del self.module.__dict__[self.attribute]
        else:
            self.module.__dict__[self.attribute] = self.before


class Interceptor:
    """Owner of everything that is put in place of a model's own, each thing under a name.

    A replacement is an entry of a module's `__dict__`, which hides its class's attribute; hooks are kept beside them.
    """

    def __init__(self) -> None:
        self._in_place: dict[str, list[_Replaced | Removable]] = {}

    @property
    def names(self) -> list[str]:
        """Of what is in place, in the order it came."""
        return list(self._in_place)

    def replace(self, name: str, module: nn.Module, attribute: str, value: Any) -> None:
        """Put `value` where the module's own attribute is; several may lie under one name."""
        replaced = _Replaced(module, attribute, value, module.__dict__.get(attribute, _NOTHING))
        self._in_place.setdefault(name, []).append(replaced)
        module.__dict__[attribute] = value

    def hook(self, name: str, *handles: Removable) -> None:
        """Keep handles of hooks, to be removed with the name."""
        self._in_place.setdefault(name, []).extend(handles)

    def gate(self, name: str, module: nn.Module) -> Gate:
        """The gate before the module's forward, put there when it is first asked for, and anew before a forward that
        somebody has put in its place since."""
        gate = module.__dict__.get("forward")
        if not isinstance(gate, Gate) or name not in self._in_place:
            self._in_place.pop(name, None)
            gate = Gate(module)
            self.replace(name, module, "forward", gate)
        return gate

    @contextlib.contextmanager
    def replaced(self, modules: Iterable[Any], forwards: Sequence[Forward]) -> Iterator[None]:
        """Each module's `forward` is another one inside the block; blocks may lie in blocks."""
        name = f"block {sum(other.startswith('block') for other in self._in_place)}"
        for module, forward in zip(modules, forwards, strict=True):
            self.replace(name, module, "forward", forward)
        try:
            yield
        finally:
            self.take_off(name)

    def take_off(self, *names: str) -> None:
        """Leave modules as they were before these names, the latest first; names that are not in place are no error.

        Raises:
            BindingError: somebody has replaced one of the attributes since; nothing was taken off.
        """
        wanted = [item for name, items in self._in_place.items() if name in names for item in items]
        latest = {(id(r.module), r.attribute): r for r in wanted if isinstance(r, _Replaced)}
        for replaced in latest.values():
            replaced.check()
        for each in reversed(wanted):
            each.remove()
        for name in names:
            self._in_place.pop(name, None)
