"""The [LEMA_REPLY] format in use: which templates ask for it, and answers that end at its closing tag.

The format's prompt and shipped template are known here; how a reply is read is the grammar's business.
"""

from __future__ import annotations

from dataclasses import replace
from importlib.resources import files

from lema.chat import ChatModel, Sampling
from lema.data.render import ChatRenderer
from lema.errors import InputError

from .grammar import STOP, prompt

TEMPLATE = files(__package__).joinpath("recipes", "lema_reply.jinja")


def asks_for_replies(renderer: ChatRenderer) -> bool:
    """Whether its template writes the format's prompt."""
    if not renderer.has_template:
        return False
    try:
        return renderer.prompt([{"role": "user", "content": "?"}]) == prompt("?")
    except InputError:  # a template that wants more than a question is another one
        return False


def in_format(chat_model: ChatModel) -> ChatModel:
    """The same model, asked with the format's template."""
    if asks_for_replies(chat_model.renderer):
        return chat_model
    return ChatModel(chat_model.model, ChatRenderer(chat_model.tokenizer, TEMPLATE.read_text(encoding="utf-8")))


def to_closing_tag(sampling: Sampling) -> Sampling:
    """The same sampling, for answers that end with the closing tag, which stays in them."""
    return replace(sampling, stop=(*sampling.stop, STOP), keep_stop=True)
