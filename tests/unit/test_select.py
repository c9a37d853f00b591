"""keep_mask and contested: what is always in, what wins, what is refused."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from capkv_local.budget.select import contested, keep_mask
from capkv_local.errors import BudgetError, CapKVError, PolicyError

LARGEST = float(np.finfo(np.float32).max)


class Case(NamedTuple):
    scores: np.ndarray
    held: np.ndarray
    counts: np.ndarray
    n_sinks: int
    n_recent: int


def right_aligned(n_held: np.ndarray, n_cells: int) -> np.ndarray:
    """Mask [n_layer, n_head_kv, n_cells] of heads that hold the last `n_held` cells."""
    return np.arange(n_cells) >= n_cells - n_held[..., None]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Scores with many ties, heads of different sizes, and counts that fit each head."""
    n_layer, n_head, n = draw(st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 30)))
    n_sinks, n_recent = draw(st.integers(0, n)), draw(st.integers(0, n))
    heads = (n_layer, n_head)
    n_held = draw(hnp.arrays(np.int64, heads, elements=st.integers(1, n)))
    held = right_aligned(n_held, n)
    few = st.sampled_from([-LARGEST, -1.0, -0.0, 0.0, 0.5, 1.0, LARGEST])
    anything = st.floats(-LARGEST, LARGEST, width=32)
    elements = draw(st.sampled_from([few, anything]))
    scores = draw(hnp.arrays(np.float32, (*heads, n), elements=elements))
    scores[~held] = draw(st.sampled_from([np.nan, np.inf, LARGEST, 0.0]))
    least = np.maximum(1, np.minimum(n_sinks + n_recent, n_held))
    counts = np.array(
        [
            draw(st.integers(int(low), int(high)))
            for low, high in zip(least.flat, n_held.flat, strict=True)
        ]
    ).reshape(heads)
    return Case(scores, held, counts, n_sinks, n_recent)


def slow_always(cells: list[int], n_sinks: int, n_recent: int) -> set[int]:
    """Sinks and recent window among the held `cells` of one head."""
    return {
        cell for rank, cell in enumerate(cells) if rank < n_sinks or rank >= len(cells) - n_recent
    }


@given(cases())
def test_keeps_exactly_the_best(case: Case) -> None:
    scores, held, counts, n_sinks, n_recent = case
    keep = keep_mask(scores, held, counts, n_sinks=n_sinks, n_recent=n_recent)
    assert keep.shape == scores.shape
    assert keep.dtype == np.bool_
    assert (keep.sum(axis=-1) == counts).all()
    assert not (keep & ~held).any()
    for head in np.ndindex(*counts.shape):
        cells = np.flatnonzero(held[head]).tolist()
        always = slow_always(cells, n_sinks, n_recent)
        rest = [cell for cell in cells if cell not in always]
        best = sorted([(scores[head][cell], cell) for cell in rest], reverse=True)
        kept = always | {cell for _, cell in best[: counts[head] - len(always)]}
        assert set(np.flatnonzero(keep[head])) == kept


@given(cases())
def test_contested_is_all_but_sinks_and_recent(case: Case) -> None:
    middle = contested(case.held, n_sinks=case.n_sinks, n_recent=case.n_recent)
    assert middle.shape == case.held.shape
    assert middle.dtype == np.bool_
    for head in np.ndindex(*case.counts.shape):
        cells = np.flatnonzero(case.held[head]).tolist()
        always = slow_always(cells, case.n_sinks, case.n_recent)
        assert np.flatnonzero(middle[head]).tolist() == [c for c in cells if c not in always]


@given(cases())
def test_order_in_memory_changes_nothing(case: Case) -> None:
    scores, held, counts, n_sinks, n_recent = case
    keep = keep_mask(scores, held, counts, n_sinks=n_sinks, n_recent=n_recent)
    spread = np.zeros((*scores.shape[:-1], 2 * scores.shape[-1]), np.float32)[..., ::2]
    spread[...] = scores
    other = keep_mask(
        spread,
        np.asfortranarray(held),
        np.asfortranarray(counts.astype(np.int32)),
        n_sinks=n_sinks,
        n_recent=n_recent,
    )
    assert (other == keep).all()


