"""What must hold on a device, on a small model and in its own process: gradients are PEFT's, memory stays flat.

It knows how the two libraries are compared; it knows nothing of time or of large models. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .arms import SEED, import_all
from .counters import Device, status_mib
from .steps import LEARNING_RATE, LORA_ALPHA, TARGETS

TOLERANCE = 1e-5
"""Of a gradient in fp32, relative to its norm."""
RANK, ROWS, TOKENS = 8, 2, 64
SAMPLES = 20
"""Of memory, over the steps."""


def variants(layers: int) -> dict[str, dict[str, Any]]:
    """Settings under which gradients are compared."""
    return {
        "streamed": {},
        "all kept, activations too": {"device_layers": layers, "ram_layers": layers, "keep_activations": layers},
        "one row at a time": {"micro_batch_size": 1, "loss_chunk_size": 32},
        "boundaries and optimizer on the host, head in chunks": {
            "boundaries": "host",
            "optimizer_place": "host",
            "head": "chunked",
            "loss_chunk_size": 32,
        },
    }


def lema_model(folder: Path, device: str, **changes: Any) -> Any:
    """A small LEMA model in fp32."""
    import lema

    settings: dict[str, Any] = {
        "device": device, "dtype": "float32", "lora_rank": RANK, "lora_alpha": LORA_ALPHA, "batch_size": ROWS,
        "lora_target_modules": list(TARGETS), "max_seq_length": TOKENS, "save_steps": 0,
    }  # fmt: skip
    return lema.LemaModel(lema.LemaConfig(str(folder), **{**settings, **changes}))


def adapters(model: Any) -> dict[str, Any]:
    """LoRA parameters by PEFT's names."""
    return {name: parameter for name, parameter in model.named_parameters() if "lora_" in name}


def gradients_of_lema(model: Any, ids: Any) -> tuple[float, dict[str, Any]]:
    """Loss and gradients of one step that changes nothing."""
    import torch

    named = adapters(model.hf_model)
    optimizer = torch.optim.SGD(list(named.values()), lr=0.0)
    found: dict[str, Any] = {}

    def look(*_: Any) -> None:
        held = [parameter for group in optimizer.param_groups for parameter in group["params"]]  # or their masters
        found.update({name: p.grad.detach().cpu().clone() for name, p in zip(named, held, strict=True)})

    optimizer.register_step_pre_hook(look)
    _, loss = model.get_trainer(optimizer).train_step(ids, ids)
    return loss, found


def plain_gradients(folder: Path, device: str, values: dict[str, Any], ids: Any) -> tuple[float, dict[str, Any]]:
    """Loss and gradients of transformers and PEFT with the same adapters."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
    lora = LoraConfig(r=RANK, lora_alpha=LORA_ALPHA, target_modules=list(TARGETS), task_type="CAUSAL_LM")
    model = get_peft_model(base.to(device), lora).train()
    named = adapters(model)
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(values[name])
    loss = model(input_ids=ids.to(device), labels=ids.to(device), use_cache=False).loss
    loss.backward()
    return float(loss), {name: parameter.grad.detach().cpu() for name, parameter in named.items()}


def parity(options: argparse.Namespace) -> dict[str, Any]:
    """The largest relative difference of any adapter's gradient to PEFT's, for every variant."""
    shape = import_all(options.folder)
    import torch

    torch.manual_seed(SEED)
    ids = torch.randint(0, shape["vocab_size"], (ROWS, TOKENS))
    values: dict[str, Any] = {}
    plain: tuple[float, dict[str, Any]] | None = None
    result: dict[str, Any] = {}
    for name, changes in variants(shape["num_hidden_layers"]).items():
        model = lema_model(options.folder, options.device, **changes)
        with model, torch.no_grad():
            for key, parameter in adapters(model.hf_model).items():
                if key not in values:  # B begins as zero, which hides mistakes
                    values[key] = torch.randn(parameter.shape) * 0.1
                parameter.copy_(values[key])
            with torch.enable_grad():
                loss, found = gradients_of_lema(model, ids)
        plain = plain or plain_gradients(options.folder, options.device, values, ids)
        apart = {key: float((found[key] - own).norm() / own.norm()) for key, own in plain[1].items()}
        result[name] = {
            "tensors": len(apart),
            "same_bits": sum(torch.equal(found[key], own) for key, own in plain[1].items()),
            "largest_difference": max(apart.values()),
            "loss_difference": abs(loss - plain[0]) / abs(plain[0]),
        }
    worst = max(one["largest_difference"] for one in result.values())
    return {"variants": result, "largest_difference": worst, "holds": worst <= TOLERANCE}


def flat(options: argparse.Namespace) -> dict[str, Any]:
    """Memory over many steps, and how much more the last quarter of them took than the second quarter."""
    shape = import_all(options.folder)
    import torch

    device = Device(options.device)
    torch.manual_seed(SEED)
    ids = torch.randint(0, shape["vocab_size"], (ROWS, TOKENS))
    model = lema_model(options.folder, options.device)
    trainer = model.get_trainer(torch.optim.AdamW(model.get_trainable_parameters(), lr=LEARNING_RATE))
    every = max(options.steps // SAMPLES, 1)
    samples: dict[str, list[float | None]] = {"host_mib": [], "device_mib": []}
    steps = []
    for number in range(1, options.steps + 1):
        trainer.train_step(ids, ids)
        if number % every == 0:
            device.synchronize()
            steps.append(number)
            samples["host_mib"].append(status_mib("VmRSS"))
            samples["device_mib"].append(device.allocated_mib())
    return {
        "steps": steps,
        **samples,
        **{f"{name.removesuffix('_mib')}_growth_mib": growth(values) for name, values in samples.items()},
    }


def growth(values: Sequence[float | None]) -> float | None:
    """Median of the last quarter less that of the second one; None where nothing was counted."""
    known = [value for value in values if value is not None]
    quarter = max(len(known) // 4, 1)
    return statistics.median(known[-quarter:]) - statistics.median(known[quarter : 2 * quarter]) if known else None


def main(arguments: Sequence[str] | None = None) -> None:
    """Check one thing and print what was found."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.gpu_checks", description=__doc__.splitlines()[0])
    made.add_argument("kind", choices=("parity", "flat"))
    made.add_argument("--folder", type=Path, required=True)
    made.add_argument("--device", default="cuda")
    made.add_argument("--steps", type=int, default=200, help="of flat")
    options = made.parse_args(arguments)
    print(json.dumps(parity(options) if options.kind == "parity" else flat(options)), flush=True)


if __name__ == "__main__":
    main()
