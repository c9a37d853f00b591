"""keep_lists: what is always in, what wins, what is refused."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from capkv_local.errors import BudgetError, CapKVError, PolicyError
from capkv_local.select import keep_lists


@st.composite
def cases(draw: st.DrawFn) -> tuple[np.ndarray, int, int, int]:
    """Scores with many ties, and a budget that fits."""
    shape = draw(st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 40)))
    n = shape[-1]
    n_sinks = draw(st.integers(0, n))
    n_recent = draw(st.integers(0, n - n_sinks))
    budget = draw(st.integers(max(1, n_sinks + n_recent), n))
    few = st.sampled_from([-(2.0**99), -1.0, -0.0, 0.0, 0.5, 1.0, 2.0**99])
    anything = st.floats(-(2.0**99), 2.0**99, width=32)
    scores = draw(hnp.arrays(np.float32, shape, elements=draw(st.sampled_from([few, anything]))))
    return scores, budget, n_sinks, n_recent


@settings(deadline=None)
@given(cases())
def test_keeps_exactly_the_best(case: tuple[np.ndarray, int, int, int]) -> None:
    scores, budget, n_sinks, n_recent = case
    n = scores.shape[-1]
    keep = keep_lists(scores, budget, n_sinks=n_sinks, n_recent=n_recent)
    assert keep.shape == (*scores.shape[:2], budget)
    assert keep.dtype == np.int32
    assert (np.diff(keep, axis=-1) > 0).all()  # sorted, unique
    assert keep.min() >= 0
    assert keep.max() < n
    always = [*range(n_sinks), *range(n - n_recent, n)]
    for row, kept in zip(scores.reshape(-1, n), keep.reshape(-1, budget), strict=True):
        middle = range(n_sinks, n - n_recent)
        best = sorted(middle, key=lambda cell: (row[cell], cell), reverse=True)
        assert kept.tolist() == sorted(always + best[: budget - len(always)])


def test_ties_go_to_the_later_cell() -> None:
    scores = np.zeros((2, 3, 10), np.float32)
    keep = keep_lists(scores, 5, n_sinks=1, n_recent=2)
    assert (keep == [0, 6, 7, 8, 9]).all()


def test_whole_cache_and_bare_minimum() -> None:
    scores = np.arange(12, dtype=np.float32).reshape(1, 2, 6)
    assert (keep_lists(scores, 6, n_sinks=2, n_recent=2) == np.arange(6)).all()
    assert (keep_lists(scores, 4, n_sinks=2, n_recent=2) == [0, 1, 4, 5]).all()


def test_accepts_float64_without_rounding_ties_into_being() -> None:
    scores = np.array([[[1.0 + 1e-12, 1.0, 0.0]]])
    assert keep_lists(scores, 1, n_sinks=0, n_recent=0).tolist() == [[[0]]]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_scores_are_the_policys_fault(bad: float) -> None:
    scores = np.zeros((2, 2, 8), np.float32)
    scores[1, 0, 5] = bad
    with pytest.raises(ValueError, match=r"policy.*1 scores.*layer 1, head 0, cell 5"):
        keep_lists(scores, 4, n_sinks=1, n_recent=1)


@pytest.mark.parametrize(
    ("budget", "n_sinks", "n_recent", "says"),
    [
        (9, 0, 0, "at most the 8 cells"),
        (0, 0, 0, "budget of 0"),
        (5, 3, 3, "3 sinks and 3 recent"),
        (4, -1, 2, "0 or more"),
    ],
)
def test_budgets_that_cannot_be(budget: int, n_sinks: int, n_recent: int, says: str) -> None:
    with pytest.raises(BudgetError, match=says):
        keep_lists(np.zeros((1, 1, 8), np.float32), budget, n_sinks=n_sinks, n_recent=n_recent)


@pytest.mark.parametrize(
    "scores", [np.zeros((2, 8), np.float32), np.zeros((1, 1, 8), np.int32), np.array("text")]
)
def test_other_shapes_and_types(scores: np.ndarray) -> None:
    with pytest.raises(PolicyError, match="n_layer, n_head_kv, n_cells"):
        keep_lists(scores, 4, n_sinks=1, n_recent=1)


def test_errors_are_caught_as_one() -> None:
    assert issubclass(PolicyError, CapKVError)
    assert issubclass(BudgetError, CapKVError)


def test_is_fast_enough_to_leave_numpy_alone() -> None:
    """A round must not notice it: 90 heads of 1,536 cells take a few milliseconds."""
    scores = np.random.default_rng(0).normal(size=(30, 3, 1536)).astype(np.float32)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        keep_lists(scores, 1024, n_sinks=4, n_recent=32)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.2  # generous: shared machines
