"""Options that verbs which let a model answer have in common.

It knows how a command line names them; what they mean is the reply room's business.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..config import LemaConfig
from ..errors import ConfigError
from ..json_file import parse_object
from ..typed import shortened
from .settings import parse_settings

if TYPE_CHECKING:
    from ..reply import Speaker

LEMA_REPLY, TEXT = "lema-reply", "text"


def _known_format(chosen: str | None) -> str | None:
    if chosen not in (None, LEMA_REPLY, TEXT):
        raise typer.BadParameter(f"{chosen!r} is neither {LEMA_REPLY} nor {TEXT}")
    return chosen


Where = Annotated[
    str,
    typer.Argument(
        metavar="CHECKPOINT",
        help="A checkpoint of a run (its final, say), a PEFT adapter, a merged model, or any model or hub id.",
        show_default=False,
    ),
]
Base = Annotated[
    str | None, typer.Option(metavar="MODEL", help="The adapter's model, where it is not where the adapter says.")
]
NoAdapter = Annotated[bool, typer.Option("--no-adapter", help="The base model alone.")]
Template = Annotated[
    Path | None, typer.Option(metavar="FILE", help="A Jinja chat template instead of the tokenizer's.")
]
Variables = Annotated[
    str | None,
    typer.Option(
        "--chat-template-kwargs",
        metavar="JSON",
        help='Variables of the chat template, as {"enable_thinking": false}. Default: those trained with.',
    ),
]
Tokens = Annotated[int, typer.Option(help="Tokens of an answer at most.")]
Temperature = Annotated[float, typer.Option(help="0 always takes the likeliest token.")]
TopP = Annotated[float, typer.Option(help="Share of probability that is drawn from.")]
Stop = Annotated[list[str] | None, typer.Option(metavar="TEXT", help="End an answer at this text; repeatable.")]
Seed = Annotated[int | None, typer.Option(help="Of the draws; the same seed gives the same answers.")]
Format = Annotated[
    str | None,
    typer.Option(
        "--format", metavar="NAME", callback=_known_format,
        help="lema-reply: ask for that format and read it; text: show answers as they come. Default: lema-reply where "
        "the chat template asks for it.",
    ),
]  # fmt: skip
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Any setting of LemaConfig; repeatable.")
]


def open_speaker(
    where: str, base: str | None, no_adapter: bool, template: Path | None, settings: list[str] | None,
    variables: str | None = None,
) -> Speaker:  # fmt: skip
    """The model that answers, on the fastest device, its weights in RAM unless said otherwise.

    A token needs every layer once, so streaming from disk is as slow as the disk: `--set strategy=streaming` where
    the model is larger than memory.
    """

    from transformers.utils import logging as transformers_logging

    from ..machine.device import default_device
    from ..reply import Speaker

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    overrides: dict[str, Any] = {"strategy": "resident", "device": default_device(), **parse_settings(settings or ())}
    if LemaConfig("any", device=overrides["device"]).device != "cpu":
        overrides.setdefault("vram_budget", "auto")
    said = f"chat_template_kwargs={shortened(variables)}"
    given = None if variables is None else parse_object(variables, said, ConfigError)
    return Speaker.open(
        where, base=base, adapter=not no_adapter, template=None if template is None else str(template),
        variables=given, **overrides,
    )  # fmt: skip


def in_chosen_format(speaker: Speaker, chosen: str | None, own_template: bool) -> tuple[Speaker, bool]:
    """The speaker asked in the format chosen, and whether its replies are to be read as LEMA's.

    Args:
        own_template: whether a template was given, which then stays.
    """
    from ..reply.lema_format import asks_for_replies, in_format

    if chosen == LEMA_REPLY:
        return (speaker if own_template else in_format(speaker)), True
    return speaker, chosen is None and asks_for_replies(speaker.renderer)


def seed_all(seed: int | None) -> None:
    """Make draws repeatable, if a seed was given."""
    if seed is not None:
        import torch

        torch.manual_seed(seed)
