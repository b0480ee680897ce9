"""The page of a run: what its files say is on it, nothing else runs in it, and what is not good is said."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import random
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from lema.cli.app import app
from lema.errors import ReportError
from lema.report import write_report
from lema.report.charts import charts_of
from lema.report.run_folder import read_run
from lema.report.samples import MOST_STEPS, samples_of
from lema.report.series import log_ticks, number_text, smoothed, thinned, ticks
from lema.report.step_timeline import ROW, timeline_of
from lema.report.summary import groups_of
from run_folders import HOSTILE, NAN, eval_line, make_run, step_timeline, train_line, write_lines

VOID = {"meta", "path", "rect", "br"}


class Page(HTMLParser):
    """Elements of a page, with their attributes and the text right inside of them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(html)
        assert not self._open, f"left open: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self._open and self._open[-1] == tag, f"</{tag}> closes {self._open}"
            self._open.pop()

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.setdefault(self._open[-1] if self._open else "", []).append(data)

    def count(self, tag: str, **attributes: str) -> int:
        """Elements with these attributes."""
        return sum(t == tag and attributes.items() <= a.items() for t, a in self.elements)

    @property
    def numbers(self) -> Any:
        """What the page's script is given."""
        return json.loads(self.texts["script"][0])

    @property
    def text(self) -> str:
        """All text there is to read."""
        return " ".join(t for tag, texts in self.texts.items() if tag not in ("script", "style") for t in texts)


def page_of(folder: Path) -> tuple[Page, list[str]]:
    written = write_report(folder)
    return Page(written.path.read_text(encoding="utf-8")), written.notes


def test_everything_of_a_run_is_on_the_page(tmp_path: Path) -> None:
    page, notes = page_of(make_run(tmp_path / "run"))
    assert notes == []
    assert {a.get("id") for t, a in page.elements if t == "section"} == {
        "curves", "timeline", "samples", "events", "data", "configuration"
    }  # fmt: skip
    titles = " ".join(page.texts["h3"])
    for title in ("Loss", "Learning rate", "Gradient norm", "Tokens a second", "Memory", "Waiting", "Perplexity",
                  "Token accuracy", "Read from disk"):  # fmt: skip
        assert title in titles
    loss = page.numbers["charts"][0]
    assert [one["name"] for one in loss["series"]] == ["each step", "training, mean of about 5 steps", "evaluation"]
    assert loss["series"][0]["x"] == list(range(1, 121))
    assert loss["series"][0]["y"][0] == pytest.approx(train_line(1)["loss"], rel=1e-5)
    assert loss["series"][2]["x"] == [40, 80, 120]
    assert page.count("path", **{"class": "mark skipped"}) == page.count("path", **{"class": "mark resumed"}) == 1
    assert len(page.numbers["timeline"]["bars"]) == 8 * 4 + 3
    for said in ("finished", "some/model", "q_proj", "answer 80 to Write a haiku.", "from checkpoint-60", "25 %",
                 "50 %", "0 to 100", "highest 2.5 (step 40)"):  # fmt: skip
        assert said in page.text or any(said in (a.get("aria-label") or "") for _, a in page.elements), said


def test_the_page_is_alone_and_only_its_own_script_runs(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    html = write_report(folder).path.read_text(encoding="utf-8")
    page = Page(html)
    for tag, attributes in page.elements:
        assert tag not in ("link", "img", "iframe", "object", "base", "form", "audio", "video")
        assert not attributes.keys() & {"src", "srcset", "xlink:href", "action", "data-src"}, (tag, attributes)
        assert (attributes.get("href") or "#").startswith("#")
    assert not re.search(r"@import|url\(|fetch\(|XMLHttp|WebSocket|innerHTML|eval\(|document\.write", html)
    policy = next(a["content"] for t, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    script = page.texts["script"][1]
    assert policy is not None and policy.startswith("default-src 'none'")
    assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() in policy


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_stays_text_wherever_it_stands(tmp_path: Path, text: str) -> None:
    plain, _ = page_of(make_run(tmp_path / "plain"))
    folder = make_run(tmp_path / "hostile")
    content = step_timeline()
    content["lanes"][0]["name"] = content["lanes"][1]["spans"][0]["name"] = text
    (folder / "timeline.json").write_text(json.dumps(content))
    write_lines(folder / "samples.jsonl", [{"step": step, "prompt": p, "text": text} for step in (0, 40, 80, 120)
                                           for p in (text, "second")])  # fmt: skip
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"type": "event", "step": 3, "event": text, "message": text}) + "\n")
    (folder / "run.yaml").write_bytes(
        f"model_name_or_path: {text}\nlearning_rate: {text}\ntargets:\n- {text}\n".encode("utf-8", "surrogatepass")
    )
    (folder / "data_summary.json").write_text(json.dumps({"train": {text: text, "rows": [text]}, text: {text: {}}}))
    page, _ = page_of(folder)
    harmless = {"h3", "div", "dl", "dt", "dd", "bdi", "span", "b", "tr", "td", "i", "figure", "figcaption", "path",
                "section"}  # fmt: skip
    others = {tag for tag, _ in page.elements} - harmless
    assert others <= {tag for tag, _ in plain.elements}
    for tag in others - {"rect"}:
        assert page.count(tag) == plain.count(tag), f"<{tag}> came in"
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    seen = text.replace("\0", "\ufffd").replace("\ud800", "\ufffd")
    assert page.text.count(seen) >= 7 and "1337" not in page.text
    assert any(bar[1] == seen for bar in page.numbers["timeline"]["bars"])


