"""Bad rows, files, tokenizers, models and checkpoints, and what the command line says of each: the table in docs.

`python tests/support/hostile.py` writes docs/errors.md anew; tests/cli/test_hostile.py checks that it says the truth.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from data_helpers import CHATML, VOCABULARY, make_tokenizer, write_jsonl
from families import save_tiny

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "errors.md"
GOOD = {"messages": [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hello."}]}
HEAD = """# What goes wrong, and what one sees

Every message below was printed by the command beside it, with paths shortened; the status was 1 unless said otherwise.
`python tests/support/hostile.py` writes this page, and a test compares it with what the commands say now.
"""


@dataclass(frozen=True)
class Case:
    """One thing that is wrong."""

    group: str
    what: str
    words: list[str]
    """The command line, without `lema`."""
    status: int = 1


class Workshop:
    """A good model, data file and configuration, and bad ones made of them.

    Args:
        folder: an empty one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = folder / "model"
        save_tiny("llama", self.model, vocab_size=VOCABULARY)
        make_tokenizer(CHATML).save_pretrained(self.model)
        self.data = write_jsonl(folder / "good.jsonl", [GOOD] * 8)

    def rows(self, name: str, *rows: Any) -> Path:
        """A data file; texts and bytes are lines as they are."""
        path = self.folder / f"{name}.jsonl"
        lines = [
            r if isinstance(r, bytes) else r.encode() if isinstance(r, str) else json.dumps(r).encode() for r in rows
        ]
        path.write_bytes(b"".join(line + b"\n" for line in lines))
        return path

    def yaml(self, name: str, text: str = "", **changes: Any) -> Path:
        """A configuration; values of None are left out, `text` comes after."""
        values: dict[str, Any] = {
            "model_name_or_path": str(self.model), "train_file": str(self.data),
            "output_dir": str(self.folder / f"out-{name}"),
            "device": "cpu", "dtype": "float32", "lora_target_modules": "all-linear", "max_seq_length": 64,
            "lora_rank": 4, "ram_budget": "2GB", "max_steps": 2,
        }  # fmt: skip
        path = self.folder / f"{name}.yaml"
        lines = [f"{key}: {json.dumps(value)}" for key, value in {**values, **changes}.items() if value is not None]
        path.write_text("\n".join([*lines, text]) + "\n", encoding="utf-8")
        return path

    def copy_of_model(self, name: str) -> Path:
        """A model to spoil."""
        return Path(shutil.copytree(self.model, self.folder / name))

    def checkpoint(self, name: str) -> tuple[Path, Path]:
        """A run of two steps that may be spoilt: its configuration and `checkpoint-1`."""
        config = self.yaml(name, save_steps=1)
        done = run(["train", str(config)])
        assert done[0] == 0, done[1]
        folder = self.folder / f"out-{name}"
        shutil.rmtree(folder / "final")
        shutil.rmtree(folder / "checkpoint-2")
        return config, folder / "checkpoint-1"


def run(words: list[str]) -> tuple[int, str]:
    """Exit status and everything printed."""
    from lema.cli.app import app

    result = CliRunner().invoke(app, words)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def cases(shop: Workshop) -> Iterator[Case]:
    """Everything that is wrong, one after the other."""
    yield from _rows(shop)
    yield from _forms(shop)
    yield from _yaml(shop)
    yield from _settings(shop)
    yield from _models(shop)
    yield from _given_as_models(shop)
    yield from _checkpoints(shop)


