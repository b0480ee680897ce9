"""Notebooks for Kaggle: what they carry, and that they run from top to bottom where there is no network."""

from __future__ import annotations

import base64
import importlib.metadata
import io
import json
import lzma
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import nbformat
import pytest
from typer.testing import CliRunner

import lema
import lema_kaggle
import lema_reply
from kaggle_server import TOKEN, Clock, KaggleServer, Kernel, execute, running_server
from lema.cli.app import app
from lema.errors import CheckpointError, ConfigError, DeviceError, KaggleError, LemaError, WeightsNotFoundError
from lema.prepare.tiny_model import tiny_model
from lema_kaggle.inside import Card, Session, collect, find_adapter, from_environment, prepare_card
from lema_kaggle.metadata import LONGEST_HOURS, NOTEBOOKS, metadata
from lema_kaggle.notebook import LARGEST, _benchmark_files, build_notebook, parameters_of
from lema_kaggle.wheel import CARRIED, build_wheel, package_files, root_of

ROOT = Path(__file__).parents[2]
OFFLINE = {"HF_HUB_OFFLINE": "1", "PIP_NO_INDEX": "1", "OMP_NUM_THREADS": "1"}


def code_of(text: str) -> list[str]:
    return ["".join(c["source"]) for c in json.loads(text)["cells"] if c["cell_type"] == "code"]


def unzipped(content: bytes) -> zipfile.ZipFile:
    return zipfile.ZipFile(io.BytesIO(content))


def carried(text: str) -> dict[str, bytes]:
    """The files of the wheels inside a notebook."""
    cell = next(source for source in code_of(text) if source.startswith("WHEELS"))
    names: dict[str, str] = {}
    exec(cell, names)
    wheels = unzipped(lzma.decompress(base64.b85decode(names["WHEELS"])))
    archives = [unzipped(wheels.read(name)) for name in wheels.namelist()]
    return {name: archive.read(name) for archive in archives for name in archive.namelist()}


def install(packages: Sequence[str], where: Path) -> dict[str, bytes]:
    """Let pip install the packages' wheels into a folder; returns their files."""
    files: dict[str, bytes] = {}
    for package in packages:
        name, content = build_wheel(package)
        (where.parent / name).write_bytes(content)
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(where)]
        subprocess.run([*pip, str(where.parent / name)], check=True)
        archive = unzipped(content)
        files |= {name: archive.read(name) for name in archive.namelist()}
    return files


# -- what they carry -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_every_notebook_is_valid_and_small_and_the_same_each_time(name: str) -> None:
    text = build_notebook(name)
    nbformat.validate(nbformat.reads(text, as_version=4))
    assert len(text.encode()) < LARGEST and build_notebook(name) == text
    for source in code_of(text):
        compile(source, name, "exec")
    parameters = parameters_of(text)
    assert parameters["NOTEBOOK"] == repr(name) and float(parameters["HOURS"]) <= LONGEST_HOURS
    assert "TITLE" not in text and NOTEBOOKS[name].title in text
    described = metadata("alice", NOTEBOOKS[name].title, "x.ipynb")
    assert described["enable_internet"] is True and described["enable_gpu"] is True


@pytest.mark.parametrize("name", [n for n, kind in NOTEBOOKS.items() if kind.template == "training"])
def test_training_notebooks_stop_well_before_their_time_and_name_a_recipe(name: str) -> None:
    parameters = parameters_of(build_notebook(name))
    assert 0 < float(parameters["RESERVE"]) <= float(parameters["HOURS"]) / 2
    recipe = parameters["RECIPE"].strip("'")
    assert (Path(lema_reply.__file__).parent / "recipes" / recipe).is_file(), recipe


