"""What follows from the numbers: where capkv loses, and how it does against the best peer."""

from __future__ import annotations

import math
from dataclasses import dataclass

from capkv_local.evaluate.records import Record
from capkv_local.evaluate.report.cells import SUBJECT, Cells, Setting
from capkv_local.evaluate.report.grid import Cell, Grid, Section, format_share
from capkv_local.evaluate.report.measures import KL, RECALL, Measure
from capkv_local.evaluate.statistics import Comparison, Verdict, compare

__all__ = ["WORDS", "Finding", "count_comparisons", "losses", "tally", "verdicts"]

WORDS: dict[Verdict, str] = {"better": "better", "unclear": "not told apart", "worse": "worse"}


@dataclass(frozen=True)
class Finding:
    """A comparison of one of our methods with one other.

    Attributes
    ----------
    where : str
        The setting in words.
    share : float
    measure : Measure
    ours, theirs : str
        Names of the methods.
    comparison : Comparison
        Ratio of KL, or difference of recall.
    """

    where: str
    share: float
    measure: Measure
    ours: str
    theirs: str
    comparison: Comparison

    @property
    def text(self) -> str:
        """Ratio or difference with its interval."""
        c = self.comparison
        if not math.isfinite(c.value):
            return "–"
        if c.neutral == 1:
            value, low, high = (f"{x:.2f}" for x in (c.value, c.low, c.high))
            return f"×{value} [{low}, {high}]"
        value, low, high = (f"{100 * x:+.1f}" for x in (c.value, c.low, c.high))
        return f"{value} [{low}, {high}] points"


def losses(cells: Cells) -> list[Finding]:
    """Every setting and share where capkv is significantly worse than another method.

    On KL or recall, within the split that counts; the full cache and the oracle do not count.
    """
    split = cells.focus().split
    return [
        finding
        for setting in cells.settings
        if setting.split == split
        for finding in _comparisons(cells, setting)
        if finding.comparison.verdict == "worse"
    ]


def count_comparisons(cells: Cells) -> int:
    """How many comparisons :func:`losses` makes: some of them go wrong by chance."""
    split = cells.focus().split
    return sum(
        len(_comparisons(cells, setting)) for setting in cells.settings if setting.split == split
    )


def verdicts(cells: Cells) -> list[Finding]:
    """Capkv against the best peer, for every share: texts of all lengths together.

    The best peer is the one with the best mean among those with all items that any peer has. It
    is chosen on the same records, which is to its advantage.
    """
    focus = cells.focus()
    groups: dict[tuple[str, str, str], list[Setting]] = {}
    for s in cells.settings:
        if (s.split, s.kv_type) == (focus.split, focus.kv_type):
            groups.setdefault((s.model, s.reading, s.question), []).append(s)
    found = []
    for (model, reading, question), settings in groups.items():
        where = f"{model} · {reading} · question {question}"
        for share in sorted({share for s in settings for share in cells.shares_in(s)}):
            for measure in (KL, RECALL):
                pooled = _pooled(cells, measure, settings, share)
                peer = _best_peer(cells, measure, pooled)
                for name in filter(lambda name: _is_ours(cells, name), pooled):
                    if peer is not None:
                        compared = compare(pooled[name], pooled[peer])
                        found.append(Finding(where, share, measure, name, peer, compared))
    return found


def tally(findings: list[Finding]) -> Grid:
    """Count the verdicts of every share, with a section for each variant of ours."""
    measures = list(dict.fromkeys(f.measure for f in findings))
    sections = []
    for name in dict.fromkeys(f.ours for f in findings):
        section = Section(name)
        for share in sorted({f.share for f in findings if f.ours == name}):
            row = []
            for measure in measures:
                verdict = [
                    f.comparison.verdict
                    for f in findings
                    if (f.ours, f.share, f.measure) == (name, share, measure)
                ]
                counts = ", ".join(
                    f"{words} {verdict.count(which)}" for which, words in WORDS.items()
                )
                row.append(Cell(counts if verdict else ""))
            section.rows.append((format_share(share), row))
        sections.append(section)
    title = "Comparisons with the best peer: one per model, reading and question"
    return Grid(title, [measure.heading for measure in measures], sections, "kept")


def _is_ours(cells: Cells, name: str) -> bool:
    return cells.method[name] == SUBJECT


def _comparisons(cells: Cells, setting: Setting) -> list[Finding]:
    """Ours against every other method of a setting, at every share, on what both have."""
    found = []
    for share in cells.shares_in(setting):
        names = [name for name in cells.names_in(setting, share) if cells.competes(name)]
        for measure in (KL, RECALL):
            records = {name: cells.select(measure, setting, share, name) for name in names}
            for ours in (name for name in names if _is_ours(cells, name)):
                for theirs in (name for name in names if not _is_ours(cells, name)):
                    compared = compare(records[ours], records[theirs])
                    if compared.n_items:
                        where = setting.title
                        found.append(Finding(where, share, measure, ours, theirs, compared))
    return found


def _pooled(
    cells: Cells, measure: Measure, settings: list[Setting], share: float
) -> dict[str, list[Record]]:
    pooled = {}
    for name in cells.names:
        records = [r for s in settings for r in cells.select(measure, s, share, name)]
        if records and cells.competes(name):
            pooled[name] = records
    return pooled


def _best_peer(cells: Cells, measure: Measure, pooled: dict[str, list[Record]]) -> str | None:
    # Variants of ours (capkv:noise=0.1) are no peers: they would be measured against themselves.
    peers = {
        name: records
        for name, records in pooled.items()
        if cells.method[name].partition(":")[0] != SUBJECT
    }
    most = max(map(len, peers.values()), default=0)
    choose = min if measure.lower_is_better else max
    complete = [name for name in peers if len(peers[name]) == most]
    return choose(complete, key=lambda name: measure.estimate(peers[name]).value, default=None)
