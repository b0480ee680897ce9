"""One flat YAML: names, types, lines, aliases, overrides, and everything that is refused."""

from __future__ import annotations

import os
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from lema import LemaConfig
from lema.data import DataConfig
from lema.errors import ConfigError, LemaError
from lema.training.config import TrainingConfig
from lema.training.meanings import understood
from lema.training.run_config import ALIASES, RunConfig, owner_of
from lema.typed import kinds_of

MODEL = "model_name_or_path: somewhere\n"


def read(tmp_path: Path, text: str | bytes, **options: Any) -> RunConfig:
    path = tmp_path / "run.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return RunConfig.from_yaml(path, **options)


def test_every_setting_has_one_owner() -> None:
    owners = [set(kinds_of(owner)) for owner in (LemaConfig, DataConfig, TrainingConfig)]
    assert sum(map(len, owners)) == len(set.union(*owners))
    assert all(owner_of(name) for name in ALIASES.values())
    assert not set(ALIASES) & set.union(*owners)


def test_what_is_written_reads_back(tmp_path: Path) -> None:
    run = RunConfig.from_dict({
        "model_name_or_path": "m", "dtype": "bf16", "strategy": "Resident", "sample_prompts": ["a: b", "- ü\n"],
        "report_to": ["wandb", "tensorboard"], "learning_rate": "1e-4", "train_file": "x.jsonl", "warmup_steps": 0.1,
    })  # fmt: skip
    assert RunConfig.from_yaml(run.save(tmp_path)) == run
    assert run.lema.learning_rate == 1e-4
    assert list(tmp_path.iterdir()) == [tmp_path / "run.yaml"]


def test_spellings_of_values(tmp_path: Path) -> None:
    text = MODEL + "learning_rate: 1e-4\nmax_steps: 1e3\nlora_alpha: 8\npacking: yes\nsave_total_limit: null\n"
    run = read(tmp_path, text + "sample_prompts: Hello, you\nlora_target_modules: [q_proj, v_proj]\neval_size: 0.1\n")
    assert run.lema.learning_rate == 1e-4
    assert (run.training.max_steps, type(run.training.max_steps)) == (1000, int)
    assert type(run.lema.lora_alpha) is float
    assert run.data.packing is True
    assert run.training.save_total_limit is None
    assert run.training.sample_prompts == ["Hello, you"]
    assert run.lema.lora_target_modules == ["q_proj", "v_proj"]


def test_aliases_and_overrides(tmp_path: Path) -> None:
    text = MODEL + "per_device_train_batch_size: 3\ncutoff_len: 77\nwarmup_ratio: 0.1\nlr_scheduler: cosine\n"
    overrides = {"max_length": "88", "learning_rate": "3e-4", "sample_prompts": "Hi, you", "report_to": "none"}
    run = read(tmp_path, text, overrides=overrides, defaults={"ram_budget": "auto", "batch_size": 9})
    assert (run.lema.batch_size, run.lema.max_seq_length, run.lema.ram_budget) == (3, 88, "auto")
    assert run.training.warmup_steps == 0.1
    assert run.training.sample_prompts == ["Hi, you"]
    run = read(tmp_path, text, overrides={"sample_prompts": '["a, b", "c"]', "max_grad_norm": "none"})
    assert run.training.sample_prompts == ["a, b", "c"]
    assert run.lema.max_grad_norm is None
    assert read(tmp_path, MODEL + "lr_scheduler_type: constant_with_warmup").training.lr_scheduler_type == "constant"


