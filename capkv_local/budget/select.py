"""From scores and counts to the cells that stay: sinks, recent window and the best of the rest."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from capkv_local.errors import BudgetError, PolicyError

Scores = NDArray[np.floating[Any]]
Mask = NDArray[np.bool_]
Counts = NDArray[np.integer[Any]]


def keep_mask(
    scores: Scores,
    held: Mask,
    counts: Counts,
    *,
    n_sinks: int,
    n_recent: int,
    protected: Mask | None = None,
) -> Mask:
    """Choose the cells that every head keeps, as many as `counts` says.

    Parameters
    ----------
    scores
        float [n_layer, n_head_kv, n_cells], higher means keep, finite in every held cell; what
        stands in the others does not matter.
    held
        bool [n_layer, n_head_kv, n_cells], the cells that the head holds.
    counts
        int [n_layer, n_head_kv], cells to keep, sinks, recent window and protected cells among
        them: at least 1 and at least those, as far as the head holds them; at most the cells it
        holds.
    n_sinks, n_recent
        First and last held cells of the head, kept whatever their score.
    protected
        bool [n_layer, n_head_kv, n_cells], more cells that are kept whatever their score.

    Returns
    -------
    bool [n_layer, n_head_kv, n_cells]
        Cells to keep, ``counts`` of them in each head. Of equal scores the later cell is kept.

    Raises
    ------
    PolicyError
        (a ValueError) Scores of the wrong shape or not finite.
    BudgetError
        (a ValueError) A count that cannot hold sinks and recent window or exceeds the cells
        held, or counts of the wrong shape or type.

    Examples
    --------
    >>> import numpy as np
    >>> scores = np.array([[[0.0, 0.1, 0.9, 0.5, 0.2, 0.0]]], dtype=np.float32)
    >>> held = np.array([[[False, True, True, True, True, True]]])
    >>> keep_mask(scores, held, np.array([[3]]), n_sinks=1, n_recent=1).astype(int).tolist()
    [[[0, 1, 1, 0, 0, 1]]]
    """
    scores, held, counts = np.asarray(scores), np.asarray(held, bool), np.asarray(counts)
    check_scores(scores, held)
    always = held & ~contested(held, n_sinks=n_sinks, n_recent=n_recent, protected=protected)
    n_always = always.sum(axis=-1)
    _check_counts(counts, n_always, held.sum(axis=-1), n_sinks=n_sinks, n_recent=n_recent)
    return always | top_cells(scores, held & ~always, counts - n_always)


def contested(held: Mask, *, n_sinks: int, n_recent: int, protected: Mask | None = None) -> Mask:
    """Held cells that are neither sinks nor recent nor protected: those whose score decides.

    Parameters
    ----------
    held
        bool [n_layer, n_head_kv, n_cells], the cells that the head holds.
    n_sinks, n_recent
        First and last held cells of every head that are not contested.
    protected
        bool [n_layer, n_head_kv, n_cells], more cells that are not.

    Returns
    -------
    bool [n_layer, n_head_kv, n_cells]

    Raises
    ------
    BudgetError
        (a ValueError) A negative `n_sinks` or `n_recent`.

    Examples
    --------
    >>> import numpy as np
    >>> held = np.array([[[False, True, True, True, True, True]]])
    >>> contested(held, n_sinks=1, n_recent=2).astype(int).tolist()
    [[[0, 0, 1, 1, 0, 0]]]
    """
    if n_sinks < 0 or n_recent < 0:
        raise BudgetError(f"n_sinks={n_sinks} and n_recent={n_recent} must be 0 or more.")
    held = np.asarray(held, bool)
    middle = np.empty(held.shape, bool)
    for index in np.ndindex(held.shape[:-2]):  # a layer; the ranks of all would be large
        layer = held[index]
        rank = np.cumsum(layer, axis=-1, dtype=np.int32)  # 1 for the first cell held
        n_held = layer.sum(axis=-1, keepdims=True)
        middle[index] = layer & (rank > n_sinks) & (rank <= n_held - n_recent)
    if protected is not None:
        middle &= ~np.asarray(protected, bool)
    return middle


def top_cells(scores: Scores, among: Mask, counts: Counts) -> Mask:
    """Best cells of every row, of equal scores the later ones.

    Parameters
    ----------
    scores
        float [..., n_cells], finite where `among` is set.
    among
        bool [..., n_cells], cells that may be chosen.
    counts
        int [...], cells to choose, from 0 to the row's cells in `among`; not checked.

    Returns
    -------
    bool [..., n_cells]
    """
    mask = np.zeros(scores.shape, bool)
    n = scores.shape[-1]
    for index in np.ndindex(mask.shape[:-1]):  # head by head: what is in between stays small
        count = int(counts[index])
        if count == 0:
            continue
        row = np.where(among[index], scores[index], -np.inf)  # below every finite score
        cut = np.partition(row, n - count)[n - count]  # the smallest score chosen
        chosen = mask[index]
        np.greater(row, cut, out=chosen)
        missing = count - np.count_nonzero(chosen)
        equal = np.flatnonzero(row == cut)
        chosen[equal[len(equal) - missing :]] = True
    return mask


def check_scores(scores: NDArray[Any], where: Mask) -> None:
    """Raise PolicyError unless `scores` are floats of the shape of `where`, finite where it is set.

    Parameters
    ----------
    scores
        What a policy returned, float [n_layer, n_head_kv, n_cells].
    where
        bool [n_layer, n_head_kv, n_cells], cells whose score is used.
    """
    if (
        scores.ndim != 3
        or scores.shape != where.shape
        or not np.issubdtype(scores.dtype, np.floating)
    ):
        raise PolicyError(
            f"The policy returned scores of type {scores.dtype} and shape {scores.shape}: they "
            f"must be floats [n_layer, n_head_kv, n_cells], here {where.shape}."
        )
    bad = ~np.isfinite(scores)
    bad &= where
    if bad.any():
        layer, head, cell = (int(i) for i in np.argwhere(bad)[0])
        raise PolicyError(
            f"The policy returned {int(bad.sum())} scores that are not finite, the first "
            f"({scores[layer, head, cell]}) at layer {layer}, head {head}, cell {cell}: mend its "
            "score()."
        )


def _check_counts(
    counts: NDArray[Any], n_always: Counts, n_held: Counts, *, n_sinks: int, n_recent: int
) -> None:
    """Raise BudgetError unless counts [L, H] lie between what is always kept and what is held."""
    if counts.shape != n_held.shape or not np.issubdtype(counts.dtype, np.integer):
        raise BudgetError(
            f"Counts of type {counts.dtype} and shape {counts.shape}: they must be integers "
            f"[n_layer, n_head_kv], here {n_held.shape}."
        )
    bad = (counts < np.maximum(1, n_always)) | (counts > n_held)
    if bad.any():
        layer, head = (int(i) for i in np.argwhere(bad)[0])
        raise BudgetError(
            f"A budget of {counts[layer, head]} cells in layer {layer}, head {head} must hold "
            f"{n_sinks} sinks and {n_recent} recent cells and what is protected, at least 1 "
            f"cell, and be at most the {n_held[layer, head]} cells there are: change kv_budget or "
            "the policy's n_sinks and n_recent."
        )
