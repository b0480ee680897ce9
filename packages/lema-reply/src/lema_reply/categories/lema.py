"""LEMA itself: what its documentation says, and what follows from it by arithmetic for any settings."""

from __future__ import annotations

import math
from collections.abc import Iterator
from random import Random

from ..facts.tables import table
from ..rows import Fact, number, unique
from ..unsettled import unsettled

_WIDTHS = (576, 768, 1024, 1536, 2048, 2560, 3072, 4096, 5120, 8192)
_RANKS = (2, 4, 8, 16, 32, 64, 128)
_TYPES = {"float32": 4, "float16": 2, "bfloat16": 2}
_TASKS = (
    "summaries",
    "recipes",
    "poems",
    "code reviews",
    "letters",
    "translations",
    "quizzes",
    "minutes",
    "reports",
    "jokes",
)


def facts(random: Random) -> Iterator[Fact]:
    """All facts about LEMA. What its documentation says is single; what is computed is not."""
    yield from table("lema", single=True)
    for make, count in (
        (_rows_per_step, 110), (_steps, 110), (_lora_size, 110), (_scaling, 60), (_layer_id, 80), (_units, 60),
        (_bytes, 110), (_checkpoints, 70), (_shards, 50), (_resume, 80), (_reading, 60), (_moments, 60),
    ):  # fmt: skip
        yield from unique(make, random, count)
    yield from _unsettled()


def _rows_per_step(random: Random) -> Fact:
    batch, windows = random.randint(1, 16), random.choice((1, 2, 3, 4, 6, 8, 12, 16))
    return Fact(
        f"rows/{batch}/{windows}",
        (f"With batch_size {batch} and gradient_accumulation_steps {windows}, how many rows has a LEMA step?",
         f"A LEMA run has batch size {batch} and accumulates {windows} times. How many rows make a step?"),
        str(batch * windows), "A step is batch size times accumulation steps, and the weights are read once for it.",
        accepted=(f"{batch * windows} rows",),
    )  # fmt: skip


def _steps(random: Random) -> Fact:
    rows, batch = 50 * random.randint(4, 220), random.choice((2, 4, 8, 10, 16, 20, 32))
    steps = math.ceil(rows / batch)
    return Fact(
        f"steps/{rows}/{batch}",
        (f"How many steps is one epoch of {rows} rows at {batch} rows a step?",
         f"LEMA trains one epoch on {rows} rows, {batch} a step. How many steps is that?"),
        f"{steps:,}", f"It is {rows} divided by {batch}{'' if rows % batch == 0 else ', rounded up'}.",
        accepted=(f"{steps:,} steps",),
    )  # fmt: skip


def _lora_size(random: Random) -> Fact:
    rank, wide, high = random.choice(_RANKS), random.choice(_WIDTHS), random.choice(_WIDTHS)
    return Fact(
        f"lora/{rank}/{wide}/{high}",
        (f"How many parameters has a LoRA of rank {rank} on a linear layer from {wide} to {high}?",
         f"A linear layer has {wide} inputs and {high} outputs. How large is its LoRA of rank {rank}, in parameters?"),
        f"{rank * (wide + high):,}", f"A is {rank} by {wide} and B is {high} by {rank}.",
        accepted=(f"{rank * (wide + high):,} parameters",),
    )  # fmt: skip


def _scaling(random: Random) -> Fact:
    rank, alpha, stable = random.choice(_RANKS), random.choice((4, 8, 16, 32, 64, 128)), random.random() < 0.4
    if stable:
        rank = random.choice((4, 16, 64))
    value = alpha / math.sqrt(rank) if stable else alpha / rank
    name = "rsLoRA" if stable else "LoRA"
    return Fact(
        f"scale/{name}/{alpha}/{rank}",
        (f"By what is a {name} adapter with alpha {alpha} and rank {rank} scaled?",
         f"What is the scaling of {name} at rank {rank} and alpha {alpha}?"),
        number(value, 6), f"It is alpha divided by {'the square root of ' if stable else ''}the rank.",
    )  # fmt: skip


def _layer_id(random: Random) -> Fact:
    blocks = random.choice((12, 16, 22, 24, 28, 30, 32, 36, 40, 48, 80))
    block = random.randrange(blocks)
    return Fact(
        f"layer-id/{blocks}/{block}",
        (f"Which layer id has block {block} of a model with {blocks} blocks in LEMA?",
         f"In LEMA's get_layer_metadata, what id does block {block} of {blocks} have?"),
        str(block + 1), f"The embedding is layer 0, blocks follow, and the head is layer {blocks + 1}.",
    )  # fmt: skip


