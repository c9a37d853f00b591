"""The figures of a report as SVG; matplotlib is needed only when some are drawn."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from capkv_local.errors import EvaluationError
from capkv_local.evaluate.report.cells import Cells, Setting
from capkv_local.evaluate.report.grid import format_share
from capkv_local.evaluate.report.measures import KL, LOGPROB, RECALL
from capkv_local.evaluate.report.style import RC, method_styles

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

__all__ = ["Figure", "draw_figures"]


@dataclass(frozen=True)
class Figure:
    """One figure.

    Attributes
    ----------
    name : str
        File name without its ending.
    title : str
    caption : str
        How to read it.
    alt : str
        What it shows, for those who do not see it.
    group : str
        Figures of a kind stand together.
    first : bool
        The one of its group that is seen at once.
    svg : str
    """

    name: str
    title: str
    caption: str
    alt: str
    group: str
    first: bool
    svg: str


def draw_figures(cells: Cells) -> list[Figure]:
    """Draw every figure that the records allow.

    Raises
    ------
    EvaluationError
        If matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
    except ImportError:
        raise EvaluationError(
            'figures need matplotlib; install it with: pip install "capkv-local[eval]"'
        ) from None
    # No pyplot: it would choose a window system and keep every figure.
    with mpl.rc_context(RC):
        return [*_pareto(cells), *_dots(cells), *_streamed(cells), *_heat_maps(cells)]


def _pareto(cells: Cells) -> Iterator[Figure]:
    from capkv_local.evaluate.report import charts

    focus, styles = cells.focus(), method_styles(cells)
    here = _focused(cells)
    for measure in (KL, RECALL):
        # Longest texts and the usual reading first: that figure is seen at once.
        ways = {(s.n_tokens, s.reading) for s in here}
        usual = max(ways, key=lambda way: (way[1] == focus.reading, way[0]))
        for n_tokens, reading in sorted(ways, key=lambda way: (way != usual, way)):
            some = [s for s in here if (s.n_tokens, s.reading) == (n_tokens, reading)]
            some = cells.drawable(measure, some)
            if not some:
                continue
            panels = _by_question(some)
            yield Figure(
                f"pareto-{measure.id}-{reading}-{n_tokens}",
                f"{measure.heading} by KV memory: {n_tokens:,} tokens, {reading}",
                "Every point is one share of the cells; stars are full caches. "
                + ("The oracle knows what comes: a bound. " if _has_oracle(cells, some) else "")
                + ("Down and left is better." if measure is KL else "Up and left is better.")
                + " Dotted lines with open marks: evicted and quantised.",
                f"Line chart of {measure.title} against KV memory for "
                f"{_listed(cells, some)}; the tables below have all numbers.",
                f"Quality by KV memory: {measure.title.partition(',')[0]}",
                (n_tokens, reading) == usual,
                _svg(charts.pareto(cells, styles, measure, panels)),
            )


def _has_oracle(cells: Cells, settings: list[Setting]) -> bool:
    return any(cells.is_oracle(name) for s in settings for name in cells.names_in(s))


def _dots(cells: Cells) -> Iterator[Figure]:
    from capkv_local.evaluate.report import charts

    focus, styles = cells.focus(), method_styles(cells)
    longest = [s for s in _focused(cells) if s.n_tokens == focus.n_tokens[s.model]]
    for measure in (KL, RECALL):
        here = cells.drawable(measure, longest, focus.share)
        if not here:
            continue
        ways = sorted({(s.reading, s.question) for s in here}, key=_way_order)
        panels = _grid(here, ways, lambda s: (s.reading, s.question))
        yield Figure(
            f"methods-{measure.id}",
            f"{measure.heading} at {charts.share_title(focus.share)}",
            "Longest texts of each model; lines are 95% intervals over cases.",
            f"Dot plot of {measure.title} with intervals at {format_share(focus.share)} for "
            f"{_listed(cells, here)}; the tables below have all numbers.",
            "Methods at one share",
            True,
            _svg(charts.dots(cells, styles, measure, panels, focus.share)),
        )