@pytest.mark.parametrize(
    ("package", "needs"), [("lema", "torch"), ("lema_reply", "lema-lora"), ("lema_kaggle", "kaggle")]
)
def test_a_wheel_inside_is_one_that_pip_installs_and_holds_every_file(package: str, needs: str, tmp_path: Path) -> None:
    assert build_wheel(package) == build_wheel(package)
    where = tmp_path / "there"
    files = install([package], where)
    root = root_of(package)
    left_out = {"__pycache__", "pinned"}  # its generator is inside
    own = {p.relative_to(root) for p in root.rglob("*") if p.is_file() and left_out.isdisjoint(p.parts)}
    there = {p.relative_to(where / package) for p in (where / package).rglob("*") if "__pycache__" not in p.parts}
    assert own <= there and all((where / package / p).read_bytes() == (root / p).read_bytes() for p in own)
    described = files[f"{CARRIED[package].replace('-', '_')}-{lema.__version__}.dist-info/METADATA"].decode()
    assert f"Requires-Dist: {needs}" in described and f"Version: {lema.__version__}" in described


@pytest.mark.slow
def test_an_installed_wheel_builds_notebooks_that_carry_it(tmp_path: Path) -> None:
    where = tmp_path / "there"
    files = install(list(CARRIED), where)
    script = (
        "import sys, lema\nfrom lema_kaggle.notebook import build_notebook\nprint(lema.__file__, file=sys.stderr)\n"
        "sys.stdout.write(build_notebook('proof'))"
    )
    env = {**os.environ, "PYTHONPATH": str(where)}
    ended = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
    assert ended.stderr.strip() == str(where / "lema/__init__.py")
    assert carried(ended.stdout) == files


def test_benchmarks_come_from_inside_a_wheel_or_from_beside_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "benchmarks/published.py" in unzipped(_benchmark_files(None)).namelist()
    package = tmp_path / "site-packages" / "lema_kaggle"
    (package / "benchmarks").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "benchmarks" / "published.py").write_text("inside = True")
    monkeypatch.setattr(lema_kaggle, "__file__", str(package / "__init__.py"))
    assert unzipped(_benchmark_files(None)).namelist() == ["benchmarks/published.py"]
    assert [name for name, _ in package_files("lema_kaggle")] == ["lema_kaggle/__init__.py"]  # others do not carry them


def test_the_benchmark_notebook_needs_benchmarks(tmp_path: Path) -> None:
    with pytest.raises(KaggleError, match="--benchmarks"):
        build_notebook("benchmark", benchmarks=tmp_path)


# -- what they call --------------------------------------------------------------------------------


def card(capability: tuple[int, int] | None, architectures: Sequence[str], count: int = 1) -> Card:
    return Card("2.15.0", count if capability else 0, "a card", capability, tuple(architectures), 16 << 30)


IMAGE = ["sm_70", "sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]


@pytest.mark.parametrize(
    ("capability", "architectures", "runs"),
    [
        ((7, 5), IMAGE, True), ((6, 0), IMAGE, False), ((6, 0), ["sm_50", "sm_60", "sm_70"], True),
        ((6, 1), ["sm_60"], True), ((6, 0), ["sm_61"], False), ((8, 9), IMAGE, True), ((9, 0), ["sm_90a"], True),
        ((12, 1), ["sm_80", "compute_90"], True), ((7, 5), ["compute_90"], False), (None, [], True),
    ],
)  # fmt: skip
def test_which_torch_has_kernels_for_which_card(
    capability: tuple[int, int] | None, architectures: list[str], runs: bool
) -> None:
    assert card(capability, architectures).has_kernels is runs


def test_the_type_a_card_computes_in() -> None:
    assert [card(c, []).dtype for c in ((6, 0), (7, 5), (8, 0), (9, 0), None)] == [
        "float16", "float16", "bfloat16", "bfloat16", "float32",
    ]  # fmt: skip


def test_a_p100_gets_an_older_torch() -> None:
    asked = iter([card((6, 0), IMAGE), card((6, 0), ["sm_50", "sm_60"])])
    commands: list[Sequence[str]] = []
    assert prepare_card(lambda: next(asked), commands.append).has_kernels
    assert "torch>=2.6,<2.15" in commands[-1] and commands[-1][-1].endswith("/cu126")
    assert commands[0][:3] == ["uninstall", "-y", "torch"]  # else pip finds that the image's will do


def test_a_torch_that_cannot_be_replaced_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1))
    with pytest.raises(DeviceError, match=r"pip uninstall .* failed.*internet"):
        prepare_card(lambda: card((6, 0), IMAGE))


