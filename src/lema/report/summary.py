"""Any JSON summary as groups of names and values, with histograms where it has them.

So what data sets say of themselves tomorrow is shown as well.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .run_folder import text_of
from .series import number_text
from .table import as_number

_MOST_CHARACTERS = 2000
_MOST_GROUPS = 60
_DEPTH = 6
_BIN = {"from", "to", "rows"}


@dataclass(frozen=True)
class Bin:
    """A bar: its bounds, its count, its height in percent of the highest."""

    label: str
    rows: str
    percent: float


@dataclass
class Group:
    """Values that belong together."""

    title: str
    values: list[tuple[str, str]] = field(default_factory=list)
    histograms: list[tuple[str, list[Bin]]] = field(default_factory=list)


def groups_of(content: Any) -> list[Group]:
    """Groups in the order of the content; nested mappings become groups named after their way."""
    found: list[Group] = []
    if isinstance(content, dict):
        _take("", content, found, _DEPTH)
    elif content is not None:
        found.append(Group("", [("value", _text(content))]))
    return [group for group in found if group.values or group.histograms][:_MOST_GROUPS]


def _take(title: str, content: dict[str, Any], found: list[Group], depth: int) -> None:
    group = Group(title)
    found.append(group)
    for key, value in content.items():
        name = text_of(key)[:200].replace("_", " ")
        if isinstance(value, dict) and value and depth:
            if len(value) <= 12 and all(not isinstance(one, (dict, list)) for one in value.values()) and title:
                group.values.append((name, " · ".join(f"{text_of(k)}: {_text(v)}" for k, v in value.items())))
            else:
                _take(f"{title} · {name}" if title else name, value, found, depth - 1)
        elif bins := _bins(value):
            group.histograms.append((name, bins))
        else:
            group.values.append((name, _share(key, value) or _text(value)))


def _share(key: str, value: Any) -> str:
    number = as_number(value)
    return f"{number_text(100 * number)} %" if key.endswith("_share") and 0 <= number <= 1 else ""


def _text(value: Any) -> str:
    if value is None or value == {} or value == []:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and abs(value) < 1 << 53:
        return f"{value:,}" if abs(value) >= 10000 else str(value)
    if isinstance(value, float):
        return number_text(as_number(value), 5)
    text = text_of(value)
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]} […]"


def _bins(value: Any) -> list[Bin]:
    if not isinstance(value, list) or not value:
        return []
    if not all(isinstance(one, dict) and one.keys() >= _BIN and as_number(one["rows"]) >= 0 for one in value):
        return []
    highest = max(one["rows"] for one in value) or 1
    return [
        Bin(f"{_text(one['from'])} to {_text(one['to'])}", _text(one["rows"]), 100 * one["rows"] / highest)
        for one in value[:200]
    ]
