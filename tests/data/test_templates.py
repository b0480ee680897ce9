"""Chat templates as models have them: what is learned is what chat will ask for, and nothing runs for ever."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer

from data_helpers import CHATML, MARKED, STRIPS_THINKING, chat, encoder, learned_text, make_tokenizer
from lema.chat import Conversation, Reply, Sampling
from lema.data import ChatRenderer, DataConfig
from lema.data import template as template_module
from lema.data.render import IGNORE
from lema.data.sandbox import OutOfTimeError, limited
from lema.errors import ConfigError, InputError
from lema.training.run_config import RunConfig

OPENS_THINKING = (  # as DeepSeek R1's distilled models: the prompt opens what the template leaves out afterwards
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>{{ m.content.split('</think>')[-1] }}<|im_end|>"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|><think>\n{% endif %}"
)
THINKS_BY_VARIABLE = (  # as DeepSeek V3.1: a variable opens thinking or closes it at once
    "{% if thinking is not defined %}{% set thinking = false %}{% endif %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|></think>"
    "{{ m.content.split('</think>', 1)[-1] }}<|im_end|>{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{{ '<think>' if thinking else '</think>' }}{% endif %}"
)
EMPTY_BEFORE = (  # as Qwen3.5's: the prompt opens thinking, an answer without any closes it with two line ends
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think>\n"
    "{{ m.reasoning_content | default('') }}\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
ENDS_THE_TEXT = (  # as Phi 3's: an end token at the end of the whole text, where nothing is asked
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|pad|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}{{ eos_token }}{% endif %}"
)
ANOTHER_END = (  # as gpt-oss': the last answer ends otherwise than those before it
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{{ '<|im_end|>' if loop.last and m.role == 'assistant' else '<|pad|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PARTS_ONLY = (  # as those of models that see
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}"
    "{% endif %}{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THOUGHT = "<think>\nhm\n</think>\n\none"


def learned(template: str, messages: list[dict[str, str]], **how: Any) -> str:
    """What is learned, after it was made sure that the tokens before the last answer are those of chat's prompt."""
    tokenizer = make_tokenizer(template, pad_is_end=False)
    variables = how.pop("variables", None)
    renderer = ChatRenderer(tokenizer, None, variables)
    row = renderer.training(messages, **how)
    asked = renderer.prompt_ids(messages[:-1])
    if how.get("last_only") or len(messages) == 2:
        assert row.input_ids[: len(asked)] == asked
    return learned_text(tokenizer, row)


# -- tokens at the border -------------------------------------------------------------------------


