"""Options that verbs which let a model answer have in common; what they mean is the chat room's business."""

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
    from ..chat import ChatModel
    from ..chat.formats import ReplyFormat


def _known_format(chosen: str | None) -> str | None:
    if chosen is not None:
        from ..chat.formats import TEXT, known_formats

        if chosen not in (known := [*known_formats(), TEXT]):
            raise typer.BadParameter(f"{chosen!r} is neither {' nor '.join(known)}")
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
        help="lema-reply, with the package lema-lora-reply: ask for that format and read it; text: show answers as "
        "they come. Default: the format that the chat template asks for.",
    ),
]  # fmt: skip


def open_chat_model(
    where: str, base: str | None, no_adapter: bool, template: Path | None, settings: list[str] | None,
    variables: str | None = None,
) -> ChatModel:  # fmt: skip
    """The model that answers, on the fastest device, its weights in RAM unless said otherwise.

    A token needs every layer once, so streaming from disk is as slow as the disk: `--set strategy=streaming` where
    the model is larger than memory.
    """

    from transformers.utils import logging as transformers_logging

    from ..chat import ChatModel
    from ..machine.device import default_device

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    overrides: dict[str, Any] = {"strategy": "resident", "device": default_device(), **parse_settings(settings or ())}
    if LemaConfig("any", device=overrides["device"]).device != "cpu":
        overrides.setdefault("vram_budget", "auto")
    said = f"chat_template_kwargs={shortened(variables)}"
    given = None if variables is None else parse_object(variables, said, ConfigError)
    return ChatModel.open(
        where, base=base, adapter=not no_adapter, template=None if template is None else str(template),
        variables=given, **overrides,
    )  # fmt: skip


def in_chosen_format(
    chat_model: ChatModel, chosen: str | None, own_template: bool
) -> tuple[ChatModel, ReplyFormat | None]:
    """The model asked in the format chosen, and the format that its replies are to be read in.

    Args:
        own_template: whether a template was given, which then stays.
    """
    from ..chat.formats import chosen_format

    read_as = chosen_format(chosen, chat_model.renderer)
    if read_as is None or chosen is None or own_template:
        return chat_model, read_as
    return read_as.ask(chat_model), read_as


def seed_all(seed: int | None) -> None:
    """Make draws repeatable, if a seed was given."""
    if seed is not None:
        import torch

        torch.manual_seed(seed)
