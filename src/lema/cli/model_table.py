"""What a model is found to be, in words for people. It knows labels; every fact is `lema.run.found`'s."""

from __future__ import annotations

from ..machine.memory import format_bytes
from ..run.found import Found


def rows_of(found: Found) -> list[tuple[str, str]]:
    """Labels and values; what is not known is left out."""
    rows = [("model", found.model), ("family", found.family)]
    if found.layers:
        kinds = ", ".join(f"{count} {kind}" for kind, count in found.layers.items())
        rows += [
            ("kept", f"{_number(found.parameters)} parameters, {found.dtype}"),
            ("layers", f"{sum(found.layers.values())} at {found.layers_path}: {kinds}"),
            ("left out", left_out(found)),
            ("head", found.head),
        ]
    if found.weights:
        rows.append(("weights", found.weights))
    if found.targets:
        rows.append(("adapters", adapters(found)))
    rows += [("refused", reason) for reason in found.refused] or [("refused", "nothing: it trains")]
    return [(label, value) for label, value in rows if value]


def left_out(found: Found) -> str:
    """Towers and their bytes."""
    towers = [f"{path} ({kind}, {format_bytes(size)})" for path, (kind, size) in found.left_out.items()]
    return ", ".join(towers) or "nothing"


def adapters(found: Found) -> str:
    """Where adapters go, and how large they are."""
    listed = ", ".join(f"{name} x {count}" for name, count in found.targets.items())
    return f"on {listed}; {_number(found.adapter_parameters)} parameters"


def _number(count: int) -> str:
    for power, unit in ((9, "billion"), (6, "million")):
        if count >= 10**power:
            return f"{count / 10**power:.3g} {unit}"
    return f"{count:,}"
