"""A streamed model beside plain transformers+PEFT over the same files, and what to compare of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM

import lema
from lema.engine.trainer import LemaTrainer
from lema.planning.plain import plan_without_budget, stored_bytes
from lema.planning.plan import MemoryPlan

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

RANK, ALPHA, SEED = 4, 8, 7
EPS = torch.finfo(torch.float32).eps
Gradients = dict[str, torch.Tensor]
Batch = dict[str, torch.Tensor]


class Recorder(torch.optim.SGD):
    """An optimizer that keeps the gradients it is asked to step on and changes nothing."""

    def __init__(self, parameters: list[Any]) -> None:
        super().__init__(parameters, lr=0.0)
        self.seen: list[torch.Tensor | None] = []
        self.steps = 0

    def step(self, closure: Any = None) -> None:
        """Remember the gradients."""
        self.steps += 1
        self.seen = [None if p.grad is None else p.grad.clone() for g in self.param_groups for p in g["params"]]


def padded_batch(rows: int = 4, length: int = 10, seed: int = 1, vocabulary: int = 99) -> Batch:
    """Random rows; the first is padded on the right, the second on the left."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocabulary, (rows, length), generator=random)
    labels, mask = ids.clone(), torch.ones_like(ids)
    if rows > 1:
        mask[0, length - 3 :] = 0
        mask[1, :3] = 0
        labels[mask == 0] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def plain_model(
    folder: Path,
    dtype: torch.dtype = torch.float32,
    attn: str = "eager",
    dropout: float = 0.0,
    targets: Any = "all-linear",
    **lora: Any,
) -> PeftModel:
    """transformers + PEFT as everybody uses them."""
    base = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attn, dtype=dtype)
    torch.manual_seed(SEED)
    settings = LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=dropout, target_modules=targets, task_type="CAUSAL_LM", **lora
    )
    return get_peft_model(base, settings).train()


def lema_config(folder: Path, **settings: Any) -> lema.LemaConfig:
    """The settings that make the same model as `plain_model`."""
    values: dict[str, Any] = {
        "device": "cpu", "dtype": "float32", "lora_target_modules": "all-linear", "seed": SEED, "lora_rank": RANK,
        "lora_alpha": ALPHA, "attn_implementation": "eager", "save_steps": 0,
    }  # fmt: skip
    return lema.LemaConfig(str(folder), **{**values, **settings})


def lema_model(folder: Path, **settings: Any) -> lema.LemaModel:
    """A streamed model, ready to train."""
    model = lema.LemaModel(lema_config(folder, **settings))
    model.initialize_lora()
    model.hf_model.train()
    return model


def adapter_of(model: torch.nn.Module) -> Gradients:
    """LoRA parameters by PEFT's names."""
    return {name: p for name, p in model.named_parameters() if "lora_" in name}


def randomise(plain: torch.nn.Module, *others: torch.nn.Module, seed: int = 1) -> None:
    """Give every LoRA parameter the same random value in all models; B is zero at first, which hides mistakes."""
    random = torch.Generator().manual_seed(seed)
    copies = [adapter_of(other) for other in others]
    with torch.no_grad():
        for name, parameter in adapter_of(plain).items():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.1)
            for copy in copies:
                copy[name].copy_(parameter)


