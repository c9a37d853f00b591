"""StreamingLLM: the first cells and the most recent ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from capkv_local.policies.base import F32, BasePolicy, KVStats, register


@register
@dataclass(frozen=True)
class Streaming(BasePolicy):
    """Keep the sinks and the most recent tokens.

    Source: "Efficient Streaming Language Models with Attention Sinks", arXiv 2309.17453::

        s_i = position of the token in cell i

    Parameters
    ----------
    n_sinks, n_recent, n_window
        See :class:`~capkv_local.policies.base.BasePolicy`; nothing is observed.

    Notes
    -----
    Departure from the paper: keys keep the rotation of their own position (the paper counts
    positions inside the cache), as in kvpress without its re-rotation wrapper. Exact up to
    2^24 tokens, where float32 stops telling neighbours apart.
    """

    name: ClassVar[str] = "streaming"

    def score(self, stats: KVStats) -> F32:
        """Token positions, float32 [n_layer, n_head_kv, n_cells]."""
        return stats.positions.astype(np.float32)
