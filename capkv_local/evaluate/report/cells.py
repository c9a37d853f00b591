"""Records sorted into the cells of tables and figures: a setting, a share, a method, a measure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from capkv_local.errors import EvaluationError
from capkv_local.evaluate.methods import FULL, ORACLE
from capkv_local.evaluate.records import Record
from capkv_local.evaluate.report.measures import HEADLINE, Measure
from capkv_local.evaluate.statistics import Estimate

__all__ = ["SUBJECT", "Cells", "Focus", "Setting"]

SUBJECT = "capkv"
"""The method whose losses and verdicts a report lists."""

Variant: TypeAlias = tuple[str, str, str]  # method, allocation, observe


@dataclass(frozen=True)
class Setting:
    """What a table has in common: methods are compared within one setting only."""

    model: str
    split: str
    kv_type: str
    n_tokens: int
    reading: str
    question: str

    @property
    def order(self) -> tuple[str, bool, bool, str, int, str, bool, str]:
        """Where it stands in a report."""
        return (
            self.model,
            self.split != "report",
            self.kv_type != "f16",
            self.kv_type,
            self.n_tokens,
            self.reading,
            self.question != "unseen",
            self.question,
        )

    @property
    def title(self) -> str:
        """All of it in words."""
        split = "" if self.split == "report" else f" · {self.split} split"
        return (
            f"{self.model} · {self.reading} · question {self.question} · "
            f"{self.n_tokens:,} tokens · KV {self.kv_type}{split}"
        )


@dataclass(frozen=True)
class Focus:
    """The part of a report that its first table and most figures show.

    Attributes
    ----------
    split, reading, kv_type : str
    share : float
        The middle one of those that were run.
    n_tokens : dict of str to int
        The longest texts of each model that were read so.
    """

    split: str
    reading: str
    kv_type: str
    share: float
    n_tokens: dict[str, int]


@dataclass
class Cells:
    """Records by setting, share and name of the method.

    The name is the method, with its allocation or what it observes only where one setting has
    several of these: one name then means the same thing in settings that differ in it.

    Parameters
    ----------
    records

    Raises
    ------
    EvaluationError
        If there are none.
    """

    records: list[Record]
    settings: list[Setting] = field(init=False)
    names: list[str] = field(init=False)
    method: dict[str, str] = field(init=False, default_factory=dict)
    details: dict[tuple[Setting, str], str] = field(init=False, default_factory=dict)
    _cells: dict[tuple[Setting, float, str], dict[tuple[str, str], list[Record]]] = field(
        init=False, default_factory=dict
    )

    def __post_init__(self) -> None:
        if not self.records:
            raise EvaluationError("There are no records to report on; run the evaluation first.")
        by_setting: dict[Setting, list[Record]] = {}
        for r in self.records:
            setting = Setting(r.model, r.split, r.kv_type, r.n_tokens, r.reading, r.question)
            by_setting.setdefault(setting, []).append(r)
        self.settings = sorted(by_setting, key=lambda setting: setting.order)
        variants = {setting: set(map(_variant, rows)) for setting, rows in by_setting.items()}
        names = _names(variants.values())
        for setting, rows in by_setting.items():
            for record in rows:
                variant = _variant(record)
                cell = self._cells.setdefault((setting, record.share, names[variant]), {})
                cell.setdefault((record.task, record.metric), []).append(record)
        for variant, name in names.items():
            self.method[name] = variant[0]
        for setting, present in variants.items():
            for variant in present:
                details = [text for text in variant[1:] if text not in ("", "uniform")]
                self.details[setting, names[variant]] = ", ".join(details)
        self.names = sorted(self.method, key=lambda name: (_rank(self.method[name]), name))

    def select(self, measure: Measure, setting: Setting, share: float, name: str) -> list[Record]:
        """Records of one measure in one cell, none if it was not run."""
        records = self._cells.get((setting, share, name), {}).get(
            (measure.task, measure.metric), []
        )
        if measure.kinds is None:
            return records
        return [record for record in records if record.kind in measure.kinds]

    def estimate(self, measure: Measure, setting: Setting, share: float, name: str) -> Estimate:
        """Mean with its interval of one measure in one cell; NaN if it was not run."""
        return measure.estimate(self.select(measure, setting, share, name))

    def reference(self, measure: Measure, setting: Setting) -> list[Record]:
        """Return what the full f16 cache reaches on every item that any method of a setting has."""
        found: dict[tuple[str, str, int], Record] = {}
        for where, share, name in self._cells:
            if where == setting:
                for record in self.select(measure, setting, share, name):
                    found[record.case, record.item, record.seed] = record
        return [replace(r, value=r.full) for r in found.values() if r.full is not None]

    def kv_bytes(self, setting: Setting, share: float, name: str) -> float | None:
        """Mean bytes of the kept rows in one cell, None if it was not run."""
        cell = self._cells.get((setting, share, name), {})
        sizes = [record.kv_bytes for records in cell.values() for record in records]
        return sum(sizes) / len(sizes) if sizes else None

    def names_in(self, setting: Setting, share: float | None = None) -> list[str]:
        """Names that were run in a setting, at one share or at any."""
        found = {
            name
            for where, at, name in self._cells
            if where == setting and (share is None or at == share)
        }
        return [name for name in self.names if name in found]

    def shares_in(self, setting: Setting) -> list[float]:
        """Shares that were run in a setting, ascending."""
        return sorted({share for where, share, _ in self._cells if where == setting})

    def drawable(
        self, measure: Measure, settings: list[Setting], share: float | None = None
    ) -> list[Setting]:
        """Settings in which an evicting method was measured so, at one share or at any.

        A KL of 0 does not count: it has no place on a logarithmic axis.
        """
        shown = {
            setting
            for setting, at, name in self._cells
            if share in (None, at) and not self.is_full(name)
            for record in self.select(measure, setting, at, name)
            if measure.metric != "kl" or record.value > 0
        }
        return [setting for setting in settings if setting in shown]

    def is_full(self, name: str) -> bool:
        """Whether nothing is evicted."""
        return self.method[name] == FULL

    def is_oracle(self, name: str) -> bool:
        """Whether it knew what comes."""
        return self.method[name] == ORACLE

    def competes(self, name: str) -> bool:
        """Whether it can be better or worse than others: no full cache, no oracle."""
        return not (self.is_full(name) or self.is_oracle(name))

    def extra_measures(self) -> list[Measure]:
        """Measures of what was run beyond :data:`HEADLINE`: other tasks, kinds and metrics."""
        covered = {(measure.task, measure.metric) for measure in HEADLINE}
        kinds: dict[tuple[str, str], set[str]] = {}
        for record in self.records:
            kinds.setdefault((record.task, record.metric), set()).add(record.kind)
        extra = []
        for (task, metric), found in sorted(kinds.items()):
            percent = metric in ("exact", "top1", "accuracy")
            unit = ", %" if percent else ""
            if (task, metric) not in covered:
                title = f"{task}: {metric}{unit}"
                extra.append(Measure(f"{task}-{metric}", title, task, metric, percent=percent))
            elif metric == "exact" and len(found) > 1:
                for kind in sorted(found):
                    title = f"{task}, {kind}: {metric}{unit}"
                    only = frozenset({kind})
                    extra.append(Measure(f"{task}-{kind}", title, task, metric, only, False, True))
        return extra

    def focus(self) -> Focus:
        """Choose what the first table and most figures show."""
        split = "report" if any(s.split == "report" for s in self.settings) else "tuning"
        here = [setting for setting in self.settings if setting.split == split]
        readings = {setting.reading for setting in here}
        reading = "streamed" if "streamed" in readings else min(readings)
        evicting = [
            (setting, share)
            for setting, share, name in self._cells
            if setting.split == split and not self.is_full(name)
        ]
        kv_types = Counter(setting.kv_type for setting, _ in evicting or [(s, 1.0) for s in here])
        kv_type = "f16" if "f16" in kv_types else kv_types.most_common(1)[0][0]
        # Other lengths and shares may have been run in another way only.
        usual = [at for at in evicting if (at[0].reading, at[0].kv_type) == (reading, kv_type)]
        shares = sorted({share for _, share in usual or evicting}) or [1.0]
        share = shares[(len(shares) - 1) // 2]
        n_tokens = {}
        for model in sorted({setting.model for setting in here}):
            known = [s.n_tokens for s, at in usual if (s.model, at) == (model, share)]
            n_tokens[model] = max(known or [s.n_tokens for s in here if s.model == model])
        return Focus(split, reading, kv_type, share, n_tokens)


def _variant(record: Record) -> Variant:
    # A label as the user wrote it repeats what has fields of its own: capkv@global+probe.
    method = record.method.partition("@")[0].partition("+")[0]
    return method, record.allocation, record.observe


def _rank(method: str) -> int:
    """Order of rows: the subject and its variants, peers, the oracle, the full cache."""
    if method in (ORACLE, FULL):
        return 3 + (method == FULL)
    return 0 if method == SUBJECT else 1 if method.startswith(f"{SUBJECT}:") else 2


def _names(settings: Iterable[set[Variant]]) -> dict[Variant, str]:
    """Shortest names that stay apart within every setting."""
    all_of: set[Variant] = set()
    several_allocations, several_observed = set(), set()
    for variants in settings:
        all_of |= variants
        pairs = {variant[:2] for variant in variants}
        several_allocations |= {m for m, n in Counter(m for m, _ in pairs).items() if n > 1}
        counts = Counter(variant[:2] for variant in variants)
        several_observed |= {pair for pair, n in counts.items() if n > 1}
    names = {}
    for method, allocation, observe in all_of:
        extra = [allocation or "no allocation"] if method in several_allocations else []
        if (method, allocation) in several_observed:
            # The tail of what is read is the question where that is known.
            extra.append("tail" if observe == "question" else observe or "observes nothing")
        names[method, allocation, observe] = f"{method} ({', '.join(extra)})" if extra else method
    return names
