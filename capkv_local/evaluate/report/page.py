"""The report: one page that needs nothing but itself, with its figures and numbers next to it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

from markupsafe import Markup, escape

from capkv_local.errors import EvaluationError
from capkv_local.evaluate.records import Results, write_csv
from capkv_local.evaluate.report.cells import SUBJECT, Cells
from capkv_local.evaluate.report.figures import Figure, draw_figures
from capkv_local.evaluate.report.findings import (
    WORDS,
    Finding,
    count_comparisons,
    losses,
    tally,
    verdicts,
)
from capkv_local.evaluate.report.grid import LEGEND, format_share, headline_grid, setting_grids
from capkv_local.evaluate.statistics import DRAWS, MIN_CASES
from capkv_local.pages import render

__all__ = ["render_page", "write_report"]


def write_report(results_path: str | Path, out_dir: str | Path) -> Path:
    """Write ``report.html``, ``results.csv`` and ``figures/*.svg`` from a results file.

    Parameters
    ----------
    results_path
        The ``results.jsonl`` of a run.
    out_dir
        Folder, made if it is not there; files of these names are replaced.

    Returns
    -------
    Path
        The page.

    Raises
    ------
    EvaluationError
        No file of records, none in it, no matplotlib, or a folder that cannot be written.
    """
    records, torn = Results(results_path).read()
    if not records:
        raise EvaluationError(f"'{results_path}' has no records; run the evaluation first")
    cells, out = Cells(records), Path(out_dir)
    figures = draw_figures(cells)
    page = out / "report.html"
    try:
        (out / "figures").mkdir(parents=True, exist_ok=True)
        for figure in figures:
            path = out / "figures" / f"{figure.name}.svg"
            path.write_text(figure.svg, encoding="utf-8")
        page.write_text(render_page(cells, figures, torn=torn), encoding="utf-8")
    except OSError as error:
        reason = error.strerror or str(error)
        raise EvaluationError(f"'{out}' cannot be written ({reason}); check it") from error
    write_csv(records, out / "results.csv")
    return page


def render_page(cells: Cells, figures: Iterable[Figure], *, torn: bool = False) -> str:
    """Return the page as HTML that loads nothing.

    Parameters
    ----------
    cells
    figures
        Of :func:`draw_figures`; none leaves them out.
    torn
        Whether the results end in a half-written line, to say so.
    """
    judged, lost = verdicts(cells), losses(cells)
    return render(
        Path(__file__).with_name("page.html.j2"),
        facts=_facts(cells, torn),
        headline=headline_grid(cells),
        legend=LEGEND,
        subject=SUBJECT,
        words=WORDS,
        verdicts=_by_setting(judged),
        tally=tally(judged),
        losses=lost,
        losses_by_setting=_by_setting(lost),
        n_comparisons=count_comparisons(cells),
        figure_groups=[(group, list(some)) for group, some in groupby(figures, lambda f: f.group)],
        grids=setting_grids(cells),
        inline=_inline,
        share=format_share,
        draws=f"{DRAWS:,}",
        min_cases=MIN_CASES,
    )


def _by_setting(findings: list[Finding]) -> list[tuple[str, list[Finding]]]:
    return [(where, list(some)) for where, some in groupby(findings, lambda f: f.where)]


def _facts(cells: Cells, torn: bool) -> list[tuple[str, str]]:
    """What was run, in words."""
    records = cells.records
    cases: dict[str, set[tuple[str, int, int]]] = {}
    for r in records:
        task = r.task if r.split == "report" else f"{r.task} ({r.split} split)"
        cases.setdefault(task, set()).add((r.case, r.n_tokens, r.seed))
    facts = [
        ("models", _listed(r.model for r in records)),
        ("methods", ", ".join(cells.names)),
        ("cells kept", ", ".join(format_share(x) for x in sorted({r.share for r in records}))),
        ("tokens read", ", ".join(f"{n:,}" for n in sorted({r.n_tokens for r in records}))),
        ("reading", _listed(r.reading for r in records)),
        ("question", _listed(r.question for r in records)),
        ("KV types", _listed(r.kv_type for r in records)),
        ("cases", _shortened(sorted({r.case for r in records}))),
        ("tasks", "; ".join(f"{task}: {_counted(found)}" for task, found in sorted(cases.items()))),
        ("seeds", _listed(str(r.seed) for r in records)),
        ("measured", f"{len(records):,} numbers"),
    ]
    if torn:
        facts.append(("note", "the results end in a half-written line, which is left out"))
    return facts


def _counted(found: set[tuple[str, int, int]]) -> str:
    return f"{len({case for case, _, _ in found})} cases, {len(found)} with lengths and seeds"


def _shortened(names: list[str]) -> str:
    shown = ", ".join(names[:12])
    return shown if len(names) <= 12 else f"{shown} and {len(names) - 12} more"


def _listed(values: Iterable[str]) -> str:
    return ", ".join(sorted(set(values)))


_PROLOG = re.compile(r"^.*?(?=<svg)", re.S)
_METADATA = re.compile(r"<metadata>.*?</metadata>", re.S)
_NAMESPACE = re.compile(r'\sxmlns(:\w+)?="[^"]*"')
_OWN_ID = re.compile(r'(\sid="|url\(#|href="#)')


def _inline(figure: Figure) -> Markup:
    """SVG as part of a page: ids that no other figure has, and what it shows in words."""
    svg = _METADATA.sub("", _PROLOG.sub("", figure.svg, count=1))
    head, rest = svg.split(">", 1)
    # Within HTML the namespaces go without saying.
    head = _NAMESPACE.sub("", head)
    rest = _OWN_ID.sub(lambda match: f"{match[1]}{figure.name}-", rest)
    return Markup(f'{head} role="img" aria-label="{escape(figure.alt)}">{rest}')
