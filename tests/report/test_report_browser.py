"""The page of a run in a real browser without a network: it draws, it answers mouse and keys, it can be read."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lema.report import write_report
from run_folders import HOSTILE, make_run, step_timeline, write_lines

# In CI nothing of this file is skipped, unless .ci/run says why no browser can be had there.
REQUIRED = os.environ.get("CI") == "true" and not os.environ.get("NO_BROWSER")
WHY = os.environ.get("NO_BROWSER") or "no browser is installed"
if REQUIRED:
    playwright: Any = importlib.import_module("playwright.sync_api")
else:
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed (pip install playwright)"
    )
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BINARY = next((found for name in BROWSERS if (found := shutil.which(name))), None)
pytestmark = [
    pytest.mark.timeout(180),
    pytest.mark.skipif(BINARY is None and not REQUIRED, reason=f"{WHY} (none of {', '.join(BROWSERS)} is on the PATH)"),
]

CONTRAST = """() => {
  const parts = (color) => color.match(/[\\d.]+/g).map(Number);
  const linear = (c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
  const ratio = (a, b) => (Math.max(light(a), light(b)) + 0.05) / (Math.min(light(a), light(b)) + 0.05);
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const color = parts(getComputedStyle(at).backgroundColor);
      if (color.length < 4 || color[3] > 0) return color;
    }
    throw new Error("nothing behind");
  };
  const barUnder = (text) => [...document.querySelectorAll(".bars rect")].find((rect) => {
    const box = rect.getBBox(), x = Number(text.getAttribute("x")), y = Number(text.getAttribute("y"));
    return box.x <= x && x <= box.x + box.width && box.y <= y && y <= box.y + box.height;
  });
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    if (!own || !element.checkVisibility() || ["SCRIPT", "STYLE"].includes(element.tagName)) continue;
    const style = getComputedStyle(element), drawn = element.closest("svg");
    const front = parts(drawn ? style.fill : style.color);
    const back = drawn ? parts(getComputedStyle(barUnder(element)).fill) : behind(element);
    found.push([ratio(front, back), `${element.tagName}: ${element.textContent.slice(0, 40)}`]);
  }
  return found;
}"""
OPEN = Callable[..., Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    assert BINARY is not None, f"in CI a browser has to be installed, and none of {', '.join(BROWSERS)} is on the PATH"
    with playwright.sync_playwright() as started:
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        opened = started.chromium.launch(executable_path=BINARY, args=flags)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with everything, texts without a place to break among them; and something missing, to see the notes."""
    folder = make_run(tmp_path_factory.mktemp("report") / ("a-run-with-a-very-long-name" * 4))
    with (folder / "samples.jsonl").open("a") as file:
        file.write(json.dumps({"step": 120, "prompt": "x" * 300, "text": "y" * 500 + "\n" + "שלום " * 40}) + "\n")
    with (folder / "run.yaml").open("a") as file:
        file.write(f"train_file: /{'long/' * 60}\n")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"damaged\n' + json.dumps({"type": "event", "step": 3, "event": "z" * 80, "message": "w" * 300}))
    write_report(folder)
    return folder


@pytest.fixture
def view(browser: Any, run: Path) -> Iterator[OPEN]:
    """Opens the page of a run offline; afterwards no message, error, dialog or request may have come of it."""
    with contextlib.ExitStack() as stack:
        complaints: list[str] = []

        def opened(width: int = 1200, scheme: str = "light", folder: Path = run, **options: Any) -> Any:
            context = browser.new_context(
                viewport={"width": width, "height": 800}, color_scheme=scheme, offline=True, **options
            )
            stack.callback(context.close)
            page = context.new_page()
            page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
            page.on("pageerror", lambda error: complaints.append(str(error)))
            page.on("dialog", lambda dialog: (complaints.append(dialog.message), dialog.dismiss()))
            page.on("request", lambda asked: asked.url.startswith("file:") or complaints.append(asked.url))
            page.goto((folder / "report.html").as_uri())
            return page

        yield opened
        assert complaints == []


def wide(page: Any, at: int) -> float:
    """Width of a bar of the timeline on the screen."""
    return float(page.locator(".bars rect").nth(at).bounding_box()["width"])