def _rows(shop: Workshop) -> Iterator[Case]:
    def case(what: str, name: str, *rows: Any, form: str | None = None) -> Case:
        path = shop.rows(name, *rows)
        more = [] if form is None else ["--format", form]
        return Case("Data", what, ["data", "check", str(path), "--model", str(shop.model), *more])

    say = {"role": "assistant", "content": "Hello."}
    ask = {"role": "user", "content": "Hello?"}
    yield case("a line that is not JSON", "not-json", GOOD, "{'role': 1}")
    yield case("a line that is not an object", "list", GOOD, [1, 2])
    yield case("a line that is not UTF-8", "latin1", GOOD, b'{"messages": "caf\xe9"}')
    yield case("no rows", "empty")
    yield case("fields that are of no known form", "unknown", {"foo": 1, "bar": 2})
    yield case("a row without its field", "missing-field", GOOD, {"text": "x"})
    yield case("messages that are no list", "no-list", GOOD, {"messages": "hello"})
    yield case("no messages", "no-messages", GOOD, {"messages": []})
    yield case("an unknown role", "role", GOOD, {"messages": [{"role": "robot", "content": "x"}, say]})
    yield case("content that is no text", "content", GOOD, {"messages": [{"role": "user", "content": 3}, say]})
    yield case("nobody answers", "no-answer", GOOD, {"messages": [ask]})
    yield case("the assistant begins", "begins", GOOD, {"messages": [say, ask, say]})
    yield case(
        "a completion that is no text",
        "completion",
        {"prompt": "a", "completion": "b"},
        {"prompt": "a", "completion": None},
    )
    yield case("a file in another form than was said", "other-form", GOOD, form="text")
    yield Case("Data", "no such file", ["data", "check", str(shop.folder / "none.jsonl"), "--model", str(shop.model)])
    long = {"messages": [{"role": "user", "content": "Hello? " * 200}, say]}
    config = shop.yaml("long", train_file=str(shop.rows("long", *[long] * 3)), too_long="error")
    yield Case("Data", "a row that is too long, where that is to be an error", ["train", str(config), "--dry-run"])
    config = shop.yaml("dropped", train_file=str(shop.rows("dropped", *[long] * 3, GOOD)), too_long="drop")
    yield Case("Data", "most rows are too long and dropped", ["data", "check", str(config)])


def _forms(shop: Workshop) -> Iterator[Case]:
    """Rows in other tools' forms, and sources of other kinds."""

    def check(what: str, path: Path | str, *more: str) -> Case:
        return Case("Data", what, ["data", "check", str(path), "--model", str(shop.model), *more])

    def case(what: str, name: str, *rows: Any) -> Case:
        return check(what, shop.rows(name, *rows))

    ask, say = GOOD["messages"]
    table = shop.folder / "comma.csv"
    table.write_text("prompt,completion\nHello, you?,Hello.\n", encoding="utf-8")
    yield check("a row of a table with a field too many", table)
    table = shop.folder / "semicolon.csv"
    table.write_text("prompt;completion\nHello?;Hello.\n", encoding="utf-8")
    yield check("a table with another separator", table)
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{a: 1}"}}]}
    yield case("arguments of a call that are text and no JSON", "arguments", {"messages": [ask, call]})
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    yield case("calls of tools, and a template that writes none", "calls", {"messages": [ask, call]})
    image = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a.png"}}]}
    yield case("an image among the parts of a content", "image", {"messages": [image, say]})
    yield case("answers with a verdict, as KTO takes them", "kto", {"prompt": "a", "completion": "b", "label": False})
    yield case("pairs of answers, as DPO takes them", "dpo", {"prompt": "a", "chosen": "b", "rejected": "c"})
    yield case("a turn that is to be learned half", "half", {"messages": [ask, {**say, "weight": 0.5}]})
    yield case("half a surrogate pair", "surrogate", {"messages": [ask, say], "id": "\ud83d"})
    yield check("a pattern that fits no file", shop.folder / "none-*.jsonl")
    packed = shop.folder / "rows.jsonl.gz"
    packed.write_bytes(b"no gzip at all")
    yield check("a compressed file that is damaged", packed)
    os.mkfifo(shop.folder / "pipe.jsonl")
    yield check("a named pipe", shop.folder / "pipe.jsonl")
    columns = 'columns={"prompt": "question"}'
    other = shop.rows("columns", {"query": "a", "completion": "b"})
    yield check("a field that columns names and no row has", other, "--set", columns)
    bad = shop.rows("skipped", GOOD, "{oops", "[]")
    yield check("more bad rows than may be skipped", bad, "--set", "on_bad_row=skip")


