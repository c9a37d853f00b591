"""How many cells each head keeps when all heads together may keep so many.

An allocator shares out contested cells, those that are neither sinks nor recent window
(:func:`capkv_local.budget.select.contested`). It is a function
``(scores, contested, total, floor)``:

scores
    float [n_layer, n_head_kv, n_cells], higher means keep, finite in every contested cell.
contested
    bool [n_layer, n_head_kv, n_cells].
total
    Contested cells to keep, all layers and heads together.
floor
    Contested cells that every head keeps at least, as far as it has them and `total` allows.

It returns int64 [n_layer, n_head_kv], the contested cells that each head keeps: `total` of them
in sum, or all where there are fewer. It raises PolicyError for scores of the wrong shape or not
finite and BudgetError for a negative `total` or `floor`. The same numbers give the same counts:
every tie has a rule.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from capkv_local.budget.select import Counts, Mask, Scores, check_scores, top_cells
from capkv_local.errors import BudgetError, unknown_name

I64 = NDArray[np.int64]
Allocator: TypeAlias = Callable[[Scores, Mask, int, int], I64]


def share_out(
    name: str,
    scores: Scores,
    contested: Mask,
    n_always: Counts,
    pools: Counts,
    budget: int,
    floor: float,
) -> I64:
    """Cells that each head keeps, of a budget that every pool of rows has for its own heads.

    Rows cannot move between devices: an allocation compares the heads of one pool. No head keeps
    more than :data:`LONGEST` times its equal share and :data:`SHORT` cells, if the others hold
    enough: what a policy computes is as long as the longest head, and would grow with the text.

    Parameters
    ----------
    name
        Of :data:`ALLOCATORS`.
    scores, contested
        As for an allocator, [n_layer, n_head_kv, n_cells].
    n_always
        int [n_layer, n_head_kv], cells that are kept in any case: sinks and recent window.
    pools
        int [n_layer], the pool of each layer.
    budget
        Cells per head, on average, those of `n_always` among them.
    floor
        Share of an equal part of the contested cells that every head keeps at least.

    Returns
    -------
    int64 [n_layer, n_head_kv]

    Raises
    ------
    BudgetError
        Unknown name, or a budget below `n_always`.
    """
    allocate = get_allocator(name)
    counts = np.array(n_always, dtype=np.int64)
    for pool in np.unique(pools):
        layers = _slice(np.flatnonzero(pools == pool))
        n_heads = n_always[layers].size
        total = budget * n_heads - int(n_always[layers].sum())
        least = int(floor * total / n_heads)
        within = _within(scores[layers], contested[layers], total)
        counts[layers] += allocate(scores[layers], within, total, least)
    return counts


def _slice(indices: I64) -> slice | I64:
    """Neighbours as a slice, which copies nothing: the layers of a device are neighbours."""
    first, last = int(indices[0]), int(indices[-1])
    return slice(first, last + 1) if last - first + 1 == len(indices) else indices


def _within(scores: Scores, contested: Mask, total: int) -> Mask:
    """The contested cells without those that no head may keep since it would hold too many."""
    held = contested.sum(axis=-1, dtype=np.int64)
    if total < 0 or held.size == 0:
        return contested  # told by the allocator, or nothing to do
    level = _fill(held.ravel(), min(total, int(held.sum())))  # as equal as the heads allow
    most = max(most_cells(total, held.size), int(level.max()))
    if held.max() <= most:
        return contested
    return top_cells(scores, contested, np.minimum(held, most))


LONGEST = 8
"""Most cells of a head, in equal shares of the budget. 4 cost an eighth of the cells half of its
answers (docs/evaluation.md)."""

SHORT = 8192
"""Cells that a head may have in any case."""


def most_cells(total: int, n_heads: int) -> int:
    """Cells that one head may keep of ``total`` that so many heads share."""
    return max(LONGEST * total // n_heads, SHORT)


PYRAMID_BETA = 20
"""Mean budget over the last layer's: the default of PyramidKV and of kvpress."""


def uniform(scores: Scores, contested: Mask, total: int, floor: int) -> I64:
    """Share out equally over all heads; the scores play no part.

    What a head has no cells for goes to the others evenly (water-filling), single cells that
    cannot be divided to the last heads. Nobody is below an equal share for the sake of another,
    so the floor needs no care.

    Parameters, returns and errors: see the module. Source: the usual budget of SnapKV, H2O and
    other policies of one size for all heads.

    Examples
    --------
    >>> import numpy as np
    >>> contested = np.array([[[True] * 8, [False] * 6 + [True] * 2]])
    >>> uniform(np.zeros((1, 2, 8)), contested, 8, 0).tolist()
    [[6, 2]]
    """
    available, total = _checked(scores, contested, total, floor)
    return _fill(available.ravel(), total).reshape(available.shape)


