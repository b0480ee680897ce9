"""Every causal and image-text family of the installed transformers: LEMA beside plain PEFT, on a tiny model of each.

A family is equal, refused, wrong, or a crash. Each runs in a process of its own, forked from one that has imported
everything, so that one that dies or hangs is a line like the others.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import textwrap
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from .processes import ROOT

MODULE = "benchmarks.families"
PAGE = ROOT / "docs" / "families.md"
RESULTS = {
    "equal": "loss and adapter after the steps are plain PEFT's, to the last bit",
    "refused": "LEMA says by name why it does not train it",
    "wrong": "trained, and something differs",
    "crash": "an error that is not LEMA's own, or a dead process",
    "not trained": "plain transformers and PEFT do not train the tiny model on rows of text either",
}
_SCANS = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h", "nemotron_h_omni")
EXCLUDED = {
    "deepseek_v4": ["o_a_proj"],
    **{family: ["router"] for family in ("llama4", "llama4_text", "phimoe")},
    **{family: ["out_proj"] for family in _SCANS},
    **{family: ["pooler"] for family in ("big_bird",)},
}
"""Modules that PEFT itself fails on, and those that no text reaches."""
RANK, ALPHA, STEPS, ROWS, LENGTH, SEED = 4, 8, 3, 4, 12, 7


@dataclass(frozen=True)
class Outcome:
    """What became of one family."""

    family: str
    result: str
    """A key of `RESULTS`."""
    reason: str
    """One line: why, or how far it was looked at."""
    model: str = ""
    """The class."""
    layers: str = ""
    """Kinds of layers of the tiny model, and how many of each."""
    seconds: float = 0.0


# -- one family ------------------------------------------------------------------------------------


class PlainFailsError(Exception):
    """transformers and PEFT alone do not get through."""


def examine(family: str, folder: Path) -> Outcome:
    """Make the family's tiny model and train it both ways."""
    from lema.errors import LemaError, UnsupportedError

    kind, layers = "", ""
    try:
        plain = Plain(family, folder)
        kind, layers = type(plain.base).__name__, plain.kinds()
        try:
            reason = compare(plain, folder)
        except UnsupportedError as error:
            if "save_original_format" not in str(error):
                raise
            layers += "; saved with save_original_format=False"
            plain.save_as_loaded()
            reason = compare(plain, folder)
        return Outcome(family, "wrong" if reason else "equal", reason, kind, layers)
    except PlainFailsError as error:
        return Outcome(family, "not trained", str(error), kind, layers)
    except LemaError as error:
        return Outcome(family, "refused", _line(error, folder), kind, layers)
    except Exception as error:  # whatever it is, it is the finding
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(last.filename).name}:{last.lineno}"
        return Outcome(family, "crash", f"{type(error).__name__}: {_line(error, folder)} ({where})", kind, layers)


class Plain:
    """The family's tiny model under plain transformers and PEFT."""

    def __init__(self, family: str, folder: Path) -> None:
        import torch

        from .tiny_families import save_tiny

        self.family, self.folder = family, folder
        try:
            made = save_tiny(family, folder)
            original = made.state_dict()
            self.base = self._loaded()
            again = self.base.state_dict()
            other = [name for name, value in original.items() if not torch.equal(value, again[name])]
            if other:
                raise ValueError(f"what it saves is not what it loads: {other[0]} and {len(other) - 1} more")
            self.base.train()
            self.base(**self.batch(0), use_cache=False).loss.backward()
        except Exception as error:
            raise PlainFailsError(f"{type(error).__name__}: {_line(error, folder)}") from error

    def save_as_loaded(self) -> None:
        """Write the model again, in the order of bytes that transformers computes with."""
        for file in self.folder.glob("*.safetensors*"):
            file.unlink()
        self.base.save_pretrained(self.folder, save_original_format=False)
        self.base = self._loaded()

    def _loaded(self) -> Any:
        import torch

        from .tiny_families import auto_class

        auto = auto_class(self.family)
        return auto.from_pretrained(
            self.folder, dtype=torch.float32, attn_implementation="eager", trust_remote_code=False
        )

    def batch(self, step: int) -> dict[str, Any]:
        """Rows of text: one padded at the right, one at the left."""
        import torch

        from .tiny_families import PLAIN_TOKENS

        random = torch.Generator().manual_seed(100 + step)
        ids = torch.randint(*PLAIN_TOKENS, (ROWS, LENGTH), generator=random)
        mask = torch.ones_like(ids)
        mask[0, LENGTH - 3 :] = 0
        mask[1, :3] = 0
        labels = ids.masked_fill(mask == 0, -100)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def adapted(self, saved: Path) -> Any:
        """PEFT's model with an adapter of the same settings as a saved one."""
        import torch
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(SEED)
        config = LoraConfig.from_pretrained(str(saved))
        config.inference_mode = False
        return get_peft_model(self.base, config).train()

    def kinds(self) -> str:
        """Classes of the checkpointable layers, and how many of each."""
        from collections import Counter

        from transformers.modeling_layers import GradientCheckpointingLayer

        found = Counter(type(m).__name__ for m in self.base.modules() if isinstance(m, GradientCheckpointingLayer))
        return ", ".join(f"{count} {name}" for name, count in found.items())


