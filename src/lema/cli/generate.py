"""`lema generate`: answers to prompts, one after the other.

Prompts come from options, a file or standard input; answers go out as text or JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from ..errors import InputError
from . import chat_options as common
from .options import Settings
from .streams import as_json as written


def generate(
    checkpoint: common.Where,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="A prompt; repeatable.")] = None,
    file: Annotated[
        Path | None,
        typer.Option("--file", metavar="FILE", help="A prompt a line, or JSONL with `prompt`; - reads stdin."),
    ] = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="Continue the prompt as it is, without chat template.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
    max_new_tokens: common.Tokens = 256,
    temperature: common.Temperature = 0.0,
    top_p: common.TopP = 1.0,
    stop: common.Stop = None,
    reply_format: common.Format = None,
    seed: common.Seed = None,
    base: common.Base = None,
    no_adapter: common.NoAdapter = False,
    chat_template: common.Template = None,
    chat_template_kwargs: common.Variables = None,
    settings: Settings = None,
) -> None:
    """Answer prompts with CHECKPOINT.

    Example: lema generate output/final -p "What is the capital of Norway?"
    """
    from ..chat import Sampling
    from ..chat.formats import TEXT

    prompts = [*(prompt or ()), *(_prompts_in(file) if file is not None else ())]
    if not prompts:
        raise typer.BadParameter("give --prompt or --file", param_hint="--prompt")
    sampling = Sampling(max_new_tokens, temperature, top_p, tuple(stop or ()))
    with common.open_chat_model(checkpoint, base, no_adapter, chat_template, settings, chat_template_kwargs) as opened:
        chosen = TEXT if plain and reply_format is None else reply_format
        chat_model, read_as = common.in_chosen_format(opened, chosen, chat_template is not None)
        if read_as is not None:
            sampling = read_as.end(sampling)
        common.seed_all(seed)
        for text in prompts:
            if as_json:
                reply = chat_model.reply(text, sampling, plain=plain)
                line = {"prompt": text, "text": reply.text, "ended_by": reply.ended_by, "tokens": reply.num_tokens}
                parts = {} if read_as is None else read_as.as_json(reply.text)
                typer.echo(written({**line, **parts}))
                continue
            if len(prompts) > 1:
                typer.secho(f"> {text}", bold=True)
            reply = chat_model.reply(text, sampling, lambda piece: typer.echo(piece, nl=False), plain=plain)
            typer.echo()
            if read_as is not None:
                read_as.show(reply.text)


def _prompts_in(file: Path) -> Iterator[str]:
    if str(file) != "-" and file.exists() and not file.is_file():
        raise InputError(f"{file} is not a file; - reads prompts from standard input")
    raw = sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
    try:
        lines = raw.decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not UTF-8: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if file.suffix not in (".jsonl", ".json"):
            yield line
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{file}, line {number} is not JSON: {error}") from error
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
            raise InputError(f"{file}, line {number} has no text named prompt")
        yield row["prompt"]
