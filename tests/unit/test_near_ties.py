"""The comparison of keep lists that the device tests go by."""

from __future__ import annotations

import numpy as np
import pytest

from tests.model.near_ties import Ties, check, compare


def masks(first: str, second: str) -> tuple[np.ndarray, np.ndarray]:
    """Heads of one layer, ``x`` is kept: "xx.. x..."."""
    return tuple(  # type: ignore[return-value]
        np.array([[[c == "x" for c in head] for head in text.split()]]) for text in (first, second)
    )


def test_equal_lists_have_no_difference() -> None:
    first, second = masks("xx.. ..xx", "xx.. ..xx")
    assert compare(first, second, np.zeros(first.shape)) == Ties(4, 0, 0.0)


def test_cells_of_a_head_stand_for_each_other_in_the_order_of_their_scores() -> None:
    first, second = masks("xx...", "..xx.")
    scores = np.array([[[2.0, 1.0, 0.99, 1.98, 7.0]]])
    ties = compare(first, second, scores)
    assert (ties.n_kept, ties.n_swapped) == (2, 2)
    assert ties.worst == pytest.approx(0.01)


def test_heads_stand_for_each_other_when_they_share_their_budget() -> None:
    first, second = masks("xx x.", "x. xx")
    scores = np.array([[[5.0, 1.0], [5.0, 0.9]]])
    assert compare(first, second, scores).worst == pytest.approx(0.1)


def test_lists_of_different_lengths_cannot_be_compared() -> None:
    first, second = masks("xx", "x.")
    with pytest.raises(AssertionError, match="2 cells are kept here and 1 there"):
        compare(first, second, np.zeros(first.shape))


@pytest.mark.parametrize(("gap", "fits"), [(5e-5, True), (5e-4, False)])
def test_what_is_no_near_tie_fails(gap: float, fits: bool) -> None:
    first, second = masks("x.", ".x")
    ties = [compare(first, second, np.array([[[1.0, 1.0 - gap]]]))]
    if fits:
        assert check(ties).startswith("1 evictions: 1 of 1 kept cells differ")
    else:
        with pytest.raises(AssertionError, match="more than 1e-04"):
            check(ties)