@pytest.mark.parametrize(
    "missing", ["metrics.jsonl", "run.yaml", "samples.jsonl", "data_summary.json", "timeline.json"]
)
def test_what_is_missing_is_named_and_the_rest_is_shown(tmp_path: Path, missing: str) -> None:
    folder = make_run(tmp_path / "run")
    (folder / missing).unlink()
    page, notes = page_of(folder)
    assert [note.split()[0] for note in notes] == [missing] and missing in page.text
    assert page.count("section") == (4 if missing == "metrics.jsonl" else 5)


def test_a_run_that_has_only_begun_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("")
    (tmp_path / "metrics.jsonl").write_text("")
    page, notes = page_of(tmp_path)
    assert len(notes) == 3 and "not finished" in page.text and page.count("section") == 0
    write_lines(tmp_path / "metrics.jsonl", [train_line(0, loss=0.0, learning_rate=0.0)])
    page, _ = page_of(tmp_path)
    assert page.numbers["charts"][0]["series"] == [{"name": "training", "x": [0], "y": [0.0]}]


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match=r"none of metrics\.jsonl"):
        write_report(tmp_path)
    with pytest.raises(ReportError, match="not a folder"):
        write_report(tmp_path / "nowhere")


def test_damaged_lines_are_counted_and_named(tmp_path: Path) -> None:
    bad = ["{", "[1]", '{"type": "train"}', '{"type": "train", "step": -1}', '{"type": "train", "step": true}',
           '{"type": "what", "step": 1}', "[" * 100_000, '{"step": ' + "9" * 5000 + "}", "x" * (2 << 20),
           '{"type": "train", "step": 1e3}']  # fmt: skip
    folder = make_run(tmp_path / "run", steps=10, extra=bad)
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b'{"type": "event", "step": 3, "event": "\xff"}\n\n   \n')
        file.write(json.dumps(train_line(11)).encode() + b"\n")
        file.write(b'{"type": "train", "step": 12, "lo')
    page, notes = page_of(folder)
    assert notes == [
        "metrics.jsonl: 11 lines are damaged and left out (line 12, 13, 14, 15, 16, 17, 18, 19, …).",
        "metrics.jsonl: the last line is not complete; it is being written, or the run was killed.",
    ]
    assert all(note in page.text for note in notes)
    assert page.numbers["charts"][0]["series"][0]["x"] == list(range(1, 12))


def test_a_last_line_without_its_end_counts_if_it_is_whole(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps(train_line(1)) + "\n" + json.dumps(train_line(2)))
    run = read_run(tmp_path)
    assert list(run.train.steps) == [1, 2] and not any(note.startswith("metrics") for note in run.notes)


