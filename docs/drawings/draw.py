"""Draws the pictures of ARCHITECTURE.md and the README: `python docs/drawings/draw.py` writes the SVG files beside it.

Each has a light ground of its own, so it can be read on light and dark pages, and needs no font or network.
"""

from __future__ import annotations

import json
import statistics
from html import escape
from pathlib import Path

INK, GROUND = "#1d2b36", "#f7f8f5"
BLUE, GREEN, SAND, ROSE, GREY = "#cfe0f1", "#d5e8d0", "#f3e3bf", "#f2d3d0", "#e3e6e4"


class Drawing:
    """Boxes, words and arrows on a ground; sizes are in pixels."""

    def __init__(self, name: str, title: str, width: int, height: int) -> None:
        self.name = name
        self._parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            f'role="img" font-family="sans-serif" font-size="13" fill="{INK}">',
            f"<title>{escape(title)}</title>",
            f'<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            f'orient="auto-start-reverse"><path d="M0 0L8 4L0 8z" fill="{INK}"/></marker></defs>',
            f'<rect width="{width}" height="{height}" rx="10" fill="{GROUND}"/>',
        ]

    def box(self, x: int, y: int, w: int, h: int, text: str = "", colour: str = GREY) -> None:
        """A box with lines of text in its middle."""
        self._parts.append(
            f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="5" fill="{colour}" stroke="{INK}" stroke-width="1"/>'
        )
        lines = text.split("\n") if text else []
        for i, line in enumerate(lines):
            self.words(x + w // 2, y + h // 2 + 5 + 17 * i - 17 * (len(lines) - 1) // 2, line, "middle")

    def words(self, x: int, y: int, text: str, anchor: str = "start", size: int = 13) -> None:
        """A line of text."""
        self._parts.append(f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-size="{size}">{escape(text)}</text>')

    def arrow(self, path: str, dashed: bool = False) -> None:
        """Along an SVG path."""
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        self._parts.append(
            f'<path d="{path}" fill="none" stroke="{INK}" stroke-width="1.4" marker-end="url(#tip)"{dash}/>'
        )

    def text(self) -> str:
        """The file."""
        return "\n".join([*self._parts, "</svg>", ""])


def batch() -> Drawing:
    """One step of training."""
    d = Drawing("batch", "The way of a batch through one step", 860, 330)
    d.box(20, 40, 90, 44, "batch\nof tokens", SAND)
    d.box(140, 40, 90, 44, "embedding", GREY)
    d.arrow("M110 62H138")
    for i, name in enumerate(["layer 0", "layer 1", "layer n-1"]):
        x = 260 + i * 120
        d.box(x, 40, 90, 44, name, BLUE)
        d.arrow(f"M{x - 30} 62H{x - 2}")
        d.box(x, 120, 90, 32, "its input", GREEN)
        d.arrow(f"M{x + 45} 84V118")
        d.box(x, 188, 90, 44, f"{name}\nagain", BLUE)
        d.arrow(f"M{x + 45} 152V186")
        if i:
            d.arrow(f"M{x} 210H{x - 28}")
    d.words(493, 54, "…", "middle")
    d.words(493, 202, "…", "middle")
    d.box(640, 40, 90, 192, "head and\nloss, in\nchunks of\ntargets", SAND)
    d.arrow("M590 62H638")
    d.arrow("M640 210H592")
    d.box(760, 110, 84, 52, "clip,\nupdate", ROSE)
    d.words(140, 140, "kept: boundaries")
    d.words(20, 206, "backward: loaded and")
    d.words(20, 223, "run again, gradients of")
    d.words(20, 240, "input and adapters")
    d.arrow("M305 232V252H802V164", dashed=True)
    d.words(560, 269, "adapter gradients", "middle")
    d.box(
        20, 288, 824, 28, "disk -> RAM slots -> (device slots): the next layers arrive while this one is computed", BLUE
    )
    d.words(20, 26, "forward: without a graph")
    return d


def slot() -> Drawing:
    """States of a slot."""
    d = Drawing("slot", "The states of a slot and what changes them", 860, 250)
    for i, (name, colour) in enumerate([("EMPTY", GREY), ("LOADING", SAND), ("READY", GREEN), ("IN_USE", BLUE)]):
        d.box(30 + i * 220, 96, 120, 52, name, colour)
    for i, word in enumerate(["an access is planned", "all pieces are read", "acquire"]):
        d.arrow(f"M{150 + i * 220} 116H{248 + i * 220}")
        d.words(199 + i * 220, 88, word, "middle", 12)
    d.arrow("M690 136H592")
    d.words(641, 160, "release", "middle", 12)
    d.arrow("M530 148V196H290V150")
    d.words(410, 215, "the next load, when every use planned for this content is spent", "middle", 12)
    d.arrow("M290 96V48H90V94")
    d.words(190, 40, "error or cancelled", "middle", 12)
    return d


def memory() -> Drawing:
    """What memory is made of."""
    d = Drawing("memory", "The parts of predicted memory, and the largest of three moments", 860, 270)
    parts = [("overhead", 90, GREY), ("S x largest\nshared layer", 110, BLUE), ("layers\nthat stay", 110, BLUE)]
    parts += [("head,\nrest", 80, SAND), ("adapters,\ngradients,\nmoments", 110, ROSE), ("(n-k) x b", 100, GREEN)]
    x = 20
    for text, width, colour in parts:
        d.box(x, 60, width, 70, text, colour)
        x += width
    d.words(20, 44, "always there")
    d.words(632, 44, "plus the largest of")
    for i, text in enumerate(["forward: k g + peak + b", "loss: k g + peak + 2 b", "backward: (k-1) g + peak + 2 b"]):
        d.box(632, 60 + 48 * i, 218, 40, text, GREY)
    d.words(20, 170, "n layers, k of them with kept activations, S slots")
    d.words(20, 192, "b: one boundary, rows x tokens x width")
    d.words(20, 214, "g: what one layer keeps for its backward")
    d.words(20, 236, "peak: the most one layer or a chunk of the loss has alive, times 1.7 on a CPU")
    return d


def overlap() -> Drawing:
    """Disk, link and computation in time."""
    d = Drawing("overlap", "Disk, link and computation overlap; the slowest decides", 860, 220)
    for row, (name, colour, start, width) in enumerate(
        [("disk -> RAM", SAND, 120, 96), ("RAM -> device", GREEN, 220, 60), ("compute", BLUE, 320, 104)]
    ):
        y = 34 + row * 48
        d.words(20, y + 22, name)
        for i in range(4):
            d.box(start + i * 110, y, width, 32, f"layer {i}", colour)
    d.arrow("M120 184H840")
    d.words(838, 204, "time", "end")
    d.words(120, 204, "a sweep takes max(compute, disk, link); without a device the middle row is missing", size=12)
    return d


def beside_peft() -> Drawing:
    """Memory and time of a step beside PEFT, out of a benchmark's runs."""
    d = Drawing("beside-peft", "Peak memory and time of a step, LEMA beside PEFT", 860, 176)
    run = Path(__file__).parents[1] / "benchmarks" / "small-2026-11-29.json"
    runs = json.loads(run.read_text(encoding="utf-8"))["runs"]
    arms = [("LEMA", BLUE), ("PEFT+checkpointing", SAND), ("PEFT", SAND)]
    for x, key, title in (
        (170, "above_floor_mib", "peak memory, MiB"),
        (520, "median_step_seconds", "time of a step, s"),
    ):
        found = [statistics.median(r["numbers"][key] for r in runs if r["label"] == name) for name, _ in arms]
        d.words(x, 28, title, size=14)
        for row, ((name, colour), value) in enumerate(zip(arms, found, strict=True)):
            y, width = 42 + 36 * row, round(240 * value / max(found))
            d.box(x, y, width, 26, colour=colour)
            d.words(x + width + 8, y + 18, f"{value:,.0f}" if value > 100 else f"{value:.1f}")
            if x == 170:
                d.words(160, y + 18, name.replace("+", " + "), "end")
    d.words(170, 166, "SmolLM2-135M, float32, 512 tokens, LoRA rank 16 on all linear layers, two CPU cores", size=12)
    return d


DRAWINGS = (batch, slot, memory, overlap, beside_peft)

if __name__ == "__main__":
    for make in DRAWINGS:
        drawing = make()
        (Path(__file__).parent / f"{drawing.name}.svg").write_text(drawing.text(), encoding="utf-8")
