"""Tools in rows: their schemas, and calls of them, in the forms that data has them, as one form that templates take.

It knows OpenAI's `tools`, `functions`, `tool_calls` and `function_call`, and the same without the outer object; it
knows nothing of conversations.

The form is OpenAI's with arguments as an object: transformers' documentation asks for that, and most templates write
arguments as JSON themselves, so that text would be written as JSON twice. Templates that lay the arguments beside text
get JSON text of the same object, see `with_text_arguments`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..errors import InputError
from .checks import check_numbers, is_absent, json_of, kind_of, list_of, names, text_of

CALL_FIELDS = ("id", "type", "index", "function", "name", "arguments")


def calls_of(message: Mapping[str, Any], place: str) -> list[dict[str, Any]]:
    """The calls in a message: its `tool_calls`, or the older `function_call`; none where it has neither.

    Raises:
        InputError: both are there, or one is not a call.
    """
    calls, old = message.get("tool_calls"), message.get("function_call")
    if not is_absent(calls) and not is_absent(old):
        raise InputError(f"{place} has tool_calls and function_call: one says what is called")
    if is_absent(calls) and is_absent(old):
        return []
    name = f"{place}: {'function_call' if is_absent(calls) else 'tool_calls'}"
    return read_calls(old if is_absent(calls) else calls, name)


def read_calls(value: Any, name: str) -> list[dict[str, Any]]:
    """One call or several, as objects or as JSON text of them."""
    if isinstance(value, str):
        value = json_of(value, name)
    if isinstance(value, Mapping):
        return [_call(value, name)]
    return [_call(call, f"{name}, call {number}") for number, call in enumerate(list_of(value, name), 1)]


def _call(call: Any, name: str) -> dict[str, Any]:
    if not isinstance(call, Mapping):
        raise InputError(f"{name} is {kind_of(call)}, not an object with name and arguments")
    inner = call.get("function", call)
    if not isinstance(inner, Mapping):
        raise InputError(f"{name}: function is {kind_of(inner)}, not an object with name and arguments")
    if "name" not in inner:
        raise InputError(f"{name} has no name; it has {names(inner)}")
    function = {
        **(inner if inner is not call else {key: item for key, item in call.items() if key not in ("id", "type")}),
        "name": text_of(inner["name"], f"{name}: name"), "arguments": _arguments(inner.get("arguments"), name),
    }  # fmt: skip
    kept = {key: item for key, item in call.items() if key not in function} if inner is call else dict(call)
    return {**kept, "type": call.get("type") or "function", "function": function}


def _arguments(value: Any, name: str) -> dict[str, Any]:
    if isinstance(value, str):
        value = json_of(value, f"{name}: arguments") if value.strip() else {}
    if value is None:
        value = {}
    if not isinstance(value, Mapping):
        raise InputError(f"{name}: arguments is {kind_of(value)}, not an object or JSON text of one")
    check_numbers(value, f"{name}: arguments")
    return dict(value)


def schemas_of(row: Mapping[str, Any]) -> list[Any] | None:
    """The tools of a row, `tools` or the older `functions`: schemas, or JSON text of them; None where it has none.

    Raises:
        InputError: both are there, or one is not a schema.
    """
    tools, old = row.get("tools"), row.get("functions")
    if isinstance(tools, str) and not tools.strip():
        tools = None
    if not is_absent(tools) and not is_absent(old):
        raise InputError("tools and functions are both there: one says what can be called")
    name, value = ("functions", old) if is_absent(tools) else ("tools", tools)
    if is_absent(value):
        return None
    if isinstance(value, str):
        value = json_of(value, name)
        if is_absent(value):
            return None
    if isinstance(value, Mapping):
        value = [value]
    return [_schema(one, f"{name}, item {number}") for number, one in enumerate(list_of(value, name), 1)]


def _schema(schema: Any, name: str) -> dict[str, Any]:
    """In the form `{"type": "function", "function": {"name": …}}`; a tool of another type stays as it is."""
    if isinstance(schema, str):
        schema = json_of(schema, name)
    if not isinstance(schema, Mapping):
        raise InputError(f"{name} is {kind_of(schema)}, not an object that describes a tool")
    if "function" not in schema and ("name" not in schema or schema.get("type", "function") != "function"):
        return dict(schema)
    inner = schema.get("function", {key: item for key, item in schema.items() if key != "type"})
    if isinstance(inner, Mapping) and isinstance(inner.get("parameters"), str):  # a template would write it as text
        inner = {**inner, "parameters": json_of(inner["parameters"], f"{name}: parameters")}
    return {**schema, "function": inner} if "function" in schema else {"type": "function", "function": inner}


def with_text_arguments(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages as `read_messages` makes them, with the arguments of their calls as JSON text."""
    return [
        {**message, "tool_calls": [_in_text(call) for call in message["tool_calls"]]}
        if "tool_calls" in message
        else dict(message)
        for message in messages
    ]


def _in_text(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}


_PROBE = {"lema_probe": None}


def takes_text(render: Callable[[list[dict[str, Any]]], str]) -> bool:
    """Whether a template wants arguments as JSON text: it fails on an object, or writes one as Python does.

    Args:
        render: messages as the template writes them; an `InputError` where it refuses them.
    """
    call = {"id": "lema00001", "type": "function", "function": {"name": "lema", "arguments": dict(_PROBE)}}
    asked: dict[str, Any] = {"role": "user", "content": "?"}
    probe = [asked, {"role": "assistant", "content": "", "tool_calls": [call]}]
    try:
        if str(_PROBE) not in render(probe):
            return False
    except InputError:
        pass
    try:
        return '"lema_probe"' in render(with_text_arguments(probe))
    except InputError:
        return False
