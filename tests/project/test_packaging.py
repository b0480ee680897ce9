"""What is published: the files of the wheel and the source archive, what they need, and that an empty environment
can use them."""

from __future__ import annotations

import ast
import configparser
import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from email.parser import Parser
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import lema
import lema_kaggle
import lema_reply
from lema.libraries import BOUNDS, DISTRIBUTION, FORMATS, KAGGLE, REPLY, VERBS, distribution
from lema_kaggle.extra import BOUNDS as KAGGLE_BOUNDS
from lema_reply.packages import PACKAGES as FACTS

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "lema"
OTHERS = {REPLY: ("packages/lema-reply", "lema_reply"), KAGGLE: ("packages/lema-kaggle", "lema_kaggle")}
"""Folder and import name of what adds to LEMA."""
COMES_WITH = {"kagglesdk": "kaggle", "pyarrow": "datasets", "urllib3": "requests"}
"""Packages that are imported and come with another one by its own promise."""
WITHOUT_EXTRAS = """
import importlib, pkgutil, sys, lema
for module in pkgutil.walk_packages(lema.__path__, "lema."):
    if not module.name.startswith("lema.__main__"):
        importlib.import_module(module.name)
print(*sorted({name.partition(".")[0] for name in sys.modules}))
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The wheel and the source archive, by the build backend itself."""
    from hatchling.builders.sdist import SdistBuilder
    from hatchling.builders.wheel import WheelBuilder

    folder = tmp_path_factory.mktemp("dist")
    wheel = next(iter(WheelBuilder(str(ROOT)).build(directory=str(folder), versions=["standard"])))
    return Path(wheel), Path(next(iter(SdistBuilder(str(ROOT)).build(directory=str(folder)))))


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The wheels of the packages that add to it, by distribution."""
    from hatchling.builders.wheel import WheelBuilder

    out = str(tmp_path_factory.mktemp("others"))
    made = {name: WheelBuilder(str(ROOT / folder)).build(directory=out, versions=["standard"])
            for name, (folder, _) in OTHERS.items()}  # fmt: skip
    return {name: Path(next(iter(paths))) for name, paths in made.items()}


def metadata_of(path: Path) -> Message:
    """A wheel's METADATA."""
    with zipfile.ZipFile(path) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(wheel.read(name).decode())


@pytest.fixture(scope="module")
def described(built: tuple[Path, Path]) -> Message:
    return metadata_of(built[0])


def requirements(described: Message) -> list[Requirement]:
    return [Requirement(text) for text in described.get_all("Requires-Dist", [])]


def of_extra(requirement: Requirement) -> str | None:
    found = re.search(r"extra == ['\"]([^'\"]+)", str(requirement.marker or ""))
    return found[1] if found else None


def test_an_editable_install_is_the_checkout(tmp_path: Path) -> None:
    from hatchling.builders.wheel import WheelBuilder

    with zipfile.ZipFile(
        next(iter(WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["editable"])))
    ) as it:
        names = [name for name in it.namelist() if ".dist-info/" not in name]
        assert len(names) == 1 and it.read(names[0]).decode().strip() == str(ROOT / "src")