HOSTILE: list[tuple[str | bytes, str]] = [
    ("", "is empty"),
    ("# nothing\n", "is empty"),
    ("- a\n- b\n", "one setting a line"),
    ("just words\n", "one setting a line"),
    (b"\xff\xfe\x00", "not UTF-8|not valid YAML"),
    (MODEL + "a: [1, 2\n", r"line \d.*not valid YAML"),
    (MODEL + "\tdtype: float32\n", "line 2.*not valid YAML"),
    ("learning_rate: 1e-4\n", "model_name_or_path is missing"),
    (MODEL + "learning_rat: 1\n", "line 2: unknown setting 'learning_rat'; did you mean 'learning_rate'"),
    (MODEL + "bf16: true\n", "line 2.*dtype: bfloat16"),
    (MODEL + "zzzzqqq: 1\n", "unknown setting 'zzzzqqq'"),
    (MODEL + "seed: 1\nseed: 2\n", "line 3: seed is set twice, first on line 2"),
    (MODEL + "max_length: 1\nmax_seq_length: 2\n", "the same setting"),
    (MODEL + "learning_rate: fast\n", "line 2: learning_rate='fast' must be a number"),
    (MODEL + "learning_rate: .nan\n", "line 2: learning_rate=nan must be a finite"),
    (MODEL + "weight_decay: .inf\n", "weight_decay=inf must be a finite"),
    (MODEL + "learning_rate: -1\n", "line 2: learning_rate=-1"),
    (MODEL + "seed: 1.5\n", "seed=1.5 must be a whole number"),
    (MODEL + "seed: true\n", "seed=True must be a whole number"),
    (MODEL + "batch_size:\n", "line 2: batch_size must be a whole number, and is empty"),
    (MODEL + "packing: maybe\n", "packing='maybe' must be true or false"),
    (MODEL + "packing: 1\n", "packing=1 must be true or false"),
    (MODEL + "train_file: [a, b]\n", "train_file=.*must be a path, as text"),
    (MODEL + "train_file: 2024-01-01\n", "train_file=.*must be a path, as text"),
    (MODEL + "report_to: [1]\n", "report_to=.*must be a list of texts"),
    (MODEL + "report_to: wandbb\n", "did you mean 'wandb'"),
    (MODEL + "lora: {r: 3}\n", "line 2: unknown setting 'lora'"), (MODEL + "lora_rank: {r: 3}\n", "lora_rank="),
    (MODEL + "sample_prompts: [[a]]\n", "not nested"),
    (MODEL + "1: 2\n", "line 2: the name of a setting"),
    (MODEL + "dtype: !!python/object/apply:os.system ['true']\n", "line 2: dtype has no plain value"),
    (MODEL + "run_name: !!timestamp nonsense\n", "run_name has no plain value"),
    (MODEL + "label_smoothing_factor: 1\n", "line 2: label_smoothing_factor=1.0 must be 0 or more and less than 1"),
    (MODEL + "warmup_ratio: 3\n", "warmup_ratio=3 must be"),
    (MODEL + "num_train_epochs: 0\n", "num_train_epochs=0.0 must be more than 0"),
    (MODEL + "adam_beta2: 1\n", "adam_beta2=1.0 must be 0 or more and less than 1"),
    (MODEL + "eval_strategy: epochs\n", "did you mean 'epoch'"),
    (MODEL + "eval_strategy: yes\n", "eval_strategy='yes' is unknown: choose one of auto, no"),
    (MODEL + "strategy: no\n", "strategy=False"),
    (MODEL + f"seed: {2**70}\n", "line 2: seed=1180591620717411303424 is too large"),
    (MODEL + f"learning_rate: {2**70}\n", "learning_rate=.* is too large"),
    (MODEL + f"max_steps: 0x{'f' * 4300}\n", "line 2: max_steps=a number of 17200 bits is too large"),
    (MODEL + f"weight_decay: 0x{'f' * 4300}\n", "line 2: weight_decay=a number of 17200 bits is too large"),
    (MODEL + f"run_name: 0x{'f' * 4300}\n", "line 2: run_name=a number of 17200 bits must be text"),
    (MODEL + "batch_size: 1e300\n", "batch_size=1e.300 is too large"),
    (MODEL + "sample_prompts: [0x" + "f" * 4300 + "]\n", "a list with such a number must be"),
    (MODEL + "lora_target_modules: 'q_(proj'\n", r"line 2: lora_target_modules: 'q_\(proj' is not a regular"),
    (MODEL + "exclude_modules: ['*']\n", r"line 2: exclude_modules: '\*' is not a regular"),
    (MODEL + "sequence_len: 3\n", "here it is max_seq_length"),
    (MODEL + "global_batch_size: 3\n", "batch_size x gradient_accumulation_steps"),
    ("[" * 5000, "nested too deeply"),
    ("a: " + "{b: " * 5000, "nested too deeply"),
    ("- " * 9000, "nested too deeply"),
    (MODEL + "load_best_model_at_end: true\neval_strategy: 'no'\n", "needs evaluations"),
    (MODEL + "save_total_limit: 0\n", "save_total_limit=0 must be 1 or more"),
    (MODEL + "on_save_error: ignore\n", "on_save_error='ignore' is unknown"),
    (MODEL + "seed: " + "9" * 5000 + "\n", "seed"),
    (MODEL + "run_name: " + "x" * (1 << 20), "too many"),
    ("a: &a [x]\nb: &b [*a, *a]\n" + MODEL, "not nested|unknown setting"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "said"), HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_files(tmp_path: Path, text: str | bytes, said: str) -> None:
    with pytest.raises(LemaError, match=said) as caught:
        read(tmp_path, text)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("strategy", ["no", "off", "false", "No", "OFF", "'no'", "none"])
def test_words_that_yaml_takes_for_false(tmp_path: Path, strategy: str) -> None:
    text = MODEL + f"eval_strategy: {strategy}\nsave_strategy: {strategy}\nreport_to: {strategy}\npacking: off\n"
    run = read(tmp_path, text + "run_name: on\nsample_prompts: [yes, No, y]\nshuffle: no\nhead: chunked\n")
    assert (run.training.eval_strategy, run.training.save_strategy, run.training.report_to) == ("no", "no", [])
    assert (run.data.packing, run.data.shuffle, run.training.run_name) == (False, False, "on")
    assert run.training.sample_prompts == ["yes", "No", "y"]
    given = read(tmp_path, MODEL, overrides={"eval_strategy": strategy.strip("'"), "report_to": "no", "packing": "no"})
    assert (given.training.eval_strategy, given.training.report_to) == ("no", [])
    assert TrainingConfig(eval_strategy=False).eval_strategy == "no"  # type: ignore[arg-type]
    assert RunConfig.from_yaml(run.save(tmp_path / "again")) == run


def test_lists_with_commas(tmp_path: Path) -> None:
    run = read(tmp_path, MODEL + "report_to: wandb, tensorboard\nlora_target_modules: q_proj, v_proj\n")
    assert run.training.report_to == ["wandb", "tensorboard"]
    assert run.lema.lora_target_modules == ["q_proj", "v_proj"]
    pattern = r"model\.layers\.\d{1,2}\.self_attn\.(q|v)_proj"
    for given in ({"lora_target_modules": pattern}, {"target_modules": pattern}):
        assert read(tmp_path, MODEL, overrides=given).lema.lora_target_modules == pattern
    run = read(tmp_path, MODEL + f"lora_target_modules: '{pattern}'\nexclude_modules: up_proj, .*\\.3\\..*\n")
    assert run.lema.lora_target_modules == pattern
    assert run.lema.exclude_modules == r"(?:(?:.*\.)?up_proj)|(?:.*\.3\..*)"
    assert run.replace(lora_rank=3).lema == LemaConfig(**{**run.lema.to_dict(), "lora_rank": 3})
    assert read(tmp_path, MODEL, overrides={"exclude_modules": '["a", "b"]'}).lema.exclude_modules == ["a", "b"]
    assert read(tmp_path, MODEL, overrides={"exclude_modules": "[ab]_proj"}).lema.exclude_modules == "[ab]_proj"


def test_numbers_on_the_command_line(tmp_path: Path) -> None:
    for given in ({"seed": "9" * 5000}, {"seed": str(2**70)}, {"max_steps": "1e300"}, {"ram_budget": "1" * 400},
                  {"sample_prompts": "[" * 100_000}, {"sample_prompts": f"[{'1' * 5000}]"}):  # fmt: skip
        with pytest.raises(ConfigError) as caught:
            read(tmp_path, MODEL, overrides=given)
        assert len(str(caught.value)) < 400


def test_pipes_and_devices_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    for path in (tmp_path / "pipe.yaml", Path("/dev/zero"), Path("/dev/stdin")):
        if path.exists() and not path.is_file():
            with pytest.raises(ConfigError, match="is a pipe or a device, not a file"):
                RunConfig.from_yaml(path)


def test_what_others_mean_otherwise_is_said(tmp_path: Path) -> None:
    text = MODEL + "micro_batch_size: 2\nbatch_size: 4\ngradient_accumulation_steps: 2\n"
    said = understood(read(tmp_path, text, overrides={"max_steps": "5"}))
    assert [line.partition("=")[0] for line in said] == ["max_steps", "micro_batch_size"]
    assert "A step has 8 rows whatever it is" in said[1] and "Axolotl" in said[1]
    assert understood(read(tmp_path, MODEL)) == []


def test_auto_is_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lema.config.default_device", lambda: "xpu")
    assert LemaConfig("m", device="auto").device == "xpu"
    assert LemaConfig("m", device="Auto").to_dict()["device"] == "xpu"


def test_hostile_places(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.yaml", tmp_path):
        with pytest.raises(ConfigError, match="lema init"):
            RunConfig.from_yaml(path)


def test_a_bad_override_is_not_blamed_on_the_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^learning_rate=-1.0") as caught:
        read(tmp_path, MODEL + "learning_rate: 1\n", overrides={"learning_rate": "-1"})
    assert "line" not in str(caught.value)
    for overrides in ({"nosuch": "1"}, {"sample_prompts": "[1"}, {"packing": "2"}, {"learning_rate": "x"}):
        with pytest.raises(ConfigError):
            read(tmp_path, MODEL, overrides=overrides)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: LemaConfig("m", learning_rate="x"), "learning_rate='x' must be a number"),  # type: ignore[arg-type]
        (lambda: LemaConfig("m", use_lora=1), "use_lora=1 must be true or false"),  # type: ignore[arg-type]
        (lambda: LemaConfig("m", lora_dropout=None), "lora_dropout must be a number, and is empty"),  # type: ignore[arg-type]
        (lambda: LemaConfig("m", max_grad_norm=[1]), "max_grad_norm"),  # type: ignore[arg-type]
        (lambda: TrainingConfig(max_steps="many"), "max_steps='many' must be a whole number"),  # type: ignore[arg-type]
        (lambda: TrainingConfig(sample_prompts=[1]), "sample_prompts"),  # type: ignore[list-item]
        (lambda: DataConfig(packing="no"), "packing"),  # type: ignore[arg-type]
        (lambda: LemaConfig("m", lora_alpha=np.bool_(True)), "lora_alpha=.*True.* must be a number"),
        (lambda: LemaConfig("m", max_grad_norm=np.array(2.5)), "max_grad_norm=.* must be a number, or none"),
        (lambda: LemaConfig("m", learning_rate=Fraction(10**400)), "too large a number"),
        (lambda: LemaConfig(""), "^model_name_or_path='' must be a path, and is empty"),
        (lambda: LemaConfig("m", output_dir=b"x"), "^output_dir=b'x' must be a path, as text"),
    ],
)
def test_types_are_checked_in_python_too(make: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make()


def test_texts_that_are_numbers_become_numbers() -> None:
    assert LemaConfig("m", learning_rate="1e-4", lora_rank="8").learning_rate == 1e-4  # type: ignore[arg-type]
    assert LemaConfig("m", lora_rank="8").lora_rank == 8  # type: ignore[arg-type]


@pytest.mark.parametrize("number", [Decimal("2.5"), Fraction(5, 2), np.float32(2.5), np.float64(2.5)])
def test_real_numbers_of_any_kind_become_floats(number: Any) -> None:
    assert (LemaConfig("m", lora_alpha=number).lora_alpha, type(LemaConfig("m", lora_alpha=number).lora_alpha)) == (
        2.5, float,
    )  # fmt: skip
    assert type(LemaConfig("m", lora_rank=np.int64(4)).lora_rank) is int


def test_paths_that_earlier_versions_left_empty_are_none() -> None:
    config = LemaConfig.from_dict({"model_name_or_path": "m", "gbi_path": "", "adapter_name_or_path": ""})
    assert config.gbi_path is None and config.adapter_name_or_path is None
    run = RunConfig.from_dict({"model_name_or_path": "m", "train_file": "", "eval_file": "", "chat_template": ""})
    assert (run.data.train_file, run.data.eval_file, run.data.chat_template) == (None, None, None)


@dataclass
class OfSomebodyElse(LemaConfig):
    """A plain dataclass below ours, with a field and a check of its own."""

    lora_rank: int = 8
    more: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.more += 1


def test_a_plain_dataclass_below_ours_is_checked() -> None:
    made = OfSomebodyElse("m", dtype="bf16", lora_alpha="3", more=4)  # type: ignore[arg-type]
    assert (made.dtype, made.lora_alpha, made.lora_rank, made.more) == ("bfloat16", 3.0, 8, 5)
    for wrong in ({"lora_rank": 0}, {"dtype": "int3"}, {"lora_target_modules": []}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            OfSomebodyElse("m", **wrong)


def test_resolved_paths_are_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").mkdir()
    run = RunConfig.from_dict({"model_name_or_path": "m", "train_file": "none.jsonl", "output_dir": "o"}).resolved()
    assert run.lema.model_name_or_path == str(tmp_path / "m")
    assert run.lema.output_dir == str(tmp_path / "o")
    assert run.data.train_file == "none.jsonl", "not there, so perhaps not a path"
    hub = RunConfig.from_dict({"model_name_or_path": "org/name"}).resolved()
    assert hub.lema.model_name_or_path == "org/name"
    assert yaml.safe_load((hub.save(tmp_path)).read_text())["model_name_or_path"] == "org/name"
