"""The drawing of each kind of figure, on matplotlib; see :mod:`.figures` for which there are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from capkv_local.evaluate.report.cells import Cells, Setting
from capkv_local.evaluate.report.grid import format_share
from capkv_local.evaluate.report.measures import Measure
from capkv_local.evaluate.report.style import Style, format_mib, format_plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH = 9.0  # inches; at 100 dots per inch the page shows it 1:1
_FULL_COLOUR = "#222222"

Panels = Sequence[Sequence[Setting | None]]


def pareto(cells: Cells, styles: dict[str, Style], measure: Measure, panels: Panels) -> Canvas:
    """Quality over KV bytes: one line per method and KV type, full caches as points.

    Parameters
    ----------
    panels
        Settings of one KV type in rows and columns; every panel also shows the other KV types of
        its setting.
    """
    figure, grid = _panels(panels, height=3.4)
    shown: list[str] = []
    for setting, axes in _pairs(panels, grid):
        full: dict[str, tuple[float, float]] = {}
        for other in _alike(cells, setting):
            for name in cells.names_in(other):
                points = _points(cells, measure, other, name)
                if points and cells.is_full(name):
                    full.setdefault(other.kv_type, points[0])
                elif points and other.reading == setting.reading:
                    shown.append(name)
                    _draw_line(axes, points, styles[name], other.kv_type == "f16")
        _draw_full(axes, full, cells, measure, setting)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(FuncFormatter(format_mib))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.margins(x=0.09, y=0.08)
        _quality_axis(axes, measure, "y")
    _label_outer(grid, x="KV memory, MiB", y=measure.heading)
    handles = [
        _mark(style.colour, style.marker, style.colour, _short(name), style.line, style.fill)
        for name, style in styles.items()
        if name in shown
    ]
    # Columns are as wide as the longest name: about 115 characters fit side by side.
    widest = max((len(str(handle.get_label())) for handle in handles), default=0) + 8
    n_rows = math.ceil(len(handles) / max(1, 115 // widest))
    figure.legend(
        handles=handles, loc="outside lower center", ncols=math.ceil(len(handles) / n_rows)
    )
    return figure


def _short(name: str) -> str:
    """A name for a legend: fields of a method can be many."""
    return name if len(name) <= 40 else f"{name[:39]}…"


def _draw_line(axes: Axes, points: list[tuple[float, float]], style: Style, plain: bool) -> None:
    x, y = zip(*points, strict=True)
    axes.plot(
        x,
        y,
        linestyle=style.line if plain else (0, (1, 1.5)),
        linewidth=style.width,
        color=style.colour,
        marker=style.marker,
        markersize=5.5,
        markerfacecolor=style.colour if plain else "white",
        markerfacecoloralt="white",
        fillstyle=style.fill,
        zorder=style.above,
    )


def _draw_full(
    axes: Axes,
    full: dict[str, tuple[float, float]],
    cells: Cells,
    measure: Measure,
    setting: Setting,
) -> None:
    """Full caches: stars where their size is known, a line for what the f16 one reaches."""
    for kv_type, point in full.items():
        axes.plot(*point, "*", color=_FULL_COLOUR, markersize=9)
        axes.annotate(
            f"full {kv_type}",
            point,
            xytext=(0, 7),
            textcoords="offset points",
            ha="right",
            fontsize=8.5,
            color=_FULL_COLOUR,
        )
    reference = measure.estimate(cells.reference(measure, setting)).value
    if "f16" not in full and math.isfinite(reference):
        axes.axhline(reference, color=_FULL_COLOUR, linewidth=1, linestyle=(0, (5, 3)))
        axes.annotate(
            "full f16",
            (0, reference),
            xycoords=("axes fraction", "data"),
            xytext=(4, 3),
            textcoords="offset points",
            fontsize=8.5,
            color=_FULL_COLOUR,
        )


def dots(
    cells: Cells, styles: dict[str, Style], measure: Measure, panels: Panels, share: float
) -> Canvas:
    """All methods at one share, with their intervals."""
    names = _measured(cells, measure, panels, share)
    figure, grid = _panels(panels, height=_height(names), share_x=True)
    for setting, axes in _pairs(panels, grid):
        for row, name in enumerate(names):
            estimate = cells.estimate(measure, setting, share, name)
            if math.isfinite(estimate.value):
                style = styles[name]
                axes.hlines(row, estimate.low, estimate.high, color=style.colour, linewidth=2)
                axes.plot(estimate.value, row, style.marker, color=style.colour, markersize=7)
        _method_axis(axes, names)
        _quality_axis(axes, measure, "x")
    _label_outer(grid, x=measure.heading)
    return figure


def streamed(
    cells: Cells,
    styles: dict[str, Style],
    measure: Measure,
    panels: Sequence[Sequence[tuple[Setting, Setting] | None]],
    share: float,
) -> Canvas:
    """One-shot (open mark) against streamed reading (filled mark) of every method.

    Parameters
    ----------
    panels
        Pairs of settings that differ in the reading: one-shot, streamed.
    """
    titles: Panels = [[pair and pair[1] for pair in row] for row in panels]
    names = _measured(cells, measure, titles, share)
    figure, grid = _panels(titles, height=_height(names), share_x=True, reading=False)
    for pair, axes in _pairs(panels, grid):
        for row, name in enumerate(names):
            ends = [cells.estimate(measure, setting, share, name).value for setting in pair]
            style = styles[name]
            axes.plot(ends, [row, row], color=style.colour, linewidth=1.5, alpha=0.6)
            for x, face in zip(ends, ("white", style.colour), strict=True):
                axes.plot(
                    x,
                    row,
                    style.marker,
                    color=style.colour,
                    markerfacecolor=face,
                    markeredgewidth=1.6,
                    markersize=7,
                )
        _method_axis(axes, names)
        _quality_axis(axes, measure, "x")
    _label_outer(grid, x=measure.heading)
    marks = [
        _mark("#555555", "o", "white", "one-shot"),
        _mark("#555555", "o", "#555555", "streamed"),
    ]
    figure.legend(handles=marks, loc="outside lower center", ncols=2)
    return figure


# ---- parts -------------------------------------------------------------------------------------


def _panels(
    panels: Panels, *, height: float, share_x: bool = False, reading: bool = True
) -> tuple[Canvas, Any]:
    """Axes in rows and columns, each with its setting as title."""
    n_rows, n_columns = len(panels), max(map(len, panels))
    figure = Canvas(figsize=(WIDTH, 0.6 + height * n_rows), layout="constrained")
    grid = figure.subplots(n_rows, n_columns, squeeze=False, sharex=share_x, sharey=True)
    for row, axes_row in zip(panels, grid, strict=True):
        for setting, axes in zip(row, axes_row, strict=True):
            if setting is None:
                axes.set_axis_off()
                continue
            how = f"{setting.reading}, {setting.question}" if reading else setting.question
            title = setting.model if axes is axes_row[0] else ""
            axes.set_title(f"{title}\n{how}" if title else how)
    return figure, grid


def _height(names: list[str]) -> float:
    return 0.75 + 0.27 * len(names)


def _pairs(panels: Any, grid: Any) -> list[tuple[Any, Axes]]:
    return [
        (setting, axes)
        for row, axes_row in zip(panels, grid, strict=True)
        for setting, axes in zip(row, axes_row, strict=True)
        if setting is not None
    ]


def _alike(cells: Cells, setting: Setting) -> list[Setting]:
    """Settings with the same texts and questions: other KV types and readings, the own one first.

    A full cache is the same however the text was read, so that of another reading will do.
    """

    def texts(s: Setting) -> tuple[str, str, int, str]:
        return s.model, s.split, s.n_tokens, s.question

    same = [other for other in cells.settings if texts(other) == texts(setting)]
    return sorted(same, key=lambda other: other.reading != setting.reading)


def _points(
    cells: Cells, measure: Measure, setting: Setting, name: str
) -> list[tuple[float, float]]:
    points = []
    for share in cells.shares_in(setting):
        size = cells.kv_bytes(setting, share, name)
        value = cells.estimate(measure, setting, share, name).value
        # A KL of 0 has no place on a logarithmic axis.
        if size and math.isfinite(value) and (value > 0 or measure.metric != "kl"):
            points.append((size, value))
    return points


def _measured(cells: Cells, measure: Measure, panels: Panels, share: float) -> list[str]:
    """Names with the measure in any panel; the first one comes on top."""
    names = [
        name
        for name in cells.names
        if any(s and cells.select(measure, s, share, name) for row in panels for s in row)
    ]
    return names[::-1]


def _method_axis(axes: Axes, names: list[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


def _quality_axis(axes: Axes, measure: Measure, which: str) -> None:
    axis = axes.yaxis if which == "y" else axes.xaxis
    if measure.metric == "kl":
        (axes.set_yscale if which == "y" else axes.set_xscale)("log")
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(format_plain))
        axis.set_minor_formatter(NullFormatter())
        axis.set_minor_locator(NullLocator())
    elif measure.percent:
        axis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * x:.0f}"))


def _label_outer(grid: Any, *, x: str, y: str = "") -> None:
    for axes in grid[-1]:
        axes.set_xlabel(x)
    for row in grid:
        row[0].set_ylabel(y)


def _mark(
    colour: str, marker: str, face: str, label: str, line: Any = "none", fill: Any = "full"
) -> Line2D:
    return Line2D(
        [],
        [],
        color=colour,
        marker=marker,
        markerfacecolor=face,
        markerfacecoloralt="white",
        fillstyle=fill,
        label=label,
        linestyle=line,
    )


def share_title(share: float) -> str:
    """Words for the share that a figure shows."""
    return f"{format_share(share)} of the cells kept"
