"""Code that a folder brings along is never run, nobody is asked on standard input, and it is named."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import lema
from data_helpers import CHATML, make_tokenizer
from families import save_tiny, tiny_config
from lema.errors import ConfigError, UnsupportedError
from lema.models import get_adapter
from lema.models.skeleton import build_skeleton
from lema.run.training import load_tokenizer
from lema.storage.strangers import code_in

ROOT = Path(__file__).parents[2]
_SAFE = {  # read settings or tensors, and have no way to run code
    "LemaConfig", "LemaModel", "LoraConfig", "PeftModel", "cls",
}  # fmt: skip
_LOADERS = {"from_pretrained", "from_config", "get_class_from_dynamic_module"}


def loading_calls(tree: ast.AST) -> list[tuple[int, str, set[str | None]]]:
    """Line, what is called, and the keywords of every call that transformers could run code in."""
    return [
        (node.lineno, ast.unparse(node.func), {word.arg for word in node.keywords if _false(word.value)})
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _LOADERS
    ]


def _false(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and value.value is False


def test_every_call_that_could_run_code_says_that_it_does_not() -> None:
    files = [path for room in ("src", "benchmarks", "examples") for path in sorted((ROOT / room).rglob("*.py"))]
    wrong, seen = [], 0
    for path in files:
        text = path.read_text(encoding="utf-8")
        assert "trust_remote_code=True" not in text, path
        for line, name, false in loading_calls(ast.parse(text)):
            seen += 1
            if name.split(".")[-2] not in _SAFE and "trust_remote_code" not in false:
                wrong.append(f"{path.relative_to(ROOT)}:{line}: {name}")
    assert not wrong, wrong
    assert seen > 10


def with_code(folder: Path, name: str, **more: Any) -> Path:
    """Let a configuration name code, which leaves a file where it is run."""
    path = folder / name
    values = json.loads(path.read_text()) if path.exists() else {}
    kinds = ("AutoTokenizer",) if name.startswith("tokenizer") else ("AutoConfig", "AutoModelForCausalLM")
    mapped: dict[str, Any] = dict.fromkeys(kinds, "own_code.Own")
    if name.startswith("tokenizer"):
        mapped = {"AutoTokenizer": ["own_code.Slow", "own_code.Fast"]}
    path.write_text(json.dumps({**values, "auto_map": mapped, **more}))
    (folder / "own_code.py").write_text("import os\nopen(os.environ['WAS_RUN'], 'w').close()\nclass Own: pass\n")
    return folder


def test_code_beside_a_model_and_its_tokenizer_is_named_and_not_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WAS_RUN", str(tmp_path / "ran"))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on standard input"))
    folder = tmp_path / "model"
    save_tiny("llama", folder)
    make_tokenizer(CHATML).save_pretrained(folder)
    for name in ("config.json", "tokenizer_config.json"):
        with_code(folder, name)
    assert code_in(folder) == [
        "config.json: AutoConfig from own_code.py", "config.json: AutoModelForCausalLM from own_code.py",
        "tokenizer_config.json: AutoTokenizer from own_code.py",
    ]  # fmt: skip
    assert load_tokenizer(folder).chat_template == CHATML
    with lema.LemaModel(lema.LemaConfig(str(folder), device="cpu")):
        pass
    assert "own_code.py" in caplog.text and "not run" in caplog.text
    assert not (tmp_path / "ran").exists()


def test_a_tokenizer_that_is_nothing_but_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WAS_RUN", str(tmp_path / "ran"))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "tokenizer_config.json").write_text('{"tokenizer_class": "OwnTokenizer"}')
    folder = with_code(tmp_path / "model", "tokenizer_config.json")
    (folder / "config.json").write_text('{"model_type": "own"}')
    with_code(folder, "config.json")
    with pytest.raises(ConfigError, match=r"own_code\.py.*does not run"):
        load_tokenizer(folder)
    with pytest.raises(UnsupportedError, match=r"own_code\.py.*does not run"):
        get_adapter("own", json.loads((folder / "config.json").read_text()))
    assert not (tmp_path / "ran").exists()


def test_a_kernel_that_a_configuration_names_is_not_fetched(caplog: pytest.LogCaptureFixture) -> None:
    config = tiny_config("llama")
    config._attn_implementation = "someone/attention:forward"
    model = build_skeleton(config, torch.float32, None)
    assert "someone" not in str(model.config._attn_implementation) and "someone/attention" in caplog.text


@pytest.mark.long
def test_a_yes_on_standard_input_runs_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    make_tokenizer(CHATML).save_pretrained(folder)
    with_code(folder, "tokenizer_config.json", tokenizer_class="OwnTokenizer")
    (tmp_path / "rows.jsonl").write_text('{"text": "one"}\n')
    verb = [sys.executable, "-m", "lema", "data", "check", str(tmp_path / "rows.jsonl"), "--model", str(folder)]
    done = subprocess.run(
        verb, input="y\n" * 50, capture_output=True, text=True, timeout=240,
        env={**os.environ, "WAS_RUN": str(tmp_path / "ran")},
    )  # fmt: skip
    assert not (tmp_path / "ran").exists() and "[y/N]" not in done.stdout + done.stderr
    assert "own_code.py" in done.stderr


def test_pipes_and_devices_in_a_models_folder_are_not_read(tmp_path: Path) -> None:
    make_tokenizer(CHATML).save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    os.mkfifo(tmp_path / "chat_template.jinja")
    with pytest.raises(ConfigError, match=r"chat_template\.jinja is no regular file"):
        load_tokenizer(tmp_path)
