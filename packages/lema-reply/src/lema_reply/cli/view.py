"""A [LEMA_REPLY] reply on the terminal: its three fields, and where it left the format.

What a text says is read by the grammar.
"""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..grammar import read

_STYLES = {"High": "green", "Medium": "yellow", "Low": "red"}


def show_reading(text: str) -> None:
    """Show what a reply says, and warn where it left the format."""
    reading = read(text)
    console = Console(highlight=False)
    if reading.reply is not None:
        table = Table(box=None, show_header=False, pad_edge=False)
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        table.add_row("Answer", Text(reading.reply.answer))
        table.add_row("Explanation", Text(reading.reply.explanation))
        table.add_row("Confidence", Text(reading.reply.confidence, _STYLES.get(reading.reply.confidence, "")))
        console.print(table)
    if not reading.strict:
        console.print(Text(f"warning: the reply left the format: {'; '.join(reading.faults)}", "yellow"))


def reading_as_json(text: str) -> dict[str, Any]:
    """What a reply says, for one line of JSON."""
    reading = read(text)
    reply = reading.reply
    fields = (
        {"answer": reply.answer, "explanation": reply.explanation, "confidence": reply.confidence} if reply else None
    )
    return {"reply": fields, "faults": list(reading.faults)}
