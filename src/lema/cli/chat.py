"""`lema chat`: a conversation in the terminal.

Lines that are typed, commands and how an answer is shown; turns and windows are the conversation's business.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import InputError
from . import chat_options as common
from .options import Settings

if TYPE_CHECKING:
    from ..chat import Conversation, Reply, Sampling
    from ..chat.formats import ReplyFormat

_COMMANDS = "quit or exit ends, clear forgets the conversation, debug shows what the model sees and writes"


def chat(
    checkpoint: common.Where,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="What the model is told first.")] = None,
    max_new_tokens: common.Tokens = 512,
    temperature: common.Temperature = 0.7,
    top_p: common.TopP = 0.9,
    stop: common.Stop = None,
    reply_format: common.Format = None,
    seed: common.Seed = None,
    base: common.Base = None,
    no_adapter: common.NoAdapter = False,
    chat_template: common.Template = None,
    chat_template_kwargs: common.Variables = None,
    settings: Settings = None,
) -> None:
    """Talk to CHECKPOINT. quit or exit ends, clear forgets the conversation, debug shows what the model sees.

    Ctrl-C stops an answer, and at the prompt the chat. Replies in the [LEMA_REPLY] format are shown in their parts.

    Example: lema chat output/final --temperature 0.7 --top-p 0.9
    """
    from ..chat import Conversation, Sampling

    sampling = Sampling(max_new_tokens, temperature, top_p, tuple(stop or ()))
    with common.open_chat_model(checkpoint, base, no_adapter, chat_template, settings, chat_template_kwargs) as opened:
        chat_model, read_as = common.in_chosen_format(opened, reply_format, chat_template is not None)
        if read_as is not None:
            sampling = read_as.end(sampling)
        common.seed_all(seed)
        config = chat_model.model.config
        adapter = "with its adapter" if chat_model.model.lora_manager is not None else "without adapter"
        typer.echo(f"{config.model_name_or_path} {adapter}, {config.dtype} on {config.device}. {_COMMANDS}.")
        if not chat_model.renderer.has_template:
            typer.echo(
                "The tokenizer has no chat template: each line is continued as it is, and nothing is remembered."
            )
        _talk(Conversation(chat_model, system), sampling, read_as)


def _talk(conversation: Conversation, sampling: Sampling, read_as: ReplyFormat | None) -> None:
    debug = False
    while (line := _read_line()) is not None:
        question = line.strip()
        command = question.lower()
        if command in ("quit", "exit"):
            return
        if command == "clear":
            conversation.clear()
            typer.echo("The conversation is forgotten.")
        elif command == "debug":
            debug = not debug
            typer.echo(f"debug is {'on' if debug else 'off'}")
        elif question:
            _answer(conversation, question, sampling, read_as, debug)


def _answer(
    conversation: Conversation, question: str, sampling: Sampling, read_as: ReplyFormat | None, debug: bool
) -> None:
    try:
        if debug:
            typer.secho(repr(conversation.prompt(question, conversation.room(sampling))), dim=True)
        reply = conversation.ask(question, sampling, _say)
    except InputError as error:
        typer.echo(f"error: {error}", err=True)
        return
    except KeyboardInterrupt:
        typer.echo("\n(stopped; this turn is forgotten)")
        return
    typer.echo()
    if read_as is not None:
        read_as.show(reply.text)
    if reply.ended_by == "length":
        typer.secho(f"(cut after {reply.num_tokens} tokens: --max-new-tokens)", dim=True)
    if conversation.dropped:
        typer.secho(f"(the first {conversation.dropped // 2} turns no longer fit into the model's window)", dim=True)
    if debug:
        _show(reply)


def _say(piece: str) -> None:
    typer.echo(piece, nl=False)
    sys.stdout.flush()


def _show(reply: Reply) -> None:
    rate = reply.num_tokens / reply.seconds if reply.seconds else 0.0
    typer.secho(repr(reply.raw), dim=True)
    typer.secho(f"{reply.num_tokens} tokens, {rate:.1f} tokens/s, ended by {reply.ended_by}", dim=True)


def _read_line() -> str | None:
    """A line; None at the end of the input, or at Ctrl-C."""
    while True:
        try:
            typer.echo("> ", nl=False)
            sys.stdout.flush()
            raw = sys.stdin.buffer.readline()
        except KeyboardInterrupt:
            typer.echo()
            return None
        if not raw:
            typer.echo()
            return None
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            typer.echo(f"error: that line is not UTF-8 (byte {error.start + 1}); it was not sent", err=True)
