"""The statistics that a policy scores with, from the native cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np

from capkv_local.errors import PolicyError
from capkv_local.native import F32, I32, KVCache, Stat
from capkv_local.policies.base import Reduce

# Computes the attention of a repetition on the first cells, see KVStats.probe_attention().
Repeat = Callable[[Reduce], F32]
# Computes the attention of the last tokens anew, see KVStats.window_attention().
Look = Callable[[Reduce, bool], F32]

ATTENTION = {"mean": Stat.ATTN_MEAN, "max": Stat.ATTN_MAX, "second_moment": Stat.ATTN_SQR}


class NativeStats:
    """:class:`~capkv_local.policies.KVStats` of the first ``n_cells`` cells, fetched lazily."""

    def __init__(
        self,
        kv: KVCache,
        *,
        n_cells: int,
        n_tokens: int,
        n_queries: int,
        carried: F32 | None,
        repeat: Repeat | None = None,
        look: Look | None = None,
    ) -> None:
        info = kv.info()
        self._kv = kv
        self.n_layer = info.n_layer
        self.n_head_kv = info.n_head_kv
        self.n_head = info.n_head
        self.n_cells = n_cells
        self.n_tokens = n_tokens
        self.n_queries = n_queries
        self.carried = carried
        self.carry_next: F32 | None = None
        self._repeat = repeat
        self._look = look
        self._positions: I32 | None = None

    @property
    def positions(self) -> I32:
        if self._positions is None:
            self._positions = self._kv.positions()[..., : self.n_cells]
        return self._positions

    def window_attention(
        self,
        *,
        reduce: Reduce = "mean",
        per_query_head: bool = False,
    ) -> F32:
        if self.n_queries == 0 and self._look is not None:
            return self._look(reduce, per_query_head)
        return self._kv.score(
            ATTENTION[reduce],
            n_cells=self.n_cells,
            n_queries=self.n_queries,
            per_head=per_query_head,
        )

    def probe_attention(self, *, reduce: Reduce = "mean") -> F32 | None:
        return None if self._repeat is None else self._repeat(reduce)

    def anchor(self, *, kind: Literal["cosine", "dot"] = "cosine", n_future: int = 512) -> F32:
        stat = Stat.ANCHOR_COS if kind == "cosine" else Stat.ANCHOR_DOT
        return self._kv.score(stat, n_cells=self.n_cells, n_future=n_future)

    def key_norm(self) -> F32:
        return self._kv.score(Stat.KEY_NORM, n_cells=self.n_cells)

    def value_norm(self) -> F32:
        return self._kv.score(Stat.VALUE_NORM, n_cells=self.n_cells)

    def key_cosine(self) -> F32:
        return self._kv.score(Stat.KEY_COS, n_cells=self.n_cells)

    def leverage(
        self, of: Literal["key", "value"], weights: F32 | None = None, noise: float = 1.0
    ) -> F32:
        stat = Stat.LEVERAGE_K if of == "key" else Stat.LEVERAGE_V
        return self._kv.score(stat, n_cells=self.n_cells, noise=noise, weights=weights)

    def carry(self, relevance: F32) -> None:
        shape = (self.n_layer, self.n_head_kv, self.n_cells)
        if relevance.shape != shape:
            raise PolicyError(f"carry() got shape {relevance.shape} instead of {shape}")
        self.carry_next = np.asarray(relevance, dtype=np.float32)