def _units(random: Random) -> Fact:
    blocks = random.randint(2, 96)
    return Fact(
        f"layers/{blocks}",
        (f"How many entries does LEMA's get_layer_metadata have for a model with {blocks} blocks?",
         f"How many layers does LEMA count in a model with {blocks} blocks?"),
        str(blocks + 2), "Embedding and head are counted too.", accepted=(f"{blocks + 2} layers",),
    )  # fmt: skip


def _bytes(random: Random) -> Fact:
    name = random.choice(sorted(_TYPES))
    wide, high = random.choice(_WIDTHS), random.choice(_WIDTHS)
    size = _TYPES[name] * wide * high
    return Fact(
        f"bytes/{name}/{wide}/{high}",
        (f"How many bytes is a {name} weight of {wide} by {high}?",
         f"LEMA streams a matrix of {wide} by {high} in {name}. How many bytes is it?"),
        f"{size:,}", f"Each number of type {name} takes {_TYPES[name]} bytes.", accepted=(f"{size:,} bytes",),
    )  # fmt: skip


def _checkpoints(random: Random) -> Fact:
    every, steps = random.choice((20, 25, 50, 100, 200, 250, 500)), 10 * random.randint(10, 300)
    return Fact(
        f"checkpoints/{every}/{steps}",
        (f"With save_steps {every}, how often does LEMA save in {steps} steps, not counting final?",
         f"A LEMA run of {steps} steps saves every {every}. How many checkpoints is that, without final?"),
        str(steps // every), f"They are named after their steps: checkpoint-{every} would be the first.",
    )  # fmt: skip


def _shards(random: Random) -> Fact:
    shards = random.randint(2, 40)
    shard = random.randint(1, shards)
    name = f"model-{shard:05d}-of-{shards:05d}.safetensors"
    return Fact(
        f"shard/{shard}/{shards}",
        (f"What is shard {shard} of {shards} of a merged model called?",
         f"Which name has file number {shard} of {shards} that lema merge writes?"),
        name, "Numbers have five digits, as transformers writes them.",
    )  # fmt: skip


def _resume(random: Random) -> Fact:
    every = random.choice((20, 25, 50, 100, 200, 250, 500))
    killed = random.randint(every + 1, 20 * every)
    last = killed // every * every
    return Fact(
        f"killed/{every}/{killed}",
        (f"A LEMA run with save_steps {every} is killed in step {killed + 1}. From which checkpoint does it go on?",
         f"LEMA saves every {every} steps and loses power after step {killed}. Which checkpoint does it resume from?"),
        f"checkpoint-{last}", f"Steps done again: {killed - last}.", accepted=(str(last), f"step {last}"),
    )  # fmt: skip


def _reading(random: Random) -> Fact:
    layers, slots = random.randint(8, 80), random.randint(2, 6)
    return Fact(
        f"loads/{layers}/{slots}",
        (f"How many loads does a LEMA step take with {layers} streamed layers and {slots} slots?",
         f"LEMA streams {layers} layers through {slots} slots. How many layers are loaded in a step?"),
        str(2 * (layers - slots)), "At the turn and at the next step the slots still hold what comes first.",
        accepted=(f"{2 * (layers - slots)} loads",),
    )  # fmt: skip


def _moments(random: Random) -> Fact:
    millions = random.randint(1, 120)
    return Fact(
        f"moments/{millions}",
        (f"How many megabytes are Adam's moments of {millions} million float32 parameters?",
         f"An adapter has {millions} million parameters. How many MB do its two Adam moments take in float32?"),
        f"{8 * millions:,} MB", "Two moments of four bytes each are eight bytes a parameter.",
        accepted=(f"{8 * millions:,}",),
    )  # fmt: skip


def _unsettled() -> Iterator[Fact]:
    for task in _TASKS:
        yield unsettled(
            "missing", f"steps/{task}",
            (f"How many LEMA steps do I need for {task}?", f"Which learning rate is best for my {task} with LEMA?"),
            f"It depends on model, data and aim; an evaluation on held-out {task} would tell.",
        )  # fmt: skip
        yield unsettled(
            "future", f"loss/{task}",
            (f"What will the final loss of my LEMA run on {task} be?", f"When exactly will my LEMA run on {task} end?"),
            "The run has to be made to know it.",
        )  # fmt: skip
    for size in (1, 3, 7, 8, 13, 14, 30, 32, 70, 72):
        yield unsettled(
            "missing", f"time/{size}",
            (f"How long does LEMA take for a {size}B model on my machine?",
             f"How many seconds is my LEMA step with a {size}B model?"),
            "It depends on disk, memory and processor; lema plan gives an estimate.",
        )  # fmt: skip