def test_every_curve_is_drawn_inside_its_box(view: OPEN) -> None:
    page = view()
    charts = page.locator(".chart")
    assert charts.count() == 11
    for number in range(charts.count()):
        chart = charts.nth(number)
        box = chart.locator(".plot").bounding_box()
        assert box["width"] > 200 and box["height"] > 100
        line = chart.locator("path.line").first
        length, left, top, right, bottom = line.evaluate(
            "e => { const b = e.getBoundingClientRect(), p = e.closest('.plot').getBoundingClientRect();"
            "return [e.getTotalLength(), b.left - p.left, b.top - p.top, b.right - p.right, b.bottom - p.bottom]; }"
        )
        assert length > 100 and left >= -4 and top >= -4 and right <= 4 and bottom <= 4
        assert chart.locator(".y span").count() >= 2 and chart.locator(".x span").count() >= 3
    assert page.locator("#chart-loss path.ends").evaluate("e => e.getAttribute('d').split('M').length - 1") == 3


def test_hovering_a_curve_shows_the_values_of_that_step(view: OPEN) -> None:
    page = view()
    plot = page.locator("#chart-loss .plot")
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    page.mouse.move(box["x"] + box["width"] * 79 / 119, box["y"] + 50)
    tip = plot.locator(".tip")
    assert tip.is_visible()
    lines = tip.locator("strong, span").all_inner_texts()
    assert lines[0] == "Step 80" and "evaluation: 1.75" in lines
    assert any(line == "each step: 1.139" for line in lines)
    inside = tip.bounding_box()
    assert box["x"] <= inside["x"] and inside["x"] + inside["width"] <= box["x"] + box["width"]
    page.mouse.move(5, 5)
    assert not tip.is_visible()


def test_keys_read_a_curve_aloud(view: OPEN) -> None:
    page = view()
    page.locator("#chart-grad_norm .plot").focus()
    page.keyboard.press("End")
    page.keyboard.press("ArrowLeft")
    assert page.locator("#chart-grad_norm .said").inner_text().startswith("Step 119, ")
    page.keyboard.press("Escape")
    assert not page.locator("#chart-grad_norm .tip").is_visible()


def test_the_timeline_has_its_lanes_and_names_what_is_hovered(view: OPEN) -> None:
    page = view()
    assert page.locator(".lanes span").all_inner_texts() == ["Disk", "Copy", "Compute", "Waiting"]
    bars = page.locator(".bars rect")
    assert bars.count() == 35
    for kind in ("disk", "copy", "forward", "backward", "head", "optimizer", "wait"):
        assert page.locator(f".bars rect.{kind}").first.bounding_box()["width"] > 0
    page.locator(".timeline").scroll_into_view_if_needed()
    page.locator(".bars rect.head").hover()
    tip = page.locator(".timeline .tip")
    assert tip.is_visible() and "head and loss" in tip.inner_text() and "200 ms" in tip.inner_text()
    page.locator(".bars rect.disk").nth(3).hover()
    assert "layer 3" in tip.inner_text() and "50 MB, 333 MB/s" in tip.inner_text()
    assert "layer 7" in page.locator(".names text").all_text_contents()


def test_the_timeline_zooms_pans_and_obeys_keys(view: OPEN) -> None:
    page = view()
    page.locator(".timeline").scroll_into_view_if_needed()
    before = wide(page, 20)
    page.get_by_role("button", name="Zoom in").click()
    assert wide(page, 20) == pytest.approx(2 * before, rel=0.15)
    plot = page.locator(".timeline .plot")
    box = plot.bounding_box()
    start = page.locator(".bars rect.head").bounding_box()["x"]
    page.mouse.move(box["x"] + 600, box["y"] + 5)
    page.mouse.down()
    page.mouse.move(box["x"] + 500, box["y"] + 5, steps=4)
    page.mouse.up()
    assert page.locator(".bars rect.head").bounding_box()["x"] == pytest.approx(start - 100, abs=2)
    plot.focus()
    page.keyboard.press("0")
    assert wide(page, 20) == pytest.approx(before, rel=0.01)
    for key, said in (("ArrowRight", "layer 0"), ("ArrowRight", "layer 1"), ("ArrowDown", "layer 1"),
                      ("ArrowDown", "layer 1 forward"), ("ArrowDown", "layer 0")):  # fmt: skip
        page.keyboard.press(key)
        assert page.locator(".timeline .said").inner_text().startswith(f"{said}, "), key
    page.mouse.move(box["x"] + 300, box["y"] + 5)
    scrolled = page.evaluate("scrollY")
    page.keyboard.down("Control")
    page.mouse.wheel(0, -500)
    page.keyboard.up("Control")
    page.wait_for_function(
        "before => document.querySelectorAll('.bars rect')[20].getBoundingClientRect().width > before", arg=before * 1.2
    )
    assert page.evaluate("scrollY") == scrolled