def pyramid(scores: Scores, contested: Mask, total: int, floor: int) -> I64:
    """Share out along a line that falls from the first layer to the last; heads of a layer equal.

    With the mean budget per head ``b = total / (n_layer n_head_kv)`` and beta = 20, a head of
    layer ``l`` gets::

        last  = b / beta,  at least the floor (and at most b)
        first = 2 b - last,  at most the first layer's cells per head (and at least b);
                             a lower first raises last to 2 b - first
        b_l   = first - (first - last) l / (n_layer - 1)

    rounded down. What rounding leaves over, and what a head has no cells for, goes to the other
    heads evenly (water-filling on top of the line), single cells to the first layers.

    Parameters, returns and errors: see the module. The scores play no part.

    Source: "PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling",
    arXiv 2406.02069, in the form and with the beta of kvpress (``PyramidKVPress``).

    Notes
    -----
    Departures from kvpress: contested cells take the place of its cells outside the window, and
    a last layer below the floor flattens the line, where kvpress falls back to equal budgets.

    Examples
    --------
    >>> import numpy as np
    >>> pyramid(np.zeros((3, 1, 64)), np.ones((3, 1, 64), bool), 60, 0).ravel().tolist()
    [39, 20, 1]
    """
    available, total = _checked(scores, contested, total, floor)
    n_layer, n_head = available.shape
    if available.size == 0:
        return available
    line = _line(total, available[0], n_layer=n_layer, n_head=n_head, floor=floor)
    # Upside down, so that what cannot be divided goes to the first layers: they never get less
    # than the next one if they have the cells.
    cells = available[::-1].ravel()
    # No lower bound: the line is at the floor or above, or flat, and filled up evenly.
    counts = _fill(cells, total, start=np.repeat(line[::-1], n_head))
    return np.ascontiguousarray(counts.reshape(n_layer, n_head)[::-1])


def adaptive_layer(scores: Scores, contested: Mask, total: int, floor: int) -> I64:
    """Share out equally over layers; within a layer the best cells win, whatever their head.

    A layer gets the cells that others have no use for, or more than its share if its heads'
    floors need it; single cells that cannot be divided go to the last layers. Within a layer
    every head has its best `floor` cells, and the rest is one top-k over all heads. Of equal
    scores the later cell wins, then the later head.

    Parameters, returns and errors: see the module. The scores of a layer's heads are compared
    with each other, so a policy must score them on one scale.

    Source: "Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation for Efficient LLM
    Inference", arXiv 2407.11550; the floor is its safeguard, there and in kvpress
    (``AdaKVPress``) 0.2 of the mean budget.

    Examples
    --------
    >>> import numpy as np
    >>> scores = np.array([[[5.0, 4.0, 3.0], [2.0, 1.0, 0.0]]])
    >>> adaptive_layer(scores, np.ones(scores.shape, bool), 4, 0).tolist()
    [[3, 1]]
    """
    available, total = _checked(scores, contested, total, floor)
    floors = np.minimum(available, floor).sum(axis=-1)
    totals = _fill(available.sum(axis=-1), total, lower=_fill(floors, total))
    return _compete(np.asarray(scores), np.asarray(contested, bool), totals, floor)


def global_(scores: Scores, contested: Mask, total: int, floor: int) -> I64:
    """Share out by one top-k over all layers and heads.

    Every head has its best `floor` cells; of the rest the best win. Of equal scores the later
    cell wins, then the later layer, then the later head.

    Parameters, returns and errors: see the module. The scores of all layers and heads are
    compared with each other, so a policy must score them on one scale.

    Source: the top-k of :func:`adaptive_layer` over all layers together.

    Examples
    --------
    >>> import numpy as np
    >>> scores = np.array([[[5.0, 4.0, 3.0]], [[2.0, 1.0, 0.0]]])
    >>> global_(scores, np.ones(scores.shape, bool), 4, 2).tolist()
    [[2], [2]]
    """
    available, total = _checked(scores, contested, total, floor)
    one = (1, available.size, np.shape(scores)[-1])  # all heads as one layer
    counts = _compete(
        np.reshape(scores, one),
        np.reshape(np.asarray(contested, bool), one),
        np.array([total]),
        floor,
    )
    return counts.reshape(available.shape)


ALLOCATORS: dict[str, Allocator] = {
    "uniform": uniform,
    "pyramid": pyramid,
    "adaptive-layer": adaptive_layer,
    "global": global_,
}
"""Allocators by the name that a user gives."""


def get_allocator(name: str) -> Allocator:
    """Find an allocator by its name in :data:`ALLOCATORS`.

    Raises
    ------
    BudgetError
        (a ValueError) Unknown name.

    Examples
    --------
    >>> get_allocator("global").__name__
    'global_'
    """
    if name in ALLOCATORS:
        return ALLOCATORS[name]
    raise BudgetError(unknown_name("allocation", name, ALLOCATORS))


