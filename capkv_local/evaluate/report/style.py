"""How figures look: one colour per method everywhere, and no chart junk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from capkv_local.evaluate.report.cells import Cells

__all__ = ["RC", "Style", "format_mib", "format_plain", "method_styles"]

# Okabe and Ito's colours, which stay apart for colour-blind readers, and some of Tol's; methods
# that only set a baseline are grey. Markers tell apart what colour alone may not.
_KNOWN = {
    "capkv": ("#0072B2", "o"),
    "capkv-paper": ("#56B4E9", "o"),
    "snapkv": ("#D55E00", "s"),
    "expected-attention": ("#009E73", "^"),
    "tova": ("#E69F00", "D"),
    "keydiff": ("#CC79A7", "v"),
    "knorm": ("#882255", "P"),
    "kvzip": ("#332288", "h"),
    "bm25": ("#999933", "X"),
    "streaming": ("#777777", "<"),
    "random": ("#AAAAAA", ">"),
    "oracle": ("#117733", "d"),
    "full": ("#222222", "*"),
}
_OTHERS = (("#44AA99", "p"), ("#AA4499", "8"), ("#661100", "d"))
# Of variants of a method. A single share has no line: there the filled part of the marker tells.
_VARIANTS = (("-", "full"), ("--", "left"), (":", "bottom"), ("-.", "top"))

RC: Any = {
    "axes.edgecolor": "#888888",
    "axes.grid": True,
    "axes.labelcolor": "#333333",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "figure.facecolor": "white",
    "font.family": ["sans-serif"],
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],
    "font.size": 9.5,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text: small files that can be searched
    "svg.hashsalt": "capkv",  # the same records give the same file
    "text.parse_math": False,  # a name with dollar signs is no formula
    "xtick.color": "#555555",
    "ytick.color": "#555555",
}


@dataclass(frozen=True)
class Style:
    """Colour, marker, line, filled part of the marker and weight of one method."""

    colour: str
    marker: str
    line: str
    fill: Any
    width: float
    above: int


def method_styles(cells: Cells) -> dict[str, Style]:
    """Style of every name: the method decides the colour, a variant of it line and filling."""
    bases = {name: cells.method[name].partition(":")[0] for name in cells.names}
    unknown = sorted(set(bases.values()) - set(_KNOWN))
    looks = _KNOWN | {base: _OTHERS[i % len(_OTHERS)] for i, base in enumerate(unknown)}
    styles: dict[str, Style] = {}
    seen: dict[str, int] = {}
    for name in cells.names:
        base = bases[name]
        nth = seen.setdefault(base, 0)
        seen[base] += 1
        ours = base == "capkv"
        colour, marker = looks[base]
        line, fill = _VARIANTS[nth % len(_VARIANTS)]
        styles[name] = Style(colour, marker, line, fill, 2.4 if ours else 1.5, 5 if ours else 3)
    return styles


def format_mib(n: float, _position: int | None = None) -> str:
    """Bytes as a tick label in MiB."""
    mib = n / 2**20
    return f"{mib:,.0f}" if mib >= 10 else f"{mib:.3g}"


def format_plain(x: float, _position: int | None = None) -> str:
    """Tick label of a logarithmic axis without powers."""
    return f"{x:g}"
