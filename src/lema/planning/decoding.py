"""How fast a model's codes become values where its layers are computed: measured on memory of the same shape.

It knows codecs and clocks; it knows nothing of files' contents or plans.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import torch

from ..machine.device import accelerator_module
from ..storage.codecs import Placement
from ..storage.layout import ParameterSource
from ..storage.views import page_aligned

_SECONDS = 0.1
_VALUES = 16 << 20
"""Of a parameter that is measured, at least where a layer has one as large."""
STATED = {"cpu": 1.5e9, "accelerator": 100e9}
"""Bytes of values a second taken for a machine that is described and not here; to rank plans."""


def decode_rate(units: Sequence[Sequence[ParameterSource]], device: torch.device) -> float | None:
    """Bytes of values a second that the slowest kind of codec of a model makes; None where nothing is decoded.

    A large parameter of each kind is decoded from zeros as often as a tenth of a second allows; the fastest counts.

    Args:
        units: sources of every layer's parameters.
        device: where layers are computed.
    """
    largest: dict[type, ParameterSource] = {}
    for source in (source for unit in units for source in unit if not isinstance(source.codec, Placement)):
        known = largest.get(type(source.codec))
        if known is None or abs(source.numel - _VALUES) < abs(known.numel - _VALUES):
            largest[type(source.codec)] = source
    return min((_rate(source, device) for source in largest.values()), default=None)


def stated_rate(device: str) -> float:
    """Of a machine that is not here."""
    return STATED["cpu" if device == "cpu" else "accelerator"]


def _rate(source: ParameterSource, device: torch.device) -> float:
    stored = [
        page_aligned(max(run.count * run.record.dtype.itemsize, 1))[: run.count * run.record.dtype.itemsize]
        .view(run.record.dtype)
        .to(device)
        for run in source.codec.runs
    ]
    out = page_aligned(source.nbytes)[: source.nbytes].to(device).view(source.dtype).view(source.shape)
    best, started = math.inf, time.perf_counter()
    while best == math.inf or time.perf_counter() - started < _SECONDS:
        before = time.perf_counter()
        source.codec.decode(stored, out)
        if device.type != "cpu":
            accelerator_module(device).synchronize()
        best = min(best, time.perf_counter() - before)
    return source.nbytes / max(best, 1e-9)
