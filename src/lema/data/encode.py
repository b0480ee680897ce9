"""`RowEncoder`: a raw row of one kind as token ids and labels.

It knows kinds of rows and the renderer; it knows nothing of lengths allowed, files or batches.

With a chat template, prompts and completions become a user's and an assistant's turn. Without one (base models) they
are laid one after the other as they are, and the end token after them; the prompt of an instruction row is followed by
a blank line.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

from ..errors import InputError
from .fields import unused_fields
from .messages import Message
from .render import IGNORE, ChatRenderer, EncodedRow
from .schema import Completion, Content, Conversation, Instruction, PlainText, read_row
from .tools import takes_text, with_text_arguments

INSTRUCTION_SEPARATOR = "\n\n"
_VERSION = 2  # of how rows become tokens: no run goes on with rows of another one, so mended faults alone leave it


class RowEncoder:
    """Encodes rows.

    Args:
        renderer: of the model's tokenizer.
        kind: one of `messages`, `conversations`, `prompt_completion`, `instruction`, `text`.
        train_on_prompt: learn prompts too.
        mask_history: learn the last answer of a conversation only.
        limit: tokens that are wanted of a row: of a far longer one only the beginning is encoded.
    """

    def __init__(
        self, renderer: ChatRenderer, kind: str, *, train_on_prompt: bool = False, mask_history: bool = False,
        limit: int | None = None,
    ) -> None:  # fmt: skip
        self.renderer = renderer
        self.kind = kind
        self._limit = limit
        self._on_prompt = train_on_prompt
        self._last_only = mask_history

    def __call__(self, row: Mapping[str, Any]) -> EncodedRow:
        """The row's ids and labels, however many, and the names of fields that nothing reads.

        Raises:
            InputError: what is wrong with the row, without saying which it is.
        """
        content, is_learned = read_row(row, self.kind)
        encoded = self._encoded(content)
        if not is_learned:
            encoded = replace(encoded, labels=[IGNORE] * len(encoded.labels))
        unused = unused_fields(row, self.kind, self.renderer.mentions)
        return replace(encoded, unused=tuple(unused)) if unused else encoded

    def _encoded(self, content: Content) -> EncodedRow:
        if isinstance(content, PlainText):
            return self.renderer.completion("", content.text, limit=self._limit)
        if isinstance(content, Completion):
            if not self.renderer.has_template:
                separator = INSTRUCTION_SEPARATOR if isinstance(content, Instruction) else ""
                return self.renderer.completion(
                    content.prompt, content.completion, separator=separator, on_prompt=self._on_prompt,
                    limit=self._limit,
                )  # fmt: skip
            content = _as_conversation(content)
        calls = next((n for n, message in enumerate(content.messages, 1) if "tool_calls" in message), None)
        if calls is not None and self.renderer.has_template and not self.renderer.mentions("tool_calls"):
            raise InputError(
                f"message {calls} calls tools, and the chat template does not write tool_calls: give chat_template: a "
                "file whose template does"
            )
        messages = [self._without_end(message) for message in content.messages]
        messages = with_text_arguments(messages) if calls and self._takes_text else messages
        return self.renderer.training(
            messages, content.tools, learned_from=content.learned_from, unlearned=content.unlearned,
            on_prompt=self._on_prompt, last_only=self._last_only, limit=self._limit,
        )  # fmt: skip

    def _without_end(self, message: Message) -> Message:
        """A message whose content does not end in the end token that the template writes after it."""
        end, content = self.renderer.tokenizer.eos_token, message.get("content")
        if not end or message.get("role") != "assistant" or not isinstance(content, str):
            return message
        bare = content.rstrip().removesuffix(end)
        return {**message, "content": bare} if bare.strip() and bare != content.rstrip() else message

    @cached_property
    def _takes_text(self) -> bool:
        return takes_text(self.renderer.prompt)

    @cached_property
    def key(self) -> str:
        """What its results depend on besides the row: tokenizer, template and settings, as a digest."""
        tokenizer = self.renderer.tokenizer
        core = json.loads(tokenizer.backend_tokenizer.to_str())
        for name in ("padding", "truncation"):  # of the last call, whosever it was
            core.pop(name, None)
        chat = (self.renderer.template, self.renderer.variables)
        parts = (_VERSION, core, tokenizer.eos_token_id, chat, self.kind, self._on_prompt, self._last_only)
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _as_conversation(content: Completion) -> Conversation:
    if not content.prompt.strip():
        raise InputError("prompt is empty; a chat template has nothing to ask with: use rows of text instead")
    turns = [("user", content.prompt), ("assistant", content.completion)]
    return Conversation([{"role": role, "content": text} for role, text in turns])