def _yaml(shop: Workshop) -> Iterator[Case]:
    def case(what: str, name: str, text: str = "", **changes: Any) -> Case:
        return Case("Configuration", what, ["train", str(shop.yaml(name, text, **changes)), "--dry-run"])

    yield case("a key that is misspelt", "misspelt", "learning_rte: 0.1")
    yield case("a key twice", "twice", "max_steps: 3")
    yield case("two names of one setting", "alias", "cutoff_len: 12")
    yield case("a number that is none", "number", learning_rate="fast")
    yield case("a value that is not possible", "value", lora_rank=0)
    yield case("a word that is not among the choices", "choice", lr_scheduler_type="cosin")
    yield case("not YAML", "broken", "a: [1, 2")
    yield case("no model", "no-model", model_name_or_path=None)
    yield case("no data", "no-data", train_file=None)
    yield case("a budget nothing fits into", "budget", ram_budget="20MB")
    yield Case("Configuration", "no such file", ["train", str(shop.folder / "none.yaml")])
    yield Case("Configuration", "an option that is not there", ["train", "run.yaml", "--resme", "auto"], 2)
    misspelt = ["train", str(shop.yaml("run")), "--set", "learning_rat=1"]
    yield Case("Configuration", "a setting that is not there, on the command line", misspelt, 2)
    yield case("evaluations, and nothing to evaluate on", "no-eval", eval_strategy="epoch")


def _settings(shop: Workshop) -> Iterator[Case]:
    def case(what: str, name: str, text: str = "", verb: str = "train", **changes: Any) -> Case:
        words = {"train": ["train", "--dry-run"], "check": ["data", "check"]}[verb]
        return Case("Settings", what, [*words, str(shop.yaml(name, text, **changes))])

    yield case("a variable that is not set", "variable", output_dir="$NOWHERE_AT_ALL/out")
    yield case("the home of nobody", "nobody", output_dir="~nobody-of-this-name/out")
    yield case("lists in lists in lists", "deep", "a: " + "[" * 3000)
    yield case("a number that is too large", "large", seed=2**70)
    yield case("a number of thousands of digits", "long", f"max_grad_norm: 0x{'f' * 4300}")
    yield case("a word that YAML takes for true", "yes", "eval_strategy: yes")
    yield case("a pattern that is none", "pattern", lora_target_modules=".*(q_proj")
    yield case("a pattern that matches nothing", "matches", lora_target_modules=".*nothing")
    yield case("a name that another tool uses", "other-tool", "sequence_len: 64")
    yield case("rows longer than the model takes", "positions", verb="check", max_seq_length=4096)
    yield case("the same before training", "positions-dry", max_seq_length=4096)
    yield case("an adapter to train further that is not there", "further", adapter_name_or_path="./nowhere")
    yield Case("Settings", "a device in place of a file", ["train", "/dev/zero"])


