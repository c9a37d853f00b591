"""KVStats over plain arrays: what the native side computes, by the float64 reference."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from capkv_local.evaluate import reference
from capkv_local.policies.base import F32

GOLDEN = Path(__file__).resolve().parent


@dataclasses.dataclass
class ArrayStats:
    """Statistics of cells that lie in arrays; checks what a policy hands in."""

    k: np.ndarray  # [n_layer, n_head_kv, n_cells, d], after RoPE
    v: np.ndarray
    mean_query: np.ndarray  # [n_layer, n_head, d], before RoPE, sinks left out
    window_query: np.ndarray  # [n_layer, n_head, n_queries, d], after RoPE
    inv_freq: np.ndarray  # [d / 2]
    n_tokens: int
    positions: np.ndarray  # int32 [n_layer, n_head_kv, n_cells]
    carried: np.ndarray | None = None
    repeated_query: np.ndarray | None = None  # [n_layer, n_head, n_repeated, d], after RoPE
    handed: np.ndarray | None = None  # what the policy carried on

    def __post_init__(self) -> None:
        self.n_layer, self.n_head_kv, self.n_cells, self.d = self.k.shape
        self.n_head, self.n_queries = self.window_query.shape[1:3]

    def observed_by(self, policy: Any) -> ArrayStats:
        """The same cells, seen by the policy's own number of last queries."""
        last = self.window_query[:, :, -policy.n_window :]
        return dataclasses.replace(self, window_query=last)

    def after(self, keep: np.ndarray) -> ArrayStats:
        """The survivors, with what was carried moved along."""
        cells = {name: np.take_along_axis(getattr(self, name), keep[..., None], 2) for name in "kv"}
        cells["positions"] = np.take_along_axis(self.positions, keep, 2)
        if self.handed is not None:
            cells["carried"] = np.take_along_axis(self.handed, keep, 2)
        return dataclasses.replace(self, **cells, handed=None)

    def window_attention(self, *, reduce: Any = "mean", per_query_head: bool = False) -> F32:
        q_pos = np.arange(self.n_tokens - self.n_queries, self.n_tokens)
        a = reference.window_attention(
            self.window_query, self.k, q_pos, self.positions, self.d**-0.5, reduce, per_query_head
        )
        return a.astype(np.float32)

    def probe_attention(self, *, reduce: Any = "mean") -> F32 | None:
        if self.repeated_query is None:
            return None
        n = self.repeated_query.shape[2]
        q_pos = np.arange(self.n_tokens, self.n_tokens + n)
        a = reference.window_attention(
            *(self.repeated_query, self.k, q_pos, self.positions, self.d**-0.5, reduce),
            reduce == "max",
        )
        if reduce == "max":
            a = a.reshape(self.n_layer, self.n_head_kv, -1, self.n_cells).max(axis=2)
        else:
            a = a * n
        return a.astype(np.float32)

    def anchor(self, *, kind: Any = "cosine", n_future: int = 512) -> F32:
        out = reference.anchor(
            self.mean_query, self.k, self.n_tokens, self.inv_freq, kind=kind, n_future=n_future
        )
        return out.astype(np.float32)

    def key_norm(self) -> F32:
        return reference.norm(self.k).astype(np.float32)

    def value_norm(self) -> F32:
        return reference.norm(self.v).astype(np.float32)

    def key_cosine(self) -> F32:
        return reference.key_cosine(self.k).astype(np.float32)

    def leverage(self, of: str, weights: Any = None, noise: float = 1.0) -> F32:
        if weights is not None:
            assert weights.dtype == np.float32
            assert (weights >= 0).all()
            assert np.isfinite(weights).all()
        u = {"key": self.k, "value": self.v}[of]
        return reference.leverage(u, weights, noise).astype(np.float32)

    def carry(self, relevance: F32) -> None:
        assert relevance.shape == self.positions.shape
        assert relevance.dtype == np.float32
        self.handed = relevance


def stats_of(raw: Any) -> ArrayStats:
    """The whole prompt of the golden files, nothing evicted yet."""
    n = len(raw["tokens"])
    positions = np.broadcast_to(np.arange(n, dtype=np.int32), raw["k"].shape[:3])
    arrays = {name: raw[name] for name in ("k", "v", "mean_query", "window_query", "inv_freq")}
    return ArrayStats(**arrays, n_tokens=n, positions=positions)


def synthetic(
    seed: int, n_cells: int = 60, n_queries: int = 8, *, probed: bool = False
) -> ArrayStats:
    """Two layers of random cells that survived out of 100 tokens, the last 40 in every head.

    ``probed``: 20 tokens are repeated.
    """
    rng = np.random.default_rng(seed)
    old = [np.sort(rng.choice(60, n_cells - 40, replace=False)) for _ in range(2 * 2)]
    positions = np.concatenate([np.stack(old), np.tile(np.arange(60, 100), (4, 1))], axis=1)
    return ArrayStats(
        k=rng.normal(size=(2, 2, n_cells, 8)),
        v=rng.normal(size=(2, 2, n_cells, 8)),
        mean_query=rng.normal(size=(2, 4, 8)),
        window_query=rng.normal(size=(2, 4, n_queries, 8)),
        inv_freq=10000.0 ** -(np.arange(4) / 4),
        n_tokens=100,
        positions=positions.reshape(2, 2, n_cells).astype(np.int32),
        repeated_query=rng.normal(size=(2, 4, 20, 8)) if probed else None,
    )


def asked(stats: ArrayStats) -> ArrayStats:
    """The same cells, observed by the queries of a question that lies behind all of them."""
    return dataclasses.replace(stats, n_tokens=stats.n_tokens + stats.n_queries)


def golden_raw() -> dict[str, Any]:
    """Keys, values and queries of a few layers, as transformers computed them in float32."""
    with np.load(GOLDEN / "kvpress-raw.npz") as arrays:
        return {**arrays, "meta": json.loads(str(arrays["meta"]))}


def golden_scores(layers: list[int] | None = None) -> dict[str, np.ndarray]:
    """What kvpress says, by policy name: float32 [n_layer, n_head_kv, n_tokens]."""
    with np.load(GOLDEN / "kvpress-scores.npz") as arrays:
        keys = [key for key in arrays if key.startswith("score_")]
        rows = slice(None) if layers is None else layers
        return {key.removeprefix("score_"): arrays[key][rows] for key in keys}
