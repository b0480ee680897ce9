"""Files as other tools' documentation has them, from the file to an adapter, without a change to the file."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from data_helpers import VOCABULARY, make_tokenizer, write_jsonl
from families import save_tiny
from lema.cli.app import app

pytestmark = pytest.mark.timeout(300)

_TEMPLATE = (
    "{% for t in tools or [] %}{{ t | tojson }}\n{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}={{ c.function.arguments | tojson }}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_WEATHER = {
    "name": "get_forecast", "description": "The forecast of a town.",
    "parameters": {"type": "object", "properties": {"town": {"type": "string"}}, "required": ["town"]},
}  # fmt: skip


def _openai(folder: Path) -> Path:
    """Fine-tuning of chat models: tools, calls with arguments as text, weights, one JSON object a line."""
    calls = [
        {"id": "call_1", "type": "function", "function": {"name": "get_forecast", "arguments": '{"town": "Bergen"}'}}
    ]
    rows = [
        {
            "messages": [
                {"role": "system", "content": "You know the weather."}, {"role": "user", "content": "Rain in Bergen?"},
                {"role": "assistant", "content": "No idea.", "weight": 0}, {"role": "user", "content": "Please look."},
                {"role": "assistant", "tool_calls": calls, "weight": 1},
            ],
            "parallel_tool_calls": False, "tools": [{"type": "function", "function": _WEATHER}],
        }
    ]  # fmt: skip
    return write_jsonl(folder / "openai.jsonl", rows * 4)


def _alpaca(folder: Path) -> Path:
    """LLaMA-Factory's Alpaca form: an array of objects with system and history."""
    rows = [
        {
            "instruction": "And in French?", "input": "", "output": "Bonjour.", "system": "You translate.",
            "history": [["Hello in German?", "Hallo."], ["In Spanish?", "Hola."]],
        }
    ]  # fmt: skip
    path = folder / "alpaca.json"
    path.write_text(json.dumps(rows * 4, indent=2), encoding="utf-8")
    return path


def _sharegpt(folder: Path) -> Path:
    """LLaMA-Factory's ShareGPT form: calls and observations as turns, tools as text."""
    rows = [
        {
            "conversations": [
                {"from": "human", "value": "Rain in Oslo?"},
                {"from": "function_call", "value": '{"name": "get_forecast", "arguments": {"town": "Oslo"}}'},
                {"from": "observation", "value": '{"rain": false}'}, {"from": "gpt", "value": "It stays dry."},
            ],
            "tools": json.dumps([_WEATHER]),
        }
    ]  # fmt: skip
    path = folder / "sharegpt.json"
    path.write_text(json.dumps(rows * 4), encoding="utf-8")
    return path


def _axolotl(folder: Path) -> Path:
    """axolotl's chat_template data: turns that say whether they are learned; compressed here."""
    turns = [
        {"from": "human", "value": "Two and two?", "train": False}, {"from": "gpt", "value": "Five.", "train": False},
        {"from": "human", "value": "Sure?", "train": False}, {"from": "gpt", "value": "Four.", "train": True},
    ]  # fmt: skip
    path = folder / "axolotl.jsonl.gz"
    path.write_bytes(gzip.compress((json.dumps({"conversations": turns}) + "\n").encode() * 4))
    return path


def _swift(folder: Path) -> Path:
    """ms-swift's query and response, with what was said before."""
    row = {"system": "You are brief.", "query": "And iron?", "response": "Fe.", "history": [["Gold?", "Au."]]}
    return write_jsonl(folder / "swift.jsonl", [row] * 4)


def _trl(folder: Path) -> Path:
    """TRL's conversational prompt and completion with tools, as Parquet with the columns of other rows."""
    import datasets

    call = {"type": "function", "function": {"name": "get_forecast", "arguments": {"town": "Oslo"}}}
    other = {"type": "function", "function": {"name": "add", "arguments": {"a": "1", "b": "2"}}}
    rows = [
        {
            "prompt": [{"role": "user", "content": "Rain in Oslo?"}],
            "completion": [{"role": "assistant", "content": "", "tool_calls": [one]}], "tools": [_WEATHER], "id": "7",
        }
        for one in (call, other) * 2
    ]  # fmt: skip
    datasets.Dataset.from_list(rows).to_parquet(folder / "trl.parquet")
    return folder / "trl.parquet"


FILES: dict[str, tuple[Callable[[Path], Path], dict[str, Any], list[str], list[str]]] = {
    # how it is written, settings, what is learned, fields that are said not to be used
    "openai": (_openai, {}, ['<call>get_forecast={"town": "Bergen"}<|im_end|>'], ["parallel_tool_calls"]),
    "alpaca": (_alpaca, {}, ["Hallo.<|im_end|>", "Hola.<|im_end|>", "Bonjour.<|im_end|>"], []),
    "sharegpt": (_sharegpt, {}, ['<call>get_forecast={"town": "Oslo"}<|im_end|>', "It stays dry.<|im_end|>"], []),
    "axolotl": (_axolotl, {}, ["Four.<|im_end|>"], []),
    "swift": (
        _swift, {"columns": {"prompt": "query", "completion": "response"}}, ["Au.<|im_end|>", "Fe.<|im_end|>"], [],
    ),
    "trl": (_trl, {}, ['<call>get_forecast={"town": "Oslo"}<|im_end|>'], ["id"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_tiny("llama", folder, vocab_size=VOCABULARY, max_position_embeddings=1024)
    make_tokenizer(_TEMPLATE).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", FILES)
@pytest.mark.long
def test_from_another_tools_file_to_an_adapter(
    name: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LEMA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")
    write, more, learned, unused = FILES[name]
    settings = {
        "model_name_or_path": str(model), "train_file": str(write(tmp_path)), "output_dir": str(tmp_path / "out"),
        "device": "cpu", "dtype": "float32", "lora_target_modules": "all-linear", "max_seq_length": 1024,
        "lora_rank": 2, "ram_budget": "2GB", "max_steps": 2, "batch_size": 2, **more,
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(
        "".join(f"{key}: {json.dumps(value)}\n" for key, value in settings.items()), encoding="utf-8"
    )
    checked = CliRunner().invoke(app, ["data", "check", str(tmp_path / "run.yaml")])
    assert checked.exit_code == 0, checked.output
    shown = checked.output.replace("↵", "")
    spans = [part.split("⟧")[0] for part in shown.split("⟦")[2:]]  # the first is the legend
    assert spans == learned and "4 rows" in shown
    assert ("fields that are not used" in shown) == bool(unused) and all(field in shown for field in unused)
    done = CliRunner().invoke(app, ["train", str(tmp_path / "run.yaml")])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "out" / "final" / "adapter_model.safetensors").stat().st_size > 0
