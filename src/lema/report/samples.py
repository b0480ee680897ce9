"""Answers to the same prompts at several steps, side by side."""

from __future__ import annotations

from dataclasses import dataclass

from .run_folder import Sample

MOST_STEPS = 8
MOST_PROMPTS = 20
MOST_CHARACTERS = 4000


@dataclass(frozen=True)
class Comparison:
    """A prompt and the answers shown: step and text, None where there is none."""

    prompt: str
    answers: list[tuple[int, str | None]]


@dataclass(frozen=True)
class Samples:
    """All comparisons, and what is left out."""

    comparisons: list[Comparison]
    notes: list[str]


def samples_of(samples: list[Sample]) -> Samples:
    """Compare: the first and the last step and evenly spaced ones between them; of equal steps the last sample."""
    notes: list[str] = []
    by_prompt: dict[str, dict[int, str]] = {}
    for sample in samples:
        by_prompt.setdefault(sample.prompt, {})[sample.step] = sample.text
    steps = sorted({sample.step for sample in samples})
    shown = steps
    if len(steps) > MOST_STEPS:
        shown = sorted({steps[round(at * (len(steps) - 1) / (MOST_STEPS - 1))] for at in range(MOST_STEPS)})
        notes.append(f"Samples were taken at {len(steps):,} steps; {len(shown)} of them are shown.")
    if len(by_prompt) > MOST_PROMPTS:
        notes.append(f"There are {len(by_prompt):,} prompts; the first {MOST_PROMPTS} are shown.")
    longest = max((len(text) for sample in samples for text in (sample.prompt, sample.text)), default=0)
    if longest > MOST_CHARACTERS:
        notes.append(f"Texts of more than {MOST_CHARACTERS:,} characters end with […]. samples.jsonl has all of them.")
    comparisons = [
        Comparison(_clipped(prompt), [(step, _clipped(texts[step]) if step in texts else None) for step in shown])
        for prompt, texts in list(by_prompt.items())[:MOST_PROMPTS]
    ]
    return Samples(comparisons, notes)


def _clipped(text: str) -> str:
    return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]} […]"
