"""SnapKV: mean attention of the last queries, smoothed along the cells."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from capkv_local.policies.base import F32, BasePolicy, KVStats, above_all, pool_cells, register
from capkv_local.policies.base import window_mask as in_window


@register
@dataclass(frozen=True)
class SnapKV(BasePolicy):
    """Keep what the observation window looked at, and its neighbours.

    Source: "SnapKV: LLM Knows What You are Looking for Before Generation", arXiv 2404.14469, in
    the form that kvpress 0.5.5 computes (``SnapKVPress``)::

        s_i = pool_j( mean over window queries q and query heads of softmax_j(q' k_j) )

    over the cells before the window; the window's own cells are always kept.

    Parameters
    ----------
    n_sinks, n_recent
        See :class:`~capkv_local.policies.base.BasePolicy`.
    n_window
        Length of the observation window, also the number of last cells that score above all.
    pool
        Odd kernel of the average pool; 1 switches it off.

    Notes
    -----
    Departures from the paper, shared with kvpress: an average pool that counts cells beyond the
    ends as zeros (the paper's experiments use a max pool of 7, its code defaults to an average
    pool of 5), scores averaged over the query heads of a KV head. Departures from kvpress: the
    pool is 7 (there 5), sinks are always kept, and a prompt shorter than the window is scored
    instead of refused. After an eviction, neighbours are neighbours among the survivors.
    """

    name: ClassVar[str] = "snapkv"
    needs: ClassVar[frozenset[str]] = frozenset({"queries"})

    pool: int = 7

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("pool", self.pool >= 1 and self.pool % 2 == 1, "odd and 1 or more")

    def score(self, stats: KVStats) -> F32:
        """Pooled window attention, the window above all; [n_layer, n_head_kv, n_cells]."""
        window = in_window(stats)
        attention = np.where(window, 0.0, stats.window_attention(reduce="mean"))
        return above_all(pool_cells(attention, self.pool), window)
