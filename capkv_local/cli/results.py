"""What ``--json`` prints of a session; one shape for all verbs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from capkv_local.cache.stats import KVCacheStats


def numbers(stats: KVCacheStats, tokens: int, seconds: Mapping[str, float]) -> dict[str, Any]:
    """Policy, budget, cells, sizes in bytes and times in seconds.

    Parameters
    ----------
    stats
        State of the cache.
    tokens
        Tokens that were read.
    seconds
        Times that the cache does not know.
    """
    native = {
        "decode": stats.t_decode_s,
        "score": stats.t_score_s,
        "select": stats.t_select_s,
        "evict": stats.t_evict_s,
    }
    return {
        "policy": stats.policy,
        "allocation": stats.allocation,
        "budget": stats.budget,
        "tokens": tokens,
        "seconds": {name: round(value, 4) for name, value in {**seconds, **native}.items()},
        "kv": {
            "cells": stats.n_cells,
            "cells_max": stats.n_cells_max,
            "cells_range": list(stats.n_cells_range),
            "bytes": stats.kv_bytes,
            "bytes_full": stats.kv_bytes_full,
            "observe_bytes": stats.observe_bytes,
            "evictions": stats.evictions,
            "cells_evicted": stats.cells_evicted,
        },
    }