def _streamed(cells: Cells) -> Iterator[Figure]:
    from capkv_local.evaluate.report import charts

    focus, styles = cells.focus(), method_styles(cells)
    longest = [s for s in _focused(cells) if s.n_tokens == focus.n_tokens[s.model]]
    for measure in (KL, RECALL):
        here = cells.drawable(measure, longest, focus.share)
        panels = _reading_pairs(here)
        if not panels:
            continue
        yield Figure(
            f"streamed-{measure.id}",
            f"What streaming costs: {measure.heading} at {charts.share_title(focus.share)}",
            "Open mark: all of the text is read, then evicted once. Filled mark: the text streams "
            "through the small cache.",
            f"Dumbbell chart of {measure.title}, one-shot against streamed, for "
            f"{_listed(cells, here)}; the tables below have all numbers.",
            "Streamed against one-shot",
            True,
            _svg(charts.streamed(cells, styles, measure, panels, focus.share)),
        )


def _reading_pairs(settings: list[Setting]) -> list[list[tuple[Setting, Setting] | None]]:
    """One-shot and streamed settings side by side: a row per model, a column per question."""
    found = {(s.model, s.question, s.reading): s for s in settings}
    both = {
        (s.model, s.question): (found[s.model, s.question, "one-shot"], s)
        for s in settings
        if s.reading == "streamed" and (s.model, s.question, "one-shot") in found
    }
    questions = sorted({question for _, question in both}, reverse=True)
    models = dict.fromkeys(model for model, _ in both)
    return [[both.get((model, question)) for question in questions] for model in models]


def _heat_maps(cells: Cells) -> Iterator[Figure]:
    from capkv_local.evaluate.report import charts, heat

    focus, first = cells.focus(), True
    for measure in (RECALL, LOGPROB):
        here = cells.drawable(measure, _focused(cells), focus.share)
        for number, model in enumerate(dict.fromkeys(s.model for s in here)):
            columns: dict[tuple[str, str], list[Setting]] = {}
            for s in sorted((s for s in here if s.model == model), key=lambda s: s.n_tokens):
                columns.setdefault((s.reading, s.question), []).append(s)
            names = [
                name
                for name in cells.names
                if not cells.is_full(name)
                and any(
                    record.depth is not None
                    for settings in columns.values()
                    for s in settings
                    for record in cells.select(measure, s, focus.share, name)
                )
            ]
            if not names:
                continue
            ordered = [columns[way] for way in sorted(columns, key=_way_order)]
            yield Figure(
                f"depth-{measure.id}-{number + 1}",
                f"{measure.heading} by depth and length: {model}, "
                f"{charts.share_title(focus.share)}",
                "Where in the text the fact stands (down: towards its end) and how long the text "
                "is (right: longer). Bright is good.",
                f"Heat maps of {measure.title} by depth and length for {', '.join(names)} with "
                f"{model}.",
                "Depth and length",
                first,
                _svg(heat.heat_map(cells, measure, ordered, names, focus.share)),
            )
            first = False


def _svg(canvas: Canvas) -> str:
    file = io.StringIO()
    # Without a date and a tool name the same records give the same file.
    nothing: dict[str, Any] = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    canvas.savefig(file, format="svg", metadata=nothing)
    return file.getvalue()


def _focused(cells: Cells) -> list[Setting]:
    focus = cells.focus()
    return [s for s in cells.settings if (s.split, s.kv_type) == (focus.split, focus.kv_type)]


def _by_question(settings: list[Setting]) -> list[list[Setting | None]]:
    questions = sorted({s.question for s in settings}, reverse=True)
    return _grid(settings, questions, lambda s: s.question)


def _grid(
    settings: list[Setting], columns: list[Any], column: Callable[[Setting], Any]
) -> list[list[Setting | None]]:
    """Settings as panels: a row per model."""
    found = {(s.model, column(s)): s for s in settings}
    models = dict.fromkeys(s.model for s in settings)
    return [[found.get((model, c)) for c in columns] for model in models]


def _way_order(way: tuple[str, str]) -> tuple[bool, bool]:
    return way[0] != "one-shot", way[1] != "unseen"


def _listed(cells: Cells, settings: list[Setting]) -> str:
    names = {name for s in settings for name in cells.names_in(s)}
    return ", ".join(name for name in cells.names if name in names)