def test_the_wheel_holds_the_package_and_nothing_else(built: tuple[Path, Path]) -> None:
    files = {
        f"lema/{path.relative_to(PACKAGE).as_posix()}"
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(built[0]) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == files
    assert {"lema/py.typed", "lema/data/questions.jsonl", "lema/report/page.html", "lema/report/page.js"} <= names


def test_the_other_wheels_hold_their_packages_and_add_verbs(others: dict[str, Path]) -> None:
    verbs, formats = {}, {}
    for name, (folder, package) in OTHERS.items():
        root = ROOT / folder / "src" / package
        files = {f"{package}/{path.relative_to(root).as_posix()}" for path in root.rglob("*")
                 if path.is_file() and "__pycache__" not in path.parts}  # fmt: skip
        if name == KAGGLE:  # for the notebook that runs them
            files |= {f"lema_kaggle/benchmarks/{path.name}" for path in (ROOT / "benchmarks").glob("*.py")}
        with zipfile.ZipFile(others[name]) as wheel:
            names = {name for name in wheel.namelist() if ".dist-info/" not in name}
            entry = next(name for name in wheel.namelist() if name.endswith("entry_points.txt"))
            groups = configparser.ConfigParser()
            groups.read_string(wheel.read(entry).decode())
            (licence,) = [name for name in wheel.namelist() if name.endswith("/LICENSE")]
            assert wheel.read(licence) == (ROOT / "LICENSE").read_bytes()
        assert {file for file in files if not file.endswith(".pyc")} == names
        verbs |= dict.fromkeys((verb.replace(".", " ") for verb in groups["lema.commands"]), name)
        if "lema.reply_formats" in groups:
            formats |= dict.fromkeys(groups["lema.reply_formats"], name)
        assert metadata_of(others[name])["Name"] == name
    assert verbs == VERBS and formats == FORMATS, "what is said of a verb that is missing"
    assert lema.__version__ == lema_reply.__version__ == lema_kaggle.__version__


def test_the_source_archive_can_be_tested(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for needed in ("src/lema/py.typed", "tests/support/helpers.py", "examples/demo_lema.py", "tasks/common.py",
                   "packages/lema-reply/pyproject.toml", "demonstration/training/train.py", "benchmarks/arms.py",
                   "packages/lema-kaggle/benchmarks/arms.py", "recipes/lema_reply.jinja", "README.md", "LICENSE",
                   "constraints.txt", "Makefile"):  # fmt: skip
        assert needed in names
    caches = ("__pycache__", ".venv", ".mypy_cache", ".pytest_cache", "_build", ".hypothesis")
    assert not [name for name in names if any(part in caches for part in Path(name).parts)]
    weights = [name for name in names if name.endswith((".pyc", ".safetensors", ".gguf"))]
    assert not [name for name in weights if not name.startswith("tests/compat/written_before/")]


def test_what_the_wheel_says_of_itself(built: tuple[Path, Path], described: Message) -> None:
    assert described["Name"] == DISTRIBUTION
    assert described["Version"] == lema.__version__
    assert built[0].name == f"lema_lora-{lema.__version__}-py3-none-any.whl"
    assert described["Requires-Python"] == ">=3.10"
    assert described["License-Expression"] == "MIT"
    with zipfile.ZipFile(built[0]) as wheel:
        entry = next(name for name in wheel.namelist() if name.endswith("entry_points.txt"))
        assert "lema = lema.cli.app:main" in wheel.read(entry).decode()


def test_the_version_is_written_in_one_place() -> None:
    written = (PACKAGE / "__init__.py").read_text(encoding="utf-8")
    assert written.count(f'"{lema.__version__}"') == 1
    assert "\nversion" not in (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("[project.scripts]")[0]


def test_every_requirement_has_a_lower_bound_that_the_tested_versions_keep(
    described: Message, others: dict[str, Path]
) -> None:
    pins = {
        canonicalize_name(name): version
        for name, _, version in (
            line.partition("==")
            for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
            if not line.startswith("#")
        )
    }
    wheels = [described, *map(metadata_of, others.values())]
    declared = [one for wheel in wheels for one in requirements(wheel) if not one.name.startswith(DISTRIBUTION)]
    for requirement in declared:
        assert any(one.operator == ">=" for one in requirement.specifier), f"{requirement} has no lower bound"
        pin = pins.get(canonicalize_name(requirement.name))
        assert pin is not None, f"constraints.txt has no {requirement.name}"
        assert requirement.specifier.contains(pin), f"constraints.txt pins {requirement.name} {pin}, not {requirement}"


HINT = re.compile(r"pip install ([^`\n]*)")
HINTED = ("src", "packages", "docs", "benchmarks", "examples", "tasks", "recipes")


def hinted_files() -> list[Path]:
    kinds = (".py", ".md", ".ipynb", ".yaml", ".html")
    found = [path for folder in HINTED for path in sorted((ROOT / folder).rglob("*")) if path.suffix in kinds]
    return [path for path in found if "_build" not in path.parts] + [*ROOT.glob("*.md"), ROOT / "Makefile"]


def test_hints_name_libraries_with_the_bounds_that_are_declared(described: Message, others: dict[str, Path]) -> None:
    wheels = (*map(metadata_of, others.values()), described)
    declared = {canonicalize_name(one.name): str(one.specifier) for wheel in wheels for one in requirements(wheel)}
    for bounds in (BOUNDS, FACTS, KAGGLE_BOUNDS):
        assert {name: declared[name] for name in bounds} == bounds
    for path in hinted_files():
        for words in HINT.findall(path.read_text(encoding="utf-8")):
            for name, bounds in re.findall(r"'([A-Za-z][\w-]*)([<>=!~][^']*)'", words):
                if canonicalize_name(name) in declared and "index-url" not in words:
                    assert declared[canonicalize_name(name)] == bounds, f"{path}: pip install {words}"


def test_no_hint_installs_a_package_of_somebody_else() -> None:
    """On PyPI `lema` is another project: only a path, a wheel, or this project's own name there may be installed."""
    strangers = re.compile(r"(?<![\w./-])(?:lema)(?:\[[\w,]+\]|[<>=!~][^\s=])")
    for path in hinted_files():
        text = path.read_text(encoding="utf-8")
        said = [text[max(0, m.start() - 30) : m.end() + 30] for m in strangers.finditer(text)]
        said += [words for words in HINT.findall(text) if re.search(r"(?<![\w./-])lema(?![\w/-])", words)]
        assert not said, f"{path}: {said}"


def test_its_own_metadata_is_not_that_of_another_package_of_the_name(tmp_path: Path) -> None:
    assert any(entry.value == "lema.cli.app:main" for entry in distribution().entry_points)
    info = tmp_path / "lema-9.9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lema\nVersion: 9.9\n")
    code = (
        "from lema.libraries import distribution as d\ntry: print(d().version)\nexcept Exception as e: print(repr(e))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(PACKAGE.parent)])},
    )  # fmt: skip
    assert done.returncode == 0 and "9.9" not in done.stdout


def imported(path: Path) -> set[tuple[str, int]]:
    """Top-level names that a file imports from elsewhere, with the line."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {(alias.name.partition(".")[0], node.lineno) for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add((node.module.partition(".")[0], node.lineno))
    return found


def test_every_import_is_declared(described: Message, others: dict[str, Path]) -> None:
    core = {canonicalize_name(requirement.name) for requirement in requirements(described)}
    assert not undeclared(PACKAGE, core, {"lema"})
    for name, (folder, package) in OTHERS.items():  # what LEMA needs, or says how to get, is there
        own = {canonicalize_name(requirement.name) for requirement in requirements(metadata_of(others[name]))}
        assert not undeclared(ROOT / folder / "src" / package, core | own, {"lema", "lema_reply", package})


def undeclared(package: Path, declared: set[str], own: set[str]) -> list[str]:
    """Imports of a package from distributions that are not declared."""
    known = metadata.packages_distributions()
    found = []
    for path in sorted(package.rglob("*.py")):
        for name, line in imported(path):
            if name in sys.stdlib_module_names or name in own:
                continue
            distributions = known.get(COMES_WITH.get(name, name), [])
            if not declared & {canonicalize_name(one) for one in distributions}:
                found.append(f"{path.relative_to(ROOT)}:{line} {name}")
    return found


@pytest.mark.long
def test_no_extra_is_imported_before_it_is_needed(described: Message) -> None:
    needed = {canonicalize_name(one.name) for one in requirements(described) if of_extra(one) is None}
    extras = {canonicalize_name(one.name) for one in requirements(described) if of_extra(one)} - needed
    of_others = {"requests", "psutil", "numpy"}  # what is needed imports these by itself
    done = subprocess.run([sys.executable, "-c", WITHOUT_EXTRAS], capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-2000:]
    known = metadata.packages_distributions()
    loaded = {canonicalize_name(one) for name in done.stdout.split() for one in known.get(name, [])}
    assert not (loaded & extras) - of_others


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_an_empty_environment(built: tuple[Path, Path], tmp_path: Path) -> None:
    """The wheel and what it declares, as pip resolves it today, outside of the checkout. Needs a package index."""
    python = tmp_path / "env" / "bin" / "python"
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    outside |= {"HF_HUB_OFFLINE": "1", "LEMA_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}

    def run(*words: str | Path, timeout: float = 250) -> str:
        done = subprocess.run(
            [str(word) for word in words], cwd=tmp_path, env=outside, capture_output=True, text=True, timeout=timeout
        )
        assert done.returncode == 0, f"{words}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
        return done.stdout

    run(sys.executable, "-m", "venv", tmp_path / "env")
    # The build of torch that this environment was tested with comes first, as `make venv` has it.
    run(python, "-m", "pip", "install", "-q", "torch==2.13.0", timeout=3000)
    run(python, "-m", "pip", "install", "-q", built[0], timeout=3000)
    command = python.with_name("lema")
    place = run(python, "-c", "import lema; print(lema.__version__, lema.__file__)").split()
    assert place[0] == lema.__version__
    assert str(tmp_path) in place[1]
    assert "train" in run(command, "--help")
    assert run(command, "--version").split() == ["lema", lema.__version__]
    assert "0 problems" in run(command, "doctor")

    run(python, "-c", "from lema.prepare.tiny_model import tiny_model; tiny_model('model')")
    questions = run(
        python, "-c", "from importlib.resources import files; print(files('lema.data') / 'questions.jsonl')"
    )
    run(command, "init", "model", questions.strip(), "-o", "run.yaml")
    settings = {"learning_rate": "0.01", "max_steps": "6", "lr_scheduler_type": "constant", "warmup_steps": "0",
                "device": "cpu", "dtype": "float32", "output_dir": "run"}  # fmt: skip
    run(command, "train", "run.yaml", *(word for pair in settings.items() for word in ("--set", "=".join(pair))))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [line["loss"] for line in lines if line.get("type") == "train"]
    assert losses[-1] < losses[0]
    run(command, "generate", "run/final", "-p", "What is gold?", "--max-new-tokens", "4")
    run(command, "report", "run")
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000
    run(command, "merge", "run/final", "merged")
    load = "from transformers import AutoModelForCausalLM as M; print(M.from_pretrained('merged').num_parameters())"
    assert int(run(python, "-c", load)) > 100_000
    typed = tmp_path / "typed.py"
    typed.write_text("import lema\nreveal_type(lema.LemaConfig('x').lora_rank)\n", encoding="utf-8")
    mypy = (sys.executable, "-m", "mypy", "--python-executable", str(python), "--cache-dir", str(tmp_path / "mypy"))
    assert 'Revealed type is "int"' in run(*mypy, typed, timeout=900).replace("builtins.", "")
