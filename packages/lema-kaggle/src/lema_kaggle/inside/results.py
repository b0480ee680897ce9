"""What a notebook leaves behind: small files that are worth fetching, and no base weights.

Files go by their names, whatever made them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lema.errors import LemaError, WeightsNotFoundError

from .session import Session

RESULT = "result.json"
ADAPTER = "adapter"
_FOR_RESUMING = ("optimizer*", "rng_state*", "scheduler*", "scaler*", "COMPLETE")
_BASE_WEIGHTS = ("model.safetensors", "model-*.safetensors", "pytorch_model*.bin")


def collect(session: Session, adapter: Path, finished: bool, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Copy the adapter to `adapter/`, drop checkpoints nobody needs any more, and write `result.json`.

    A finished run keeps no checkpoint; one that was stopped keeps the newest, for another kernel to go on from.

    Args:
        facts: what else `result.json` is to say.

    Raises:
        LemaError: base weights lie among the outputs, which would be fetched too.
    """
    target = session.work / ADAPTER
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(adapter, target, ignore=shutil.ignore_patterns(*_FOR_RESUMING))
    for path in session.run_folder.glob("checkpoint-*"):
        if finished or path != adapter:
            shutil.rmtree(path)
    if finished:
        shutil.rmtree(adapter)
    strangers = [str(p.relative_to(session.work)) for form in _BASE_WEIGHTS for p in session.work.rglob(form)]
    if strangers:
        raise LemaError(f"these are base weights, which belong in {session.scratch}: {', '.join(strangers)}")
    state = json.loads((target / "trainer_state.json").read_text(encoding="utf-8"))
    result = {
        "status": "finished" if finished else "stopped",
        "global_step": state["global_step"],
        "max_steps": state["max_steps"],
        "hours": session.hours_taken(),
        **facts,
    }
    (session.work / RESULT).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def find_adapter(folder: Path) -> Path:
    """The adapter among attached or fetched outputs: `adapter/` of a notebook, else the newest there is.

    Raises:
        WeightsNotFoundError: there is none.
    """
    found = [path.parent for path in folder.rglob("adapter_config.json")]
    if not found:
        raise WeightsNotFoundError(f"no adapter_config.json below {folder}: attach a kernel or data set that has one")
    named = [path for path in found if path.name == ADAPTER]
    return max(named or found, key=lambda path: (path / "adapter_config.json").stat().st_mtime)
