"""What a plan says of a model of codes: stored and decoded bytes, and what decoding takes of a step."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from families import save_tiny, tiny_config
from helpers import lema_model, padded_batch
from lema.doctor.machine import codes_of
from lema.models.registry import get_adapter
from lema.planning.decoding import decode_rate
from lema.planning.footprint import Footprint
from lema.planning.hardware import Hardware
from lema.planning.plan import Choices, LayerCost, LossCost, ModelSizes, Workload
from lema.planning.planner import make_plan
from lema.planning.sizes import model_sizes
from lema.planning.step_time import estimate
from lema.prepare import prepare
from lema.run.planned import make
from lema.storage.index import GlobalBinaryIndex

MACHINE = "ram=8GB,disk=1GB/s,flops=1T,name=machine"
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_use_double_quant": True}
SHAPE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "num_key_value_heads": 4}


def test_decoding_is_part_of_both_sweeps_and_may_be_the_bound() -> None:
    hardware = Hardware.parse(MACHINE)
    plain = ModelSizes(
        units=(100_000_000,) * 8, scratch=10, head=0, head_streams=False, vocab=1000, embedding=0, rest=0, lora=1000
    )
    work = Workload(
        1, 64, 10_000, lambda rows: LayerCost(1, 1, 1, 10**9, 10**9, 1), lambda positions: LossCost(1, 10**6)
    )
    choices = Choices(device_layers=0, ram_layers=0)
    plan = make_plan(plain, work, hardware, dtype="float32", ram_budget=None, vram_budget=None, choices=choices)
    without = estimate(plan, Footprint(plain, work, "cpu"), hardware, "float32")
    coded = replace(plain, decoded=(200_000_000,) * 8, decode_bytes_per_s=1e9)
    found = estimate(plan, Footprint(coded, work, "cpu"), hardware, "float32")
    assert without.decode_seconds == 0.0 and found.decode_seconds == pytest.approx(2 * 8 * 0.2)
    assert found.compute_seconds == pytest.approx(without.compute_seconds + found.decode_seconds)
    slow = estimate(plan, Footprint(replace(coded, decode_bytes_per_s=1e7), work, "cpu"), hardware, "float32")
    assert slow.bound_by == "decoding" and slow.step_seconds > found.step_seconds


def test_sizes_of_the_files_and_of_the_configuration_agree(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "source", **SHAPE)
    folder = prepare(tmp_path / "source", tmp_path / "codes", dtype="bfloat16", quantize="nf4").path
    config = json.loads((folder / "config.json").read_text())
    adapter = get_adapter("llama", config)
    adapter.configure(torch.bfloat16)
    with GlobalBinaryIndex(folder) as gbi:
        stored = model_sizes(adapter, gbi=gbi)
        rate = decode_rate(adapter.unit_sources(gbi), torch.device("cpu"))
    configured = model_sizes(adapter)
    values = 2 * (2 * 256 * 256 + 2 * 256 * 256 + 3 * 256 * 512)
    assert set(stored.decoded) == set(configured.decoded) == {values}
    assert stored.scratch >= values and configured.scratch >= values
    assert configured.units[0] == pytest.approx(stored.units[0], rel=0.12), "tables and texts beside codes are small"
    assert stored.units[0] < 0.31 * values
    assert rate is not None and 0 < rate < 1e13


def test_the_doctor_finds_codes_and_measures_them(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "source", **SHAPE)
    assert codes_of(tmp_path / "source", "cpu") is None
    folder = prepare(tmp_path / "source", tmp_path / "codes", dtype="bfloat16", quantize="int8").path
    codes = codes_of(folder, "cpu")
    assert codes is not None and 0.5 * codes.values < codes.stored < 0.6 * codes.values and codes.rate > 0


def test_a_plan_without_weights_counts_codes_as_configured(tmp_path: Path) -> None:
    plans = []
    for settings in (None, NF4):
        config = tiny_config("llama", **SHAPE).to_dict() | ({"quantization_config": settings} if settings else {})
        path = tmp_path / f"{settings is None}" / "config.json"
        path.parent.mkdir()
        path.write_text(json.dumps({**config, "architectures": ["LlamaForCausalLM"]}))
        values = {"model_name_or_path": str(path), "dtype": "bfloat16", "ram_budget": "4GB"}
        plans.append(make({**values, "batch_size": 1, "max_seq_length": 16}, MACHINE))
    plain, coded = plans
    assert not coded.weights and coded.plan.estimate is not None and coded.plan.estimate.decode_seconds > 0
    asked = make({**plain.config.to_dict(), "quantize": "nf4"}, MACHINE)
    assert asked.plan.host_bytes == coded.plan.host_bytes
    assert plain.plan.estimate is not None and plain.plan.estimate.decode_seconds == 0


def test_resident_codes_stay_codes(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "source", **SHAPE)
    folder = prepare(tmp_path / "source", tmp_path / "codes", dtype="bfloat16", quantize="nf4").path
    with lema_model(folder, dtype="bfloat16", strategy="resident") as model:
        assert model.memory.plan.in_ram == (0, 1, 2, 3) and not model.memory.plan.mapped
        trainer = model.get_trainer()
        for _ in range(2):
            trainer.train_step(padded_batch())
        assert trainer.last_step.bytes_read == 0
    with lema_model(tmp_path / "source", strategy="resident") as model:
        assert model.memory.plan.mapped == (0, 1, 2, 3)


def test_scratch_is_one_layers_and_no_more(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "source", **SHAPE)
    folder = prepare(tmp_path / "source", tmp_path / "codes", dtype="bfloat16", quantize="nf4").path
    with lema_model(folder, dtype="bfloat16") as streamed:
        scratch = streamed.memory._scratch.buffer.numel()
        layer = max(state.layout.scratch_nbytes for state in streamed.memory._layers if state.layout is not None)
        assert layer <= scratch < layer + 4096
