"""From scores to keep lists: sinks, recent window and the best of the rest."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from capkv_local.errors import BudgetError, PolicyError


def keep_lists(
    scores: NDArray[np.floating[Any]], budget: int, *, n_sinks: int, n_recent: int
) -> NDArray[np.int32]:
    """Choose `budget` cells in every head of every layer.

    Parameters
    ----------
    scores
        float [n_layer, n_head_kv, n_cells], higher means keep, all finite.
    budget
        Cells to keep per layer and head, ``n_sinks + n_recent <= budget <= n_cells``.
    n_sinks, n_recent
        First and last cells that are kept whatever their score.

    Returns
    -------
    int32 [n_layer, n_head_kv, budget]
        Cell indices, ascending. Of equal scores the later cell is kept.

    Raises
    ------
    PolicyError
        (a ValueError) Scores of the wrong shape or not finite.
    BudgetError
        (a ValueError) A budget that cannot hold sinks and recent window, or exceeds the cells.

    Examples
    --------
    >>> import numpy as np
    >>> scores = np.array([[[0.0, 0.1, 0.9, 0.5, 0.2, 0.0]]], dtype=np.float32)
    >>> keep_lists(scores, 4, n_sinks=1, n_recent=1).tolist()
    [[[0, 2, 3, 5]]]
    """
    scores = np.asarray(scores)
    _check_scores(scores)
    n_layer, n_head_kv, n_cells = scores.shape
    if n_sinks < 0 or n_recent < 0:
        raise BudgetError(f"n_sinks={n_sinks} and n_recent={n_recent} must be 0 or more.")
    if not max(1, n_sinks + n_recent) <= budget <= n_cells:
        raise BudgetError(
            f"A budget of {budget} cells must hold {n_sinks} sinks and {n_recent} recent cells "
            f"and be at most the {n_cells} cells there are: change kv_budget or the policy's "
            "n_sinks and n_recent."
        )
    keep = np.zeros(scores.shape, bool)
    keep[..., :n_sinks] = True
    keep[..., n_cells - n_recent :] = True
    middle = slice(n_sinks, n_cells - n_recent)
    keep[..., middle] = _top(scores[..., middle], budget - n_sinks - n_recent)
    # Every row of the mask has `budget` marks, and nonzero walks rows and cells in order.
    cells = np.nonzero(keep.reshape(-1, n_cells))[1]
    return cells.reshape(n_layer, n_head_kv, budget).astype(np.int32)


def _top(scores: NDArray[Any], count: int) -> NDArray[np.bool_]:
    """Mask of the `count` largest along the last axis, later ones first among equals."""
    n = scores.shape[-1]
    if count == 0 or count == n:
        return np.full(scores.shape, count > 0)
    cut = np.partition(scores, n - count, axis=-1)[..., n - count, None]  # smallest score kept
    above = scores > cut
    equal = scores == cut
    missing = count - above.sum(axis=-1, keepdims=True)
    rank_from_end = np.cumsum(equal[..., ::-1], axis=-1)[..., ::-1]
    mask: NDArray[np.bool_] = above | (equal & (rank_from_end <= missing))
    return mask


def _check_scores(scores: NDArray[Any]) -> None:
    if scores.ndim != 3 or not np.issubdtype(scores.dtype, np.floating):
        raise PolicyError(
            f"The policy returned scores of type {scores.dtype} and shape {scores.shape}: they "
            "must be floats [n_layer, n_head_kv, n_cells]."
        )
    bad = ~np.isfinite(scores)
    if bad.any():
        layer, head, cell = (int(i) for i in np.argwhere(bad)[0])
        raise PolicyError(
            f"The policy returned {int(bad.sum())} scores that are not finite, the first "
            f"({scores[layer, head, cell]}) at layer {layer}, head {head}, cell {cell}: mend its "
            "score()."
        )
