"""Formats of replies that packages bring: how one is asked for, where it ends, and how it is shown and judged.

They are found by the entry points of a group, whose names are the formats'. No format is known here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import ConfigError
from ..libraries import FORMATS, how_to_add

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from ..data.render import ChatRenderer
    from .chat_model import ChatModel
    from .sampling import Sampling

GROUP = "lema.reply_formats"
TEXT = "text"
"""Replies are shown as they come."""


class ReplyFormat(Protocol):
    """What an entry point of the group names: an object with these methods."""

    def asked_by(self, renderer: ChatRenderer) -> bool:
        """Whether a chat template writes the format's prompt."""

    def ask(self, chat_model: ChatModel) -> ChatModel:
        """The same model, asked with the format's template."""

    def end(self, sampling: Sampling) -> Sampling:
        """The same sampling, for answers that end where the format does."""

    def show(self, text: str) -> None:
        """Print what a reply says, and where it left the format."""

    def as_json(self, text: str) -> dict[str, Any]:
        """What a reply says, for one line of JSON."""

    def evaluate(
        self, open_model: Callable[[], ChatModel], data: Path, *, checkpoint: str, alone: bool, limit: int | None,
        max_new_tokens: int, batch_size: int, as_json: str | None, plot_file: Path | None,
    ) -> None:  # fmt: skip
        """Put the questions of a file to a model and its base, and print how many replies are good."""


@cache
def installed_formats() -> dict[str, ReplyFormat]:
    """Formats by name."""
    found = {}
    for entry in entry_points(group=GROUP):
        try:
            found[entry.name] = entry.load()
        except Exception as error:  # other people's code: replies are read without it
            logger.warning("the format %s of %s cannot be used: %r", entry.name, entry.value, error)
    return found


def known_formats() -> list[str]:
    """Names of formats, installed or not."""
    return sorted({*FORMATS, *(entry.name for entry in entry_points(group=GROUP))})


def format_named(name: str) -> ReplyFormat:
    """The format of a name.

    Raises:
        ConfigError: there is none, or the package that brings it is not installed.
    """
    if (found := installed_formats().get(name)) is not None:
        return found
    if name in FORMATS:
        raise ConfigError(f"the format {name} comes with a package of its own: {how_to_add(FORMATS[name])}")
    raise ConfigError(f"there is no format {name!r}: choose one of {', '.join(known_formats())}")


def chosen_format(chosen: str | None, renderer: ChatRenderer) -> ReplyFormat | None:
    """The format that was chosen, or else the one that the chat template asks for; None: replies are plain text."""
    if chosen is not None:
        return None if chosen == TEXT else format_named(chosen)
    return next((each for each in installed_formats().values() if each.asked_by(renderer)), None)
