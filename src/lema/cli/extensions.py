"""Verbs that other packages bring, found by the entry points of a group.

An entry point's name is where its verb goes, with points between the words (`data.build`); what it names is the verb's
function, or a `typer.Typer` that has several. A verb that is known but not installed says which package has it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import Any

import typer
from typer.core import TyperGroup
from typer.main import get_command_name

from ..libraries import VERBS, how_to_add
from .paths import expands_paths

GROUP = "lema.commands"


class Extensible(TyperGroup):
    """A group of verbs some of which may come with other packages."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The verb that was typed."""
        if args and self.get_command(ctx, args[0]) is None:
            verb = " ".join([*_path_of(ctx), args[0]])
            if verb in VERBS:
                ctx.fail(f"lema {verb} comes with a package of its own: {how_to_add(VERBS[verb])}")
        return super().resolve_command(ctx, args)


def _path_of(ctx: Any) -> list[str]:
    """The words between `lema` and what is typed next."""
    return [] if ctx.parent is None else [*_path_of(ctx.parent), ctx.info_name]


def add_verbs(groups: Mapping[str, typer.Typer]) -> None:
    """Put the verbs of installed packages into their groups, '' being the outermost one.

    A package whose verb cannot be imported, has no name or one that is taken, or names a group there is none of, costs
    that verb and a warning, which says whose it is.
    """
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name):
        group, _, name = entry.name.rpartition(".")
        try:
            _add(groups[group], name, entry.load())
        except Exception as error:  # other people's code: whatever it raises must not cost every other verb
            whose = f"{entry.dist.name} ({entry.value})" if entry.dist else entry.value
            typer.echo(f"warning: the verb {entry.name!r} of {whose} cannot be used: {error!r}", err=True)


def _add(group: typer.Typer, name: str, verb: typer.Typer | Callable[..., None]) -> None:
    if not name.strip():
        raise ValueError("it has no name")
    if name in _names(group):
        raise ValueError("there is a verb of this name already")
    if isinstance(verb, typer.Typer):
        group.add_typer(verb, name=name)
    else:
        group.command(name)(expands_paths(verb))


def _names(group: typer.Typer) -> set[str]:
    """Of the verbs and groups that a group has."""
    named: list[Any] = [*group.registered_commands, *group.registered_groups]
    return {each.name or get_command_name(getattr(each.callback, "__name__", "")) for each in named}
