"""Needle maps: where in texts of which length a fact is found again."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FuncFormatter

from capkv_local.evaluate.records import Record
from capkv_local.evaluate.report.cells import Cells, Setting
from capkv_local.evaluate.report.charts import WIDTH
from capkv_local.evaluate.report.measures import Measure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_REFERENCE = "full f16"


def heat_map(
    cells: Cells, measure: Measure, columns: list[list[Setting]], names: list[str], share: float
) -> Canvas:
    """Needle maps: depth by length, a row of panels per method and one for the full cache.

    Parameters
    ----------
    columns
        For every column of panels the settings of its lengths, ascending.
    """
    depths = [
        record.depth
        for record in cells.records
        if (record.task, record.metric) == (measure.task, measure.metric)
        and (measure.kinds is None or record.kind in measure.kinds)
    ]
    edges = _depth_edges([depth for depth in depths if depth is not None])
    rows = [*names, _REFERENCE]
    values = {
        (name, i): _depth_by_length(cells, measure, settings, share, name, edges)
        for name in rows
        for i, settings in enumerate(columns)
    }
    finite = np.concatenate([v[np.isfinite(v)] for v in values.values()])
    low, high = (0.0, 1.0) if measure.percent else (float(finite.min()), float(finite.max()))
    size = (WIDTH, 1.1 + len(rows) * (0.35 + 0.19 * (len(edges) - 1)))
    figure = Canvas(figsize=size, layout="constrained")
    grid = figure.subplots(len(rows), len(columns), squeeze=False, sharex="col", sharey=True)
    image: Any = None
    for row, name in enumerate(rows):
        for column, settings in enumerate(columns):
            axes, heat = grid[row][column], values[name, column]
            image = axes.pcolormesh(heat, cmap="cividis", vmin=low, vmax=high)
            _cell_texts(axes, heat, measure, low, high)
            _bare(axes)
            axes.set_xticks(np.arange(len(settings)) + 0.5, [f"{s.n_tokens:,}" for s in settings])
            axes.set_yticks([0, len(edges) - 1], ["start", "end"])
            axes.set_ylim(len(edges) - 1, 0)
            title = [name] if column == 0 else []
            if row == 0:
                title.append(f"{settings[0].reading}, {settings[0].question}")
            axes.set_title("\n".join(title))
    for axes in grid[-1]:
        axes.set_xlabel("tokens read")
    for row_axes in grid:
        row_axes[0].set_ylabel("depth")
    bar = figure.colorbar(image, ax=grid, shrink=min(1.0, 3 / size[1]), pad=0.015)
    bar.set_label(measure.heading)
    bar.outline.set_visible(False)
    if measure.percent:
        bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * x:.0f}"))
    return figure


def _depth_edges(depths: list[float]) -> list[float]:
    """Edges of the depth bins: around the depths that there are if these are few, else fifths."""
    distinct = sorted(set(depths))
    if 1 < len(distinct) <= 7:
        between = [(a + b) / 2 for a, b in itertools.pairwise(distinct)]
        return [0.0, *between, 1.0]
    return [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]


def _depth_by_length(
    cells: Cells,
    measure: Measure,
    settings: list[Setting],
    share: float,
    name: str,
    edges: list[float],
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Means [n_depth, n_length], NaN where nothing was measured."""
    out = np.full((len(edges) - 1, len(settings)), math.nan)
    for column, setting in enumerate(settings):
        found = (
            cells.reference(measure, setting)
            if name == _REFERENCE
            else cells.select(measure, setting, share, name)
        )
        bins: dict[int, list[Record]] = {}
        for record in found:
            if record.depth is not None:
                row = int(np.searchsorted(edges[1:-1], record.depth, side="right"))
                bins.setdefault(row, []).append(record)
        for row, records in bins.items():
            out[row, column] = sum(record.value for record in records) / len(records)
    return out


def _cell_texts(axes: Axes, heat: Any, measure: Measure, low: float, high: float) -> None:
    for (y, x), value in np.ndenumerate(heat):
        if math.isfinite(value):
            text = f"{100 * value:.0f}" if measure.percent else f"{value:.2f}"
            light = value > (low + high) / 2
            colour = "#111111" if light else "#ffffff"
            axes.text(x + 0.5, y + 0.5, text, ha="center", va="center", fontsize=8, color=colour)


def _bare(axes: Axes) -> None:
    axes.grid(visible=False)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
