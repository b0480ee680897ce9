"""One part of the [LEMA_REPLY] proof in its own process; prints what it found as one line of JSON.

It knows how a model is trained, asked and merged, by LEMA and by plain transformers with PEFT; it does not know what
is claimed of the results.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

KINDS = ("train-lema", "train-peft", "ask-lema", "ask-peft", "merge")
TRAIN, HELD_OUT = "training_data.jsonl", "held_out.jsonl"
RAM_BUDGET = "600MB"
"""Too small for the model's layers, so that they stream."""


def settings(options: argparse.Namespace) -> dict[str, str]:
    """What both trainings say otherwise than the recipe."""
    return {
        "model_name_or_path": str(options.folder), "train_file": str(options.work / TRAIN),
        "eval_file": str(options.work / HELD_OUT), "output_dir": str(options.work / "lema"), "device": "cpu",
        "eval_strategy": "no", "sample_prompts": "[]", "logging_steps": "1", "ram_budget": RAM_BUDGET,
        **({"max_steps": str(options.steps)} if options.steps else {}),
    }  # fmt: skip


def lema(*words: str) -> None:
    """Run a verb; its output goes to stderr, its failure is ours."""
    status = subprocess.run([sys.executable, "-m", "lema", *words], stdout=sys.stderr, check=False).returncode
    if status:
        raise SystemExit(status)


def train_lema(options: argparse.Namespace) -> dict[str, Any]:
    """`lema train` with layers streamed from disk."""
    pairs = [part for name, value in settings(options).items() for part in ("--set", f"{name}={value}")]
    lema("train", str(options.recipe), *pairs, "--plain", "--resume", "auto")
    lines = [json.loads(line) for line in (options.work / "lema" / "metrics.jsonl").read_text("utf-8").splitlines()]
    steps = [line for line in lines if line["type"] == "train"]
    return {
        "losses": [step["loss"] for step in steps],
        "bytes_read": sum(step["bytes_read"] for step in steps),
        "peak_bytes": max(step["peak_bytes"] for step in steps),
        "step_seconds": sum(step["step_seconds"] for step in steps),
        "tokens": sum(step["tokens"] for step in steps),
    }


def train_peft(options: argparse.Namespace) -> dict[str, Any]:
    """Plain transformers and PEFT, the model whole in memory: the same rows, order and settings."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, get_scheduler

    from lema.data import load_data
    from lema.training.run_config import RunConfig

    run = RunConfig.from_yaml(options.recipe, settings(options))
    tokenizer = AutoTokenizer.from_pretrained(options.folder, trust_remote_code=False)
    stream = load_data(
        run.data, tokenizer, max_seq_length=run.lema.max_seq_length, rows_per_step=run.rows_per_step, seed=run.lema.seed
    ).train
    base = AutoModelForCausalLM.from_pretrained(options.folder, dtype=run.lema.dtype, trust_remote_code=False)
    torch.manual_seed(run.lema.seed)
    model = get_peft_model(
        base,
        LoraConfig(
            r=run.lema.lora_rank, lora_alpha=run.lema.lora_alpha, lora_dropout=run.lema.lora_dropout,
            target_modules=run.lema.lora_target_modules, task_type="CAUSAL_LM",
        ),
    )  # fmt: skip
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    wanted = run.training
    optimizer = torch.optim.AdamW(
        trained, lr=run.lema.learning_rate, betas=(wanted.adam_beta1, wanted.adam_beta2), eps=wanted.adam_epsilon,
        weight_decay=wanted.weight_decay,
    )  # fmt: skip
    steps = wanted.max_steps if wanted.max_steps > 0 else round(wanted.num_train_epochs * stream.steps_per_epoch)
    warmup = wanted.warmup_steps if wanted.warmup_steps >= 1 else -(-steps * wanted.warmup_steps // 1)
    scheduler = get_scheduler(wanted.lr_scheduler_type, optimizer, int(warmup), steps)
    losses, started = [], time.perf_counter()
    for number in range(steps):
        loss = model(**next(stream).inputs, use_cache=False).loss
        loss.backward()
        if run.lema.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(trained, run.lema.max_grad_norm)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss))
        if number % 25 == 0:
            print(f"step {number + 1}/{steps} {losses[-1]:.4f}", file=sys.stderr, flush=True)
    model.save_pretrained(options.work / "peft")
    return {"losses": losses, "step_seconds": time.perf_counter() - started}


def ask_lema(options: argparse.Namespace) -> dict[str, Any]:
    """`lema eval`: the base in the format, the base asked plainly, and LEMA's adapter."""
    out = options.work / "answers-lema.json"
    lema(
        "eval", str(options.work / "lema" / "final"), "--data", str(options.work / HELD_OUT), "--format", "lema-reply",
        "--limit", str(options.questions), "--max-new-tokens", "96", "--json", str(out),
    )  # fmt: skip
    return _without_rows(out)