def test_a_card_without_any_build_is_said_to_have_none() -> None:
    with pytest.raises(DeviceError, match=r"no kernels for a card .*NvidiaTeslaT4"):
        prepare_card(lambda: card((5, 2), IMAGE), lambda _: None)
    with pytest.raises(DeviceError, match="and neither has"):
        prepare_card(lambda: card((6, 0), IMAGE), lambda _: None)


def test_of_two_cards_one_is_used_and_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    two = prepare_card(lambda: card((7, 5), IMAGE, 2), lambda _: None)
    assert "of 2 cards one is used" in str(two) and os.environ["CUDA_VISIBLE_DEVICES"] == "0"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")


@pytest.mark.long
def test_this_machine_can_be_asked() -> None:
    found = prepare_card(pip=lambda _: pytest.fail("nothing is to be installed"))
    assert found.has_kernels and found.torch


def test_parameters_from_the_environment_keep_their_types() -> None:
    own = {"ROWS": 5, "HOURS": 8.0, "RESUME": False, "MODEL": "", "card": 1, "LIST": []}
    env = {"LEMA_KAGGLE_ROWS": "7", "LEMA_KAGGLE_HOURS": "2", "LEMA_KAGGLE_RESUME": "1", "LEMA_KAGGLE_MODEL": "m"}
    assert from_environment(own, env) == {"ROWS": 7, "HOURS": 2.0, "RESUME": True, "MODEL": "m"}
    with pytest.raises(ConfigError, match=r"LEMA_KAGGLE_ROWS='x' must be a int"):
        from_environment(own, {"LEMA_KAGGLE_ROWS": "x"})


def session_in(folder: Path, **values: Any) -> Session:
    return Session(
        8.0, 1000.0, **{"work": folder / "work", "inputs": folder / "input", "now": lambda: 4600.0, **values}
    )


def checkpoint(folder: Path, step: int) -> Path:
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "max_steps": 9}))
    (folder / "adapter_config.json").write_text("{}")
    (folder / "optimizer.safetensors").write_text("large")
    return folder


def test_training_gets_what_is_left_without_the_reserve(tmp_path: Path) -> None:
    assert session_in(tmp_path).hours_for_training(1.5) == pytest.approx(5.5)
    assert session_in(tmp_path).hours_for_training(9.0) == pytest.approx(1 / 60)


def test_the_newest_attached_checkpoint_is_taken_over(tmp_path: Path) -> None:
    session = session_in(tmp_path)
    with pytest.raises(CheckpointError, match="--resume-from"):
        session.take_over()
    checkpoint(tmp_path / "input/lema-proof/run/checkpoint-3", 3)
    checkpoint(tmp_path / "input/notebooks/alice/lema-proof-2/run/checkpoint-12", 12)
    (tmp_path / "input/notebooks/alice/lema-proof-2/run/metrics.jsonl").write_text("{}\n")
    assert session.take_over() == 12 and session.take_over() is None
    assert sorted(p.name for p in session.run_folder.iterdir()) == ["checkpoint-12", "metrics.jsonl"]
    assert session.adapter() == (session.run_folder / "checkpoint-12", False)