@given(cases())
def test_absent_cells_change_nothing(case: Case) -> None:
    """More absent cells in front shift the mask and do no more."""
    scores, held, counts, n_sinks, n_recent = case
    keep = keep_mask(scores, held, counts, n_sinks=n_sinks, n_recent=n_recent)
    front = [(0, 0), (0, 0), (3, 0)]
    padded = keep_mask(
        np.pad(scores, front, constant_values=np.nan),
        np.pad(held, front),
        counts,
        n_sinks=n_sinks,
        n_recent=n_recent,
    )
    assert (padded == np.pad(keep, front)).all()


@given(cases())
def test_inputs_are_left_alone(case: Case) -> None:
    before = [case.scores.copy(), case.held.copy(), case.counts.copy()]
    keep_mask(case.scores, case.held, case.counts, n_sinks=case.n_sinks, n_recent=case.n_recent)
    np.testing.assert_array_equal(case.scores, before[0])
    np.testing.assert_array_equal(case.held, before[1])
    np.testing.assert_array_equal(case.counts, before[2])


@given(cases(), st.data())
def test_protected_cells_stay_and_the_best_of_the_others(case: Case, data: st.DataObject) -> None:
    scores, held, counts, n_sinks, n_recent = case
    ends = {"n_sinks": n_sinks, "n_recent": n_recent}
    protected = data.draw(hnp.arrays(np.bool_, held.shape))
    open_ = contested(held, **ends, protected=protected)
    assert (open_ == contested(held, **ends) & ~protected).all()
    counts = np.maximum(counts, (held & ~open_).sum(axis=-1))
    keep = keep_mask(scores, held, counts, **ends, protected=protected)
    assert (keep.sum(axis=-1) == counts).all()
    assert (keep >= held & protected).all() and not (keep & ~held).any()
    for head in np.ndindex(*counts.shape):
        won, lost = scores[head][keep[head] & open_[head]], scores[head][open_[head] & ~keep[head]]
        assert not won.size or not lost.size or won.min() >= lost.max()


def test_ties_go_to_the_later_cell() -> None:
    held = right_aligned(np.array([[10, 8, 5]]), 10)
    keep = keep_mask(
        np.zeros((1, 3, 10), np.float32), held, np.array([[5, 5, 4]]), n_sinks=1, n_recent=2
    )
    assert np.flatnonzero(keep[0, 0]).tolist() == [0, 6, 7, 8, 9]
    assert np.flatnonzero(keep[0, 1]).tolist() == [2, 6, 7, 8, 9]
    assert np.flatnonzero(keep[0, 2]).tolist() == [5, 7, 8, 9]


def test_whole_head_and_bare_minimum() -> None:
    scores = np.arange(18, dtype=np.float32).reshape(1, 3, 6)
    held = right_aligned(np.array([[6, 6, 3]]), 6)
    keep = keep_mask(scores, held, np.array([[6, 4, 3]]), n_sinks=2, n_recent=2)
    assert keep.astype(int).tolist() == [
        [[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 1, 1], [0, 0, 0, 1, 1, 1]]
    ]


def test_a_head_smaller_than_sinks_and_recent_keeps_all() -> None:
    held = right_aligned(np.array([[2]]), 6)
    scores = np.zeros((1, 1, 6), np.float32)
    keep = keep_mask(scores, held, np.array([[2]]), n_sinks=4, n_recent=32)
    assert (keep == held).all()
    assert not contested(held, n_sinks=4, n_recent=32).any()


def test_accepts_float64_without_rounding_ties_into_being() -> None:
    scores = np.array([[[1.0 + 1e-12, 1.0, 0.0]]])
    keep = keep_mask(scores, np.ones(scores.shape, bool), np.array([[1]]), n_sinks=0, n_recent=0)
    assert keep.tolist() == [[[True, False, False]]]


