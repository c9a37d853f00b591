"""Key norm: cells whose keys are short."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from capkv_local.policies.base import F32, BasePolicy, KVStats, register


@register
@dataclass(frozen=True)
class KNorm(BasePolicy):
    """Keep the cells with the smallest key norms.

    Source: "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression", arXiv
    2406.11430, in the form that kvpress 0.5.5 computes (``KnormPress``)::

        s_i = -||k_i||

    Parameters
    ----------
    n_sinks, n_recent, n_window
        See :class:`~capkv_local.policies.base.BasePolicy`; nothing is observed.

    Notes
    -----
    Departures from the paper: it leaves the first layers uncompressed, here (as in kvpress) all
    layers are treated alike; sinks and the recent window are always kept.
    """

    name: ClassVar[str] = "knorm"

    def score(self, stats: KVStats) -> F32:
        """Negative key norm, float32 [n_layer, n_head_kv, n_cells]."""
        return -stats.key_norm()