def compare(plain: Plain, folder: Path) -> str:
    """What differs between LEMA and plain PEFT after a few steps; empty: nothing."""
    import torch

    import lema

    model = lema.LemaModel(
        lema.LemaConfig(
            str(folder), device="cpu", dtype="float32", lora_target_modules="all-linear", lora_rank=RANK,
            lora_alpha=ALPHA, exclude_modules=EXCLUDED.get(plain.family), seed=SEED, attn_implementation="eager",
            save_steps=0, loss_chunk_size=None,
        )
    )  # fmt: skip
    model.initialize_lora()
    ours = _adapter(model.hf_model)
    model.save_pretrained(folder / "adapter")
    whole = plain.adapted(folder / "adapter")
    theirs = _adapter(whole)
    if ours.keys() != theirs.keys():
        odd = sorted(ours.keys() ^ theirs.keys())
        return f"names of the adapter differ: {odd[0]} and {len(odd) - 1} more"
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in theirs.items():
            parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.1)
            ours[name].copy_(parameter)
    optimizer = torch.optim.AdamW(list(theirs.values()), lr=1e-2)
    trainer = model.get_trainer(torch.optim.AdamW(model.get_trainable_parameters(), lr=1e-2))
    for step in range(STEPS):
        batch = plain.batch(step)
        torch.manual_seed(step)
        expected = whole(**batch, use_cache=False).loss
        expected.backward()
        optimizer.step()
        optimizer.zero_grad()
        torch.manual_seed(step)
        _, loss = trainer.train_step({name: batch[name] for name in ("input_ids", "attention_mask", "labels")})
        if loss is None or not abs(loss - expected.item()) <= 1e-6 * abs(expected.item()):
            return f"step {step + 1}: loss {loss}, plain PEFT's {expected.item()}"
        differ = [name for name, p in theirs.items() if not torch.equal(p, ours[name])]
        if differ:
            worst = max(float((theirs[n] - ours[n]).detach().norm() / theirs[n].detach().norm()) for n in differ)
            return (
                f"step {step + 1}: {len(differ)} of {len(theirs)} tensors of the adapter differ, by {worst:.1e} at most"
                f", first {differ[0]}"
            )
    return ""


def _adapter(model: Any) -> dict[str, Any]:
    return {name: p for name, p in model.named_parameters() if "lora_" in name}


def _line(error: BaseException, folder: Path) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:2])
    return text.replace(str(folder), "MODEL").replace("|", "/")[:300]


# -- all families ----------------------------------------------------------------------------------


def sweep(names: Sequence[str], seconds: int) -> Iterator[Outcome]:
    """One family after the other, each in a forked child that has so many seconds."""
    for name in names:
        with tempfile.TemporaryDirectory(prefix="lema-family-") as folder:
            yield _in_child(name, Path(folder), seconds)


def _in_child(family: str, folder: Path, seconds: int) -> Outcome:
    started = time.monotonic()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _child(family, folder, seconds, writing)
    os.close(writing)
    with open(reading, "rb") as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    spent = round(time.monotonic() - started, 1)
    if text:
        return Outcome(**{**json.loads(text), "seconds": spent})
    code = os.waitstatus_to_exitcode(status)
    why = f"no end after {seconds} s" if code == -signal.SIGALRM else f"its process ended with status {code}"
    return Outcome(family, "crash", why, seconds=spent)


