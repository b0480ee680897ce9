"""The [LEMA_REPLY] format in use: which templates ask for it, and answers that end at its closing tag.

It knows the format's prompt and shipped template; how a reply is read is the grammar's business.
"""

from __future__ import annotations

from dataclasses import replace
from importlib.resources import files

from ..data.render import ChatRenderer
from ..errors import InputError
from ..proof.grammar import STOP, prompt
from .sampling import Sampling
from .speaker import Speaker

FORMAT = "lema-reply"
TEMPLATE = files("lema").joinpath("recipes", "lema_reply.jinja")


def asks_for_replies(renderer: ChatRenderer) -> bool:
    """Whether its template writes the format's prompt."""
    if not renderer.has_template:
        return False
    try:
        return renderer.prompt([{"role": "user", "content": "?"}]) == prompt("?")
    except InputError:  # a template that wants more than a question is another one
        return False


def in_format(speaker: Speaker) -> Speaker:
    """The same model, asked with the format's template."""
    if asks_for_replies(speaker.renderer):
        return speaker
    return Speaker(speaker.model, ChatRenderer(speaker.tokenizer, TEMPLATE.read_text(encoding="utf-8")))


def to_closing_tag(sampling: Sampling) -> Sampling:
    """The same sampling, for answers that end with the closing tag, which stays in them."""
    return replace(sampling, stop=(*sampling.stop, STOP), keep_stop=True)