def test_tokens_are_cut_where_the_prompt_of_chat_ends(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = make_tokenizer(EMPTY_BEFORE)
    tokenizer.backend_tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    renderer = ChatRenderer(tokenizer)
    messages = chat("q", "one")
    prompt = renderer.prompt(messages[:1])
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert renderer.ids(whole)[: len(renderer.ids(prompt))] != renderer.ids(prompt), "a token reaches over the border"
    row = renderer.training(messages)
    asked = renderer.ids(prompt)
    assert row.input_ids[: len(asked)] == asked and row.labels[: len(asked)] == [IGNORE] * len(asked)
    assert tokenizer.decode(row.input_ids) == whole
    assert learned_text(tokenizer, row) == "\n</think>\n\none<|im_end|>\n"
    assert caplog.text.count("they are cut there") == 1


def test_every_prompt_of_a_conversation_is_cut() -> None:
    tokenizer = make_tokenizer()
    renderer = ChatRenderer(tokenizer)
    messages = chat("q", "\n one", "r", "\n two")
    row = renderer.training(messages)
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.decode(row.input_ids) == whole and row.input_ids != renderer.ids(whole)
    first = renderer.prompt_ids(messages[:1])
    assert row.input_ids[: len(first)] == first and len(row.input_ids) == len(renderer.ids(whole)) + 2
    assert learned_text(tokenizer, row) == "\n one<|im_end|>\n\n two<|im_end|>\n"


@pytest.mark.parametrize("bos", [False, True])
def test_a_prompt_without_template_is_cut_as_it_will_be_asked(bos: bool) -> None:
    tokenizer = make_tokenizer(None, bos=bos)
    for prompt, completion in (("Q: one? A: ", "two"), ("one\n", "\ntwo"), ("one", " two"), ("think", "ing")):
        row = encoder(tokenizer, "prompt_completion")({"prompt": prompt, "completion": completion})
        asked = ChatRenderer(tokenizer).ask(prompt)
        assert row.input_ids[: len(asked)] == asked, prompt
        assert row.labels[: len(asked)] == [IGNORE] * len(asked)
        assert learned_text(tokenizer, row) == f"{completion}<|im_end|>"


# -- the first token and the last -----------------------------------------------------------------


def test_text_that_begins_with_the_first_token_has_it_once_and_never_as_a_target() -> None:
    tokenizer = make_tokenizer(None, bos=True)
    first = tokenizer.bos_token_id
    text = "<|endoftext|>one two<|im_end|>"
    for row in (
        encoder(tokenizer, "text")({"text": text}),
        encoder(tokenizer, "text")({"text": "one two"}),
        encoder(tokenizer, "text")({"text": "<|endoftext|>" * 3 + "one two"}),
        encoder(tokenizer, "prompt_completion")({"prompt": "<|endoftext|>one", "completion": " two"}),
        encoder(tokenizer, "prompt_completion", train_on_prompt=True)(
            {"prompt": "<|endoftext|>one", "completion": " two"}
        ),
        encoder(tokenizer, "instruction")({"instruction": "<|endoftext|>one", "output": "two"}),
    ):
        assert row.input_ids.count(first) == 1 and row.input_ids[0] == first and first not in row.labels
        assert row.input_ids.count(tokenizer.eos_token_id) == 1 and row.labels[-1] == tokenizer.eos_token_id
    renderer = ChatRenderer(tokenizer)
    assert renderer.ask("<|endoftext|>one") == renderer.ask("one") == [first, *tokenizer("one")["input_ids"][1:]]


def test_a_text_that_ends_in_its_end_token_and_a_line_end_gets_no_second_one() -> None:
    tokenizer = make_tokenizer(None)
    row = encoder(tokenizer, "text")({"text": "one<|im_end|>\n"})
    assert row.input_ids.count(tokenizer.eos_token_id) == 1


# -- templates with habits ------------------------------------------------------------------------


def test_an_end_token_of_the_whole_text_is_no_rewriting() -> None:
    assert learned(ENDS_THE_TEXT, chat("q", "one", "r", "two")) == "one<|pad|>\ntwo<|pad|>\n<|im_end|>"
    assert learned(ENDS_THE_TEXT, chat("q", "one")) == "one<|pad|>\n<|im_end|>"


def test_of_a_turn_that_ends_otherwise_later_the_rest_is_learned() -> None:
    assert learned(ANOTHER_END, chat("q", "one", "r", "two")) == "onetwo<|im_end|>"


def test_a_rewritten_answer_is_still_refused() -> None:
    with pytest.raises(InputError, match=r"rewrites message 2 .*mask_history"):
        learned(STRIPS_THINKING, chat("q", THOUGHT, "r", "two"))
    assert learned(STRIPS_THINKING, chat("q", THOUGHT, "r", "two"), last_only=True) == "two<|im_end|>\n"


@pytest.mark.parametrize("field", ["reasoning_content", "thinking", "reasoning", "inside", "unopened"])
def test_a_prompt_that_opens_thinking_is_gone_on_from(field: str) -> None:
    inside = {"inside": THOUGHT, "unopened": "hm\n</think>\n\none"}
    answer = {"role": "assistant", "content": inside.get(field, "one")} | ({} if field in inside else {field: "hm"})
    assert learned(OPENS_THINKING, [*chat("q"), answer]) == "hm\n</think>\n\none<|im_end|>"
    found = learned(THINKS_BY_VARIABLE, [*chat("q"), answer], variables={"thinking": True})
    assert found.startswith("hm") and found.endswith("</think>one<|im_end|>")


def test_without_reasoning_an_empty_one_is_learned_and_it_is_said(caplog: pytest.LogCaptureFixture) -> None:
    assert learned(OPENS_THINKING, chat("q", "one")) == "\n</think>\n\none<|im_end|>"
    assert "opens the model's thinking" in caplog.text
    assert learned(THINKS_BY_VARIABLE, chat("q", "one")) == "one<|im_end|>"
    assert learned(OPENS_THINKING, chat("q", "zero", "r", "one"), last_only=True) == "\n</think>\n\none<|im_end|>"


def test_reasoning_that_the_template_would_drop_is_refused() -> None:
    thought = [*chat("q"), {"role": "assistant", "content": "one", "reasoning_content": "hm"}]
    with pytest.raises(InputError, match="message 2 has reasoning, which the chat template does not write"):
        learned(CHATML, thought)
    assert learned(EMPTY_BEFORE, thought) == "hm\n</think>\n\none<|im_end|>\n"
    with pytest.raises(InputError, match="message 2 has reasoning"):
        learned(CHATML, thought, on_prompt=True)
    with pytest.raises(InputError, match="message 2 has reasoning"):
        learned(MARKED, thought)


def test_reasoning_inside_the_content_goes_where_the_template_wants_it() -> None:
    assert learned(EMPTY_BEFORE, chat("q", THOUGHT)) == "hm\n</think>\n\none<|im_end|>\n"
    assert learned(CHATML, chat("q", THOUGHT)) == f"{THOUGHT}<|im_end|>\n"


def test_what_a_prompt_opened_is_kept_with_the_answer() -> None:
    """So that the template finds the reasoning of the turn before where it looks for it."""
    asked: list[str] = []

    class Thinker:
        renderer, context = ChatRenderer(make_tokenizer(EMPTY_BEFORE)), None

        def continue_from(self, ids: list[int], *_: Any) -> Reply:
            asked.append(self.renderer.tokenizer.decode(ids))
            return Reply("hm\n</think>\n\none", 5, 0.1, "end")

    conversation = Conversation(Thinker())  # type: ignore[arg-type]
    conversation.ask("q", Sampling())
    conversation.ask("r", Sampling())
    assert "assistant\n<think>\nhm\n</think>\n\none<|im_end|>" in asked[1]


def test_a_template_that_wants_parts_gets_them() -> None:
    assert learned(PARTS_ONLY, chat("q", "one")) == "one<|im_end|>\n"
    assert "q" in ChatRenderer(make_tokenizer(PARTS_ONLY)).prompt(chat("q"))


def test_marks_that_begin_in_the_prompt_or_elsewhere(caplog: pytest.LogCaptureFixture) -> None:
    early = MARKED.replace("{{ m.role }}\n{% if m.role == 'assistant' %}{%- generation -%}", "{{ m.role }}"
                           "{% if m.role == 'assistant' %}{% generation %}{{ '\n' }}").replace(
        "{% else %}{{ m.content }}", "{% else %}{{ '\n' + m.content }}")  # fmt: skip
    assert early != MARKED
    assert learned(early, chat("q", "one")) == "one<|im_end|>"
    other = MARKED.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    tokenizer = make_tokenizer(other)
    assert learned_text(tokenizer, ChatRenderer(tokenizer).training(chat("q", "one"))) == "one<|im_end|>"
    assert "not what its marked answers follow" in caplog.text


def test_of_several_named_templates_the_one_transformers_takes(tmp_path: Path) -> None:
    named = {"default": CHATML, "tool_use": "TOOLS" + CHATML, "rag": "RAG" + CHATML}
    tokenizer = make_tokenizer(None)
    tokenizer.chat_template = dict(named)
    renderer, tools = ChatRenderer(tokenizer), [{"type": "function", "function": {"name": "f"}}]
    for given in (None, tools):
        expected = tokenizer.apply_chat_template(chat("q"), tools=given, tokenize=False, add_generation_prompt=True)
        assert renderer.prompt(chat("q"), given) == expected
    chosen = ChatRenderer.from_file(tokenizer, "rag")
    assert chosen.prompt(chat("q")).startswith("RAG") and tokenizer.chat_template == named["rag"]
    tokenizer.chat_template = {"rag": named["rag"], "other": CHATML}
    with pytest.raises(InputError, match=r"other, rag .*none of them is the default"):
        ChatRenderer(tokenizer).prompt(chat("q"))


# -- variables ------------------------------------------------------------------------------------


def test_variables_reach_the_template_and_stay_with_the_tokenizer(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(THINKS_BY_VARIABLE)
    assert ChatRenderer(tokenizer).prompt(chat("q")).endswith("</think>")
    renderer = ChatRenderer(tokenizer, None, {"thinking": True})
    assert renderer.prompt(chat("q")).endswith("<think>")
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert ChatRenderer(again).prompt(chat("q")) == renderer.prompt(chat("q"))
    assert ChatRenderer(again, CHATML).variables == {}, "they were another template's"
    assert ChatRenderer(AutoTokenizer.from_pretrained(tmp_path), None, {}).variables == {}
    keys = {encoder(make_tokenizer(THINKS_BY_VARIABLE), "messages").key}
    tokenizer = make_tokenizer(THINKS_BY_VARIABLE)
    ChatRenderer(tokenizer, None, {"thinking": True})
    assert encoder(tokenizer, "messages").key not in keys


def test_variables_that_mean_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"reads no 'thinkin'.*did you mean 'thinking'"):
        ChatRenderer(make_tokenizer(THINKS_BY_VARIABLE), None, {"thinkin": True})
    with pytest.raises(ConfigError, match="no chat template"):
        ChatRenderer(make_tokenizer(None), None, {"thinking": True})
    with pytest.raises(ConfigError, match="messages is what LEMA itself gives"):
        DataConfig(chat_template_kwargs={"messages": []})
    with pytest.raises(ConfigError, match="must be names with values"):
        DataConfig(chat_template_kwargs=["thinking"])  # type: ignore[arg-type]


def test_variables_in_a_runs_file_and_on_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model_name_or_path: m\nchat_template_kwargs:\n  enable_thinking: false\n")
    run = RunConfig.from_yaml(file)
    assert run.data.chat_template_kwargs == {"enable_thinking": False}
    assert RunConfig.from_yaml(run.save(tmp_path / "out")).data == run.data
    typed = RunConfig.from_yaml(file, {"chat_template_kwargs": '{"enable_thinking": true, "n": 1}'})
    assert typed.data.chat_template_kwargs == {"enable_thinking": True, "n": 1}
    with pytest.raises(ConfigError, match=r"chat_template_kwargs='{nothing' is not valid JSON"):
        RunConfig.from_yaml(file, {"chat_template_kwargs": "{nothing"})


# -- code of strangers ----------------------------------------------------------------------------

_LOOP = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3
HOSTILE = {
    "recursion": ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "calls itself without end"),
    "division": ("{{ 1 / (messages|length - 1) }}", "division"),
    "modulo": ("{{ 1 % (messages|length - 1) }}", "ZeroDivision"),
    "range": ("{% for i in range(10000000000) %}{% endfor %}", "range"),
    "codec": ("{{ 'x'.encode('no-such-codec') }}", "no-such-codec"),
    "index": ("{{ messages[7].content.upper() }}", "no element|undefined"),
    "memory": ("{{ 'x' * (messages|length * 100000000000) }}", "GiB of memory"),
    "list": ("{{ ([0] * (messages|length * 100000000000))|length }}", "GiB of memory"),
    "padding": ("{{ 'x'.center(messages|length * 100000000000) }}", "GiB of memory|Overflow"),
    "doubling": ("{% set n = namespace(s='x') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}{{ n.s }}",
                 "GiB of memory"),
    "numbers": ("{{ 'x' * 100000000000000000000 }}", "Overflow|cannot fit"),
    "assertion": ("{{ raise_exception('no') }}", "no"),
    "format": ("{{ '%d' % 'x' }}", "number"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_what_a_template_does_wrong_is_said(name: str) -> None:
    text, words = HOSTILE[name]
    with pytest.raises((InputError, ConfigError), match=f"(?i){words}"):
        ChatRenderer(make_tokenizer(text)).prompt(chat("q"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{% for %}", "not Jinja: line 1"),
        ("{{ 9 ** 9 ** 9 }}", "raises to a power in line 1"),
        ("\n{{ messages|length ** 2 }}", "raises to a power in line 2"),
        ("{{ 'x' * 100000000000 }}", "memory"),
        ("{{ " + "(" * 4000 + "1" + ")" * 4000 + " }}", "no Jinja that can be read|RecursionError"),
        ("{{ 1" + "0" * 5000 + " }}", "digits"),
        ("{% if true %}" * 3000 + "{% endif %}" * 3000, "no Jinja that can be read|Recursion|Syntax|blocks"),
    ],
)
def test_what_cannot_be_a_template_is_refused_at_once(text: str, words: str) -> None:
    with pytest.raises((ConfigError, InputError), match=words):
        ChatRenderer(make_tokenizer(text)).prompt(chat("q"))


def test_a_template_that_does_not_end_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_module, "_SECONDS", 0.3)
    began = time.monotonic()
    with pytest.raises(ConfigError, match=r"did not end within 0\.3 seconds"):
        ChatRenderer(make_tokenizer(_LOOP))
    late = "{% if messages|length > 1 %}" + _LOOP + "{% endif %}" + CHATML
    renderer = ChatRenderer(make_tokenizer(late))
    with pytest.raises(InputError, match="did not end within"):
        renderer.training(chat("q", "one"))
    assert time.monotonic() - began < 60
    monkeypatch.setattr(template_module, "_SECONDS", 30.0)
    assert renderer.prompt(chat("q")).endswith("assistant\n"), "it is usable afterwards"


def test_a_text_of_gigabytes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_module, "_LONGEST_TEXT", 1000)
    with pytest.raises(InputError, match="characters"):
        ChatRenderer(make_tokenizer("{% for i in range(2000) %}x{% endfor %}")).prompt(chat("q"))