@pytest.mark.parametrize("width", [320, 400, 768, 1600])
def test_nothing_is_wider_than_the_screen(view: OPEN, width: int) -> None:
    page = view(width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    out = page.evaluate(
        "() => [...document.querySelectorAll('body *')].filter((e) => !e.closest('.scroll, nav, svg, .skip, .said') && "
        "e.checkVisibility() && e.getBoundingClientRect().right > innerWidth + 1).map((e) => e.outerHTML.slice(0, 80))"
    )
    assert out == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_light_and_dark(view: OPEN, scheme: str) -> None:
    page = view(scheme=scheme)
    page.locator("#chart-loss .plot").hover()
    found = page.evaluate(CONTRAST)
    assert len(found) > 150 and [text for ratio, text in found if ratio < 4.5] == []
    assert any(text.startswith("text: ") for _, text in found) and any("layer" in text for _, text in found)
    behind = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert (sum(behind) > 600) == (scheme == "light")


def test_without_scripts_all_but_the_handles_is_there(view: OPEN) -> None:
    page = view(java_script_enabled=False)
    assert page.locator(".chart path.line").first.bounding_box()["width"] > 200
    assert page.locator(".bars rect.head").bounding_box()["width"] > 50
    assert not page.locator(".zoom").is_visible()
    assert "answer 80 to Write a haiku." in page.locator("#samples").inner_text()


def test_it_prints_without_what_only_a_screen_has(view: OPEN) -> None:
    page = view()
    page.emulate_media(media="print")
    assert not page.locator("nav").is_visible() and not page.locator(".zoom").is_visible()
    assert page.locator(".answers").first.evaluate("e => getComputedStyle(e).overflowX") == "visible"
    assert len(page.pdf()) > 20_000


def test_tab_reaches_every_handle_in_order(view: OPEN) -> None:
    page = view()
    reached = []
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement === document.body"):
            break
        name = page.evaluate("document.activeElement.getAttribute('aria-label') || document.activeElement.textContent")
        reached.append(name[:24])
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none", name
    assert reached[0] == "Skip to the content"
    expected = ["Curves", "Loss. training, mean of a", "Zoom out", "Zoom in", "All", "Timeline of one step. Bus",
                "Figures of the lanes", "Answers to prompt 1, step"]  # fmt: skip
    places = [reached.index(name[:24]) for name in expected]
    assert places == sorted(places)


def test_hostile_text_does_nothing(view: OPEN, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    content = step_timeline()
    texts = [text.replace("alert(1)", "window.hacked=1") for text in HOSTILE]
    content["lanes"][2]["spans"] += [{"name": text, "start": 0.5, "end": 2.0} for text in texts]
    (folder / "timeline.json").write_text(json.dumps(content))
    write_lines(folder / "samples.jsonl", [{"step": 1, "prompt": text, "text": text} for text in texts])
    write_report(folder)
    page = view(folder=folder)
    page.locator(".timeline .plot").focus()
    for key in ("ArrowRight", "ArrowDown", "ArrowDown"):  # into the lane that has them
        page.keyboard.press(key)
    heard = ""
    for _ in range(20 + len(texts)):
        page.keyboard.press("ArrowRight")
        heard += page.locator(".timeline .said").text_content()
        assert page.locator(".tip *:not(strong):not(span)").count() == 0
    assert all(text in heard for text in texts[:5])
    assert page.evaluate("window.hacked") is None and page.locator(".bars rect").count() == 35 + len(texts)
    assert page.locator("img, iframe, object").count() == 0