def gradients_of(model: torch.nn.Module) -> Gradients:
    """A copy of every adapter gradient there is; the model's are emptied."""
    found = {name: p.grad.clone() for name, p in adapter_of(model).items() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def plain_step(model: PeftModel, batch: Mapping[str, torch.Tensor], scale: float = 1.0) -> tuple[float, Gradients]:
    """Loss and gradients of plain PEFT."""
    loss = model(**batch, use_cache=False).loss
    (loss * scale if scale != 1.0 else loss).backward()
    return loss.item(), {name: g / scale for name, g in gradients_of(model).items()}


class Everywhere64(TorchFunctionMode):
    """Models go to float32 for norms, softmax and rotary angles; a float64 reference must not."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Say float64 where float32 is said."""
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        args = tuple(torch.float64 if a is torch.float32 else a for a in args)
        kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        return func(*args, **kwargs)


def recording_trainer(model: lema.LemaModel) -> LemaTrainer:
    """A trainer whose optimizer only remembers."""
    return model.get_trainer(Recorder(model.get_trainable_parameters()))


def recorded(trainer: LemaTrainer, model: torch.nn.Module) -> Gradients:
    """The gradients the recording optimizer saw last, by name."""
    assert isinstance(trainer.optimizer, Recorder)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    return {n: g for n, g in zip(names, trainer.optimizer.seen, strict=True) if g is not None}


def lema_step(model: lema.LemaModel, batch: Batch, trainer: LemaTrainer | None = None) -> tuple[float, Gradients]:
    """Loss and gradients of one `train_step`."""
    trainer = trainer or recording_trainer(model)
    _, loss = trainer.train_step(batch)
    assert loss is not None
    return loss, recorded(trainer, model.hf_model)


@contextlib.contextmanager
def cut_into(model: lema.LemaModel, micro: int | None = None, chunk: int | None = None) -> Iterator[None]:
    """Inside the block layers run so many rows at once, and the loss so many targets; None: all."""
    batching, memory = model.attachment.batching, model.memory
    before = batching.micro_batch_size, memory.plan
    batching.micro_batch_size, memory.plan = micro, replace(memory.plan, loss_chunk_size=chunk)
    try:
        yield
    finally:
        batching.micro_batch_size, memory.plan = before


def differing(expected: Gradients, found: Gradients) -> list[str]:
    """Names whose gradient is missing or differs in a bit; also complains if there is nothing to compare."""
    assert expected, "the reference has no gradients"
    extra = [n for n, g in found.items() if n not in expected and bool(g.any())]
    return extra + [n for n, g in expected.items() if n not in found or not torch.equal(g, found[n])]


def relative(a: float, b: float) -> float:
    """Relative distance of two losses."""
    return abs(a - b) / abs(b)


def errors(reference: Gradients, found: Gradients) -> dict[str, float]:
    """Relative error of each tensor against a float64 reference."""
    return {
        n: float((found[n].double() - g.double()).norm() / g.double().norm().clamp_min(1e-30))
        for n, g in reference.items()
        if bool(g.any())
    }


def assert_as_exact_as_plain(reference: Gradients, plain: Gradients, found: Gradients, floor: float = 16 * EPS) -> None:
    """Error against float64 at most 1.5 times plain PEFT's own; below `floor` luck decides."""
    own, ours = errors(reference, plain), errors(reference, found)
    assert own
    worse = {n: (e, own[n]) for n, e in ours.items() if not e <= 1.5 * own[n] + floor}
    assert not worse, f"{len(worse)} of {len(own)} gradients are less exact than plain PEFT's (ours, plain): {worse}"


@dataclass
class Pair:
    """A plain and a streamed model of the same files with the same adapter values."""

    folder: Path
    plain: PeftModel
    model: lema.LemaModel
    targets: Any = "all-linear"
    extras: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path, dtype: torch.dtype = torch.float32, attn: str = "eager", **settings: Any) -> Pair:
        """Both models, randomised."""
        targets = settings.get("lora_target_modules", "all-linear")
        dropout = settings.get("lora_dropout", 0.0)
        plain = plain_model(folder, dtype, attn, dropout, targets)
        name = str(dtype).removeprefix("torch.")
        model = lema_model(folder, dtype=name, attn_implementation=attn, **settings)
        first = differing(dict(adapter_of(plain)), dict(adapter_of(model.hf_model)))
        assert not first, f"initial LoRA differs: {first}"
        randomise(plain, model.hf_model)
        return cls(folder, plain, model, targets)

    def reference(self, batch: Batch) -> Gradients:
        """Gradients of plain PEFT in float64."""
        with Everywhere64():
            return plain_step(self._double(), batch)[1]

    def _double(self) -> PeftModel:
        if "double" not in self.extras:
            double = plain_model(self.folder, torch.float64, targets=self.targets).to(torch.float64)
            double.get_base_model().set_experts_implementation("eager")  # grouped_mm has no float64
            own = adapter_of(self.plain)
            with torch.no_grad():
                for name, parameter in adapter_of(double).items():
                    parameter.copy_(own[name])
            self.extras["double"] = double
        return self.extras["double"]

    def close(self) -> None:
        """End the streamed model's threads."""
        self.model.close()


def strategy_plan(
    gbi: Any, adapter: Any, mapped: Sequence[int] = (), device: str = "cpu", strategy: str = "streaming", **changes: Any
) -> MemoryPlan:
    """The plan of no budget, two slots a tier, but for some layers that are bound to the mapped files."""
    plan = plan_without_budget(*stored_bytes(gbi, adapter), device=device, strategy=lema.MemoryStrategy.parse(strategy))
    left = tuple(unit for unit in plan.from_disk if unit not in mapped)
    return replace(plan, from_disk=left, mapped=(*plan.mapped, *mapped), **changes)
