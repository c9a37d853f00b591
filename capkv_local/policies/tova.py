"""TOVA: attention of the last token, averaged over all heads of a layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from capkv_local.policies.base import F32, BasePolicy, KVStats, above_all, register


@register
@dataclass(frozen=True)
class Tova(BasePolicy):
    """Keep what the last token looks at; all heads of a layer keep the same cells.

    Source: "Transformers are Multi-State RNNs", arXiv 2401.06104, in the form that kvpress 0.5.5
    computes (``TOVAPress``)::

        s_i = mean over query heads of softmax_i(q_last' k_i)

    Parameters
    ----------
    n_sinks, n_recent
        See :class:`~capkv_local.policies.base.BasePolicy`.
    n_window
        Queries averaged over; 1 is TOVA, more is a milder variant of it.

    Notes
    -----
    Departures from the paper: it evicts one cell per decoded token, here eviction comes in
    rounds; the last token, the sinks and the recent window are always kept. Departure from
    kvpress: only the sinks and the recent window (there only the last token is kept so). Heads
    keep the same cells only while their caches hold the same tokens, which this policy ensures
    unless another one ran before.
    """

    name: ClassVar[str] = "tova"
    needs: ClassVar[frozenset[str]] = frozenset({"queries"})

    n_window: int = 1

    def score(self, stats: KVStats) -> F32:
        """Attention of the last query, the last cell above all; [n_layer, n_head_kv, n_cells]."""
        attention = stats.window_attention(reduce="mean")
        layer = attention.mean(axis=1, dtype=np.float64, keepdims=True)
        return above_all(np.broadcast_to(layer, attention.shape), slice(-1, None))
