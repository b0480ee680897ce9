"""What a model is found to be: one page, without its weights, from `lema doctor MODEL` and `lema plan`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lema.cli.app import app
from lema.config import LemaConfig
from lema.run.found import look_at

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.tiny_families import save_tiny, tiny_config

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def gemma3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gemma3") / "model"
    save_tiny("gemma3", folder)
    return folder


def config_of(folder: Path, **settings: Any) -> LemaConfig:
    return LemaConfig(str(folder), device="cpu", lora_target_modules="all-linear", **settings)


def only_config(family: str, folder: Path, **changes: Any) -> Path:
    """A folder with nothing but a config.json."""
    (folder / "config.json").write_text(json.dumps({**tiny_config(family).to_dict(), **changes}))
    return folder


def test_a_composite_says_its_layers_its_towers_and_where_adapters_go(gemma3: Path) -> None:
    found = look_at(config_of(gemma3))
    assert found.family == "gemma3 (Gemma3ForConditionalGeneration)"
    assert found.dtype == "float32"
    assert found.layers_path == "model.language_model.layers"
    assert found.layers == {
        "Gemma3DecoderLayer (sliding_attention)": 3,
        "Gemma3DecoderLayer (full_attention)": 1,
    }
    assert set(found.left_out) == {"model.vision_tower", "model.multi_modal_projector"}
    kind, nbytes = found.left_out["model.vision_tower"]
    assert kind == "SiglipVisionModel"
    assert nbytes > 0
    assert found.head == "128 x 64, tied to the embedding"
    assert found.targets == dict.fromkeys(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), 4
    )
    assert "all of the model's are there" in found.weights
    assert found.refused == []


def test_a_configuration_is_enough(tmp_path: Path) -> None:
    found = look_at(config_of(only_config("qwen3_5_moe", tmp_path)))
    assert sum(found.layers.values()) == 4
    assert len(found.layers) == 2
    assert "not here" in found.weights
    assert found.refused == []


@pytest.mark.parametrize(
    ("family", "changes", "settings", "reason"),
    [
        ("llama", {"quantization_config": {"quant_method": "aqlm"}}, {}, "quantised with aqlm"),
        ("llama4_text", {}, {}, "exclude_modules: \\[router\\]"),
        ("t5gemma2", {}, {}, "an encoder with a decoder"),
        ("llama", {}, {"exclude_modules": "nothing_of_all"}, ""),
    ],
)
def test_what_is_refused_is_said_with_its_reason(
    tmp_path: Path, family: str, changes: dict[str, Any], settings: dict[str, Any], reason: str
) -> None:
    found = look_at(config_of(only_config(family, tmp_path, **changes), **settings))
    assert len(found.refused) == bool(reason)
    if reason:
        with pytest.raises(AssertionError, match=reason):
            raise AssertionError(found.refused[0])


def test_doctor_prints_the_page_and_its_status_is_the_verdict(gemma3: Path, tmp_path: Path) -> None:
    runner = CliRunner()
    good = runner.invoke(app, ["doctor", str(gemma3), "--set", "lora_target_modules=q_proj"])
    assert good.exit_code == 0, good.output
    for words in (
        "family     gemma3 (Gemma3ForConditionalGeneration)",
        "layers     4 at model.language_model.layers: 3 Gemma3DecoderLayer (sliding_attention)",
        "model.vision_tower (SiglipVisionModel,", "on q_proj x 4;", "refused    nothing: it trains",
    ):  # fmt: skip
        assert words in good.output
    only_config("llama4_text", tmp_path)
    bad = runner.invoke(app, ["doctor", str(tmp_path), "--set", "lora_target_modules=all-linear", "--json"])
    assert bad.exit_code == 1
    assert "router" in json.loads(bad.output)["refused"][0]


def test_a_plan_says_what_the_model_is(gemma3: Path) -> None:
    said = CliRunner().invoke(
        app,
        ["plan", str(gemma3), "--hardware", "rtx4060-8g,ram=8GB,disk=1GB/s", "--max-seq-length", "16", "--json",
         "--set", "lora_target_modules=all-linear"],
    )  # fmt: skip
    assert said.exit_code == 0, said.output
    found = json.loads(said.output)["found"]
    assert found["family"] == "gemma3 (Gemma3ForConditionalGeneration)"
    assert "model.vision_tower" in found["left_out"]
    assert found["targets"]["q_proj"] == 4
