"""How one training step is taken: by LEMA, by LEMA's reads without the computation, by plain PEFT.

It knows how the two libraries are driven; it knows nothing of clocks, processes or reports.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KINDS = ("lema", "lema_io", "peft", "peft_checkpointing")
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
GPT2_TARGETS = ("c_attn", "c_proj", "c_fc")
LORA_ALPHA = 32
LEARNING_RATE = 1e-4


@dataclass
class Driver:
    """A model that is ready to train."""

    step: Callable[[], float]
    """One step; its loss."""
    memory: Any = None
    """LEMA's memory manager; None for PEFT."""
    summary: Callable[[], dict[str, Any]] = dict
    """What else is to be said once the steps are over."""

    def counted(self) -> dict[str, float]:
        """LEMA's counters so far: loads, bytes, seconds; empty for PEFT."""
        return dataclasses.asdict(self.memory.stats) if self.memory is not None else {}


def driver(options: argparse.Namespace, ids: Any) -> Driver:
    """The driver of the kind that the options name, for token ids `[batch, tokens]`."""
    if options.kind == "lema":
        return _lema(options, ids)
    return _lema_io(options) if options.kind == "lema_io" else _peft(options, ids)


def settings(pairs: list[str]) -> dict[str, Any]:
    """`name=value` pairs as settings; values are JSON where they can be, else text."""
    found: dict[str, Any] = {}
    for name, _, value in (pair.partition("=") for pair in pairs):
        try:
            found[name] = json.loads(value)
        except json.JSONDecodeError:
            found[name] = value
    return found


def targets(folder: Path) -> list[str]:
    """The names that all linear layers of the model's blocks have."""
    family = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    return list(GPT2_TARGETS if family == "gpt2" else TARGETS)


def lema_config(options: argparse.Namespace) -> Any:
    """The options as LEMA's settings; a budget of 'auto' becomes the number it stands for now."""
    import lema
    from lema.planning.policy import resolve_budgets

    config = lema.LemaConfig(
        str(options.folder),
        device=options.device,
        dtype=options.dtype,
        strategy=options.strategy,
        lora_rank=options.rank,
        lora_alpha=LORA_ALPHA,
        lora_target_modules=targets(options.folder),
        num_slots=options.slots,
        save_steps=0,
        batch_size=options.batch,
        max_seq_length=options.tokens,
        **{"loss_chunk_size": options.chunk or "auto", **settings(options.set)},
    )
    ram, vram = resolve_budgets(config)
    return config.replace(ram_budget=ram, vram_budget=vram)


def _lema(options: argparse.Namespace, ids: Any) -> Driver:
    import torch

    import lema

    config = lema_config(options)
    model = lema.LemaModel(config)
    trainer = model.get_trainer(torch.optim.AdamW(model.get_trainable_parameters(), lr=LEARNING_RATE))

    def step() -> float:
        _, loss = trainer.train_step(ids, ids)
        assert loss is not None
        return loss

    return Driver(step, model.memory, lambda: _lema_summary(model, bool(options.predict)))


def _lema_io(options: argparse.Namespace) -> Driver:
    """A step's accesses, with the same slots and readers, and nothing computed in between."""
    import lema
    from lema.streaming.schedule import AccessSchedule

    model = lema.LemaModel(lema_config(options))
    memory = model.memory
    schedule = AccessSchedule.training(memory.num_units)

    def step() -> float:
        memory.predict(schedule)
        for number, access in enumerate(schedule.accesses):
            if number == memory.num_units:  # the turn
                if (chunks := memory.head_chunks) is not None:
                    for chunk in range(len(chunks.ranges)):
                        with chunks.use(chunk):
                            pass
                with memory.use(memory.head_unit):
                    pass
            with memory.use(access.unit, access.phase):
                pass
        return 0.0

    return Driver(step, memory, lambda: _lema_summary(model, bool(options.predict)))


def _peft(options: argparse.Namespace, ids: Any) -> Driver:
    """The plain loop around transformers' model with PEFT's LoRA."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(
        options.folder, dtype=getattr(torch, options.dtype), trust_remote_code=False
    )
    lora = LoraConfig(
        r=options.rank, lora_alpha=LORA_ALPHA, target_modules=targets(options.folder), task_type="CAUSAL_LM"
    )
    model = get_peft_model(base.to(options.device), lora)
    model.train()
    if options.kind == "peft_checkpointing":
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
    ids = ids.to(options.device)

    def step() -> float:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    return Driver(step)


def _lema_summary(model: Any, predict: bool) -> dict[str, Any]:
    """The plan in force, what it predicted, and the budgets; without a budget, on request what one would predict."""
    config, plan = model.config, model.memory.plan
    asked = _counted(model) if predict else plan
    return {
        "strategy": config.strategy.value,
        "ram_budget_bytes": config.ram_budget,
        "vram_budget_bytes": config.vram_budget,
        "planned": bool(plan.host_bytes),
        "plan": _plan_summary(asked),
    }


def _counted(model: Any) -> Any:
    """The plan with what it takes: predicted afterwards, where it was made without a budget."""
    from lema.engine.assembly import StoredModel
    from lema.engine.outlook import Outlook

    return Outlook(model.config, StoredModel(model.adapter, model.gbi)).counted(model.memory.plan)


def _plan_summary(plan: Any) -> dict[str, Any] | None:
    """What a plan decided and predicted, in numbers."""
    from lema.planning.footprint import DEVICE_CONTEXT

    if not plan.host_bytes:
        return None
    estimate = plan.estimate
    return {
        "on_device": len(plan.on_device),
        "in_ram": len(plan.in_ram),
        "from_disk": len(plan.from_disk),
        "keep_activations": len(plan.keep_activations),
        "head": plan.head,
        "loss_chunk_size": plan.loss_chunk_size,
        "micro_batch_size": plan.micro_batch_size,
        "boundaries": plan.boundaries,
        "optimizer": plan.optimizer,
        "predicted_mib": round(plan.host_peak / 2**20, 1),
        "predicted_parts_mib": {name: round(size / 2**20, 1) for name, size in plan.host_bytes.items()},
        # torch's counters, which this stands beside, do not have the context
        "predicted_device_mib": round((plan.device_peak - plan.device_bytes.get(DEVICE_CONTEXT, 0)) / 2**20, 1),
        "predicted_device_parts_mib": {name: round(size / 2**20, 1) for name, size in plan.device_bytes.items()},
        "estimated_seconds": round(estimate.step_seconds, 3),
        "estimated_compute_seconds": round(estimate.compute_seconds, 6),
        "bound_by": estimate.bound_by,
    }
