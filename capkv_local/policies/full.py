"""No eviction: the full cache, to compare with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from capkv_local.policies.base import F32, BasePolicy, KVStats, register


@register
@dataclass(frozen=True)
class Full(BasePolicy):
    """Keep everything; the cache then has to hold the whole context.

    Parameters
    ----------
    n_sinks, n_recent, n_window
        Without effect.
    """

    name: ClassVar[str] = "full"
    evicts: ClassVar[bool] = False

    def score(self, stats: KVStats) -> F32:
        """The same score for every cell, float32 [n_layer, n_head_kv, n_cells]."""
        return np.ones((stats.n_layer, stats.n_head_kv, stats.n_cells), np.float32)