def test_no_cells_no_heads() -> None:
    for shape in [(0, 3, 5), (2, 0, 5), (0, 0, 0)]:
        keep = keep_mask(
            np.zeros(shape), np.ones(shape, bool), np.zeros(shape[:2], int), n_sinks=1, n_recent=1
        )
        assert keep.shape == shape
    assert contested(np.zeros((2, 3, 0), bool), n_sinks=1, n_recent=1).shape == (2, 3, 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_scores_are_the_policys_fault(bad: float) -> None:
    scores = np.zeros((2, 2, 8), np.float32)
    scores[1, 0, 5] = bad
    held = np.ones(scores.shape, bool)
    counts = np.full((2, 2), 3)
    with pytest.raises(ValueError, match=r"policy.*1 scores.*layer 1, head 0, cell 5") as caught:
        keep_mask(scores, held, counts, n_sinks=1, n_recent=1)
    assert isinstance(caught.value, PolicyError)
    held[1, 0, :6] = False
    assert keep_mask(scores, held, np.full((2, 2), 2), n_sinks=1, n_recent=1).sum() == 8


@pytest.mark.parametrize(
    ("count", "n_sinks", "n_recent", "says"),
    [
        (6, 0, 0, r"6 cells in layer 1, head 0.*at most the 5 cells"),
        (0, 0, 0, r"budget of 0 cells in layer 1, head 0"),
        (-1, 0, 0, r"budget of -1"),
        (3, 2, 2, "2 sinks and 2 recent"),
        (4, 3, 3, "3 sinks and 3 recent"),  # all five cells are sinks or recent
        (4, -1, 2, "0 or more"),
        (4, 1, -2, "0 or more"),
    ],
)
def test_counts_that_cannot_be(count: int, n_sinks: int, n_recent: int, says: str) -> None:
    """One head of five cells among heads of eight, all others with a count that fits."""
    n_held = np.array([[8, 8], [5, 8]])
    counts = np.array([[8, 8], [count, 8]])
    with pytest.raises(BudgetError, match=says):
        keep_mask(
            np.zeros((2, 2, 8), np.float32),
            right_aligned(n_held, 8),
            counts,
            n_sinks=n_sinks,
            n_recent=n_recent,
        )


@pytest.mark.parametrize("n_cells", [0, 4])
def test_a_head_without_cells_has_nothing_to_keep(n_cells: int) -> None:
    shape = (1, 1, n_cells)
    for count in (0, 1):
        with pytest.raises(BudgetError, match="at most the 0 cells"):
            keep_mask(
                np.zeros(shape),
                np.zeros(shape, bool),
                np.array([[count]]),
                n_sinks=1,
                n_recent=1,
            )


@pytest.mark.parametrize(
    "counts",
    [np.full((2, 1), 4), np.full((1, 2, 1), 4), np.array(4), np.full((1, 2), 4.0)],
)
def test_counts_of_other_shapes_and_types(counts: np.ndarray) -> None:
    with pytest.raises(BudgetError, match=r"integers \[n_layer, n_head_kv\], here \(1, 2\)"):
        keep_mask(np.zeros((1, 2, 8)), np.ones((1, 2, 8), bool), counts, n_sinks=1, n_recent=1)


@pytest.mark.parametrize(
    "scores",
    [
        np.zeros((2, 8), np.float32),
        np.zeros((1, 2, 7), np.float32),
        np.zeros((2, 1, 8), np.float32),
        np.zeros((1, 2, 8), np.int32),
        np.array("text"),
    ],
)
def test_scores_of_other_shapes_and_types(scores: np.ndarray) -> None:
    with pytest.raises(PolicyError, match=r"n_layer, n_head_kv, n_cells\], here \(1, 2, 8\)"):
        keep_mask(scores, np.ones((1, 2, 8), bool), np.full((1, 2), 4), n_sinks=1, n_recent=1)


def test_errors_are_caught_as_one() -> None:
    assert issubclass(PolicyError, CapKVError)
    assert issubclass(BudgetError, CapKVError)
