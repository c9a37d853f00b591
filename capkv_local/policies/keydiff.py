"""KeyDiff: keys unlike the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from capkv_local.policies.base import F32, BasePolicy, KVStats, register


@register
@dataclass(frozen=True)
class KeyDiff(BasePolicy):
    """Keep the keys that point away from the mean direction of all keys.

    Source: "KeyDiff: Key Similarity-Based KV Cache Eviction", arXiv 2504.15364, in the form that
    kvpress 0.5.5 computes (``KeyDiffPress``)::

        s_i = -cos(k_i, mean_j k_j / ||k_j||)

    Parameters
    ----------
    n_sinks, n_recent, n_window
        See :class:`~capkv_local.policies.base.BasePolicy`; nothing is observed.

    Notes
    -----
    Departures from the paper: none in the score; the paper evicts block by block, which here
    happens while a prompt streams through a full cache. Departure from kvpress: sinks and the
    recent window are always kept.
    """

    name: ClassVar[str] = "keydiff"

    def score(self, stats: KVStats) -> F32:
        """Negative cosine with the mean key direction, [n_layer, n_head_kv, n_cells]."""
        return -stats.key_cosine()