def _child(family: str, folder: Path, seconds: int, writing: int) -> NoReturn:
    """Never returns; the parent's exit handlers must not run here."""
    code = 1
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(seconds)
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        warnings.simplefilter("ignore")
        with open(writing, "wb") as pipe:
            pipe.write(json.dumps(asdict(examine(family, folder))).encode())
        code = 0
    finally:
        os._exit(code)


def page(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """The page for people."""
    import peft
    import torch
    import transformers

    counts = {result: sum(o.result == result for o in outcomes) for result in RESULTS}
    yield "# Model families"
    yield ""
    versions = f"transformers {transformers.__version__} (torch {torch.__version__}, PEFT {peft.__version__})"
    text = (
        f"Every causal and image-text family of {versions}, made anew by `python -m {MODULE}`. Each is a tiny random "
        "model in float32 with every kind of layer that the family mixes, of an image-text family the whole model, "
        f"saved and loaded as on the hub. It is trained for {STEPS} steps of AdamW on padded rows of text by LEMA, "
        "streamed, and by plain transformers and PEFT, from the same random adapter on the same modules: all linear "
        "ones of the text model."
    )
    yield from textwrap.wrap(text, 118, break_long_words=False, break_on_hyphens=False)
    yield ""
    for result, meaning in RESULTS.items():
        yield f"- **{result}**, {counts[result]}: {meaning}"
    equal = [o for o in outcomes if o.result == "equal"]
    yield from ("", "## Equal", "", "| family | class | its layers |", "|---|---|---|")
    yield from (f"| {o.family} | {o.model} | {o.layers} |" for o in equal)
    for result in ("wrong", "crash", "refused", "not trained"):
        found = [o for o in outcomes if o.result == result]
        if found:
            yield from ("", f"## {result.capitalize()}", "", "| family | class | why |", "|---|---|---|")
            yield from (f"| {o.family} | {o.model} | {o.reason} |" for o in found)


def _of_before(file: Path) -> list[Outcome]:
    return [Outcome(**json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()]


def main(arguments: Sequence[str] | None = None) -> int:
    """Sweep, print a line a family, and write the page if all families were looked at."""
    made = argparse.ArgumentParser(prog=f"python -m {MODULE}", description="LEMA beside PEFT on every family")
    made.add_argument("families", nargs="*", help="model types (default: all, and the page is written)")
    made.add_argument("--seconds", type=int, default=120, help="a family may take (default: %(default)s)")
    made.add_argument("--out", type=Path, default=PAGE, help="the page (default: docs/families.md)")
    made.add_argument("--json", type=Path, help="also a line of JSON a family, into this file")
    made.add_argument("--go-on", action="store_true", help="take what that file has of a run that was stopped")
    options = made.parse_args(arguments)
    if not hasattr(os, "fork"):
        made.error("this system has no fork()")
    import peft  # noqa: F401  (children inherit what is imported here)
    import torch
    import transformers

    import lema.model

    from .tiny_families import families

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    assert lema.model
    known = families()
    if unknown := sorted(set(options.families) - set(known)):
        made.error(f"not a causal or image-text family of transformers {transformers.__version__}: {unknown}")
    outcomes = _of_before(options.json) if options.go_on and options.json and options.json.exists() else []
    todo = [name for name in options.families or known if name not in {outcome.family for outcome in outcomes}]
    for outcome in sweep(todo, options.seconds):
        print(f"{outcome.family:28} {outcome.result:12} {outcome.seconds:5.1f} s  {outcome.reason}", flush=True)
        outcomes.append(outcome)
        if options.json:
            with open(options.json, "a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(outcome)) + "\n")
    print(", ".join(f"{sum(o.result == result for o in outcomes)} {result}" for result in RESULTS))
    if not options.families:
        outcomes.sort(key=lambda outcome: outcome.family)
        options.out.write_text("\n".join(page(outcomes)) + "\n", encoding="utf-8")
    return int(any(o.result in ("wrong", "crash") for o in outcomes))


if __name__ == "__main__":
    sys.exit(main())