def test_limits_are_taken_back() -> None:
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_AS)
    for work in (lambda: None, lambda: bytearray(1 << 40), lambda: 1 / 0):
        try:
            with limited(5, 1 << 30):
                work()
        except (MemoryError, ZeroDivisionError):
            pass
        assert resource.getrlimit(resource.RLIMIT_AS) == before

    def run(found: list[str]) -> None:
        try:
            with limited(0.2, 1 << 30):
                while True:
                    pass
        except OutOfTimeError:
            found.append("stopped")

    found: list[str] = []
    thread = threading.Thread(target=run, args=(found,))
    thread.start()
    thread.join(60)
    assert found == ["stopped"]


@pytest.mark.parametrize("what", ["pipe", "device", "folder", "large", "bytes"])
def test_only_a_regular_file_is_read_as_a_template(tmp_path: Path, what: str) -> None:
    path = tmp_path / "t.jinja"
    if what == "pipe":
        os.mkfifo(path)
    elif what == "device":
        path = Path("/dev/zero")
    elif what == "folder":
        path.mkdir()
    elif what == "large":
        path.write_bytes(b"x" * (1 << 24) + b"y")
    else:
        path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="chat_template="):
        ChatRenderer.from_file(make_tokenizer(), path)


def test_reasoning_inside_the_content_is_not_lost_in_silence() -> None:
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    renderer = ChatRenderer(make_tokenizer(template))
    answer = {"role": "assistant", "content": "<think>\nsecret plan\n</think>\n\nHello"}
    with pytest.raises(InputError, match="message 2 has reasoning, which the chat template does not write"):
        renderer.training([{"role": "user", "content": "Hi"}, answer])


def test_a_prompt_that_opens_something_else_is_no_thinking() -> None:
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: <reply>{% endif %}"
    )
    renderer = ChatRenderer(make_tokenizer(template))
    with pytest.raises(InputError, match="differently once it is answered"):
        renderer.training([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}])
