"""Questions that cannot be settled, and what is said to them: taste, the future, what is not said, what never was.

The kinds are here; what is asked about is in the categories.
"""

from __future__ import annotations

from .rows import Fact

_KINDS = {
    "taste": (
        "It depends on personal taste",
        ("It depends", "A matter of taste", "It depends on taste", "There is no single answer", "Personal preference"),
    ),
    "future": (
        "It cannot be known yet",
        ("Unknown", "It is unknown", "It cannot be known", "Nobody knows", "It cannot be predicted"),
    ),
    "missing": (
        "There is not enough information",
        ("Not enough information", "It cannot be known", "Unknown", "It depends", "It cannot be determined"),
    ),
    "lost": ("It is not known", ("Unknown", "It is unknown", "It cannot be known", "Nobody knows", "Not known")),
}


def unsettled(kind: str, name: str, questions: tuple[str, ...], why: str) -> Fact:
    """A fact of low confidence.

    Args:
        kind: `taste`, `future`, `missing` (the question leaves out what it depends on) or `lost` (never recorded, or
            never happened).
        why: what the question would need to be settled.
    """
    answer, accepted = _KINDS[kind]
    return Fact(f"{kind}/{name}", questions, answer, why, "Low", accepted)