def test_a_finished_run_leaves_no_checkpoint_and_a_stopped_one_its_newest(tmp_path: Path) -> None:
    session = session_in(tmp_path)
    for step in (3, 6):
        checkpoint(session.run_folder / f"checkpoint-{step}", step)
    result = collect(session, *session.adapter(), {"notebook": "proof"})
    assert result == {"status": "stopped", "global_step": 6, "max_steps": 9, "hours": 1.0, "notebook": "proof"}
    assert [p.name for p in session.run_folder.iterdir()] == ["checkpoint-6"]
    assert sorted(p.name for p in (session.work / "adapter").iterdir()) == ["adapter_config.json", "trainer_state.json"]
    checkpoint(session.run_folder / "final", 9)
    assert collect(session, *session.adapter(), {})["status"] == "finished"
    assert list(session.run_folder.iterdir()) == [] and find_adapter(session.work) == session.work / "adapter"


def test_base_weights_are_no_outputs(tmp_path: Path) -> None:
    session = session_in(tmp_path)
    checkpoint(session.run_folder / "final", 9)
    (session.work / "merged").mkdir()
    (session.work / "merged/model-00001-of-00002.safetensors").write_text("")
    with pytest.raises(LemaError, match=r"base weights.*merged/model-00001"):
        collect(session, *session.adapter(), {})


def test_no_adapter_and_no_checkpoint_are_said(tmp_path: Path) -> None:
    with pytest.raises(WeightsNotFoundError, match="attach a kernel"):
        find_adapter(tmp_path)
    with pytest.raises(CheckpointError, match="stopped before its first save"):
        session_in(tmp_path).adapter()
    with pytest.raises(ConfigError, match=r"no recipe 'x'.*lema_reply"):
        session_in(tmp_path).recipe("x")


def test_what_comes_after_training_is_given_up_when_the_time_is_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    session = session_in(tmp_path)
    monkeypatch.setattr(session, "lema", lambda *words, **options: session.python(*words, **options))
    assert session.lema_in_time("-c", "print('done')") is True
    session.hours = 1.0  # and it began an hour ago
    assert session.lema_in_time("-c", "import time; print('begun', flush=True); time.sleep(200)") is False
    assert "given up: the 1 hours" in capsys.readouterr().out


def installing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, versions: dict[str, str], fails: bool = False, name: str = "proof"
) -> list[list[str]]:
    """The pip commands of the cells that install, on a machine that has other versions of some packages."""
    run, version, commands = subprocess.run, importlib.metadata.version, []

    def pip(command: list[str], **options: Any) -> Any:
        if "--target" in command:
            return run(command, **options)
        commands.append(command)
        return subprocess.CompletedProcess(command, int(fails))

    cells = code_of(build_notebook(name))
    first = next(number for number, text in enumerate(cells) if text.startswith("WHEELS ="))
    names: dict[str, Any] = {}
    with monkeypatch.context() as patched:
        patched.setattr(subprocess, "run", pip)
        patched.setattr(importlib.metadata, "version", lambda name: versions.get(name) or version(name))
        patched.setattr(sys, "path", list(sys.path))
        patched.setenv("PYTHONPATH", "")
        patched.setattr(tempfile, "tempdir", str(tmp_path))
        for source in cells[first : first + 2]:
            exec(compile(source, "cell", "exec"), names)
    return commands


@pytest.mark.long
def test_what_the_image_lacks_is_installed_and_torch_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    here = importlib.metadata.version("torch")
    assert installing(monkeypatch, tmp_path, {}) == []
    (command,) = installing(monkeypatch, tmp_path, {"transformers": "4.53.3"})
    assert command[-1].startswith("transformers") and ">=5.17" in command[-1]
    kept = Path(command[command.index("--constraint") + 1])
    assert kept.read_text() == f"torch=={here}\n"
    (command,) = installing(monkeypatch, tmp_path, {"torchao": "0.10.0"})  # beside it PEFT fails
    assert command[-4:] == ["uninstall", "--yes", "--quiet", "torchao"]
    (command,) = installing(monkeypatch, tmp_path, {"pint": "0.1"})  # for facts
    assert command[-1].startswith("pint")
    assert installing(monkeypatch, tmp_path, {"pint": "0.1", "matplotlib": "1.0"}, name="inference") == []


