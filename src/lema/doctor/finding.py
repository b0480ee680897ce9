"""One thing the doctor has to say: a level, words, and what to do."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Level(str, Enum):
    """How bad it is."""

    OK = "ok"
    ADVICE = "advice"
    """A run would work, and could do better."""
    PROBLEM = "problem"
    """A run would fail, or do something else than was meant."""


@dataclass(frozen=True)
class Finding:
    """What was found, and the command or setting that mends it."""

    level: Level
    topic: str
    """One or two words: "torch", "disk"."""
    message: str
    fix: str = ""
    """Empty where all is well."""

    def __post_init__(self) -> None:
        assert self.fix or self.level is Level.OK, f"{self.topic}: a finding that is not ok needs its fix"


def ok(topic: str, message: str) -> Finding:
    """All is well."""
    return Finding(Level.OK, topic, message)


def advice(topic: str, message: str, fix: str) -> Finding:
    """It could be better."""
    return Finding(Level.ADVICE, topic, message, fix)


def problem(topic: str, message: str, fix: str) -> Finding:
    """It will not work."""
    return Finding(Level.PROBLEM, topic, message, fix)
