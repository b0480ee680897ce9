"""Chat templates of the models most used, and what of three conversations each of them lets a model learn.

`python tests/data/test_stock_templates.py` writes tests/stock_templates.json anew: by template, what is learned of one
answer, of two, and of one with reasoning; where two are refused, what is learned with `mask_history`.
"""

from __future__ import annotations

import json
import logging
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from data_helpers import chat, learned_text, make_tokenizer
from lema.data import ChatRenderer
from lema.data.render import IGNORE
from lema.errors import InputError

SHOWN = Path(__file__).with_name("stock_templates.json")
_ASK = "{% if add_generation_prompt %}"
# The formats that model cards describe, written down anew and without tools or images.
WRITTEN = {
    "llama2": (
        "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content|trim + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content|trim + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    "mistral": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + '[/INST]' }}"
        "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
    ),
    "zephyr": (
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
        + _ASK + "{{ '<|assistant|>\n' }}{% endif %}"
    ),
    "smollm2": (
        "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n"
        "{% endif %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        + _ASK + "{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "phi4": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' }}{% endfor %}"
        + _ASK + "{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
    ),
    "granite3": (
        "{% for m in messages %}{{ '<|start_of_role|>' + m.role + '<|end_of_role|>' + m.content }}"
        "{{ '<|end_of_text|>\n' }}{% endfor %}" + _ASK + "{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}"
    ),
    "olmo2": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<|user|>\n' + m.content + '\n' }}"
        "{% else %}{{ '<|assistant|>\n' + m.content + eos_token + ('' if loop.last else '\n') }}{% endif %}{% endfor %}"
        + _ASK + "{{ '<|assistant|>\n' }}{% endif %}"
    ),
    "falcon3": (
        "{% for m in messages %}{% if m.role == 'user' %}{{ '<|user|>\n' + m.content + '\n' }}{% else %}"
        "{{ '<|assistant|>\n' + m.content + (eos_token if loop.last else '\n') }}{% endif %}{% endfor %}"
        + _ASK + "{{ '<|assistant|>\n' }}{% endif %}"
    ),
    "deepseek_v3_1": (
        "{% set thinking = thinking | default(false) %}{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
        "{{ '<｜User｜>' + m.content }}{% else %}{{ '<｜Assistant｜></think>' + m.content.split('</think>', 1)[-1] }}"
        "{{ '<｜end▁of▁sentence｜>' }}{% endif %}{% endfor %}"
        + _ASK + "{{ '<｜Assistant｜>' + ('<think>' if thinking else '</think>') }}{% endif %}"
    ),
    "kimi_k2": (
        "{% for m in messages %}{{ '<|im_' + m.role + '|>' + m.role + '<|im_middle|>' + m.content + '<|im_end|>' }}"
        "{% endfor %}" + _ASK + "{{ '<|im_assistant|>assistant<|im_middle|>' }}{% endif %}"
    ),
}  # fmt: skip


def _stock() -> dict[str, str]:
    """Those above, and those that the installed TRL ships (Apache 2.0)."""
    found = find_spec("trl")
    folder = Path(found.origin).parent / "chat_templates" if found is not None and found.origin else Path("none")
    return WRITTEN | {path.stem: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.jinja"))}


STOCK = _stock()
_SPECIAL = re.compile(
    r"<[|｜][^<>\s'\"{}]{1,40}>|<[a-z_]{2,20}\|>|<(?:end_of_turn|start_of_turn|end_of_utterance|bos|eos)>"
)
# Those that strip thinking, or the tags of an empty one, from earlier answers, or leave them out of them.
_LAST_ONLY = re.compile(r"qwen3(_5_(no)?think|_6)?|deepseek_r1_distill|deepseekv3|nemotron_3_\w+")
_THOUGHT = {"role": "assistant", "content": "five six", "reasoning_content": "three four"}
CONVERSATIONS = {
    "one answer": chat("one", "two"),
    "two answers": chat("one", "two", "three", "five"),
    "reasoning": [*chat("one two"), _THOUGHT],
}


def stock_tokenizer(template: str) -> Any:
    """A tokenizer in which what the template writes between angles is special."""
    tokenizer = make_tokenizer(template, bos=True)
    written = tokenizer.apply_chat_template(chat("a", "b"), tokenize=False) if "raise_exc" not in template else ""
    words = sorted(set(_SPECIAL.findall(template + written)) - {*tokenizer.added_tokens_encoder})
    tokenizer.add_special_tokens({"additional_special_tokens": words})
    return tokenizer


def refusal(renderer: ChatRenderer, messages: list[dict[str, str]]) -> str:
    """Why a conversation is not learned; empty: it is."""
    try:
        renderer.training(messages)
    except InputError as error:
        return str(error)
    return ""


def spans(name: str) -> dict[str, str]:
    """What is learned of each conversation."""
    tokenizer = stock_tokenizer(STOCK[name])
    renderer = ChatRenderer(tokenizer)
    found = {}
    for kind, messages in CONVERSATIONS.items():
        refused = refusal(renderer, messages)
        if not refused:
            found[kind] = learned_text(tokenizer, renderer.training(messages))
        elif kind == "two answers":
            found["two answers, mask_history"] = learned_text(tokenizer, renderer.training(messages, last_only=True))
        else:
            found[kind] = "refused"
    return found


@pytest.mark.parametrize("name", STOCK)
def test_stock_templates(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """One answer, two, and one with reasoning: learned after the prompt of chat, whole, with its end."""
    caplog.set_level(logging.WARNING)
    tokenizer = stock_tokenizer(STOCK[name])
    renderer = ChatRenderer(tokenizer)
    for kind, messages in CONVERSATIONS.items():
        many, refused = kind == "two answers", refusal(renderer, messages)
        if many and refused:
            assert "mask_history" in refused and _LAST_ONLY.fullmatch(name), refused
            many = False
        elif refused:
            assert kind == "reasoning" and ("reasoning" in refused or "enable_thinking" in refused), refused
            continue
        row = renderer.training(messages, last_only=not many)
        text = learned_text(tokenizer, row)
        asked = renderer.prompt_ids(messages[:-1])
        assert messages[-1]["content"] in text and "one" not in text
        assert not many or ("two" in text and "three" not in text)
        assert kind != "reasoning" or "three four" in text
        assert text.count("</think>") <= 1 + many
        assert row.labels[-1] != IGNORE and any(label in tokenizer.all_special_ids for label in row.labels[-3:])
        if not many and row.input_ids[: len(asked)] != asked:
            assert renderer._template.marked and "not what its marked answers follow" in caplog.text


def test_what_is_learned_is_shown() -> None:
    shown = json.loads(SHOWN.read_text(encoding="utf-8"))
    assert {*WRITTEN} <= {*shown}
    for name in {*shown} & {*STOCK}:
        assert spans(name) == shown[name], name


def test_reasoning_that_a_variable_switches_on() -> None:
    tokenizer = stock_tokenizer(STOCK["deepseek_v3_1"])
    row = ChatRenderer(tokenizer, None, {"thinking": True}).training(CONVERSATIONS["reasoning"])
    assert learned_text(tokenizer, row) == "three four</think>five six<｜end▁of▁sentence｜>"
    assert "chat_template_kwargs can set the template's thinking" in refusal(
        ChatRenderer(stock_tokenizer(STOCK["deepseek_v3_1"])), CONVERSATIONS["reasoning"]
    )


if __name__ == "__main__":
    text = json.dumps({name: spans(name) for name in sorted(STOCK)}, indent=1, ensure_ascii=False)
    SHOWN.write_text(text + "\n", encoding="utf-8")
