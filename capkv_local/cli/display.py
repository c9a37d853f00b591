"""How numbers, progress and answers look: rich on a terminal, plain lines everywhere else."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, TextIO

import click

if TYPE_CHECKING:
    from capkv_local.cache.stats import KVCacheStats
    from capkv_local.chat import IngestProgress, IngestReport

ProgressCallback = Callable[["IngestProgress"], None]

# ---- numbers -----------------------------------------------------------------------------------


def count(value: int, word: str) -> str:
    """Return a counted word: ``1 token``, ``12,345 tokens``.

    Examples
    --------
    >>> count(12345, "token")
    '12,345 tokens'
    """
    return f"{value:,} {word}{'' if value == 1 else 's'}"


def size(n_bytes: float) -> str:
    """Return a size in bytes, KiB, MiB or GiB.

    Examples
    --------
    >>> size(58720256)
    '56.0 MiB'
    """
    if n_bytes < 1024:
        return f"{n_bytes:.0f} B"
    for unit in ("KiB", "MiB"):
        n_bytes /= 1024
        if n_bytes < 1023.95:
            return f"{n_bytes:.1f} {unit}"
    return f"{n_bytes / 1024:.1f} GiB"


def duration(seconds: float) -> str:
    """Return a time for people.

    Examples
    --------
    >>> duration(0.84), duration(136), duration(3720)
    ('0.8 s', '2 min 16 s', '1 h 02 min')
    """
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


# ---- progress ----------------------------------------------------------------------------------


def is_fancy(stream: TextIO) -> bool:
    """Return whether a stream takes colours and cursor movement."""
    return stream.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"


def progress_text(progress: IngestProgress) -> str:
    """Return tokens done and total, rate, time left, KV and process memory, on one line."""
    total, about = progress.total, "~" if progress.estimated else ""
    if not progress.done:
        return f"counting: {count(total or 0, 'token')} so far, RAM {size(progress.rss_bytes)}"
    rate = progress.done / progress.seconds if progress.seconds > 0 else 0.0
    of = "" if total is None else f"/{about}{total:,}"
    parts = [f"{progress.done:,}{of} tokens"]
    if rate > 0:
        parts.append(f"{rate:,.0f}/s")
        if total is not None:
            parts.append(f"{about}{duration(max(0, total - progress.done) / rate)} left")
    parts += [f"KV {size(progress.kv_bytes)}", f"RAM {size(progress.rss_bytes)}"]
    return ", ".join(parts)


def report_text(title: str, report: IngestReport) -> str:
    """Return what was read, as one line for after the progress bar."""
    rate = f", {report.tokens / report.seconds:,.0f}/s" if report.seconds > 0 else ""
    return (
        f"read {title}: {count(report.tokens, 'token')} in {duration(report.seconds)}{rate}; "
        f"{count(report.n_cells, 'cell')} kept, {size(report.kv_bytes)}"
    )


@contextlib.contextmanager
def waiting(text: str) -> Iterator[None]:
    """Show that something takes a while (loading a model); nothing when not on a terminal."""
    if not is_fancy(sys.stderr):
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(text):
        yield


@contextlib.contextmanager
def ingest_progress(*, quiet: bool = False) -> Iterator[ProgressCallback]:
    """Show the progress of reading on standard error; yields the callback for ``ingest``."""
    if quiet:
        yield lambda progress: None
        return
    if not is_fancy(sys.stderr):
        yield _PlainProgress()
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    console = Console(stderr=True)
    console.width -= 4  # room for the ^C that a terminal echoes: a wrapped bar leaves traces
    bar = Progress(
        TextColumn("reading"),
        BarColumn(bar_width=None),
        TextColumn("{task.description}", markup=False),
        console=console,
        expand=True,
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    )
    with bar:
        task = bar.add_task("starting", total=None)

        def show(progress: IngestProgress) -> None:
            bar.update(
                task,
                total=progress.total if progress.done else None,
                completed=progress.done,
                description=progress_text(progress),
            )

        yield show


class _PlainProgress:
    """A line for every tenth of the text, or every 30 seconds: readable in a log."""

    def __init__(self) -> None:
        self._tenth = 0
        self._time = time.monotonic()

    def __call__(self, progress: IngestProgress) -> None:
        tenth = 10 * progress.done // progress.total if progress.total else 0
        now = time.monotonic()
        if tenth == self._tenth and now - self._time < 30:
            return
        self._tenth, self._time = tenth, now
        click.echo(f"reading: {progress_text(progress)}", err=True)


@contextlib.contextmanager
def step_progress() -> Iterator[Callable[[int, int, str], None]]:
    """Show steps that take seconds each: yields a callback (steps done, in all, what is next)."""
    if not is_fancy(sys.stderr):
        yield _PlainSteps()
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        MofNCompleteColumn(),
        BarColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}", markup=False),
    )
    # Texts and methods differ in cost: the rate is taken over many steps.
    with Progress(
        *columns, console=Console(stderr=True), transient=True, speed_estimate_period=600
    ) as bar:
        task = bar.add_task("starting", total=None)
        yield lambda done, total, what: bar.update(
            task, total=total, completed=done, description=what
        )


class _PlainSteps:
    """A line every 30 seconds, with the time that is left: readable in a log."""

    def __init__(self) -> None:
        self._start = self._last = time.monotonic()
        self._first: int | None = None  # steps that an earlier run had done

    def __call__(self, done: int, total: int, what: str) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = done
        if now - self._last < 30 and done < total:
            return
        self._last = now
        new = done - self._first
        left = f", {duration((total - done) * (now - self._start) / new)} left" if new else ""
        click.echo(f"{done:,}/{total:,}{left}, {what}", err=True)


# ---- answers -----------------------------------------------------------------------------------

# A document can make a model repeat escape sequences; a terminal must not obey them.
_CONTROLS = {code: None for code in [*range(9), *range(11, 32), *range(127, 160)]}


def printable(text: str) -> str:
    """Return a text without control characters."""
    return text.translate(_CONTROLS)


def stream_answer(pieces: Iterable[str]) -> str:
    """Write an answer to standard output piece by piece, without white space around it.

    Returns
    -------
    str
        The whole answer, as it was generated but stripped.
    """
    answer: list[str] = []
    started = False
    held = ""  # white space that is written only when text follows it
    for piece in pieces:
        text = held + printable(piece)
        if not started:
            text = text.lstrip()
        answer.append(piece)
        shown = text.rstrip()
        started = started or bool(shown)
        held = text[len(shown) :]
        click.echo(shown, nl=False)
    click.echo()
    return "".join(answer).strip()


def budget_text(stats: KVCacheStats) -> str:
    """Return how many cells are kept, and how heads share them."""
    shared = "" if stats.allocation is None else f", {stats.allocation}"
    return f"{stats.budget:,} cells per head{shared}"


def columns(rows: Sequence[Sequence[str]], *, right: bool = False) -> list[str]:
    """Return lines of columns as wide as they need be; ``right``: all but the first to the right.

    Examples
    --------
    >>> columns([("a", "bc"), ("def", "g")], right=True)
    ['a    bc', 'def   g']
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    pad = str.rjust if right else str.ljust
    return [
        "  ".join([row[0].ljust(widths[0]), *map(pad, row[1:], widths[1:])]).rstrip()
        for row in rows
    ]


