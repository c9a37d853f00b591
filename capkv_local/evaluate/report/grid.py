"""Tables before they are drawn: titles, sections, and cells with their marks."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from capkv_local.evaluate.report.cells import Cells, Setting
from capkv_local.evaluate.report.measures import HEADLINE, KL, RECALL_OF_FULL, Measure
from capkv_local.evaluate.statistics import MIN_CASES, Estimate, compare

__all__ = [
    "LEGEND",
    "Cell",
    "Grid",
    "Section",
    "format_bytes",
    "format_number",
    "format_share",
    "headline_grid",
    "mark_best",
    "setting_grids",
]

Mark = Literal["", "best", "tied"]

LEGEND = (
    "mean [95% interval over cases]; allocation uniform unless named; ↓ lower, ↑ higher is better; "
    "* best of its column, ~ not significantly different from it "
    f"(paired bootstrap; fewer than {MIN_CASES} common cases never are)"
)


@dataclass(frozen=True)
class Cell:
    """Text of one cell and whether it is the best of its column, or as good."""

    text: str = ""
    mark: Mark = ""


@dataclass
class Section:
    """Rows under one heading; a row is its label and one cell per column.

    Attributes
    ----------
    title : str
    rows : list
    full : str
        What full caches reach, "" if that is not known.
    """

    title: str
    rows: list[tuple[str, list[Cell]]] = field(default_factory=list)
    full: str = ""

    @property
    def heading(self) -> str:
        """Title, and what full caches reach."""
        return f"{self.title} · full cache: {self.full}" if self.full else self.title


@dataclass
class Grid:
    """A table: columns beyond that of the labels, and sections of rows."""

    title: str
    columns: list[str]
    sections: list[Section]
    label: str = "method"


def format_share(share: float) -> str:
    """Percentage with as many digits as it needs."""
    return f"{100 * share:.3g}%"


def format_bytes(n: float) -> str:
    """Bytes as MiB with three digits."""
    mib = n / 2**20
    return f"{mib:,.0f} MiB" if mib >= 100 else f"{mib:.3g} MiB"


def format_number(x: float, digits: int = 3, *, like: float | None = None) -> str:
    """Number with so many digits; `like`: with the decimals that this number would have.

    Examples
    --------
    >>> format_number(0.01234), format_number(0.2, 2, like=0.0123), format_number(0)
    ('0.0123', '0.200', '0')
    """
    size = abs(x if like is None else like)
    if size == 0:
        return f"{x:.3g}"
    decimals = min(6, max(0, digits - 1 - math.floor(math.log10(size))))
    return f"{x:.{decimals}f}"


def format_estimate(estimate: Estimate, measure: Measure) -> str:
    """Mean and interval, as the measure is shown."""
    value, bounds = estimate.value, (estimate.low, estimate.high)
    if not math.isfinite(value):
        return "–" if estimate.n_items else ""
    if measure.percent:
        text, (low, high) = f"{100 * value:.1f}", (f"{100 * x:.0f}" for x in bounds)
    elif measure.metric == "logprob":  # differences of less than 1% in probability do not matter
        text, (low, high) = f"{value:.2f}", (f"{x:.2f}" for x in bounds)
    else:
        text, (low, high) = format_number(value), (format_number(x, 2, like=value) for x in bounds)
    # Nothing varies, or there are too few cases to know.
    return f"{text} [{low}, {high}]" if bounds[0] < bounds[1] else text


def mark_best(
    cells: Cells, measure: Measure, setting: Setting, share: float, names: list[str]
) -> dict[str, Mark]:
    """Best method of a column, and those not significantly different from it.

    Only methods that have all items that any of them has can be the best: an interrupted run may
    have measured another on the easy cases only. The full cache and the oracle take no part.
    """
    records = {
        name: cells.select(measure, setting, share, name) for name in names if cells.competes(name)
    }
    most = max(map(len, records.values()), default=0)
    means = {
        name: measure.estimate(found).value
        for name, found in records.items()
        if found and len(found) == most
    }
    means = {name: value for name, value in means.items() if math.isfinite(value)}
    if len(means) < 2:
        return {}
    choose = min if measure.lower_is_better else max
    best = choose(means, key=lambda name: means[name])
    marks: dict[str, Mark] = {best: "best"}
    for name, found in records.items():
        if name != best and found and compare(found, records[best]).verdict == "unclear":
            marks[name] = "tied"
    return marks


def _column(
    cells: Cells, measure: Measure, setting: Setting, share: float, names: list[str]
) -> dict[str, Cell]:
    """Cells of one column; those with fewer cases than others say how many."""
    estimates = {name: cells.estimate(measure, setting, share, name) for name in names}
    marks = mark_best(cells, measure, setting, share, names)
    most = max((estimate.n_cases for estimate in estimates.values()), default=0)
    column = {}
    for name, estimate in estimates.items():
        text = format_estimate(estimate, measure)
        if text and estimate.n_cases < most:
            text += f" ({estimate.n_cases} of {most} cases)"
        column[name] = Cell(text, marks.get(name, ""))
    return column


def setting_grids(
    cells: Cells, *, extra: bool = True, settings: list[Setting] | None = None
) -> list[tuple[Setting, Grid]]:
    """One table per setting: a section per measure, methods by shares.

    Parameters
    ----------
    cells
    extra
        Also the measures beyond the headline ones.
    settings
        Which; None: all.
    """
    measures = [*HEADLINE, *(cells.extra_measures() if extra else [])]
    grids = []
    for setting in cells.settings if settings is None else settings:
        names = [name for name in cells.names_in(setting) if not cells.is_full(name)]
        shares = [
            s for s in cells.shares_in(setting) if set(names) & set(cells.names_in(setting, s))
        ]
        sections = []
        for measure in measures:
            columns = [_column(cells, measure, setting, share, names) for share in shares]
            section = Section(measure.heading, full=_full(cells, measure, setting))
            for name in names:
                row = [column[name] for column in columns]
                if any(cell.text for cell in row):
                    section.rows.append((_label(cells, setting, name), row))
            if section.rows or section.full:
                sections.append(section)
        sections.append(_memory(cells, setting, shares, names))
        label = "method" if names else "full cache only"
        grid = Grid(setting.title, list(map(format_share, shares)), sections, label)
        grids.append((setting, grid))
    return grids


def _full(cells: Cells, measure: Measure, setting: Setting) -> str:
    """What full caches reach: that of f16, and that of the setting's KV type if it was run."""
    found = {}
    if not measure.of_full:
        found["f16"] = measure.estimate(cells.reference(measure, setting))
    for name in filter(cells.is_full, cells.names_in(setting, 1.0)):
        found.setdefault(setting.kv_type, cells.estimate(measure, setting, 1.0, name))
    texts = {kv_type: format_estimate(estimate, measure) for kv_type, estimate in found.items()}
    return ", ".join(f"{text} with {kv_type}" for kv_type, text in texts.items() if text)


