"""The part of a context's KV cache that can be evicted per head.

Arrays go in and out as C-contiguous numpy arrays of the shapes in ``llama-kv-evict.h``; every
status below 0 becomes a typed exception.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from capkv_local.errors import NativeError, OutOfMemory
from capkv_local.native.loading import check, functions
from capkv_local.native.structs import (
    ERR_ALLOC,
    F32,
    I32,
    Info,
    Mask,
    ObserveParams,
    RawInfo,
    ScoreParams,
    Stat,
)


class KVCache:
    """The part of a context's KV cache that can be evicted per head.

    Every head of every layer holds as many cells as it keeps. Cells are numbered from the end, so
    that arrays are dense: a head that holds fewer cells than others lacks the first ones.

    Parameters
    ----------
    ctx
        ``llama_context *`` as llama-cpp-python holds it; must outlive this object.

    Raises
    ------
    NativeBuildMissing
        The library is a stock one.
    UnsupportedModel
        The memory of the model, or a setting of the context, does not allow eviction.
    """

    def __init__(self, ctx: Any) -> None:
        self._ctx = ctx
        self._f = functions()
        check(self._f["llama_memory_evict_supported"](ctx), "evict KV cells per head")

    def info(self) -> Info:
        raw = RawInfo()
        check(
            self._f["llama_memory_evict_get_info"](self._ctx, ctypes.byref(raw)),
            "read the state of the KV cache",
        )
        return Info(**{name: int(getattr(raw, name)) for name, _ in raw._fields_})  # type: ignore[misc]

    def positions(self) -> I32:
        """Token position in every used cell, ``[n_layer, n_head_kv, n_cells]``; -1: not held."""
        info = self.info()
        out = np.empty((info.n_layer, info.n_head_kv, info.n_cells), dtype=np.int32)
        status = self._f["llama_memory_evict_positions"](self._ctx, out.ctypes.data, out.size)
        check(status, "read the positions of the KV cells")
        return out

    def pools(self) -> I32:
        """Pool of rows of every layer, ``[n_layer]``: one for each device."""
        out = np.empty(self.info().n_layer, dtype=np.int32)
        status = self._f["llama_memory_evict_pools"](self._ctx, out.ctypes.data, out.size)
        check(status, "read where the KV cells lie")
        return out

    def held_range(self) -> tuple[int, int]:
        """Fewest and most cells that a head holds."""
        if self.info().n_cells == 0:
            return 0, 0
        held = (self.positions() >= 0).sum(axis=-1)
        return int(held.min()), int(held.max())

    def resize(self, n_cells: int) -> None:
        """Allocate ``n_cells`` cells per head on average; what is held moves along.

        Needed once before anything is decoded or evicted. Old and new memory exist side by side
        for a moment.

        Raises
        ------
        OutOfMemory
            Not that much memory; nothing has changed.
        NativeError
            Fewer cells than are held; nothing has changed.
        """
        status = self._f["llama_memory_evict_resize"](self._ctx, n_cells)
        if status == ERR_ALLOC:
            n_mib = n_cells * self.info().n_bytes_cell / 2**20
            raise OutOfMemory(
                f"no memory for {n_cells} KV cells per head ({n_mib:.0f} MiB): take a smaller "
                "kv_budget, kv_room or n_batch, or a smaller cache type (type_k, type_v)"
            )
        check(status, f"make room for {n_cells} KV cells per head")

    def set_n_ctx(self, n_ctx: int) -> None:
        """Declare the logical context length (tokens) of a cache of fewer cells."""
        check(
            self._f["llama_memory_evict_set_n_ctx"](self._ctx, n_ctx),
            f"use a context of {n_ctx} tokens",
        )

    def observe(self, n_window: int, *, mean_query: bool = False, n_skip: int = 0) -> None:
        """Observe the last ``n_window`` queries (0 and no mean: stop) from the next decode on."""
        params = ObserveParams(n_window, mean_query, n_skip)
        check(self._f["llama_memory_observe"](self._ctx, params), "observe queries")

    def set_mean(self, enabled: bool) -> None:
        """Whether the next decodes enter the mean query."""
        check(self._f["llama_memory_observe_set_mean"](self._ctx, enabled), "observe queries")

    def add_attention(self, stat: Stat, p0: int) -> None:
        """Add up the attention that tokens from position ``p0`` on pay, from the next decode on.

        ``stat`` is one of ``ATTN_*``; it begins at 0 unless the same is added up already.
        Meanwhile, no queries are observed.
        """
        check(self._f["llama_memory_observe_attn"](self._ctx, int(stat), p0), "add up attention")

    def stop_attention(self) -> None:
        """Observe queries again, and free what :meth:`add_attention` takes."""
        check(self._f["llama_memory_observe_attn"](self._ctx, 0, -1), "stop adding up attention")

    def attention(self, n_cells: int) -> F32:
        """What was added up for the first ``n_cells`` cells, ``[n_layer, n_head_kv, n_cells]``.

        The sum over all tokens of the mean over the query heads of a group, for ``ATTN_MAX`` the
        largest; 0 in cells that a head does not hold.
        """
        info = self.info()
        out = np.empty((info.n_layer, info.n_head_kv, n_cells), dtype=np.float32)
        status = self._f["llama_memory_get_attn"](self._ctx, n_cells, out.ctypes.data, out.size)
        check(status, "read the attention that was added up")
        return out

    def score(
        self,
        stat: Stat,
        *,
        n_cells: int,
        n_queries: int = 0,
        per_head: bool = False,
        n_future: int = 0,
        noise: float = 0.0,
        weights: F32 | None = None,
    ) -> F32:
        """One statistic of the first ``n_cells`` cells, ``[n_layer, n_rows, n_cells]``.

        0 in cells that a head does not hold. ``n_rows`` is ``n_head`` for the anchor and with
        ``per_head``, else ``n_head_kv``. ``weights`` is ``[n_layer, n_head_w, n_cells]`` with
        ``n_head_w`` a multiple of ``n_head_kv``.
        """
        info = self.info()
        attention = stat <= Stat.ATTN_SQR
        anchor = stat in (Stat.ANCHOR_COS, Stat.ANCHOR_DOT)
        n_rows = info.n_head if anchor or (attention and per_head) else info.n_head_kv
        params = ScoreParams(
            stat=int(stat),
            n_cells=n_cells,
            n_queries=n_queries,
            per_head=per_head,
            n_future=n_future,
            lambda_=noise,
        )
        if weights is not None:
            weights = np.ascontiguousarray(weights, dtype=np.float32)
            if weights.ndim != 3 or weights.shape[::2] != (info.n_layer, n_cells):
                raise NativeError(
                    f"weights have shape {weights.shape} instead of "
                    f"({info.n_layer}, n_head, {n_cells})"
                )
            params.n_head_w = weights.shape[1]
            params.weights = weights.ctypes.data
        out = np.empty((info.n_layer, n_rows, n_cells), dtype=np.float32)
        status = self._f["llama_memory_score"](self._ctx, params, out.ctypes.data, out.size)
        check(status, f"compute {stat.name}")
        return out

    def evict(self, keep: Mask) -> None:
        """Every head keeps the cells marked in ``keep[n_layer, n_head_kv, n_cells]``.

        Any number per head, the last cell always among them; afterwards the largest number is in
        use and every head holds the last of those cells.
        """
        n_keep = np.ascontiguousarray(keep.sum(axis=-1), dtype=np.uint32)
        # nonzero walks heads and cells in order: the lists of the heads, one behind the other.
        lists = [np.nonzero(layer)[-1].astype(np.int32) for layer in keep]
        cells = np.concatenate(lists, dtype=np.int32)
        expected = self.info()
        if keep.shape != (expected.n_layer, expected.n_head_kv, expected.n_cells):
            raise NativeError(
                f"the mask of kept cells has shape {keep.shape} instead of "
                f"{(expected.n_layer, expected.n_head_kv, expected.n_cells)}"
            )
        status = self._f["llama_memory_evict"](
            self._ctx, n_keep.ctypes.data, cells.ctypes.data, cells.size
        )
        check(status, "evict KV cells")