def _evictions(stats: KVCacheStats) -> str:
    if not stats.evictions and stats.n_cells < stats.n_tokens:
        return "none since it was opened"
    return f"{stats.evictions:,} ({count(stats.cells_evicted, 'cell')} evicted)"


def stats_text(stats: KVCacheStats) -> str:
    """Return the state of the cache as lines of ``name  value``."""
    memory = size(stats.kv_bytes)
    if 0 < stats.kv_bytes < stats.kv_bytes_full:
        less = 1 - stats.kv_bytes / stats.kv_bytes_full
        memory += f", {less:.0%} less than the {size(stats.kv_bytes_full)} without eviction"
    fewest, most = stats.n_cells_range
    spread = "" if fewest == most else f" ({fewest:,} to {most:,})"
    parts = {}
    if stats.n_protected:
        turns = stats.n_cells - stats.n_cells_protected
        parts["document"] = f"{stats.n_cells_protected:,} of them, of {stats.n_protected:,} tokens"
        parts["conversation"] = f"{turns:,} of {stats.n_cells_conversation:,} beside the document"
    if stats.copy_bytes:
        parts["copy"] = f"{size(stats.copy_bytes)}, to go back to the document alone"
    rows = {
        "policy": stats.policy or "none",
        "budget": budget_text(stats),
        "tokens": f"{stats.n_tokens:,}",
        "cells": f"{stats.n_cells:,} of {stats.n_cells_max:,} per head{spread}",
        **parts,
        "KV memory": memory,
        "observation": size(stats.observe_bytes),
        "evictions": _evictions(stats),
        "time": f"decode {duration(stats.t_decode_s)}, score {duration(stats.t_score_s)}, "
        f"select {duration(stats.t_select_s)}, evict {duration(stats.t_evict_s)}",
    }
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())
