# %% [markdown]
# # TITLE
# Peak memory of the card and seconds a step, LEMA beside PEFT with and without gradient checkpointing, over four
# models at 128 and 512 tokens. Each arm is a process of its own; one that runs out of memory is part of the result.
#
# Left behind: `benchmarks/`, the report as Markdown, JSON and plot.
#
# Every parameter below can also be set by an environment variable `LEMA_KAGGLE_<NAME>`.

# %% tags=["parameters"]
import time

NOTEBOOK = ""
MODELS = "gpt2,TinyLlama/TinyLlama-1.1B-Chat-v1.0,HuggingFaceTB/SmolLM2-1.7B,NousResearch/Llama-2-7b-hf"
TOKENS = "128,512"  # a row
STEPS = 21  # the first one warms up
BUDGETS = "2GB,6GB"  # of the card's memory, for LEMA's arms besides the one without a budget
RANK = 16
HOURS = 4.0
BEGAN = time.time()

# %% tags=["install"]

# %% [markdown]
# ## The card

# %%
from lema_kaggle.inside import Session, from_environment, prepare_card

globals().update(from_environment(globals()))
session = Session(HOURS, BEGAN)
card = prepare_card()
print(card)

# %% [markdown]
# ## Measured

# %%
session.python(
    "-m", "benchmarks.published", "--models", MODELS, "--tokens", TOKENS, "--steps", str(STEPS), "--rank", str(RANK),
    "--budgets", BUDGETS, "--device", card.device, "--dtype", card.dtype, "--cache", session.scratch,
    "--minutes", str(round(60 * session.hours_for_training(0.25), 1)), "--out", session.work / "benchmarks",
)  # fmt: skip

# %%
for page in sorted((session.work / "benchmarks").glob("*.md")):
    print(page.read_text())