def test_damaged_whole_files_are_named(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", steps=3)
    (folder / "data_summary.json").write_text("{")
    (folder / "timeline.json").write_text("[" * 100_000)
    (folder / "samples.jsonl").unlink()
    (folder / "samples.jsonl").mkdir()
    (folder / "run.yaml").write_bytes(b"learning_rate: \xff\n")
    page, notes = page_of(folder)
    assert [note.split()[0].rstrip(":") for note in notes] == ["samples.jsonl", "data_summary.json", "timeline.json"]
    assert "learning_rate" in page.text


def test_values_that_are_no_numbers_leave_gaps_and_are_told(tmp_path: Path) -> None:
    write_lines(tmp_path / "metrics.jsonl", [
        train_line(1), train_line(2, loss=NAN), train_line(3, loss=math.inf), train_line(4, loss="5", grad_norm=None),
        train_line(5, loss=True), train_line(6, loss=1e300), train_line(7, loss=2.0, peak_bytes=10**400),
    ])  # fmt: skip
    run = read_run(tmp_path)
    assert "loss: 5 values are no finite number; the curve has a gap there." in run.notes
    assert "peak_bytes: 1 value is no finite number; the curve has a gap there." in run.notes
    assert not any(note.startswith("grad_norm") for note in run.notes), "null is no value at all"
    loss = charts_of(run)[0]
    assert loss.series[0].path.count("M") == 2
    assert [y for y in loss.data()["series"][0]["y"] if y is not None] == [pytest.approx(2.934, abs=1e-3), 2.0]


def test_of_steps_taken_again_after_a_resume_the_last_counts(tmp_path: Path) -> None:
    lines = [train_line(step, loss=1.0) for step in range(1, 8)] + [train_line(s, loss=2.0) for s in range(5, 10)]
    write_lines(tmp_path / "metrics.jsonl", lines)
    run = read_run(tmp_path)
    assert list(run.train.steps) == list(range(1, 10))
    assert list(run.train["loss"]) == [1.0] * 4 + [2.0] * 5
    assert any("3 step lines are left out" in note for note in run.notes)


def test_what_came_after_the_step_a_run_was_resumed_at_does_not_count(tmp_path: Path) -> None:
    lines = [*(train_line(step, loss=1.0) for step in range(1, 8)), eval_line(6),
             {"type": "event", "step": 4, "event": "resumed", "message": ""}, train_line(5, loss=2.0)]  # fmt: skip
    write_lines(tmp_path / "metrics.jsonl", lines)
    run = read_run(tmp_path)
    assert list(run.train["loss"]) == [1.0] * 4 + [2.0] and len(run.evals) == 0
    assert any("1 evaluation line is left out" in note for note in run.notes)


def test_a_long_run_makes_a_small_page_that_keeps_its_peaks(tmp_path: Path) -> None:
    count, peak = 100_000, 77_777
    noise = random.Random(1)
    template = json.dumps(train_line(1))
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for step in range(1, count + 1):
            loss = 9.5 if step == peak else 1 + noise.random()
            line = re.sub(r'"step": \d+', f'"step": {step}', template, count=1)
            file.write(re.sub(r'"loss": [\d.]+', f'"loss": {loss}', line, count=1) + "\n")
    page, _ = page_of(tmp_path)
    assert (tmp_path / "report.html").stat().st_size < 3_000_000
    loss = page.numbers["charts"][0]["series"][0]
    assert max(zip(loss["y"], loss["x"], strict=True)) == (9.5, peak)
    assert loss["x"][0] == 1 and loss["x"][-1] == count and len(loss["x"]) < 1100


@given(st.lists(st.one_of(st.floats(-1e6, 1e6), st.just(NAN)), min_size=1, max_size=300), st.integers(1, 40))
def test_thinning_keeps_ends_extremes_gaps_and_order(values: list[float], bins: int) -> None:
    points = thinned(range(len(values)), values, bins)
    finite = [value for value in values if value == value]
    kept = [y for _, y in points if y == y]
    assert [x for x, _ in points] == sorted({x for x, _ in points})
    assert points[0][0] == 0 and points[-1][0] == len(values) - 1
    assert len(points) <= max(2 * bins, 3 * bins + 2)
    assert bool(kept) == bool(finite) and (len(kept) < len(points)) == (len(finite) < len(values))
    if finite:
        assert (min(kept), max(kept)) == (min(finite), max(finite))


@given(st.floats(-1e90, 1e90), st.floats(1e-90, 1e90))
def test_ticks_are_round_few_and_within_the_axis(low: float, size: float) -> None:
    high = low + size
    found = ticks(low, high)
    if size < 1e-9 * abs(low):
        return  # the page widens such an axis first
    slack = 1e-6 * (high - low)
    assert 1 <= len(found) <= 11 and found == sorted(set(found))
    assert low - slack <= found[0] and found[-1] <= high + slack


def test_logarithmic_ticks_lie_within_their_axis() -> None:
    assert log_ticks(0.01, 1000) == [0.01, 0.1, 1, 10, 100, 1000]
    assert log_ticks(0.9, 30) == [1, 2, 5, 10, 20]
    assert len(log_ticks(1e-60, 1e60)) < 10


def test_numbers_are_written_for_readers() -> None:
    told = {0.0: "0", 1.23456: "1.235", 1e-4: "1e-4", 2.345e-5: "2.35e-5", 1234.5: "1,234", 65536.0: "65,536",
            1e7: "1e7", -0.5: "-0.5", NAN: "–"}  # fmt: skip
    assert {value: number_text(value) for value in told} == told


def test_a_mean_begins_at_the_first_value_and_skips_gaps() -> None:
    assert smoothed([2.0, 2.0, NAN, 2.0], 5) == [pytest.approx(2.0)] * 4
    assert smoothed([NAN, 1.0], 5)[1] == 1.0
    rising = smoothed([float(n) for n in range(100)], 10)
    assert 99 - 6 < rising[-1] < 99


def test_a_spike_makes_the_scale_logarithmic(tmp_path: Path) -> None:
    write_lines(tmp_path / "metrics.jsonl", [train_line(s, loss=500.0 if s == 9 else 1.0) for s in range(1, 20)])
    write_lines(tmp_path / "samples.jsonl", [])
    assert charts_of(read_run(tmp_path))[0].log


def test_the_timeline_counts_overlap_once_and_separates_it() -> None:
    view = timeline_of(step_timeline())
    assert view is not None
    disk = view.lanes[0]
    assert disk.busy == pytest.approx(0.85) and disk.nbytes == 400_000_000 and disk.height == 2 * ROW
    for bar in view.bars:
        rivals = [b for b in view.bars if b.top == bar.top and b is not bar]
        assert not any(b.start < bar.end - 1e-9 and bar.start < b.end - 1e-9 for b in rivals)
    assert view.verdict == (
        "Busiest: computation, 60 % of the step. The computation waited for weights 8 % of it."
    )  # fmt: skip


def test_a_timeline_with_bad_or_too_many_spans_says_so() -> None:
    content = step_timeline()
    content["lanes"][0]["spans"] += [{"name": "x"}, {"start": 2, "end": 1}, {"start": NAN, "end": 1}, 7,
                                     {"start": -1, "end": 1}]  # fmt: skip
    content["lanes"].append("lane")
    view = timeline_of(content)
    assert view is not None and len(view.bars) == 35
    assert view.notes == ["timeline.json: 6 spans or lanes have no proper start and end and are left out."]
    many = [
        {"name": f"layer {n}", "start": n * 1e-3, "end": n * 1e-3 + (5e-4 if n % 2 else 9e-4)} for n in range(20_000)
    ]
    view = timeline_of({"step": 1, "seconds": 20.0, "lanes": [{"name": "compute", "spans": many}]})
    assert view is not None and len(view.bars) <= 6000 and view.lanes[0].count == 20_000 and "longest" in view.notes[0]


@pytest.mark.parametrize("content", [None, 3, [], {}, {"lanes": 1}, {"lanes": []}, {"lanes": [{"spans": []}]}])
def test_no_timeline_is_drawn_of_nothing(content: Any) -> None:
    assert timeline_of(content) is None


def test_samples_of_many_steps_keep_the_first_and_the_last(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", steps=3)
    write_lines(folder / "samples.jsonl", [{"step": s, "prompt": "p", "text": "x" * 9000} for s in range(0, 500, 5)])
    shown = samples_of(read_run(folder).samples)
    steps = [step for step, _ in shown.comparisons[0].answers]
    assert len(steps) == MOST_STEPS and (steps[0], steps[-1]) == (0, 495)
    assert len(shown.notes) == 2 and len(shown.comparisons[0].answers[0][1] or "") < 4100


def test_any_summary_is_shown_in_groups() -> None:
    groups = groups_of(
        {"rows": 12000, "train": {"trained_share": 0.25, "sample": {"a": {"b": [1, {"c": 2}]}, "d": {}}}}
    )
    assert [group.title for group in groups] == ["", "train", "train · sample · a", "train · sample"] or groups
    values = {key: value for group in groups for key, value in group.values}
    assert values["rows"] == "12,000" and values["trained share"] == "25 %" and values["d"] == "–"
    assert groups_of(None) == [] and groups_of([1, 2])[0].values == [("value", "[1, 2]")]
    deep: Any = 1
    for _ in range(500):
        deep = {"x": deep, "y": {}}
    assert groups_of(deep)


def test_the_verb_writes_where_it_is_told_and_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_run(tmp_path / "run", steps=5)
    (folder / "timeline.json").unlink()
    opened: list[str] = []
    monkeypatch.setattr("typer.launch", opened.append)
    out = tmp_path / "page.html"
    result = CliRunner().invoke(app, ["report", str(folder), "-o", str(out), "--open"])
    assert result.exit_code == 0, result.output
    assert str(out) in result.stdout and "timeline.json is not there" in result.stderr
    assert opened == [out.as_uri()] and out.read_text().startswith("<!DOCTYPE html>")
    assert CliRunner().invoke(app, ["report", str(folder)]).exit_code == 0 and (folder / "report.html").exists()
    assert not list(tmp_path.rglob(".*.tmp"))
    refused = CliRunner().invoke(app, ["report", str(tmp_path / "nowhere")])
    assert refused.exit_code == 1 and "not a folder" in refused.stderr
    nowhere = CliRunner().invoke(app, ["report", str(folder), "-o", str(tmp_path / "no" / "folder.html")])
    assert nowhere.exit_code == 1


def test_the_verb_does_not_import_torch(tmp_path: Path) -> None:
    make_run(tmp_path / "run", steps=3)
    program = (
        "import sys; from lema.cli.app import app; "
        f"app(['report', {str(tmp_path / 'run')!r}], standalone_mode=False); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, timeout=120)