def test_packages_that_cannot_be_had_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"transformers.*--no-internet.*--dataset"):
        installing(monkeypatch, tmp_path, {"transformers": "4.53.3"}, fails=True)


def test_a_verb_that_fails_fails_the_cell(tmp_path: Path) -> None:
    with pytest.raises(LemaError, match="ended with status 2"):
        session_in(tmp_path).lema("no-such-verb")


# -- they run --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.mark.timeout(900)
@pytest.mark.long
def test_the_inference_notebook_runs_with_the_package_it_carries(model: Path, tmp_path: Path) -> None:
    notebook = nbformat.reads(build_notebook("inference", {"MAX_NEW_TOKENS": 2, "COMPARE": False}), as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell("import lema; print('it is', lema.__file__)"))
    said = execute(nbformat.writes(notebook), tmp_path, {**OFFLINE, "LEMA_KAGGLE_ADAPTER": str(model)})
    assert "it is" in said and str(ROOT) not in said.partition("it is")[2], "it is the checkout's, not the notebook's"
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 5 and all(0 < answer["tokens"] <= 2 for answer in answers)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_benchmark_notebook_runs(tmp_path: Path) -> None:
    models = ",".join(str(tiny_model(tmp_path / kind, kind)) for kind in ("llama", "gpt2"))
    values = {"MODELS": models, "TOKENS": "8", "STEPS": 3, "BUDGETS": "2GB"}
    work = tmp_path / "work"
    work.mkdir()
    execute(build_notebook("benchmark", values), work, OFFLINE, timeout=1800)
    report = json.loads(next((work / "benchmarks").glob("published-*.json")).read_text())
    assert len(report["runs"]) == 2 * 4 and report["failures"] == []
    assert len(report["tables"][0]["rows"]) == 8 and all(row[2] > 0 for row in report["tables"][0]["rows"])


# -- and all the way -------------------------------------------------------------------------------


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[KaggleServer]:
    home = os.environ["HOME"]
    with running_server(monkeypatch, tmp_path / "home") as running:
        monkeypatch.setenv("LEMA_CACHE", str(Path(home) / ".cache/lema"))
        yield running


def machine(work: Path, inputs: dict[str, Kernel]) -> Any:
    """A machine that executes a kernel's newest notebook, with the outputs of its sources attached."""

    def run(kernel: Kernel) -> None:
        sent = kernel.versions[-1]
        folder = work / kernel.ref.replace("/", "-") / str(len(kernel.versions))
        attached = folder / "input"
        for ref in sent.get("kernelDataSources", ()):
            for name, content in inputs[ref].files.items():
                path = attached / ref.rpartition("/")[2] / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
        place = folder / "working"
        place.mkdir(parents=True)
        # what Kaggle has at /kaggle/input; everything else is as it is there
        text = sent["text"].replace("Session(HOURS, BEGAN)", "Session(HOURS, BEGAN, inputs=pathlib.Path('../input'))")
        try:
            kernel.log.append(execute(text, place, OFFLINE, timeout=800))
        finally:
            kernel.files = {p.relative_to(place).as_posix(): p.read_bytes() for p in place.rglob("*") if p.is_file()}

    return run


def kaggle(monkeypatch: pytest.MonkeyPatch, clock: Clock, *words: str) -> Any:
    monkeypatch.setenv("KAGGLE_API_TOKEN", TOKEN)
    monkeypatch.setattr("lema_kaggle.retry_policy.RetryPolicy", lambda **given: clock.retry_policy(say=given["say"]))
    return CliRunner().invoke(app, ["kaggle", *words])


