# %% [markdown]
# # TITLE
# Answers questions with an adapter from an attached kernel or data set, and with its base model alone beside it.
#
# Left behind: `answers.jsonl` and `base_answers.jsonl`.
#
# Every parameter below can also be set by an environment variable `LEMA_KAGGLE_<NAME>`.

# %% tags=["parameters"]
import time

NOTEBOOK = ""
ADAPTER = ""  # its folder; empty: the one that is attached
MODEL = ""  # the base model's hub id or folder; empty: as the adapter says
TEMPERATURE = 0.7
TOP_P = 0.9
MAX_NEW_TOKENS = 160
COMPARE = True  # ask the base model too
HOURS = 2.0
BEGAN = time.time()

# %% tags=["questions"]
QUESTIONS = [
    "What is the capital of Norway?",
    "What is the chemical symbol of gold?",
    "How many degrees do the angles of a triangle add up to?",
    "What is LEMA?",
    "How do I remove a coffee stain from a shirt?",
]

# %% tags=["install"]

# %% [markdown]
# ## The card and the adapter

# %%
import json
from pathlib import Path

from lema_kaggle.inside import Session, find_adapter, from_environment, prepare_card

globals().update(from_environment(globals()))
session = Session(HOURS, BEGAN)
card = prepare_card()
print(card)
adapter = Path(ADAPTER) if ADAPTER else find_adapter(session.inputs)
print(adapter)

# %% [markdown]
# ## Answers

# %%
questions = session.scratch / "questions.jsonl"
questions.write_text("".join(json.dumps({"prompt": question}) + "\n" for question in QUESTIONS))


def answers(name: str, *more: str) -> list[dict]:
    """Ask all questions; the answers as lines of JSON, also in a file."""
    said = session.lema(
        "generate", adapter, "--file", questions, "--json", "--stop", "[/LEMA_REPLY]", "--seed", "0",
        "--temperature", str(TEMPERATURE), "--top-p", str(TOP_P), "--max-new-tokens", str(MAX_NEW_TOKENS),
        "--set", f"dtype={card.dtype}", *(["--base", MODEL] if MODEL else []), *more,
        within=3600 * session.hours_for_training(0),
    )  # fmt: skip
    lines = [line for line in said.splitlines() if line.startswith("{")]
    (session.work / name).write_text("\n".join(lines) + "\n")
    return [json.loads(line) for line in lines]


adapted = answers("answers.jsonl")

# %%
plain = answers("base_answers.jsonl", "--no-adapter") if COMPARE else []
for number, answer in enumerate(adapted):
    print("=" * 100, answer["prompt"], "-- with the adapter:", answer["text"], sep="\n")
    if plain:
        print("-- the base model:", plain[number]["text"], sep="\n")
