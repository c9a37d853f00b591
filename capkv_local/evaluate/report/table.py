"""The tables of a report for a terminal and as Markdown."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import asdict
from typing import IO, Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from capkv_local.evaluate.records import Record
from capkv_local.evaluate.report.cells import Cells
from capkv_local.evaluate.report.grid import LEGEND, Cell, Grid, headline_grid, setting_grids

__all__ = ["make_console", "markdown", "print_tables", "tables"]

_PLAIN_WIDTH = 120


def make_console(file: IO[str] | None = None, *, plain: bool = False) -> Console:
    """Console for tables: 120 columns and no colour where it is no terminal, or if `plain`."""
    file = file or sys.stdout
    if plain or not file.isatty():
        return Console(file=file, width=_PLAIN_WIDTH, no_color=True, force_terminal=False)
    return Console(file=file)


def print_tables(
    records: Iterable[Record], console: Console | None = None, *, extra: bool = False
) -> None:
    """Print one table per setting, with a section for every measure.

    Parameters
    ----------
    records
    console
        None: that of :func:`make_console`.
    extra
        Also other tasks, single kinds of questions and further metrics.

    Raises
    ------
    EvaluationError
        If there are no records.
    """
    cells = Cells(list(records))
    console = console or make_console()
    for _, grid in setting_grids(cells, extra=extra):
        console.print(_rich(grid))
    console.print(Text(LEGEND, style="dim"))


def tables(records: Iterable[Record]) -> list[dict[str, Any]]:
    """Return what :func:`print_tables` prints, for JSON.

    Raises
    ------
    EvaluationError
        If there are no records.
    """
    return [asdict(grid) for _, grid in setting_grids(Cells(list(records)))]


def markdown(records: Iterable[Record], *, headline: bool = False, extra: bool = False) -> str:
    """Return the same tables as GitHub Markdown.

    Parameters
    ----------
    records
    headline
        Only the table that a report begins with.
    extra
        As in :func:`print_tables`.

    Raises
    ------
    EvaluationError
        If there are no records.
    """
    cells = Cells(list(records))
    grids = (
        [headline_grid(cells)] if headline else [g for _, g in setting_grids(cells, extra=extra)]
    )
    legend = LEGEND.replace("*", "**bold**:", 1)
    return "\n".join([*map(_markdown, grids), _escaped(legend).replace(r"\*\*", "**"), ""])


def _rich(grid: Grid) -> Group:
    """Heading, then a table per section: a heading within a table would widen its first column."""
    parts: list[Text | Table] = [Text(grid.title, style="bold"), Text()]
    for section in grid.sections:
        parts.append(Text(section.heading, style="italic"))
        if not section.rows:
            continue
        table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
        for column in (f"  {grid.label}", *grid.columns):
            table.add_column(column, overflow="fold")
        for label, row in section.rows:
            table.add_row(Text(f"  {label}"), *map(_rich_cell, row))
        parts += [table, Text()]
    return Group(*parts, Text())


def _rich_cell(cell: Cell) -> Text:
    if cell.mark == "best":
        return Text(f"{cell.text}*", style="bold")
    return Text(f"{cell.text}~" if cell.mark == "tied" else cell.text)


def _markdown(grid: Grid) -> str:
    lines = [f"### {_escaped(grid.title)}", ""]
    lines.append(_line([grid.label, *map(_escaped, grid.columns)]))
    lines.append(_line(["---"] * (len(grid.columns) + 1)))
    for section in grid.sections:
        lines.append(_line([f"*{_escaped(section.heading)}*", *[""] * len(grid.columns)]))
        lines += [
            _line([_escaped(label), *map(_markdown_cell, row)]) for label, row in section.rows
        ]
    return "\n".join([*lines, ""])


def _markdown_cell(cell: Cell) -> str:
    text = _escaped(cell.text)
    if cell.mark == "best":
        return f"**{text}**"
    return f"{text} \\~" if cell.mark == "tied" else text


def _line(texts: list[str]) -> str:
    return f"| {' | '.join(texts)} |"


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is."""
    return "".join(f"\\{c}" if c in "\\`*_[]<>|~#" else c for c in " ".join(text.split()))