def _models(shop: Workshop) -> Iterator[Case]:
    def case(what: str, name: str, spoil: Callable[[Path], Any]) -> Case:
        model = shop.copy_of_model(name)
        spoil(model)
        return Case(
            "Model and tokenizer", what, ["train", str(shop.yaml(f"run-{name}", model_name_or_path=str(model)))]
        )

    def config(**changes: Any) -> Callable[[Path], Any]:
        def spoil(model: Path) -> None:
            path = model / "config.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

        return spoil

    def weights(change: Callable[[bytes], bytes]) -> Callable[[Path], Any]:
        return lambda model: (model / "model.safetensors").write_bytes(
            change((model / "model.safetensors").read_bytes())
        )

    yield Case(
        "Model and tokenizer",
        "no such model",
        ["train", str(shop.yaml("nowhere", model_name_or_path=str(shop.folder / "nowhere")))],
    )
    yield case("no config.json", "no-config", lambda m: (m / "config.json").unlink())
    yield case("no weights", "no-weights", lambda m: (m / "model.safetensors").unlink())
    yield case("weights that were cut off", "cut", weights(lambda b: b[:-1000]))
    yield case("a header that lies about its length", "header", weights(lambda b: struct.pack("<Q", 1 << 40) + b[8:]))
    yield case("a tensor that is missing", "missing", config(num_hidden_layers=5))
    yield case("a tensor of another shape", "shape", config(intermediate_size=64))
    yield case("quantised weights", "quantised", config(quantization_config={"quant_method": "gptq", "bits": 4}))
    yield case("no tokenizer", "no-tokenizer", lambda m: [p.unlink() for p in m.glob("tokenizer*")])
    yield case(
        "messages, and a tokenizer without chat template",
        "no-template",
        lambda m: [p.unlink() for p in m.glob("*.jinja")],
    )
    yield case(
        "a chat template that is not Jinja",
        "bad-template",
        lambda m: (m / "chat_template.jinja").write_text("{% for %}"),
    )
    yield from _strangers(case)


def _strangers(case: Callable[..., Case]) -> Iterator[Case]:
    """Templates and code that come with a model."""

    def template(text: str) -> Callable[[Path], Any]:
        return lambda m: (m / "chat_template.jinja").write_text(text)

    def code(file: str, **more: Any) -> Callable[[Path], Any]:
        def spoil(folder: Path) -> None:
            values = {**json.loads((folder / file).read_text()), **more}
            (folder / file).write_text(json.dumps(values))

        return spoil

    def pipe(folder: Path) -> None:
        (folder / "chat_template.jinja").unlink()
        os.mkfifo(folder / "chat_template.jinja")

    yield case("a chat template that asks for gigabytes", "huge-template", template("{{ 'x' * 1000000000000 }}"))
    yield case("one that calls itself", "endless-template", template("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"))
    yield case("one that is a pipe", "pipe-template", pipe)
    own = {"AutoTokenizer": ["own_code.Slow", "own_code.Fast"]}
    yield case(
        "a tokenizer that is code of its own", "own-tokenizer",
        code("tokenizer_config.json", tokenizer_class="OwnTokenizer", auto_map=own),
    )  # fmt: skip
    yield case(
        "a model that is code of its own", "own-model",
        code("config.json", model_type="own", auto_map={"AutoConfig": "own_code.OwnConfig"}),
    )  # fmt: skip


