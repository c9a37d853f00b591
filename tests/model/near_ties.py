"""The same keep lists on two devices, but for near-ties.

Two devices sum up in different orders, so that scores differ in their last digits, and of two cells
whose scores are as good as equal one device may keep the one and the other the other. What is
allowed to differ is that, and nothing else: :func:`in_step` runs one text through two sessions and
compares what they decide at every eviction. The second session then goes on with the cells of the
first, so that a near-tie does not make later decisions differ for another reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]
Scores = NDArray[np.floating[Any]]

RTOL = 1e-4
"""How much the scores of two cells may differ, as a share of the larger, to be a near-tie."""


@dataclass(frozen=True)
class Ties:
    """How two keep lists differ.

    Attributes
    ----------
    n_kept
        Cells that the first keeps, all heads together.
    n_swapped
        Cells of those that the second does not keep.
    worst
        Largest relative difference between the scores of a cell and of the one in its place.
    """

    n_kept: int
    n_swapped: int
    worst: float

    def __str__(self) -> str:
        return (
            f"{self.n_swapped} of {self.n_kept:,} kept cells differ, "
            f"largest relative difference {self.worst:.1e}"
        )


def compare(first: Mask, second: Mask, scores: Scores) -> Ties:
    """How ``second`` differs from ``first``, in the ``scores`` of the first.

    Parameters
    ----------
    first, second
        What is kept, [n_layer, n_head_kv, n_cells]; as many cells in both.
    scores
        [n_layer, n_head_kv, n_cells], what ``first`` was chosen by.

    Notes
    -----
    A cell that only one keeps stands for one that only the other keeps: of the same head while
    there are such, else of any head, since heads share their budget. Both are taken in the order
    of their scores.
    """
    only_first, only_second = first & ~second, second & ~first
    worst = 0.0
    rest: tuple[list[float], list[float]] = ([], [])
    for layer, head in zip(*np.nonzero((only_first | only_second).any(axis=-1)), strict=True):
        ours = np.sort(scores[layer, head][only_first[layer, head]])[::-1]
        theirs = np.sort(scores[layer, head][only_second[layer, head]])[::-1]
        n = min(len(ours), len(theirs))
        worst = max(worst, _largest(ours[:n], theirs[:n]))
        rest[0].extend(ours[n:])
        rest[1].extend(theirs[n:])
    if len(rest[0]) != len(rest[1]):
        raise AssertionError(f"{first.sum()} cells are kept here and {second.sum()} there")
    worst = max(worst, _largest(np.sort(rest[0]), np.sort(rest[1])))
    return Ties(int(first.sum()), int(only_first.sum()), worst)


def _largest(a: Scores, b: Scores) -> float:
    if len(a) == 0:
        return 0.0
    scale = np.maximum(np.maximum(np.abs(a), np.abs(b)), np.finfo(np.float64).tiny)
    return float((np.abs(a - b) / scale).max())


def in_step(first: Any, second: Any, tokens: Sequence[int], **looks: Any) -> list[Ties]:
    """Have two sessions read the same tokens; how their decisions differ, one for each eviction.

    Parameters
    ----------
    first, second
        Two :class:`~capkv_local.Llama` of the same settings, on two devices.
    looks
        As for :meth:`~capkv_local.Llama.prefill`.
    """
    decisions: list[tuple[Scores, Mask, Mask]] = []
    ties: list[Ties] = []

    def record(scores: Scores, held: Mask, *rest: Any) -> Mask:
        keep: Mask = type(first._cache)._select(first._cache, scores, held, *rest)
        decisions.append((np.array(scores, np.float64), held, keep))
        return keep

    def follow(scores: Scores, held: Mask, *rest: Any) -> Mask:
        theirs, theirs_held, keep = decisions[len(ties)]
        if not np.array_equal(held, theirs_held):
            raise AssertionError("the two sessions do not hold the same cells")
        ours: Mask = type(second._cache)._select(second._cache, scores, held, *rest)
        ties.append(compare(keep, ours, theirs))
        return keep

    for llama, choose in ((first, record), (second, follow)):
        llama._cache._select = choose
        try:
            llama.prefill(list(tokens), **looks)
        finally:
            del llama._cache._select
    if len(ties) != len(decisions):
        raise AssertionError(f"{len(decisions)} evictions here, {len(ties)} there")
    return ties


def check(ties: Sequence[Ties], rtol: float = RTOL) -> str:
    """All of them in a sentence.

    Raises
    ------
    AssertionError
        Some difference is no near-tie.
    """
    all_ = Ties(
        sum(t.n_kept for t in ties),
        sum(t.n_swapped for t in ties),
        max((t.worst for t in ties), default=0.0),
    )
    sentence = f"{len(ties)} evictions: {all_}"
    if all_.worst > rtol:
        raise AssertionError(f"{sentence}, more than {rtol:.0e}")
    return sentence
