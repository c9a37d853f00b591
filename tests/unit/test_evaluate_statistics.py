"""Intervals and comparisons of planted results."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from capkv_local.errors import EvaluationError
from capkv_local.evaluate.statistics import compare, mean, recall, relative, summarise
from tests.unit.planted import fact, record


def test_mean_counts_items_and_draws_cases() -> None:
    # All spread is between cases: twice the items in each must not narrow the interval.
    values = {f"c{i}": i / 10 for i in range(10)}
    once = mean(fact(case, "0", value) for case, value in values.items())
    often = mean(fact(case, str(i), v) for case, v in values.items() for i in range(9))
    assert once.value == often.value == pytest.approx(0.45)
    assert (once.low, once.high) == pytest.approx((often.low, often.high))
    assert (often.n_items, often.n_cases) == (90, 10)
    # The standard error of this mean is 0.0908.
    assert once.low == pytest.approx(0.45 - 1.96 * 0.0908, abs=0.015)
    assert once.high == pytest.approx(0.45 + 1.96 * 0.0908, abs=0.015)


def test_intervals_cover_the_truth() -> None:
    rng = np.random.default_rng(3)
    hits = 0
    for _ in range(200):
        draws = rng.normal(0.5, 1.0, 30)
        estimate = mean([record(case=str(i), value=x) for i, x in enumerate(draws)], draws=500)
        hits += estimate.low <= 0.5 <= estimate.high
    assert 0.90 <= hits / 200 <= 0.99


def test_order_and_repetition_change_nothing() -> None:
    records = [record(case=str(i), value=i * 0.1) for i in range(7)]
    assert mean(records) == mean(records[::-1]) == mean(records)
    assert mean(records, seed=1) != mean(records)


def test_few_cases() -> None:
    assert math.isnan(mean([]).value)
    one = mean([record()])
    assert one.value == 0.1 and math.isnan(one.low)
    ours = [record(case=str(i), value=0.1) for i in range(4)]
    theirs = [replace(r, method="snapkv", value=0.9) for r in ours]
    assert compare(ours, theirs).verdict == "unclear"  # 4 of 4 is no proof
    assert compare([], theirs).n_items == 0


def test_relative_to_the_full_cache() -> None:
    records = [fact(str(i), "0", float(i < 3), full=float(i < 6)) for i in range(8)]
    assert relative(records).value == 0.5
    assert math.isnan(relative([replace(r, full=0.0) for r in records]).value)
    others = [
        fact("0", "x", 1.0, kind="absent"),
        fact("0", "y", 1.0, task="quote"),
        fact("0", "z", 1.0, metric="logprob"),
    ]
    own, of_full = recall([*records, *others])
    assert (own.value, own.n_items, of_full.value) == (3 / 8, 8, 0.5)


def test_comparison_uses_only_common_items() -> None:
    ours = [record(case=str(i), value=0.1 + 0.01 * i) for i in range(9)]
    theirs = [replace(r, method="snapkv", value=2 * r.value) for r in ours[:6]]
    theirs.append(record(case="only theirs", method="snapkv", value=1e6))
    theirs.append(replace(theirs[0], seed=1, value=1e6))
    compared = compare(ours, theirs)
    assert (compared.n_items, compared.n_cases, compared.neutral) == (6, 6, 1)
    assert compared.value == pytest.approx(0.5) and compared.high == pytest.approx(0.5)
    assert compared.verdict == "better" and compare(theirs, ours).verdict == "worse"


def test_pairing_sees_small_differences_between_unequal_cases() -> None:
    ours = [fact(str(i), "0", i / 10, metric="accuracy") for i in range(10)]
    theirs = [replace(r, method="snapkv", value=r.value - 0.02) for r in ours]
    compared = compare(ours, theirs)
    assert compared.value == pytest.approx(0.02) and compared.verdict == "better"
    assert mean(ours).low < mean(theirs).high  # which the single intervals cannot show


def test_noise_is_not_significant() -> None:
    rng = np.random.default_rng(5)
    ours = [record(case=str(i), value=x) for i, x in enumerate(rng.uniform(0.1, 1, 20))]
    theirs = [replace(r, value=x) for r, x in zip(ours, rng.permutation([r.value for r in ours]),
                                                  strict=True)]  # fmt: skip
    assert compare(ours, theirs).verdict == "unclear"


def test_metrics_are_not_mixed() -> None:
    both = [record(), record(metric="top1", value=1.0)]
    with pytest.raises(EvaluationError, match="kl, top1 cannot be averaged"):
        mean(both)
    groups = summarise(both, by=("method", "metric"))
    assert groups["capkv", "top1"].value == 1.0
    with pytest.raises(EvaluationError, match="no field 'metod'"):
        summarise(both, by=("metod",))
