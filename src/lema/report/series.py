"""Long columns made short enough to draw, and the numbers beside axes.

What the numbers mean makes no difference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

BINS = 500
"""A longer series is cut into so many bins, of each of which the lowest and the highest point stay."""

Point = tuple[int, float]


def thinned(steps: Sequence[int], values: Sequence[float], bins: int = BINS) -> list[Point]:
    """Points to draw; NaN where the line has a gap.

    Of every bin the lowest and the highest finite point stay, in their order, so that no peak is lost. First and
    last point stay too.
    """
    count = len(values)
    if count <= 2 * bins:
        chosen: list[int] = list(range(count))
    else:
        kept = {0, count - 1}
        for number in range(bins):
            first, last = number * count // bins, (number + 1) * count // bins
            finite = [row for row in range(first, last) if values[row] == values[row]]
            if finite:
                kept |= {min(finite, key=values.__getitem__), max(finite, key=values.__getitem__)}
            if len(finite) < last - first:
                kept.add(next(row for row in range(first, last) if values[row] != values[row]))
        chosen = sorted(kept)
    return [(steps[row], values[row]) for row in chosen]


def smoothed(values: Sequence[float], width: int) -> list[float]:
    """Exponential mean over about `width` values, started without bias; NaN values count for nothing."""
    decay = 1 - 2 / (width + 1)
    total = weight = 0.0
    found = []
    for value in values:
        if value == value:
            total = total * decay + value * (1 - decay)
            weight = weight * decay + (1 - decay)
        found.append(total / weight if weight else math.nan)
    return found


def ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers within bounds, 1, 2 or 5 times a power of ten apart; between half and one and a half of `about`."""
    if not high > low:
        return [low]
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * times for times in (1, 2, 5, 10) if power * times >= 0.7 * rough)
    first = math.ceil(low / step - 1e-9)
    return [round(number * step, 12 - math.floor(math.log10(step))) for number in range(first, _last(high, step) + 1)]


def _last(high: float, step: float) -> int:
    return math.floor(high / step + 1e-9)


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten within positive bounds; 2 and 5 times them too where that leaves fewer than three."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    every = len(exponents) // 8 + 1
    tens = [10.0**n for n in exponents if low <= 10.0**n <= high and n % every == 0]
    if len(tens) >= 3:
        return tens
    return [times * 10.0**n for n in exponents for times in (1, 2, 5) if low <= times * 10.0**n <= high]


def number_text(value: float, digits: int = 4) -> str:
    """A number for readers: so many digits, thousands apart, a power of ten where it is very large or small."""
    if value != value:
        return "–"
    if value == 0:
        return "0"
    if not 1e-3 <= abs(value) < 1e7:
        mantissa, exponent = f"{value:.{digits - 2}e}".split("e")
        if "." in mantissa:
            mantissa = mantissa.rstrip("0").rstrip(".")
        return f"{mantissa}e{int(exponent)}"
    text = f"{value:,.{max(digits - 1 - math.floor(math.log10(abs(value))), 0)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def duration_text(seconds: float) -> str:
    """Seconds as `3 h 12 min`, `4 min 10 s` or `1.2 s`."""
    if seconds != seconds:
        return "–"
    if seconds < 60:
        return f"{number_text(seconds, 2)} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60} min"


def bytes_text(count: float) -> str:
    """Bytes in decimal units."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(count) >= size:
            return f"{number_text(count / size, 3)} {unit}"
    return f"{number_text(count)} B"