def _given_as_models(shop: Workshop) -> Iterator[Case]:
    """Folders and weights that are something else than a model to train over."""

    def case(what: str, name: str, make: Callable[[Path], Any]) -> Case:
        folder = shop.folder / name
        folder.mkdir()
        make(folder)
        return Case("Model and tokenizer", what, ["plan", str(folder)])

    def adapter(folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(shop.model)}))

    def run_folder(folder: Path) -> None:
        adapter(folder / "final")
        (folder / "run.yaml").write_text("{}")

    def model(folder: Path, **changes: Any) -> None:
        shutil.copytree(shop.model, folder, dirs_exist_ok=True)
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    def both(folder: Path) -> None:
        model(folder)
        adapter(folder)

    def packed(folder: Path) -> None:
        model(folder)
        tensors = load_file(folder / "model.safetensors")
        for name in [name for name in tensors if name.endswith("_proj.weight")]:
            stem, weight = name.removesuffix("weight"), tensors.pop(name)
            tensors[f"{stem}qweight"] = torch.zeros(weight.shape[1] // 8, weight.shape[0], dtype=torch.int32)
            tensors[f"{stem}scales"] = torch.ones(1, weight.shape[0])
        save_file(tensors, folder / "model.safetensors")

    def pickled(folder: Path) -> None:
        model(folder)
        (folder / "model.safetensors").rename(folder / "consolidated.safetensors")
        (folder / "pytorch_model.bin").write_bytes(b"PK")

    yield case("an adapter's folder given as the model", "an-adapter", adapter)
    yield case("a run's folder given as the model", "a-run", run_folder)
    yield case("a model and an adapter in one folder", "both", both)
    yield case("GPTQ weights, and no word of it in config.json", "packed", packed)
    yield case("weights by MLX", "mlx", lambda f: model(f, quantization={"group_size": 64, "bits": 4}))
    yield case("a file that transformers passes over for a pickle", "pickled", pickled)


def _checkpoints(shop: Workshop) -> Iterator[Case]:
    def case(what: str, name: str, spoil: Callable[[Path], Any], resume: str | None = None, **changes: Any) -> Case:
        config, folder = shop.checkpoint(name)
        spoil(folder)
        if changes:
            config = shop.yaml(name, save_steps=1, **changes)
        return Case("Checkpoints", what, ["train", str(config), "--resume", resume or str(folder)])

    def cut(path: Path) -> None:
        path.write_bytes(path.read_bytes()[:-20])

    config, _ = shop.checkpoint("again")
    yield Case("Checkpoints", "a run that was there before", ["train", str(config)])
    yield case("its marker is missing: it was never whole", "marker", lambda f: (f / "COMPLETE").unlink())
    yield case("tensors that were cut off", "cut-state", lambda f: cut(f / "optimizer.safetensors"))
    yield case("a state that is not JSON", "state", lambda f: (f / "trainer_state.json").write_text("{"))
    other = shop.copy_of_model("other-base")
    save_tiny("llama", other, seed=5, vocab_size=VOCABULARY)
    yield case("other base weights", "other-weights", lambda f: None, model_name_or_path=str(other))
    rows = shop.rows("other-data", *[GOOD] * 9)
    yield case("other data", "changed-data", lambda f: None, train_file=str(rows))
    yield case("another learning rate", "changed-rate", lambda f: None, learning_rate=0.5)
    yield case("another rank", "changed-rank", lambda f: None, lora_rank=8)
    yield Case("Checkpoints", "chat with a folder that holds nothing", ["chat", str(shop.folder / "out-nothing")])


def table(folder: Path) -> str:
    """The page, from running every case."""
    shop = Workshop(folder)
    parts, group = [HEAD], ""
    for case in cases(shop):
        status, output = run(case.words)
        assert status == case.status, f"{case.what}: status {status}, not {case.status}\n{output}"
        if case.group != group:
            group = case.group
            parts.append(f"\n## {group}\n\n| what is wrong | command | what one sees |\n|---|---|---|")
        words = " ".join(["lema", *case.words]).replace(f"{folder}/", "")
        said = f"status {status}: " if status != 1 else ""
        parts.append(f"| {case.what} | `{words}` | {said}{_essence(output, folder)} |")
    return "\n".join(parts) + "\n"


def _essence(output: str, folder: Path) -> str:
    """The message in what was printed: an error, the bad rows, what is in a box, or else the last line."""
    lines = [line for line in output.replace(f"{folder}/", "").splitlines() if line.strip()]
    starts = [i for i, line in enumerate(lines) if line.startswith("error:") or re.match(r"bad +\S+, line", line)]
    boxed = [line.strip("│ ") for line in lines if line.startswith("│")]
    chosen = lines[starts[0] :] if starts else boxed or lines[-1:]
    text = re.sub(r"saved with \d+", "saved with N", " ".join(" ".join(chosen).split()))  # paths are in that file
    return text.removeprefix("error: ").removeprefix("bad ").replace("|", "\\|")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        DOCUMENT.write_text(table(Path(name)), encoding="utf-8")