def said_in_chat(adapter: Path) -> str:
    """What `lema chat` says, in a process of its own, to one question; without its greeting."""
    words = ["chat", str(adapter), "--max-new-tokens", "4", "--temperature", "0"]
    ended = subprocess.run(
        [sys.executable, "-m", "lema", *words],
        input="What is LEMA?\nquit\n",
        capture_output=True,
        text=True,
        check=True,
    )
    greeting, _, rest = ended.stdout.partition("\n")
    assert "with its adapter" in greeting, ended.stdout
    return rest.replace(">", "").strip()


def small(model: Path, **more: Any) -> list[str]:
    values = {"MODEL": model, "ROWS": 48, "MAX_STEPS": 4, "EVAL_LIMIT": 2, **more}
    return [word for name, value in values.items() for word in ("--set", f"{name}={value}")]


@pytest.mark.slow
@pytest.mark.xdist_group("kaggle")
@pytest.mark.timeout(1800)
def test_run_from_build_to_an_adapter_that_answers(
    server: KaggleServer, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.runner = machine(tmp_path / "machine", server.kernels)
    clock = Clock(waits_for=server.changed)
    folder = tmp_path / "proof"
    done = kaggle(monkeypatch, clock, "run", "proof", "-o", str(folder), *small(model))
    log = "".join(server.kernels["alice/lema-proof"].log)
    assert done.exit_code == 0, f"{done.output}\n{log[-6000:]}"
    out = folder / "output"
    result = json.loads((out / "result.json").read_text())
    assert (result["status"], result["global_step"]) == ("finished", 4)
    assert {"eval.json", "eval.png", "lema-proof.log"} <= {p.name for p in out.iterdir()}
    assert (out / "run/metrics.jsonl").is_file() and not list(out.rglob("model*.safetensors"))
    assert json.loads((out / "adapter/adapter_config.json").read_text())["base_model_name_or_path"] == str(model)
    assert said_in_chat(out / "adapter")


@pytest.mark.slow
@pytest.mark.xdist_group("kaggle")
@pytest.mark.timeout(1800)
def test_a_kernel_goes_on_where_the_one_before_had_to_stop(
    server: KaggleServer, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.runner = machine(tmp_path / "machine", server.kernels)
    clock = Clock(waits_for=server.changed)
    folder = tmp_path / "proof"
    words = small(model, MAX_STEPS=100_000, SETTINGS="max_train_hours=0.03 eval_strategy=no")  # enough to get going
    both = kaggle(monkeypatch, clock, "run", "proof", "-o", str(folder), "--parts", "2", *words)
    logs = {ref: "".join(kernel.log) for ref, kernel in server.kernels.items()}
    assert both.exit_code == 0, f"{both.output}\n{logs}"
    assert list(logs) == ["alice/lema-proof", "alice/lema-proof-2"]
    assert server.kernels["alice/lema-proof-2"].versions[0]["kernelDataSources"] == ["alice/lema-proof"]
    first, second = (json.loads((folder / n / "result.json").read_text()) for n in ("output", "output-lema-proof-2"))
    assert (first["status"], second["status"]) == ("stopped", "stopped")
    assert 0 < first["global_step"] < second["global_step"]
    assert f"--set MODEL={model} --set ROWS=48" in both.stdout
    assert f"goes on after step {first['global_step']}" in logs["alice/lema-proof-2"]
    assert f"lema kaggle run proof --resume-from alice/lema-proof-2 -o {folder}" in both.stdout


@pytest.mark.slow
@pytest.mark.xdist_group("kaggle")
@pytest.mark.timeout(1800)
def test_a_notebook_that_fails_says_where(
    server: KaggleServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.runner = machine(tmp_path / "machine", server.kernels)
    clock = Clock(waits_for=server.changed)
    words = ["--set", "ADAPTER=/nowhere"]
    failed = kaggle(monkeypatch, clock, "run", "inference", "-o", str(tmp_path / "inference"), *words)
    assert failed.exit_code == 1 and "alice/lema-inference failed" in failed.stderr
    assert "/nowhere" in failed.stderr and "lema kaggle logs alice/lema-inference" in failed.stderr
