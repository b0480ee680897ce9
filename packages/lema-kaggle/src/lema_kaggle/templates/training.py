# %% [markdown]
# # TITLE
# Builds the data set, trains an adapter by streaming the base model's weights, measures it on questions it has not
# seen, and merges it. Training stops by itself early enough for the rest, and what it has learned is saved then;
# another kernel goes on from there (`lema kaggle run NOTEBOOK --resume-from OWNER/SLUG`).
#
# Left behind: `adapter/`, `result.json`, `eval.json`, `eval.png`, `run/metrics.jsonl`, `run/report.html`.
#
# Every parameter below can also be set by an environment variable `LEMA_KAGGLE_<NAME>`.

# %% tags=["parameters"]
import time

NOTEBOOK = ""
RECIPE = ""  # of the package's recipes
MODEL = ""  # hub id or folder; empty: as the recipe says
ROWS = 5000  # of the data set
SEED = 0
MAX_STEPS = 0  # 0: as many as the recipe says
EVAL_LIMIT = 300  # held-out questions that are asked
HOURS = 8.0  # until everything is over
RESERVE = 1.0  # hours of them for measuring and merging
RESUME = False  # go on from the checkpoint of an attached kernel
SETTINGS = ""  # further settings of the run, as NAME=VALUE NAME=VALUE
BEGAN = time.time()

# %% tags=["install"]

# %% [markdown]
# ## The card

# %%
import json
import shlex

import lema
from lema_kaggle.inside import Session, collect, from_environment, prepare_card

globals().update(from_environment(globals()))
session = Session(HOURS, BEGAN)
card = prepare_card()
print(card)

# %% [markdown]
# ## The data

# %%
data, held_out = session.work / "data" / "train.jsonl", session.work / "data" / "held_out.jsonl"
data.parent.mkdir(exist_ok=True)
session.lema(
    "data", "build", "-o", data, "--held-out", held_out, "--count", str(ROWS), "--seed", str(SEED), "--any-size"
)
session.lema("data", "validate", data)

# %% [markdown]
# ## Training

# %%
settings = {
    "output_dir": session.run_folder,
    "train_file": data,
    "eval_file": held_out,
    "chat_template": session.recipe("lema_reply.jinja"),
    "device": card.device,
    "dtype": card.dtype,
    "max_train_hours": round(session.hours_for_training(RESERVE), 4),
}
if MODEL:
    settings["model_name_or_path"] = MODEL
if MAX_STEPS:
    settings["max_steps"] = MAX_STEPS
if RESUME:
    print("goes on after step", session.take_over())
settings |= dict(pair.split("=", 1) for pair in shlex.split(SETTINGS))
words = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
session.lema("train", session.recipe(RECIPE), "--plain", "--resume", "auto", *words)
adapter, finished = session.adapter()
print(adapter, "finished" if finished else "stopped by its time limit, to be gone on with")
facts = {"notebook": NOTEBOOK, "lema": lema.__version__, "card": str(card), "rows": ROWS}
result = collect(session, adapter, finished, facts)  # now: it is left behind whatever becomes of the rest
adapter = session.work / "adapter"

# %% [markdown]
# ## Measured, on questions it has not seen

# %%
evaluated = session.lema_in_time(
    "eval", adapter, "--data", held_out, "--format", "lema-reply", "--limit", str(EVAL_LIMIT),
    "--json", session.work / "eval.json", "--plot", session.work / "eval.png",
)  # fmt: skip
session.lema_in_time(
    "generate", adapter, "-p", "What is the capital of Norway?", "--max-new-tokens", "96", "--stop", "[/LEMA_REPLY]"
)

# %% [markdown]
# ## Merged
# As long as there is time, the merged model is compared with base and adapter and asked once. It stays on this machine:
# with the adapter that is left behind, `lema merge` makes it again anywhere.

# %%
merged = session.scratch / "merged"
was_merged = session.lema_in_time("merge", adapter, merged)
if was_merged:
    session.lema_in_time(
        "generate", merged, "-p", "What is the capital of Norway?", "--max-new-tokens", "96",
        "--set", f"device={card.device}", "--set", f"dtype={card.dtype}",
    )  # fmt: skip

# %% [markdown]
# ## What is left behind

# %%
session.lema("report", session.run_folder)
result |= {"evaluated": evaluated, "merged": was_merged, "hours": session.hours_taken()}
(session.work / "result.json").write_text(json.dumps(result, indent=2) + "\n")
print(json.dumps(result, indent=2))
