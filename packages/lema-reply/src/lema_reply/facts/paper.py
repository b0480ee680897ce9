"""Sizes of sheets of paper, width and height in millimetres. Source: ISO 216."""

from __future__ import annotations

PAPER = {
    "A0": (841, 1189), "A1": (594, 841), "A2": (420, 594), "A3": (297, 420), "A4": (210, 297), "A5": (148, 210),
    "A6": (105, 148), "A7": (74, 105), "B4": (250, 353), "B5": (176, 250),
}  # fmt: skip
