"""What `lema data check` prints: counts, a histogram of lengths, one row coloured by what is learned, bad rows.

It knows what was found and how to show it; it finds nothing itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ..data.survey import segments

if TYPE_CHECKING:
    from .data import Checked

_BAR = 40
_EXAMPLE_CHARACTERS = 3000
_LEARNED, _MASKED = "bold green", "dim"


def show(checked: Checked, console: Console | None = None) -> None:
    """Print one file's findings."""
    console = console or Console(soft_wrap=True, highlight=False)
    found: dict[str, Any] = checked.survey.as_dict()
    console.print(f"[bold]{escape(checked.name)}[/]  {len(checked.dataset):,} rows, read as {checked.kind}")
    console.print(_counts(checked, found))
    if found["length_histogram"]:
        console.print(_histogram(checked, found))
        console.print(_lengths(found))
    _show_example(checked, console)
    if found["unused_fields"]:
        said = ", ".join(f"{name} ({rows:,} rows)" for name, rows in found["unused_fields"].items())
        console.print(Text(f"fields that are not used: {said}", style="yellow"))
    for line in found["bad_rows"]:
        console.print(Text(f"bad   {line}", style="red"))
    if (more := found["bad"] + found["dropped"].get("bad", 0) - len(found["bad_rows"])) > 0:
        console.print(f"      and {more:,} more")
    console.print(_verdict(checked, found))


def _counts(checked: Checked, found: dict[str, Any]) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_column(justify="right")

    def add(name: str, rows: int, style: str = "") -> None:
        table.add_row(name, f"{rows:,}", f"{rows / found['rows']:.1%}", style=style if rows else "")

    add("looked at", found["rows"])
    add("kept", found["kept"])
    add(f"  truncated to {checked.dataset.max_seq_length:,} tokens", found["truncated"], "yellow")
    for reason, rows in sorted(found["dropped"].items()):
        add(f"dropped, {reason}", rows, "yellow")
    add("bad", found["bad"], "red")
    add("duplicates", found["duplicates"], "yellow")
    table.add_row("tokens", f"{found['tokens']:,}", "")
    table.add_row("tokens learned", f"{found['trained_tokens']:,}", f"{found['trained_share']:.1%}")
    return table


def _histogram(checked: Checked, found: dict[str, Any]) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False, title="tokens of a row", title_justify="left")
    table.add_column(justify="right")
    table.add_column(justify="right")
    table.add_column()
    most = max(bin["rows"] for bin in found["length_histogram"])
    for bin in found["length_histogram"]:
        over = bin["from"] >= checked.dataset.max_seq_length
        bar = Text("█" * max(round(_BAR * bin["rows"] / most), bin["rows"] > 0), style="yellow" if over else "cyan")
        table.add_row(f"{bin['from']:,}-{bin['to'] - 1:,}", f"{bin['rows']:,}", bar)
    return table


def _lengths(found: dict[str, Any]) -> str:
    said = "  ".join(f"{p}%: {n:,}" for p, n in found["length_percentiles"].items() if p != "100")
    return f"mean {found['length_mean']:.0f}  {said}  longest {found['length_percentiles']['100']:,}"


def _show_example(checked: Checked, console: Console) -> None:
    """The first row kept: what is learned in colour, the rest faint."""
    if checked.survey.example is None:
        return
    index, row = checked.survey.example
    encoder: Any = checked.dataset.encoder
    text = Text()
    for part, learned in segments(encoder.renderer.tokenizer, row):
        if not learned:
            text.append(part, style=_MASKED)
            continue
        shown = part.replace("\n", "↵\n")
        if not console.is_terminal:  # where there are no colours, brackets tell
            shown = f"⟦{shown.rstrip()}⟧{shown[len(shown.rstrip()) :]}"
        text.append(shown, style=_LEARNED)
    cut = len(text) > _EXAMPLE_CHARACTERS
    text.truncate(_EXAMPLE_CHARACTERS)
    legend = "[bold green]learned[/], [dim]not learned[/]" if console.is_terminal else "learned between ⟦ and ⟧"
    console.print(f"{escape(checked.dataset.rows.where(index))}: {legend}")
    console.print(text)
    if cut:
        console.print("[dim]...[/]")


def _verdict(checked: Checked, found: dict[str, Any]) -> str:
    if found["bad"]:
        return f"[red]{found['bad']:,} bad rows: training would stop at the first of them[/]"
    if not found["kept"]:
        return "[red]no row is left to learn from[/]"
    if checked.dropped_share > checked.max_dropped:
        return (
            f"[red]{checked.dropped_share:.1%} of the rows are dropped, more than max_dropped={checked.max_dropped:g}: "
            "raise max_seq_length or max_dropped[/]"
        )
    if not found["end_learned_share"] and found["kept"] > found["truncated"]:
        return "[yellow]no answer ends in a special token: the model may never learn to stop[/]"
    return "[green]all rows are good[/]"
