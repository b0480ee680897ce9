"""The forms that other tools' rows have: each field is honoured, refused by its name, or named as not used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data_helpers import CHATML, MARKED, chat, encoder, learned_text, make_tokenizer, write_jsonl
from lema.data import DataConfig, ListRows, TokenDataset, detect_format, load_data, open_rows
from lema.data.survey import survey
from lema.errors import InputError

_CALLS = "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}=ARGUMENTS{% endfor %}"
_TOOLS = (
    "{% for t in tools or [] %}{{ t | tojson }}\n{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}" + _CALLS + "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _with(arguments: str) -> str:
    return _TOOLS.replace("ARGUMENTS", arguments)


TEMPLATES = {  # how templates write arguments
    "as JSON": _with("{{ c.function.arguments | tojson }}"),
    "beside text": _with("{{ '' + c.function.arguments + '' }}"),
    "as they are": _with("{{ c.function.arguments }}"),
    "as JSON unless text": _with(
        "{% if c.function.arguments is string %}{{ c.function.arguments }}{% else %}"
        "{{ c.function.arguments | tojson }}{% endif %}"
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEMA_CACHE", str(tmp_path / "cache"))


def ask(*more: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": "q"}, *more]


def call(arguments: Any, **more: Any) -> dict[str, Any]:
    calls = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}]
    return {"role": "assistant", "content": None, "tool_calls": calls, **more}


def read(row: dict[str, Any], template: str | None = CHATML, kind: str | None = None, **settings: Any) -> str:
    """The text of a row and, behind a bar, what is learned of it."""
    tokenizer = make_tokenizer(template)
    encoded = encoder(tokenizer, kind or detect_format(ListRows([row])), **settings)(row)
    return f"{tokenizer.decode(encoded.input_ids)}|{learned_text(tokenizer, encoded)}"


# -- tools ---------------------------------------------------------------------------------------

OBJECT = {"city": "Oslo é", "days": [1, None], "deep": {"none": None}}


@pytest.mark.parametrize("name", TEMPLATES)
def test_arguments_as_text_are_those_of_an_object_however_a_template_writes_them(name: str) -> None:
    expected = f"<call>f={json.dumps(OBJECT, ensure_ascii=False)}<|im_end|>\n"
    forms = [
        call(OBJECT), call(json.dumps(OBJECT)), call(json.dumps(OBJECT, ensure_ascii=False, indent=1)),
        {"role": "assistant", "content": "", "function_call": {"name": "f", "arguments": json.dumps(OBJECT)}},
        {"role": "assistant", "function_call": {"name": "f", "arguments": OBJECT}},
        {"role": "assistant", "tool_calls": [{"name": "f", "arguments": json.dumps(OBJECT)}]},
        {"role": "assistant", "tool_calls": json.dumps([{"name": "f", "arguments": OBJECT}])},
    ]  # fmt: skip
    for form in forms:
        text, learned = read({"messages": ask(form)}, TEMPLATES[name]).split("|<call>")
        assert f"<call>{learned}" == expected and text.endswith(expected), form


def test_a_call_without_arguments_has_none() -> None:
    for arguments in ("", "{}", None, {}):
        assert "<call>f={}<|im_end|>" in read({"messages": ask(call(arguments))}, TEMPLATES["as JSON"])


def test_calls_in_sharegpt_and_what_tools_answer() -> None:
    turns = [
        {"from": "human", "value": "q"},
        {"from": "function_call", "value": json.dumps({"name": "f", "arguments": {"a": 1}})},
        {"from": "observation", "value": '{"b": 2}'}, {"from": "gpt", "value": "done"},
    ]  # fmt: skip
    row = {"conversations": turns, "system": "s", "tools": json.dumps([{"name": "f", "parameters": {}}])}
    text = read(row, TEMPLATES["as JSON"])
    assert text.startswith(
        '{"type": "function", "function": {"name": "f", "parameters": {}}}\n<|im_start|>system\ns<|im_end|>'
    )
    assert text.endswith('|<call>f={"a": 1}<|im_end|>\ndone<|im_end|>\n') and '<|im_start|>tool\n{"b": 2}' in text
    for role, content in (("tool", {"b": 2}), ("tool", '{"b": 2}'), ("function", {"b": 2})):
        row = {"messages": ask(call({}), {"role": role, "name": "f", "content": content}, *chat("x", "y"))}
        assert '<|im_start|>tool\n{"b": 2}<|im_end|>' in read(row, TEMPLATES["as JSON"])


def test_schemas_are_one_form() -> None:
    bare = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {"a": {"default": None}}}}
    whole = {"type": "function", "function": bare}
    texts = {
        read({"messages": ask(call({})), name: tools}, TEMPLATES["as JSON"])
        for name, tools in (
            ("tools", [whole]), ("tools", [bare]), ("functions", [bare]), ("tools", json.dumps([bare])),
            ("tools", [json.dumps(whole)]), ("tools", [{"type": "function", **bare}]),
            ("functions", json.dumps([bare])), ("functions", [{**bare, "parameters": json.dumps(bare["parameters"])}]),
            ("tools", [{"type": "function", "function": {**bare, "parameters": json.dumps(bare["parameters"])}}]),
        )
    }  # fmt: skip
    assert len(texts) == 1 and '"default": null' in texts.pop()


def test_a_template_that_writes_no_calls_is_refused_where_there_are_some() -> None:
    with pytest.raises(InputError, match=r"message 2 calls tools, and the chat template does not write tool_calls"):
        read({"messages": ask(call({}))})


# -- tables --------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["parquet", "save_to_disk", "in Python", "pandas"])
def test_nulls_that_a_table_fills_in_are_not_there(how: str, tmp_path: Path) -> None:
    import datasets

    rows = []
    for name, arguments in (("f", {"city": "Oslo"}), ("g", {"a": "1", "list": [{"x": "1"}, {"y": "2"}]}), ("h", {})):
        properties = {key: {"type": "string"} for key in arguments}
        schema = {"name": name, "parameters": {"type": "object", "properties": properties}}
        calls = [{"type": "function", "function": {"name": name, "arguments": arguments}}]
        rows.append({"messages": ask({"role": "assistant", "content": "", "tool_calls": calls}), "tools": [schema]})
    table = datasets.Dataset.from_list(rows)
    assert table[0]["messages"][1]["tool_calls"][0]["function"]["arguments"].get("a", 0) is None
    source: Any = table
    if how == "parquet":
        table.to_parquet(source := tmp_path / "rows.parquet")
    elif how == "save_to_disk":
        table.save_to_disk(source := tmp_path / "rows")
    elif how == "pandas":
        source = table.to_pandas()
    from_table, from_lines = open_rows(source), open_rows(write_jsonl(tmp_path / "rows.jsonl", rows))
    template = TEMPLATES["as JSON"]
    for number in range(len(rows)):
        assert read(from_table[number], template) == read(from_lines[number], template), number


def test_nulls_that_are_meant_stay(tmp_path: Path) -> None:
    row = {"messages": ask(call({"a": None, "b": [None]})), "tools": [{"name": "f", "default": None}]}
    for name, text in (("rows.jsonl", json.dumps(row)), ("rows.json", json.dumps([row])), ("x.json", json.dumps(row))):
        (tmp_path / name).write_text(text, encoding="utf-8")
        found = read(open_rows(tmp_path / name)[0], TEMPLATES["as JSON"])
        assert '<call>f={"a": null, "b": [null]}' in found and '"default": null' in found


# -- marks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["header", "marked"])
@pytest.mark.parametrize("no", [("weight", 0), ("weight", 0.0), ("train", False), ("loss", False), ("masked", True)])
def test_turns_that_are_marked_are_not_learned(no: tuple[str, Any], template: str) -> None:
    name, value = no
    yes = {name: not value if isinstance(value, bool) else 1}
    end = "<|im_end|>\n" if template == CHATML else "<|im_end|>"
    for marks, learned in (
        ([{name: value}, yes], ["two"]), ([yes, {name: value}], ["one"]), ([{name: value}, {}], ["two"]),
        ([{name: value}] * 2, []), ([yes, yes], ["one", "two"]), ([{name: None}, {}], ["one", "two"]),
    ):  # fmt: skip
        messages = chat("q", "one", "r", "two")
        for message, mark in zip(messages[1::2], marks, strict=True):
            message |= mark
        row: dict[str, Any] = {"messages": messages}
        expected = "".join(f"{word}{end}" for word in learned)
        encoded = encoder(tokenizer := make_tokenizer(template), "messages")(row)
        assert learned_text(tokenizer, encoded) == expected
        turns = [{"from": m.pop("role"), "value": m.pop("content"), **m} for m in messages]
        turned = encoder(tokenizer, "conversations")({"conversations": turns})
        assert (turned.input_ids, turned.labels) == (encoded.input_ids, encoded.labels)
        if learned:
            last = encoder(tokenizer, "conversations", mask_history=True)({"conversations": turns})
            assert learned_text(tokenizer, last) == f"{learned[-1]}{end}"


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        ("messages", {"messages": chat("q", "a")}), ("text", {"text": "some text"}),
        ("prompt_completion", {"prompt": "q", "completion": "a"}), ("instruction", {"instruction": "q", "output": "a"}),
    ],
)  # fmt: skip
def test_rows_that_are_marked_are_dropped_and_counted(kind: str, row: dict[str, Any]) -> None:
    rows = [row, {**row, "weight": 0}, {**row, "train": False}, {**row, "weight": 1, "train": True}]
    found = survey(TokenDataset(ListRows(rows), encoder(make_tokenizer(), kind), max_seq_length=64), range(4))
    assert found.kept == 2 and found.dropped == {"no target": 2} and not found.unused and not found.bad


@pytest.mark.parametrize(
    ("marks", "words"),
    [
        ({"weight": 0.5}, "weight: 0.5, and only 0 and 1"), ({"train": "no"}, "train: 'no'"),
        ({"weight": 0, "train": True}, "weight and train, which contradict"), ({"mask": 1}, "has mask"),
        ({"loss_scale": 2.0}, "has loss_scale"), ({"train_detail": [{"begin_offset": 0}]}, "has train_detail"),
        ({"label": False}, "has label"),
    ],
)  # fmt: skip
def test_marks_that_cannot_be_followed_are_refused(marks: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=rf"messages, message 2 \(role assistant\) .*{words}|.*{words}"):
        read({"messages": ask({"role": "assistant", "content": "a", **marks})})
    with pytest.raises(InputError, match=f"the row has .*{next(iter(marks))}"):
        read({"messages": chat("q", "a"), **marks})


def test_a_mark_on_a_turn_that_is_not_the_assistants(tmp_path: Path) -> None:
    marked = {"messages": [{"role": "user", "content": "q", "train": False}, {"role": "assistant", "content": "a"}]}
    assert read(marked).endswith("|a<|im_end|>\n")
    marked["messages"][0]["train"] = True
    with pytest.raises(InputError, match=r"message 1 \(role user\) is marked to be learned"):
        read(marked)
    with pytest.raises(InputError, match="message 2 is marked not to be learned, and train_on_prompt"):
        read({"messages": ask({"role": "assistant", "content": "a", "weight": 0})}, train_on_prompt=True)


# -- fields --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "p", "completion": "c", "label": True}, "the row has label"),
        ({"prompt": "p", "completion": "c", "label": False}, r"columns: \{label: null\}"),
        ({"messages": chat("q", "a"), "rejected_response": "b"}, "has rejected_response"),
        ({"messages": chat("q", "a"), "chosen": chat("q", "b")}, "has chosen"),
        ({"conversations": chat("q", "a"), "kto_tag": False}, "has kto_tag"),
        ({"instruction": "q", "output": "a", "images": ["a.png"]}, "has images, and only text is learned"),
        ({"messages": chat("q", "a"), "history": [["a", "b"]]}, "has history"),
        ({"messages": chat("q", "a"), "chat_template_kwargs": {"x": 1}}, "has chat_template_kwargs"),
        ({"instruction": "q", "output": "a", "history": [["only"]]}, "history, item 1"),
        ({"messages": chat("q", "a", system="s"), "system": "t"}, "system is there twice"),
        ({"messages": ask(call("{oops"))}, r"call 1: arguments is text that is not JSON"),
        ({"messages": ask(call("[1]"))}, r"call 1: arguments is a list, not an object"),
        ({"messages": ask(call('{"a": [NaN]}'))}, "call 1: arguments has nan, a number that JSON has no word for"),
        ({"messages": ask(call('{"a": 1e999}'))}, "call 1: arguments has inf"),
        ({"messages": ask({"role": "assistant", "content": "a", "should_learn": False})}, "has should_learn, which"),
        ({"messages": chat("q", "a"), "sample_weight": 0.5}, r"has sample_weight.*columns: \{sample_weight: null\}"),
        ({"messages": ask(call({}, function_call={"name": "f"}))}, "tool_calls and function_call"),
        ({"messages": ask({"role": "assistant", "tool_calls": [{"function": {}}]})}, "call 1 has no name"),
        ({"messages": chat("q", "a"), "tools": "[oops"}, "tools is text that is not JSON"),
        ({"messages": chat("q", "a"), "tools": [3]}, "tools, item 1 is int"),
        ({"messages": chat("q", "a"), "tools": [{"name": "f"}], "functions": [{"name": "f"}]}, "tools and functions"),
        ({"conversations": [{"from": "function_call", "value": "<tool_call>"}]}, "1: value is text that is not JSON"),
        ({"messages": ask({"role": "assistant", "content": [{"type": "refusal", "refusal": "n"}]})}, "'refusal'"),
        ({"messages": ask({"role": "assistant", "content": [{"type": "text"}]})}, "part 1: text is null"),
    ],
)  # fmt: skip
def test_what_would_mean_something_else_is_refused_by_name(row: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        read(row, TEMPLATES["as JSON"])


def test_an_end_token_in_a_content_is_not_doubled() -> None:
    for ending in ("<|im_end|>", "<|im_end|>\n", " <|im_end|>"):
        assert "a<|im_end|>\n" in read({"messages": chat("q", f"a{ending}")}).replace(" ", "")
        assert "<|im_end|><|im_end|>" not in read({"messages": chat("q", f"a{ending}", "r", f"b{ending}")})


def test_preferences_are_named() -> None:
    for row in ({"prompt": "p", "chosen": "a", "rejected": "b"}, {"input": {}, "preferred_output": []}):
        with pytest.raises(InputError, match="preferences are not trained"):
            detect_format(ListRows([row]))


def test_history_system_and_tools_are_read_wherever_they_are() -> None:
    for row in (
        {"instruction": "two", "input": "", "output": "b", "history": [["one", "a"]], "system": "s"},
        {"prompt": "two", "completion": "b", "history": [["one", "a"]], "system": "s"},
        {"messages": chat("one", "a", "two", "b"), "system": "s"},
        {"messages": chat("one", "a", "two", "b", system="s"), "system": "s"},
        {"conversations": chat("one", "a", "two", "b"), "system": "s"},
    ):
        text = read(row)
        assert text == read({"messages": chat("one", "a", "two", "b", system="s")}), row
        assert read(row, mask_history=True).endswith("|b<|im_end|>\n")
    row = {"prompt": chat("one", "a", "two"), "completion": chat("", "b")[1:], "system": "s"}
    assert read(row).endswith("two<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n|b<|im_end|>\n")
    row = {"prompt": "q", "completion": "a", "tools": [{"name": "f"}]}
    assert read(row, TEMPLATES["as JSON"]).startswith('{"type": "function"')


def test_parts_of_content_are_joined() -> None:
    for parts in ([{"type": "text", "text": "one "}, {"type": "text", "text": "two"}], ["one ", {"text": "two"}]):
        assert read({"messages": ask({"role": "assistant", "content": parts})}).endswith("|one two<|im_end|>\n")
        assert (
            read({"conversations": [{"from": "human", "value": parts}, {"from": "gpt", "value": parts}]}).count("two")
            == 3
        )


def test_fields_that_nothing_reads_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    message = {"role": "assistant", "content": "a", "annotations": [1], "name": None, "empty": ""}
    rows = [{"messages": ask(message), "id": i, "source": None, "tools": [{"name": "f"}]} for i in range(3)]
    dataset = TokenDataset(ListRows(rows), encoder(make_tokenizer(), "messages"), max_seq_length=64)
    assert survey(dataset, range(3)).unused == {"id": 3, "tools": 3, "messages.annotations": 3}
    reads = CHATML.replace("{{ m.content }}", "{{ m.content }}{{ m.annotations }}")
    dataset = TokenDataset(ListRows(rows), encoder(make_tokenizer(reads), "messages"), max_seq_length=64)
    assert survey(dataset, range(3)).unused == {"id": 3, "tools": 3}
    config = DataConfig(train_file=str(write_jsonl(tmp_path / "rows.jsonl", rows)))
    data = load_data(config, make_tokenizer(), max_seq_length=64, rows_per_step=1, seed=0)
    assert data.summary["train"]["sample"]["unused_fields"]["id"] == 3
    assert "fields that are not used: id, tools, messages.annotations" in caplog.text


def test_a_field_that_no_sample_meets_is_named_with_its_row(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"text": "a", **({"late": 1} if i == 1 else {})} for i in range(600)]
    config = DataConfig(train_file=str(write_jsonl(tmp_path / "rows.jsonl", rows)), shuffle=False)
    data = load_data(config, make_tokenizer(), max_seq_length=64, rows_per_step=4, seed=0)
    assert "not used" not in caplog.text
    for _ in range(data.train.steps_per_epoch + 1):
        next(data.train)
    assert caplog.text.count("rows.jsonl, line 2: fields that are not used: late") == 1


# -- text that is none ---------------------------------------------------------------------------

HALF = "ab\ud83d"


@pytest.mark.parametrize(
    "row",
    [
        {"messages": ask(call({"a": HALF}))}, {"messages": ask(call({HALF: 1}))},
        {"messages": ask(call('{"a": "\\ud83d"}'))}, {"text": "a", "meta": {"x": [HALF]}},
        {"messages": chat("q", "a"), "tools": [{"name": "f", "description": HALF}]},
        {"messages": chat("q", "a"), "tools": '[{"name": "f", "enum": ["\\ud83d"]}]'},
        {"messages": ask({"role": "assistant", "name": HALF, "content": "a"})}, {"messages": chat("q", "a"), HALF: 1},
        {"messages": chat("q", "a"), "id": HALF}, {"conversations": chat("q", "a"), "system": HALF},
        {"instruction": "q", "output": "a", "history": [["a", HALF]]}, {"text": HALF},
        {"messages": ask({"role": "assistant", "content": [{"type": "text", "text": HALF}]})},
        {"messages": ask({"role": "assistant", "function_call": {"name": HALF, "arguments": "{}"}})},
    ],
)  # fmt: skip
def test_half_a_surrogate_pair_anywhere_is_named(row: dict[str, Any], tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [row])
    rows = open_rows(path)
    dataset = TokenDataset(rows, encoder(make_tokenizer(TEMPLATES["as JSON"]), detect_format(rows)), max_seq_length=64)
    with pytest.raises(InputError, match=r"line 1: .* has half a surrogate pair at character [13], no text") as caught:
        dataset[0]
    str(caught.value).encode("utf-8")


def test_names_that_are_no_text_can_be_printed() -> None:
    with pytest.raises(InputError) as caught:
        detect_format(ListRows([{HALF: 1}]))
    str(caught.value).encode("utf-8")
