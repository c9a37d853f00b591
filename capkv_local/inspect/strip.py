"""What survived, for a terminal: a strip of the text, the budgets of the layers, passages."""

from __future__ import annotations

import itertools
import sys
import textwrap
from collections.abc import Iterable, Sequence
from typing import IO

import numpy as np
from rich.console import Console
from rich.text import Text

from capkv_local.inspect.collect import EDGES, N_LEVELS, Passage, Survival, levels, ranked
from capkv_local.inspect.question import Attention

_PLAIN_WIDTH, _WIDEST = 100, 140
_MOST_ROWS = 16  # of the strip
_BAR = 30
# Of 256, from nothing (grey) to all: purple, blue, green, yellow, on dark and on light ground.
_COLOURS = (236, 54, 61, 31, 37, 42, 113, 184, 226)


def print_strip(
    survival: Survival,
    attention: Attention | None = None,
    *,
    n_passages: int = 5,
    file: IO[str] | None = None,
    fancy: bool = False,
) -> None:
    """Print what survived.

    Parameters
    ----------
    attention
        That of a question, to say what it would lose.
    n_passages
        Of those that survived best, and worst.
    file
        Standard output by default.
    fancy
        Colours, and as wide as the terminal; otherwise plain text with a digit for each level.
    """
    file = file or sys.stdout
    if fancy:
        console = Console(file=file, highlight=False, force_terminal=True)
        console.width = min(console.width, _WIDEST)
    else:
        console = Console(file=file, highlight=False, width=_PLAIN_WIDTH, no_color=True)
    parts: list[Iterable[Text]] = [
        _wrapped(summary(survival), console.width),
        _strip(survival, console.width, fancy),
        _layers(survival),
        _passages(survival, console.width, n_passages),
    ]
    if attention is not None:
        parts.append(_question(attention, console.width))
    for i, lines in enumerate(parts):
        if i:
            console.print()
        for line in lines:
            console.print(line, soft_wrap=True)


def summary(survival: Survival) -> str:
    """What is held in all, in one line."""
    s = survival
    shared = "" if s.allocation is None else f", {s.allocation}"
    return (
        f"{s.n_tokens:,} tokens, {s.cells.mean():,.0f} cells per head held "
        f"({s.share.mean():.1%}; {s.cells.min():,} to {s.cells.max():,}); "
        f"no head holds {s.n_gone:,} of the tokens ({s.policy}{shared})"
    )


def legend() -> list[str]:
    """What each level means."""
    ends = [f"{edge:.0%}" for edge in EDGES]
    between = [f"<{ends[0]}", *(f"{a}-{b}" for a, b in itertools.pairwise(ends))]
    return ["none", *(text.replace("%-", "-") for text in between), "all"]


def _strip(survival: Survival, width: int, fancy: bool) -> list[Text]:
    label = len(f"{survival.n_tokens:,}")
    n_columns = max(10, width - label - 1)
    n_rows = min(_MOST_ROWS, -(-survival.n_tokens // n_columns))
    size = -(-survival.n_tokens // (n_columns * n_rows))  # tokens of a mark
    starts = np.arange(0, survival.n_tokens, size)
    counts = np.minimum(size, survival.n_tokens - starts)
    means = np.add.reduceat(survival.share, starts) / counts
    found = levels(means).tolist()
    each = "a token" if size == 1 else f"{size} tokens"
    lines = [Text(f"Share of the heads that hold a token; a mark is {each}.", style="bold")]
    key = Text()
    for level, text in enumerate(legend()):
        key.append_text(_mark(level, fancy)).append(f" {text}  ")
    lines.append(key)
    for first in range(0, len(found), n_columns):
        line = Text(f"{first * size:>{label},} ", style="dim")
        for level in found[first : first + n_columns]:
            line.append_text(_mark(level, fancy))
        lines.append(line)
    return lines


def _mark(level: int, fancy: bool) -> Text:
    assert 0 <= level < N_LEVELS
    if fancy:
        return Text("█", style=f"color({_COLOURS[level]})")
    return Text("." if level == 0 else str(level))


def _layers(survival: Survival) -> list[Text]:
    cells = survival.cells
    n_layer, n_head = cells.shape
    heads = f"fewest and most of its {n_head} heads" if n_head > 1 else "its only head"
    lines = [Text(f"Cells per head in each layer, mean, {heads}.", style="bold")]
    most = float(cells.mean(axis=-1).max())
    width = len(f"{cells.max():,}")
    for layer in range(n_layer):
        row = cells[layer]
        bar = "#" * round(_BAR * float(row.mean()) / most)
        spread = f"{row.min():>{width},} to {row.max():>{width},}" if n_head > 1 else ""
        lines.append(
            Text(f"{layer + 1:>3}  {row.mean():>{width},.0f}  {spread}  ").append(
                bar, style="color(31)"
            )
        )
    return lines


def _passages(survival: Survival, width: int, n: int) -> list[Text]:
    order = ranked(survival)
    best, worst = order[:n], order[n:][-n:][::-1]
    lines = [Text("Passages of which most is held.", style="bold")]
    lines += _rows(survival, [(f"{p.share(survival):.0%}", p) for p in best], width)
    if worst:
        lines += [Text(), Text("Passages of which least is held.", style="bold")]
        lines += _rows(survival, [(f"{p.share(survival):.0%}", p) for p in worst], width)
    return lines


def _rows(survival: Survival, rows: Sequence[tuple[str, Passage]], width: int) -> list[Text]:
    sources = [str(p.source or "no document") for _, p in rows]
    widest = max(map(len, sources), default=0)
    lines = []
    for (number, passage), source in zip(rows, sources, strict=True):
        line = Text(f"{number:>5}  ").append(f"{source:<{widest}}", style="dim")
        lines.append(line.append(f"  {passage.text(survival, max(20, width - len(line) - 2))}"))
    return lines


def _wrapped(text: str, width: int) -> list[Text]:
    return [Text(line) for line in textwrap.wrap(text, width)]


def _question(attention: Attention, width: int) -> list[Text]:
    survival = attention.survival
    lines = [Text(f"What would be lost to: {attention.question}", style="bold")]
    lines += _wrapped(question_summary(attention), width)
    tokens, words = attention.worst_tokens(), []
    for token in tokens:
        word = survival.pieces[token].strip() or repr(survival.pieces[token])
        words.append(f"{word} ({token:,}, {survival.n_held[token]} of {survival.n_heads} heads)")
    what = "Attended most" if attention.full is None else "Lost most"
    if words:
        lines += [Text(), Text(f"{what}: token (position, heads that hold it).", style="bold")]
        lines += [Text(f"       {word}") for word in words]
        total = float(attention.attended.sum())
        rows = [
            (f"{float(attention.at_stake[p.tokens].sum()) / total:.1%}", p)
            for p in attention.worst_passages(5)
        ]
        lines += [Text(), Text(f"{what}: passages, in % of the attention.", style="bold")]
        lines += _rows(survival, rows, width)
    return lines


def question_summary(attention: Attention) -> str:
    """What a question loses, in a sentence."""
    if attention.lost_share is None:
        return (
            f"Not compared with the full cache: {attention.why_not}. These figures are its "
            "attention on what is held; what it would find besides is not known."
        )
    return (
        f"{attention.lost_share:.1%} of its attention on the text (all heads, without the first "
        f"{attention.survival.n_sinks} tokens) goes to cells that are not held any more."
    )
