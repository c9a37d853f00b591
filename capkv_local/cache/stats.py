"""What a cache holds and what it cost: what users see."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class KVCacheStats:
    """What the KV cache of a :class:`~capkv_local.Llama` holds and what it cost.

    ``budget``, ``n_cells`` and ``n_cells_max`` are cells per head, on average over all heads of
    all layers: kept after an eviction, held now, allocated. ``n_cells_range`` are the fewest and
    the most that a head holds now. ``kv_bytes`` is the memory that is allocated for K and V (all
    layers), ``kv_bytes_full`` what the same context would take without eviction, and
    ``observe_bytes`` what the observed queries take. Times are wall seconds since the model was
    loaded. ``n_protected`` tokens (a document) are protected, ``n_cells_protected`` cells hold
    them, and ``n_cells_conversation`` are there for all that follows; ``copy_bytes`` is the host
    memory of a copy to go back to them, see :meth:`~capkv_local.Llama.forget`.
    """

    policy: str | None
    allocation: str | None
    budget: int
    n_tokens: int
    n_cells: int
    n_cells_max: int
    n_cells_range: tuple[int, int]
    kv_bytes: int
    kv_bytes_full: int
    observe_bytes: int = 0
    evictions: int = 0
    cells_evicted: int = 0
    t_score_s: float = 0.0
    t_select_s: float = 0.0
    t_evict_s: float = 0.0
    t_decode_s: float = 0.0
    n_protected: int = 0
    n_cells_protected: int = 0
    n_cells_conversation: int = 0
    copy_bytes: int = 0


@dataclass
class Counters:
    """What evictions have done and cost so far."""

    evictions: int = 0
    cells_evicted: int = 0
    t_score_s: float = 0.0
    t_select_s: float = 0.0
    t_evict_s: float = 0.0