def _checked(scores: Any, contested: Any, total: int, floor: int) -> tuple[I64, int]:
    """Contested cells of each head [L, H], and how many can be kept of them; raise if unusable."""
    contested = np.asarray(contested, bool)
    check_scores(np.asarray(scores), contested)
    if total < 0 or floor < 0:
        raise BudgetError(f"total={total} and floor={floor} cells must be 0 or more.")
    available = contested.sum(axis=-1, dtype=np.int64)
    return available, min(int(total), int(available.sum()))


def _line(total: int, first_cells: I64, *, n_layer: int, n_head: int, floor: int) -> I64:
    """Budget per head of each layer [L], rounded down; the formula stands in :func:`pyramid`."""
    # Exact fractions: no rounding of floats decides over a cell.
    mean = Fraction(total, n_layer * n_head)
    last = min(mean, max(mean / PYRAMID_BETA, Fraction(floor)))
    first = max(mean, min(2 * mean - last, Fraction(int(first_cells.sum()), n_head)))
    if n_layer == 1:
        return np.array([math.floor(mean)], np.int64)
    fall = 2 * (first - mean) / (n_layer - 1)  # first - last over the layers between
    return np.array([math.floor(first - layer * fall) for layer in range(n_layer)], np.int64)


def _fill(upper: I64, total: ArrayLike, *, lower: ArrayLike = 0, start: ArrayLike = 0) -> I64:
    """Share out `total` along the last axis by water-filling.

    ``clip(start + level, lower, upper)`` with the highest level that `total` allows; what is
    left then is less than one for each entry that could rise, and the last of these get it.

    Parameters
    ----------
    upper
        int [..., n], most that each entry can take.
    total
        int [...], at least the sum of `lower` and at most that of `upper`; not checked.
    lower, start
        int, broadcast to `upper`.

    Returns
    -------
    int64 [..., n], its sum along the last axis is `total`
    """
    if upper.size == 0:
        return upper.astype(np.int64)
    total = np.asarray(total)[..., None]
    lower, start = np.broadcast_to(lower, upper.shape), np.broadcast_to(start, upper.shape)
    low = (lower - start).min(axis=-1, keepdims=True)  # everything at its lower bound
    high = (upper - start).max(axis=-1, keepdims=True)  # everything at its upper bound
    while (low < high).any():
        level = (low + high + 1) // 2
        fits = np.clip(start + level, lower, upper).sum(axis=-1, keepdims=True) <= total
        low, high = np.where(fits, level, low), np.where(fits, high, level - 1)
    filled = np.clip(start + low, lower, upper)
    can_rise = np.clip(start + low + 1, lower, upper) > filled
    rank_from_end = np.cumsum(can_rise[..., ::-1], axis=-1)[..., ::-1]
    left = total - filled.sum(axis=-1, keepdims=True)
    return np.asarray(filled + (can_rise & (rank_from_end <= left)), np.int64)


def _compete(scores: Scores, contested: Mask, totals: I64, floor: int) -> I64:
    """Cells of each head when the heads of a group compete for the group's total.

    Parameters
    ----------
    scores, contested
        [n_group, n_head, n_cells]
    totals
        int [n_group], at most the group's contested cells.
    floor
        Cells that each head has for certain, or an equal share where the total is too small.

    Returns
    -------
    int64 [n_group, n_head]
    """
    floors = _fill(np.minimum(contested.sum(axis=-1, dtype=np.int64), floor), totals)
    rest = contested & ~top_cells(scores, contested, floors)
    won = [_won(*group) for group in zip(scores, rest, totals - floors.sum(axis=-1), strict=True)]
    return floors + np.array(won, np.int64).reshape(floors.shape)


def _won(scores: Scores, among: Mask, total: int) -> I64:
    """Cells of each head among the best `total`; of equals the later cell, then the later head.

    Nothing in between is as large as `scores` but one copy of them: with all heads of a model in
    a group, and one of them long, that decides what budget fits.

    Parameters
    ----------
    scores, among
        [n_head, n_cells]
    total
        At most the cells in `among`.
    """
    available = among.sum(axis=-1, dtype=np.int64)
    if total in (0, available.sum()):
        return available if total else np.zeros_like(available)
    values = scores[among]
    values.partition(values.size - total)
    cut = values[values.size - total]  # the smallest score that wins
    del values
    won = np.array(
        [np.count_nonzero(row[mask] > cut) for row, mask in zip(scores, among, strict=True)],
        np.int64,
    )
    missing = int(total - won.sum())  # of the cells that score `cut`
    if missing == 0:
        return won
    # Cell by cell, heads next to each other: later there means later cell, then later head.
    equal = np.flatnonzero((among & (scores == cut)).T)
    return won + np.bincount(equal[-missing:] % len(won), minlength=len(won))