def ask_peft(options: argparse.Namespace) -> dict[str, Any]:
    """Both adapters in plain transformers, which nothing but their own end token stops, scored the same way."""
    from lema_reply.evaluate import Arm, evaluate, read_questions

    questions, arms = read_questions(options.work / HELD_OUT, options.questions), []
    for name, adapter in (("PEFT adapter", "peft"), ("LEMA's adapter in PEFT", "lema/final")):
        model, tokenizer = _plain(options.folder, options.work / adapter)
        arms.append(Arm(name, _answerer(model, tokenizer)))
    evaluate(questions, arms).save(options.work / "answers-peft.json")
    return _without_rows(options.work / "answers-peft.json")


def merge(options: argparse.Namespace) -> dict[str, Any]:
    """`lema merge` in fp32, reloaded by plain transformers, beside base and adapter by PEFT."""
    import torch

    from lema_reply.evaluate import read_questions
    from lema_reply.grammar import prompt

    merged = options.work / "merged"
    lema("merge", str(options.work / "lema" / "final"), str(merged), "--base", str(options.folder))
    questions = read_questions(options.work / HELD_OUT, options.same)
    prompts = [prompt(question.question) for question in questions]
    texts, logits, spread = [], [], 0.0
    for adapter, folder in ((options.work / "lema" / "final", options.folder), (None, merged)):
        model, tokenizer = _plain(folder, adapter)
        texts.append(_answerer(model, tokenizer)(prompts))
        with torch.no_grad():
            logits.append([model(**tokenizer(text, return_tensors="pt")).logits for text in prompts[:10]])
    differences = [float((a - b).abs().max()) for a, b in zip(*logits, strict=True)]
    spread = max(float(a.abs().max()) for a in logits[0])
    return {
        "questions": len(prompts),
        "same_answers": sum(a == b for a, b in zip(*texts, strict=True)),
        "largest_logit_difference": max(differences),
        "largest_logit": spread,
    }


def _plain(folder: Path, adapter: Path | None) -> tuple[Any, Any]:
    """A model of plain transformers in fp32, with a PEFT adapter or without."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left", trust_remote_code=False)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.eval(), tokenizer


def _answerer(model: Any, tokenizer: Any, rows: int = 16) -> Callable[[Sequence[str]], list[str]]:
    """Greedy answers of plain transformers, batches of similar length."""

    def answer(prompts: Sequence[str]) -> list[str]:
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        found = [""] * len(prompts)
        for start in range(0, len(order), rows):
            batch = order[start : start + rows]
            inputs = tokenizer([prompts[i] for i in batch], return_tensors="pt", padding=True, add_special_tokens=False)
            made = model.generate(
                **inputs, do_sample=False, temperature=None, top_p=None, top_k=None, max_new_tokens=96,
                pad_token_id=tokenizer.pad_token_id, repetition_penalty=1.0,
            )  # fmt: skip
            for i, ids in zip(batch, made[:, inputs["input_ids"].shape[1] :], strict=True):
                found[i] = tokenizer.decode(ids, skip_special_tokens=True)
            print(f"{start + len(batch)}/{len(order)} answered", file=sys.stderr, flush=True)
        return found

    return answer


def _without_rows(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text(encoding="utf-8"))
    return {key: value for key, value in content.items() if key in ("questions", "settled", "arms")}


def parser() -> argparse.ArgumentParser:
    """The arm's options."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.proof_arms", description=__doc__.splitlines()[0])
    made.add_argument("kind", choices=KINDS)
    made.add_argument("--folder", type=Path, required=True)
    made.add_argument("--work", type=Path, required=True)
    made.add_argument("--recipe", type=Path, required=True)
    made.add_argument("--steps", type=int, default=0)
    made.add_argument("--questions", type=int, default=400)
    made.add_argument("--same", type=int, default=50)
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    """Do one part and print what it found."""
    options = parser().parse_args(arguments)
    warnings.filterwarnings("ignore")
    started = time.perf_counter()
    part: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
        "train-lema": train_lema, "train-peft": train_peft, "ask-lema": ask_lema, "ask-peft": ask_peft, "merge": merge,
    }  # fmt: skip
    found = part[options.kind](options)
    print(json.dumps({**found, "seconds": round(time.perf_counter() - started, 1)}), flush=True)


if __name__ == "__main__":
    sys.exit(main())
