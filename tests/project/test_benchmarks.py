"""Every benchmark from its command line to its report, on a model of a few thousand parameters.

Arms run inside the test's process, where importing torch once is enough; one runs as a process of its own, as all
of them do otherwise. Figures mean nothing here; that reports have them, and that ratios are those of the runs, does.
"""

from __future__ import annotations

import contextlib
import gc
import gzip
import importlib.util
import io
import itertools
import json
import math
import statistics
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from lema.planning.hardware import Hardware
from lema_reply.score import Share

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import (
    __main__,
    arms,
    counters,
    dial,
    folders,
    gpu,
    gpu_report,
    larger_than_memory,
    make_model,
    memory,
    memory_group,
    options,
    plots,
    processes,
    proof,
    report,
    scaling,
    small,
    speed,
    tables,
    trace,
)

SECONDS, ABOVE = "median_step_seconds", "above_floor_mib"
COMMON = ["--tokens", "16", "--rank", "2", "--steps", "3"]
Content = dict[str, Any]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in bf16."""
    folder = tmp_path_factory.mktemp("tiny")
    total = make_model.make_model(folder, make_model.PRESETS["tiny"])
    assert total == (folder / "model.safetensors").stat().st_size
    return folder


def in_process(
    command: Sequence[str], timeout: float | None = None, join: Callable[[], None] | None = None
) -> subprocess.CompletedProcess[str]:
    """What `processes.execute` does, in this process and without a memory group."""
    out, err = io.StringIO(), io.StringIO()
    code: Any = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
        try:
            importlib.import_module(command[2]).main(list(command[3:]))
        except SystemExit as ended:
            code = ended.code
        except Exception:
            traceback.print_exc()
            code = 1
    return subprocess.CompletedProcess(list(command), code, out.getvalue(), err.getvalue())


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Arms run in this process, on a machine that needs no measuring."""
    from lema.planning import probe

    rates = {"float32": 1e11, "bfloat16": 2e11}
    machine = Hardware("a test", "cpu", 0, 8 << 30, 1e9, math.inf, rates, "measured")
    monkeypatch.setattr(probe, "measure", lambda device, path=None: machine)
    monkeypatch.setenv("LEMA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(processes, "execute", in_process)
    peaks = itertools.count(400.0, 3.5)  # this process's own would not move any more after the first arm
    monkeypatch.setattr(arms, "peak_mib", lambda: next(peaks))
    yield
    gc.collect()


def run(benchmark: Any, out: Path, *arguments: str, status: int | None = 0) -> Content:
    """Run a benchmark and return its JSON, after a look at the other files."""
    ended = benchmark.main([*arguments, "--out", str(out)])
    found = list(out.glob("*.json"))
    assert len(found) == 1
    content: Content = json.loads(found[0].read_text())
    assert status is None or ended == status, (content["failures"], content["checks"])
    text = found[0].with_suffix(".md").read_text()
    picture = found[0].with_suffix(".png")
    if importlib.util.find_spec("matplotlib") is not None:
        assert f"![plot]({picture.name})" in text and picture.read_bytes().startswith(b"\x89PNG")
    assert content["complete"] and content["command"] in text and content["environment"]["versions"]["torch"] in text
    assert all(f"| {r['label']} |" in text for r in content["runs"]), "a run is not listed"
    return content


def value(content: Content, label: str, key: str) -> float:
    """A number of the arm's only run."""
    found = [r for r in content["runs"] if r["label"] == label]
    assert len(found) == 1 and found[0]["failure"] is None, (label, found)
    number = found[0]["numbers"]
    for part in key.split("."):
        number = number[part]
    return float(number)


def figure(content: Content, name: str) -> dict[str, Any]:
    """A ratio of the report."""
    return next(r for r in content["ratios"] if r["name"] == name)


def verdicts(content: Content) -> dict[str, str]:
    """Every checked claim with its verdict."""
    return {check["claim"]: check["verdict"] for check in content["checks"]}


def assert_ratio(content: Content, name: str, key: str, over: str, *under: str) -> None:
    """The report's ratio is that of its runs, to the largest of the arms under it."""
    expected = value(content, over, key) / max(value(content, label, key) for label in under)
    assert figure(content, name)["pairs"] == [pytest.approx(expected)]
    assert figure(content, name)["median"] == pytest.approx(expected)


@pytest.mark.long
def test_speed_measures_the_limits_in_the_same_run(model: Path, tmp_path: Path, here: None) -> None:
    content = run(speed, tmp_path, *COMMON, "--shape", "tiny", "--folder", str(model), "--pairs", "1", status=None)
    assert_ratio(content, "step time, LEMA / PEFT", SECONDS, speed.LEMA, speed.PLAIN)
    name = "step time, LEMA / max(computation, reads)"
    assert_ratio(content, name, SECONDS, speed.LEMA, speed.COMPUTE, speed.IO)
    name = "step time, half on disk / max(computation, reads)"
    assert_ratio(content, name, SECONDS, speed.HALF, speed.COMPUTE, speed.HALF_IO)
    assert set(verdicts(content).values()) == {"holds"}
    assert value(content, speed.LEMA, "loads_per_step") == 2 * (6 - 2)
    assert value(content, speed.HALF, "loads_per_step") == 2 * (3 - 2) + 1  # and the head
    for timed in (r["numbers"] for r in content["runs"] if r["numbers"]):
        assert timed[SECONDS] == pytest.approx(statistics.median(timed["timed_seconds"]), abs=1e-5)
    size = (model / "model.safetensors").stat().st_size
    rate = size / value(content, speed.READER, SECONDS)
    assert value(content, speed.READER, "bytes_per_second") == pytest.approx(rate)
    against_dd = figure(content, "bytes a second, reader / dd")
    if not any(line.startswith("dd,") for line in content["failures"]):  # this file system grants direct reads
        assert_ratio(content, against_dd["name"], "bytes_per_second", speed.READER, speed.DD)
        assert against_dd["verdict"] == ("met" if against_dd["median"] >= 0.85 else "missed")


def test_arms_alternate_and_ratios_are_medians_over_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([10.0, 1.0, 2.0, 30.0, 50.0, 1.0])
    monkeypatch.setattr(
        processes, "run_arm", lambda arm, pair, timeout: processes.Run(arm.label, pair, 0, {SECONDS: next(seconds)})
    )
    both = [processes.Arm(label, "lema", Path(), {}) for label in "ab"]
    cleared: list[str] = []
    runs = list(processes.alternate(both, 3, 1.0, lambda arm: cleared.append(arm.label)))
    assert "".join(run.label for run in runs) == "".join(cleared) == "abbaab"
    found = report.ratio(runs, "x", SECONDS, "a", "b", target=20)
    assert found.pairs == (10.0, 15.0, 50.0) and found.median == 15.0 and found.verdict == "met"
    assert report.ratio(runs, "x", SECONDS, "a", ("a", "b")).pairs == (1.0, 1.0, 1.0)
    assert report.ratio(runs, "x", SECONDS, "a", "nobody").verdict == "not measured"
    assert report.ratio(runs, "x", SECONDS, "a", "b", target=20, at_least=True).verdict == "missed"


@pytest.mark.long
def test_memory_compares_prediction_and_measurement(model: Path, tmp_path: Path, here: None) -> None:
    content = run(memory, tmp_path, "--cases", "tiny:2x16", "--shape-budget", "3GB", "--rank", "2", "--steps", "2",
                  status=None)  # fmt: skip
    lema, budget, checkpointing = (f"tiny 2x16: {arm}" for arm in (memory.LEMA, memory.BUDGET, memory.CHECKPOINTING))
    predicted = value(content, budget, "plan.predicted_mib")
    assert_ratio(content, "tiny 2x16: peak, LEMA / PEFT+checkpointing", ABOVE, lema, checkpointing)
    found = figure(content, "tiny 2x16: measured / predicted, LEMA with the budget")["median"]
    assert found == pytest.approx(value(content, budget, ABOVE) / predicted)
    row = next(row for row in content["tables"][0]["rows"] if row[0] == budget)
    assert row[3:5] == [predicted, value(content, budget, ABOVE)] and row[2] == pytest.approx(3e9 / 2**20)
    assert value(content, lema, "plan.predicted_mib") > 0  # asked of a plan afterwards
    assert verdicts(content)["tiny 2x16: the peak is within the budget in every run"] == "holds"


@pytest.mark.long
def test_scaling_checks_that_bytes_do_not_grow(model: Path, tmp_path: Path, here: None) -> None:
    content = run(scaling, tmp_path, *COMMON, "--pairs", "1", "--shape", "tiny", "--folder", str(model),
                  "--micro-batches", "1,4", "--layers", "3,4,6", "--lengths", "16,32",
                  "--base-layers", "4")  # fmt: skip
    assert set(verdicts(content).values()) == {"holds"} and len(content["checks"]) == 3
    name = "step time, 4 micro-batches / 1 micro-batches"
    assert_ratio(content, name, SECONDS, "4 micro-batches", "1 micro-batches")
    each = value(content, "4 micro-batches", SECONDS) / value(content, "1 micro-batches", SECONDS) / 4
    name = "step time a token, 4 micro-batches / 1 micro-batches"
    assert figure(content, name)["median"] == pytest.approx(each)
    unit = value(content, "4 layers", "engine_bytes_per_step") / 4
    assert value(content, "6 layers", "engine_bytes_per_step") == 8 * unit
    rows = content["tables"][0]["rows"]
    assert [row[0] for row in rows] == [1, 4] and rows[0][3] == rows[1][3] == pytest.approx(4 * unit / 1e6)
    assert rows[1][2] == pytest.approx(4 * 16 / value(content, "4 micro-batches", SECONDS))


def test_a_claim_that_does_not_hold_is_said_and_fails() -> None:
    numbers = {1: 100.0, 2: 101.0}
    runs = [processes.Run(f"{n} tokens", 0, 0, numbers={scaling.BYTES: size}) for n, size in numbers.items()]
    made = report.Report("x", "x", "x", runs)
    made.checks = [scaling.same(made, scaling.TOKENS, (1, 2)), scaling.same(made, scaling.TOKENS, (2, 4))]
    assert [check.verdict for check in made.checks] == ["DOES NOT HOLD", "could not be checked"]
    assert made.failed()
    over = processes.Run("x", 0, 0, numbers={"above_floor_mib": 11.0, "ram_budget_bytes": 10 << 20})
    assert dial.within_budget([over], "x", "x").holds is False


@pytest.mark.long
def test_dial_goes_from_the_smallest_budget_to_peft(model: Path, tmp_path: Path, here: None) -> None:
    content = run(dial, tmp_path, *COMMON, "--pairs", "1", "--shape", "tiny", "--folder", str(model),
                  "--budgets", "1MB,3GB,auto", status=1)  # fmt: skip
    assert [r["label"] for r in content["runs"]] == ["LEMA, 1MB", "LEMA, 3GB", "LEMA, auto", "PEFT"]
    refused = content["runs"][0]["failure"]  # the plan's own words, without this machine's folders
    assert "does not fit into ram_budget" in refused and str(model) not in refused
    assert_ratio(content, "step time, largest budget (auto) / PEFT", SECONDS, "LEMA, auto", "PEFT")
    assert figure(content, "step time, smallest budget (1MB) / PEFT")["verdict"] == "not measured"
    assert value(content, "LEMA, auto", "ram_budget_bytes") > 2**28  # the number that 'auto' stood for
    found = verdicts(content)
    assert found["3GB: the peak is within the budget in every run"] == "holds"
    assert found["1MB: the peak is within the budget in every run"] == "could not be checked"


@pytest.mark.long
def test_small_compares_the_arms(tmp_path: Path, here: None) -> None:
    folder = tmp_path / "model"
    make_model.make_model(folder, make_model.PRESETS["tiny"], "float32")
    content = run(small, tmp_path, *COMMON, "--pairs", "1", "--folder", str(folder), status=None)
    assert_ratio(content, "step time, LEMA / PEFT+checkpointing", SECONDS, small.LEMA, small.CHECKPOINTING)
    assert_ratio(content, "step time, LEMA / the same with exact loss", SECONDS, small.LEMA, small.EXACT)
    used = {run["label"]: run["options"] for run in content["runs"]}
    assert set(used[small.LEMA]) == {"dtype", "tokens", "rank", "steps"}, "nothing else is set"
    assert set(verdicts(content).values()) == {"holds"}


@pytest.mark.long
def test_larger_than_memory_reads_once_where_all_is_in_ram(model: Path, tmp_path: Path, here: None) -> None:
    content = run(larger_than_memory, tmp_path, *COMMON, "--pairs", "1", "--shape", "tiny", "--folder", str(model),
                  "--limit", "900MB", "--ram-budget", "2GB", status=None)  # fmt: skip
    streaming, resident = larger_than_memory.STREAMING, larger_than_memory.RESIDENT
    assert_ratio(content, "step time, streaming limited / all in RAM", SECONDS, streaming, resident)
    assert value(content, resident, "engine_bytes_per_step") == 0 and value(content, resident, "plan.in_ram") == 6
    assert value(content, streaming, "ram_budget_bytes") == 2e9
    assert set(verdicts(content).values()) == {"holds"}
    assert "--limit 900MB" in content["command"] and str(model) not in content["command"]
    row = content["tables"][0]["rows"][0]
    assert row[0] == streaming and row[2] == value(content, streaming, "loads_per_step")
    if larger_than_memory.why_no_group(900 * 10**6) is None:
        assert row[7] == pytest.approx(900e6 / 2**20)
    old = larger_than_memory.parser().parse_args(["--limit-mb", "1240"])
    assert old.limit_mb == 1240


@pytest.fixture
def dry_run(here: None, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The arguments of a dry run of the GPU benchmark, shortened."""
    monkeypatch.setattr(gpu, "SIMULATED", gpu.Scale("cpu", "ram_budget", ("1GB",), "tiny", (), "tiny", "600MB", 8))
    return ["--device", "simulated", *COMMON]


@pytest.mark.long
def test_gpu_dry_run_goes_through_every_stage(dry_run: list[str], tmp_path: Path) -> None:
    content = run(gpu, tmp_path, *dry_run, status=None)
    base = tmp_path / f"gpu_simulated-{content['date']}"
    assert not content["failures"] and "NOT A MEASUREMENT" in base.with_suffix(".md").read_text()
    labels = [r["label"] for r in content["runs"]]
    assert labels == ["parity", "tiny: LEMA, 1GB", "tiny: PEFT+checkpointing", "tiny: PEFT",
                      "tiny: LEMA, all on the card", "tiny: LEMA, 600MB, 600MB of RAM", "flat"]  # fmt: skip
    assert_ratio(content, "tiny: LEMA, 1GB / PEFT, step time", SECONDS, labels[1], labels[3])
    bound = value(content, labels[1], "plan.estimated_compute_seconds")
    bound = max(bound, value(content, labels[1], "engine_bytes_per_step") / 1e9)  # the disk of `here`
    expected = value(content, labels[1], SECONDS) / bound
    assert figure(content, "tiny: LEMA, 1GB, step time / bound")["median"] == pytest.approx(expected)
    assert {v for claim, v in verdicts(content).items() if "gradients" in claim} == {"holds"}
    assert value(content, "flat", "host_growth_mib") < 64
    row = next(row for row in content["tables"][0]["rows"] if row[0] == labels[1])
    assert row[6] == pytest.approx(16 / value(content, labels[1], SECONDS))
    with gzip.open(f"{base}-trace.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    assert {event["args"]["name"] for event in events if event["name"] == "process_name"} >= {"compute", "wait"}
    assert value(content, labels[1], "trace.compute_seconds") <= value(content, labels[1], "trace.step_seconds")


@pytest.mark.long
def test_gpu_results_survive_a_kill_and_end_in_time(
    dry_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = iter(range(2))

    def killed(arm: processes.Arm, pair: int, timeout: float) -> processes.Run:
        assert timeout <= 600
        if next(first, None) is None:
            raise KeyboardInterrupt
        return processes.run_arm(arm, pair, timeout)

    monkeypatch.setattr(gpu, "run_arm", killed)
    with pytest.raises(KeyboardInterrupt):
        gpu.main([*dry_run, "--out", str(tmp_path)])
    left = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert [r["label"] for r in left["runs"]] == ["parity", "tiny: LEMA, 1GB"] and not left["complete"]
    assert left["runs"][1]["numbers"][SECONDS] > 0

    monkeypatch.setattr(gpu, "run_arm", processes.run_arm)
    assert gpu.main([*dry_run, "--minutes", "0", "--out", str(tmp_path)]) == 0
    none = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert none["complete"] and not none["runs"] and {"left out: parity", "left out: tiny model"} <= set(none["facts"])


def test_gpu_report_judges_what_only_a_card_has() -> None:
    limits = {"link_bytes_per_s": 10e9, "disk_bytes_per_s": 2e9}
    lema = {SECONDS: 3.0, gpu_report.VRAM: 4000.0, "vram_budget_bytes": 4 * 10**9, "copied_bytes_per_step": 20e9,
            "engine_bytes_per_step": 1e9, "plan": {"estimated_compute_seconds": 1.0}, "losses": [5.0]}  # fmt: skip
    runs = [
        processes.Run("7B: LEMA, 4GB", 0, 0, lema),
        processes.Run("7B: PEFT", 0, 0, {SECONDS: 1.5, gpu_report.VRAM: 16000.0, "losses": [5.2]}),
        processes.Run("7B: PEFT+checkpointing", 0, 1, failure="out of memory"),
    ]
    lema.update(gpu_report.bounds(runs[0], limits))
    assert lema["bound_seconds"] == 2.0 and lema["bound_by"] == "link"
    made = report.Report("x", "x", "x", runs)
    gpu_report.judge(made, on_card=True, tokens=512)
    found = {one.name: one.median for one in made.ratios}
    assert found == {
        "7B: LEMA, 4GB / PEFT, step time": 2.0,
        "7B: LEMA, 4GB / PEFT, VRAM": 0.25,
        "7B: LEMA, 4GB, step time / bound": 1.5,
    }
    assert [check.holds for check in made.checks] == [False, False]  # 4000 MiB are more than 4 GB; losses differ
    assert made.tables[0].rows[0][6] == pytest.approx(512 / 3)


def test_trace_brings_the_device_onto_the_clock_of_the_reads(tmp_path: Path) -> None:
    events = [
        {"ph": "X", "cat": "user_annotation", "name": trace.STEP, "ts": 5_000_000.0, "dur": 2e6},
        {"ph": "X", "cat": "kernel", "name": "matmul", "ts": 5_500_000.0, "dur": 250_000.0, "args": {"stream": 7}},
        {"ph": "X", "cat": "gpu_memcpy", "name": "HtoD", "ts": 5_100_000.0, "dur": 1e6, "args": {"stream": 13}},
        {"ph": "X", "cat": "cpu_op", "name": "aten::mm", "ts": 5_000_000.0, "dur": 1e6},
        {"ph": "M", "name": "process_name"},
    ]

    class Profiled:
        def export_chrome_trace(self, path: str) -> None:
            Path(path).write_text(json.dumps({"traceEvents": events}))

    found = trace._of_device(Profiled(), started=100.0)
    assert [(one.kind, one.row, round(one.start, 6), round(one.end, 6)) for one in found] == [
        ("compute", "stream 7", 100.5, 100.75),
        ("copy", "stream 13", 100.1, 101.1),
    ]


def test_listening_leaves_the_engine_as_it_was(model: Path, here: None) -> None:
    from benchmarks import steps

    chosen = arms.parser().parse_args(["lema_io", "--folder", str(model), "--dtype", "bfloat16", "--tokens", "16"])
    made = steps.driver(chosen, None)
    made.step()
    before = made.counted()["bytes_read"]
    with trace.listening(made.memory) as spans:
        made.step()
    read = made.counted()["bytes_read"] - before
    assert sum(int(one.name.split()[0]) for one in spans if one.kind == trace.DISK) == read > 0
    assert sum(one.kind == trace.COMPUTE for one in spans) == 12 + (0 if made.memory.head_chunks else 1)
    assert not {"acquire", "release"} & set(vars(made.memory)) and "_read" not in vars(made.memory._reader)
    assert counters.Device("cpu").numbers() == {}


def test_rows_separate_what_overlaps_and_are_as_few_as_can_be() -> None:
    assert trace.rows([(0, 2), (1, 3), (2, 4), (2.5, 3.5), (3, 5)]) == [0, 1, 0, 2, 1]
    assert trace.rows([]) == []


@pytest.mark.long
def test_an_arm_is_a_process_of_its_own_with_its_own_peak(model: Path, tmp_path: Path) -> None:
    arm = processes.Arm("real", "lema", model, {"dtype": "bfloat16", "tokens": 16, "rank": 2, "steps": 2})
    limit = 2 * 10**9
    if larger_than_memory.why_no_group(limit) is None:
        arm = processes.Arm(arm.label, arm.kind, arm.folder, arm.options, limit)
    ended = processes.run_arm(arm, 0, 120)
    assert ended.numbers is not None, ended.failure
    numbers = ended.numbers
    assert numbers["peak_mib"] == pytest.approx(numbers["floor_mib"] + numbers[ABOVE], abs=0.3)
    assert 200 < numbers["floor_mib"] < numbers["peak_mib"] < 1500
    if arm.limit_bytes is not None:
        assert ended.group is not None and 0 < (ended.group["peak_bytes"] or 0) <= limit
        killed = processes.run_arm(processes.Arm("killed", arm.kind, model, arm.options, 120 << 20), 0, 60)
        assert killed.numbers is None and "killed by SIGKILL" in (killed.failure or "")
        assert "for want of memory" in (killed.failure or "")
        assert not list(memory_group.ROOT.glob("**/lema-benchmark-*"))


def test_without_matplotlib_the_report_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    made = report.Report("none", "none", "none", panels=[plots.Panel("p", "x", "y", {"a": {1: 2.0}})])
    assert "matplotlib is not installed" in report.save(made, tmp_path)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".md"]


def test_shapes_have_the_size_that_is_announced(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    announced = make_model.parameters(make_model.PRESETS["tiny"]) * 2
    assert 0 <= (model / "model.safetensors").stat().st_size - announced < 16384  # the header
    assert make_model.parameters(make_model.PRESETS["7b"]) == 6_738_415_616
    monkeypatch.setattr(folders, "SPARE_BYTES", 1 << 60)
    with pytest.raises(processes.NotPrepared, match="GB of disk"), folders.model_folder("7b", tmp_path / "new"):
        pass
    assert not (tmp_path / "new").exists()


def _share(hits: int, of: int) -> Content:
    return Share(hits, of).to_json()


def _arm(strict: Content | None, right: Content) -> Content:
    return {"strict": strict, "right": right, "categories": {"maths": right}, "unsettled": {"says_low": None}}


def _proof_numbers(strict: int = 320, right: int = 90, tail: float = 0.4, same: int = 50) -> dict[str, Content]:
    losses = [2.0] * 90
    return {
        "train-lema": {
            "losses": losses + [0.4] * 10, "tokens": 9000, "bytes_read": 10**9, "step_seconds": 50.0,
            "peak_bytes": 2**29,
        },
        "train-peft": {"losses": losses + [tail] * 10},
        "ask-lema": {
            "questions": 320,
            "arms": {
                "base, in the format": _arm(_share(0, 320), _share(5, 300)),
                "base, asked plainly": _arm(None, _share(100, 300)),
                "adapter": _arm(_share(strict, 320), _share(right, 300)),
            },
        },
        "ask-peft": {
            "questions": 320,
            "arms": {
                "PEFT adapter": _arm(_share(319, 320), _share(100, 300)),
                "LEMA's adapter in PEFT": _arm(_share(319, 320), _share(100, 300)),
            },
        },
        "merge": {
            "questions": 50, "same_answers": same, "largest_logit_difference": 1e-5, "largest_logit": 20.0
        },
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "refuted"),
    [
        ({}, None),
        ({"strict": 300}, "the adapter keeps it"),
        ({"right": 60}, "the adapter: right answers"),
        ({"tail": 0.5}, "loss curve"),
        ({"same": 49}, "greedy answer"),
    ],
    ids=str,
)
def test_the_proof_holds_only_where_its_numbers_do(changed: dict[str, Any], refuted: str | None) -> None:
    found = report.Report("proof", "", "")
    proof.judge(found, _proof_numbers(**changed))
    failed = [check.claim for check in found.checks if not check.holds]
    assert len(failed) == (refuted is not None) and all(str(refuted) in claim for claim in failed)
    shown = changed.get("strict", 320)
    assert found.tables[0].rows[0][3] == f"{shown / 320:.1%} ({shown} of 320)" and found.facts


def test_a_part_of_the_proof_that_is_missing_is_said() -> None:
    found, numbers = report.Report("proof", "", ""), _proof_numbers()
    del numbers["ask-peft"], numbers["merge"]
    proof.judge(found, numbers)
    assert [check.verdict for check in found.checks].count("could not be checked") == 5


def test_options_are_checked_and_shown_as_written(capsys: pytest.CaptureFixture[str]) -> None:
    assert options.size("1240MiB") == 1240 << 20 and options.written_budget("auto") == "auto"
    made = options.common_options("m", "d", 1, 2)
    made.add_argument("--cases", type=options.several(memory.case), default=memory.DEFAULT)
    assert "--cases smollm2:1x128,smollm2:4x128" in options.command_line("m", options.parse(made, []))
    for wrong in (["--cases", "nobody:1x2"], ["--steps", "1"]):
        with pytest.raises(SystemExit):
            options.parse(made, wrong)
    assert "nobody" in capsys.readouterr().err


def test_busy_time_counts_what_overlaps_once() -> None:
    spans = [trace.Span("disk", "r", "n", *times) for times in ((0.0, 2.0), (1.0, 3.0), (5.0, 6.0), (5.2, 5.5))]
    assert trace.busy(spans) == pytest.approx(4.0)


def test_every_benchmark_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.main([]) == 0
    listed = capsys.readouterr().out
    names = {"small", "memory", "speed", "larger_than_memory", "scaling", "dial", "gpu", "proof", "sft_trainer"}
    assert all(f"  {name} " in listed for name in names)


def runs_of(**numbers: tuple[float, ...]) -> list[processes.Run]:
    """Runs of arms that took so many seconds, with as many MiB where 100 were predicted."""
    return [
        processes.Run(label, pair, 0, {SECONDS: value, ABOVE: value, "plan": {"predicted_mib": 100}})
        for label, values in numbers.items()
        for pair, value in enumerate(values)
    ]


def test_more_memory_that_is_slower_is_seen() -> None:
    assert tables.never_slower(runs_of(small=(10, 20), large=(10.2, 20.2)), ["small", "large"]).holds
    slower = tables.never_slower(runs_of(small=(10, 20), large=(8, 16), all=(9, 18)), ["small", "large", "all"])
    assert slower.holds is False and "1.125, all over large" in slower.detail
    assert tables.never_slower(runs_of(small=(10,)), ["small", "large"]).holds is None


def test_a_peak_that_was_not_predicted_is_seen() -> None:
    runs = runs_of(good=(103, 104, 120), high=(106, 107), low=(94,))
    assert [tables.as_predicted(runs, name, name).holds for name in ("good", "high", "low", "none")] == [
        True, False, False, None
    ]  # fmt: skip
