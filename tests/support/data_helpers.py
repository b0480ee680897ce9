"""A tokenizer made on the spot, chat templates with their traps, and data files."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from lema.data import EncodedRow, RowEncoder, TokenDataset
from lema.data.render import ChatRenderer
from lema.data.rows import ListRows

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (  # no header of an assistant's turn; ends it with the end token
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}<|im_end|>{% endif %}{% endfor %}"
)
STRIPS_THINKING = (  # as Qwen3's and DeepSeek's do
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1] }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{%- generation -%}{{ m.content }}{%- endgeneration -%}<|im_end|>\n{% else %}{{ m.content }}<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {"chatml": CHATML, "llama2": LLAMA2}

_CORPUS = [
    "What is the capital of Norway? Oslo is the capital of Norway.",
    "The chemical symbol of gold is Au, from the Latin word aurum.",
    "user assistant system\n\n think answer question one two three four five six seven",
]
VOCABULARY = 400


def make_tokenizer(template: str | None = CHATML, *, pad_is_end: bool = True, bos: bool = False) -> Any:
    """A fast byte-level BPE tokenizer of at most `VOCABULARY` tokens, whose padding token is its end token."""
    core = Tokenizer(BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
    core.train_from_iterator(
        _CORPUS,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
            special_tokens=[AddedToken(word, special=True) for word in special],
        ),
    )  # fmt: skip
    if bos:
        from tokenizers.processors import TemplateProcessing

        core.post_processor = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    end = "<|im_end|>"
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=end, pad_token=end if pad_is_end else "<|pad|>", chat_template=template,
        bos_token="<|endoftext|>" if bos else None,
    )  # fmt: skip


def make_metaspace_tokenizer(template: str | None, scheme: str) -> Any:
    """A fast tokenizer as SentencePiece models have: a space belongs to the word after it."""
    core = Tokenizer(BPE(byte_fallback=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    core.decoder = decoders.Metaspace(prepend_scheme=scheme)
    special = [AddedToken(word, special=True) for word in ("<|im_start|>", "<|im_end|>")]
    letters = [chr(c) for c in range(33, 127)] + ["\n"]
    core.train_from_iterator(
        _CORPUS,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=letters, show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|im_end|>", chat_template=template
    )


def chat(*turns: str, system: str | None = None) -> list[dict[str, str]]:
    """Messages of a user and an assistant, in turn."""
    start = [{"role": "system", "content": system}] if system is not None else []
    return start + [{"role": "user" if i % 2 == 0 else "assistant", "content": t} for i, t in enumerate(turns)]


def write_jsonl(path: Path, rows: Iterable[Any]) -> Path:
    """One JSON value a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def learned_text(tokenizer: Any, row: EncodedRow) -> str:
    """What a row teaches, as text."""
    return tokenizer.decode([label for label in row.labels if label != -100], skip_special_tokens=False)


def numbered_rows(count: int, longest: int = 30, shortest: int = 2) -> list[dict[str, str]]:
    """Text rows of different lengths; each says its number."""
    return [{"text": f"{i}:" + "x" * (shortest + (i * 7) % (longest - shortest))} for i in range(count)]


class ByBytes:
    """An encoder of text rows without a tokenizer: bytes are tokens, all are learned but the first `masked` ones."""

    def __init__(self, masked: int = 1) -> None:
        self.masked = masked

    def __call__(self, row: Any) -> EncodedRow:
        ids = list(row["text"].encode())
        return EncodedRow(ids, [-100] * min(self.masked, len(ids)) + ids[self.masked :])


def byte_dataset(rows: list[dict[str, str]], max_seq_length: int = 64, too_long: str = "truncate") -> TokenDataset:
    """A data set of bytes."""
    return TokenDataset(ListRows(rows), ByBytes(), max_seq_length=max_seq_length, too_long=too_long)


def encoder(tokenizer: Any, kind: str, **settings: Any) -> RowEncoder:
    """Of rows of a kind."""
    return RowEncoder(ChatRenderer(tokenizer), kind, **settings)
