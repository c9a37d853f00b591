"""Means with intervals, and which method is better, from cases as the units that are sampled.

Questions about one document are not independent, so the bootstrap draws cases with all their
items: a hundred questions about ten documents count as ten documents. Intervals are percentile
intervals at 95%; with ten cases they are somewhat too narrow, as all bootstrap intervals are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from capkv_local.errors import EvaluationError
from capkv_local.evaluate.records import Record

__all__ = [
    "ANSWERABLE",
    "DRAWS",
    "LOWER_IS_BETTER",
    "MIN_CASES",
    "Comparison",
    "Estimate",
    "compare",
    "mean",
    "recall",
    "relative",
    "summarise",
]

F64: TypeAlias = NDArray[np.float64]
Verdict: TypeAlias = Literal["better", "worse", "unclear"]

LOWER_IS_BETTER = frozenset({"kl", "nll"})
ANSWERABLE = frozenset({"single", "confusable", "multi-hop"})
"""Kinds of questions about facts that the context answers."""
DRAWS = 2000
MIN_CASES = 5
"""Fewer cases allow no claim: by chance alone, all of 4 point the same way once in 8 times."""
_LEVEL = (2.5, 97.5)


@dataclass(frozen=True)
class Estimate:
    """A mean (or ratio) with its 95% interval.

    Attributes
    ----------
    value, low, high : float
        NaN where there is nothing to average; the bounds also with fewer than two cases.
    n_items, n_cases : int
        What it was computed from.
    """

    value: float
    low: float
    high: float
    n_items: int
    n_cases: int


@dataclass(frozen=True)
class Comparison:
    """How one method does against another on what both have.

    Attributes
    ----------
    value, low, high : float
        Ours minus theirs, or ours over theirs, with the 95% interval; NaN as in Estimate.
    neutral : float
        No difference: 0 for a difference, 1 for a ratio.
    lower_is_better : bool
    n_items, n_cases : int
        What both have.
    """

    value: float
    low: float
    high: float
    neutral: float
    lower_is_better: bool
    n_items: int
    n_cases: int

    @property
    def verdict(self) -> Verdict:
        """``"better"`` or ``"worse"`` if the interval excludes no difference, else unclear."""
        if self.n_cases < MIN_CASES or not self.low <= self.high:
            return "unclear"
        if self.low <= self.neutral <= self.high:
            return "unclear"
        return "better" if (self.high < self.neutral) == self.lower_is_better else "worse"


def mean(records: Iterable[Record], *, draws: int = DRAWS, seed: int = 0) -> Estimate:
    """Mean over all items, its interval from drawing cases with all their items.

    Parameters
    ----------
    records
        Of one metric.
    draws, seed
        Of the bootstrap; the same ones give the same interval.

    Raises
    ------
    EvaluationError
        On records of several metrics.
    """
    records = list(records)
    _metric(records)
    values = np.array([[record.value, 1.0] for record in records])
    return _ratio(values, [_cluster(record) for record in records], draws, seed)


def relative(records: Iterable[Record], *, draws: int = DRAWS, seed: int = 0) -> Estimate:
    """Sum of the values over the sum that the full cache reaches; 1 is as good as full.

    Records without a value of the full cache are left out. Parameters and errors: see
    :func:`mean`.
    """
    records = [record for record in records if record.full is not None]
    _metric(records)
    values = np.array([[record.value, float(record.full or 0.0)] for record in records])
    return _ratio(values, [_cluster(record) for record in records], draws, seed)


def recall(records: Iterable[Record]) -> tuple[Estimate, Estimate]:
    """Share of answerable facts that come out exactly: of all, and relative to the full cache."""
    exact = [
        record
        for record in records
        if record.task == "facts" and record.metric == "exact" and record.kind in ANSWERABLE
    ]
    return mean(exact), relative(exact)


def compare(
    ours: Iterable[Record], theirs: Iterable[Record], *, draws: int = DRAWS, seed: int = 0
) -> Comparison:
    """Compare two methods on the items that both have.

    For ``kl`` the ratio of the means, for other metrics the difference of the means.

    Parameters
    ----------
    ours, theirs
        Records of one metric, each of one method; only items of both count. An item that one
        has several times (with pooled settings) counts with its mean.
    draws, seed
        Of the bootstrap.

    Raises
    ------
    EvaluationError
        On records of several metrics.
    """
    ours, theirs = list(ours), list(theirs)
    metric = _metric([*ours, *theirs])
    a, b = _by_item(ours), _by_item(theirs)
    common = [item for item in a if item in b]
    values = np.array([[a[item], b[item], 1.0] for item in common]).reshape(-1, 3)
    lower = metric in LOWER_IS_BETTER
    clusters = [item[:3] for item in common]
    if metric == "kl":
        found, neutral = _ratio(values[:, :2], clusters, draws, seed), 1.0
    else:
        pairs = np.column_stack([values[:, 0] - values[:, 1], values[:, 2]])
        found, neutral = _ratio(pairs, clusters, draws, seed), 0.0
    return Comparison(
        found.value, found.low, found.high, neutral, lower, found.n_items, found.n_cases
    )


def summarise(
    records: Iterable[Record],
    by: Sequence[str],
    *,
    estimate: Callable[[list[Record]], Estimate] = mean,
) -> dict[tuple[Any, ...], Estimate]:
    """Estimate of every group of records with the same values in the fields `by`.

    Raises
    ------
    EvaluationError
        On an unknown field, or a group of several metrics.

    Examples
    --------
    >>> summarise([], by=("method", "metric"))
    {}
    """
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for name in by:
        if name not in Record.__dataclass_fields__:
            raise EvaluationError(f"A record has no field '{name}' to group by.")
    for record in records:
        groups.setdefault(tuple([getattr(record, name) for name in by]), []).append(record)
    return {group: estimate(members) for group, members in groups.items()}


# ---- bootstrap ---------------------------------------------------------------------------------


def _cluster(record: Record) -> tuple[str, str, str]:
    return record.model, record.task, record.case


def _item(record: Record) -> tuple[Any, ...]:
    """What two methods are paired by; begins with the cluster."""
    return (*_cluster(record), record.split, record.item, record.seed, record.n_tokens)


def _by_item(records: list[Record]) -> dict[tuple[Any, ...], float]:
    values: dict[tuple[Any, ...], list[float]] = {}
    for record in records:
        values.setdefault(_item(record), []).append(record.value)
    return {item: math.fsum(some) / len(some) for item, some in values.items()}


def _metric(records: list[Record]) -> str:
    metrics = {record.metric for record in records}
    if len(metrics) > 1:
        raise EvaluationError(f"{', '.join(sorted(metrics))} cannot be averaged together.")
    return next(iter(metrics), "")


@lru_cache(maxsize=64)
def _weights(n: int, draws: int, seed: int) -> F64:
    """How often each of `n` cases is drawn, [draws, n]."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(n, np.full(n, 1 / n), size=draws).astype(np.float64)


def _ratio(values: F64, clusters: Sequence[tuple[Any, ...]], draws: int, seed: int) -> Estimate:
    """Sum of column 0 over that of column 1, [n_items, 2], with the interval over clusters."""
    nan = math.nan
    if not clusters:
        return Estimate(nan, nan, nan, 0, 0)
    # Sorted, so that the order of the records cannot change an interval.
    index = {cluster: i for i, cluster in enumerate(sorted(set(clusters)))}
    sums = np.zeros((len(index), 2))
    np.add.at(sums, [index[cluster] for cluster in clusters], values)
    top, bottom = sums.sum(axis=0)
    if bottom == 0:
        return Estimate(nan, nan, nan, len(values), len(index))
    low = high = nan
    if len(index) > 1:
        drawn = _weights(len(index), draws, seed) @ sums
        # Draws of cases on which the full cache fails throughout have no ratio.
        drawn = drawn[drawn[:, 1] != 0]
        low, high = np.percentile(drawn[:, 0] / drawn[:, 1], _LEVEL)
    return Estimate(float(top / bottom), float(low), float(high), len(values), len(index))
