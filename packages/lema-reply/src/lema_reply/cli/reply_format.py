"""What `lema chat`, `generate` and `eval` find under the name `lema-reply`: see `lema.chat.formats.ReplyFormat`."""

from __future__ import annotations

from ..lema_format import asks_for_replies, in_format, to_closing_tag
from .evaluation import evaluate_replies
from .view import reading_as_json, show_reading


class LemaReplyFormat:
    """The format's parts under the names that verbs call them by."""

    asked_by = staticmethod(asks_for_replies)
    ask = staticmethod(in_format)
    end = staticmethod(to_closing_tag)
    show = staticmethod(show_reading)
    as_json = staticmethod(reading_as_json)
    evaluate = staticmethod(evaluate_replies)


LEMA_REPLY = LemaReplyFormat()