def _memory(cells: Cells, setting: Setting, shares: list[float], names: list[str]) -> Section:
    def text(name: str, share: float) -> str:
        size = cells.kv_bytes(setting, share, name)
        return "" if size is None else format_bytes(size)

    full = [text(name, 1.0) for name in cells.names_in(setting, 1.0) if cells.is_full(name)]
    section = Section("KV memory", full=", ".join(full))
    for name in names:
        row = [Cell(text(name, share)) for share in shares]
        section.rows.append((_label(cells, setting, name), row))
    return section


def _label(cells: Cells, setting: Setting, name: str) -> str:
    details = cells.details.get((setting, name), "")
    return f"{cells.method[name]} ({details})" if details else name


def headline_grid(cells: Cells) -> Grid:
    """The table to read first: KL and recall at the middle share on each model's longest texts."""
    focus = cells.focus()
    here = [
        setting
        for setting in cells.settings
        if (setting.split, setting.kv_type, setting.reading)
        == (focus.split, focus.kv_type, focus.reading)
        and setting.n_tokens == focus.n_tokens[setting.model]
    ]
    questions = sorted({setting.question for setting in here}, reverse=True)
    shown = [
        (question, measure)
        for question in questions
        for measure in (KL, RECALL_OF_FULL)
        if cells.drawable(measure, [s for s in here if s.question == question], focus.share)
    ]
    sections = []
    for model in dict.fromkeys(setting.model for setting in here):
        by_question = {setting.question: setting for setting in here if setting.model == model}
        names = [
            name
            for name in cells.names
            if any(name in cells.names_in(setting, focus.share) for setting in by_question.values())
        ]
        columns = [
            _column(cells, measure, by_question[question], focus.share, names)
            if question in by_question
            else {}
            for question, measure in shown
        ]
        rows = [(name, [column.get(name, Cell()) for column in columns]) for name in names]
        sections.append(Section(f"{model}, {focus.n_tokens[model]:,} tokens", rows))
    return Grid(
        f"{format_share(focus.share)} of the cells kept · {focus.reading} · KV {focus.kv_type}",
        [f"{question}: {measure.heading}" for question, measure in shown],
        sections,
    )
