"""Float64 oracle of every native statistic, in plain numpy, from raw keys, values and queries.

Written to be read beside the equations, not to be fast; imported by tests and evaluation only.
Arrays are ``[..., head, cell or query, d]``. Query head ``h`` reads KV head
``h // (n_head // n_head_kv)``. Every result is float64.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]
Array = NDArray[Any]

_TINY = 1e-12
"""Norms below this count as this in cosines, so that a zero vector has cosine 0."""


def leverage(u: Array, w: Array | None = None, noise: float = 1.0) -> F64:
    """Ridge leverage ``w_i u_i' (noise I + sum_j w_j u_j u_j')^-1 u_i``.

    Parameters
    ----------
    u
        [..., n_head_kv, n_cells, d]
    w
        [..., n_head, n_cells], not negative, n_head a multiple of n_head_kv; None means all 1.
    noise
        Ridge, above 0.

    Returns
    -------
    [..., n_head_kv, n_cells]
        Averaged over the query heads of a KV head; in [0, 1). A head's sum is
        ``d - noise tr(A^-1)``, its capacity's effective dimension.
    """
    u = np.asarray(u, np.float64)
    *lead, n_head_kv, n_cells, d = u.shape
    if w is None:
        w = np.ones((*lead, n_head_kv, n_cells))
    w = np.asarray(w, np.float64).reshape(*lead, n_head_kv, -1, n_cells)  # [.., H_kv, G, n]
    u = u[..., None, :, :]  # [.., H_kv, 1, n, d]
    scaled = np.sqrt(w)[..., None] * u
    a = noise * np.eye(d) + np.swapaxes(scaled, -1, -2) @ scaled  # [.., H_kv, G, d, d]
    solved = np.linalg.solve(a, np.swapaxes(scaled, -1, -2))  # [.., H_kv, G, d, n]
    per_head = np.einsum("...nd,...dn->...n", scaled, solved)
    return _f64(per_head.mean(axis=-2))


def window_attention(
    q: Array,
    k: Array,
    q_pos: Array,
    k_pos: Array,
    scale: float,
    reduce: Literal["mean", "max", "second_moment"] = "mean",
    per_query_head: bool = False,
) -> F64:
    """Attention of the last queries on every cell: softmax over all cells, causal.

    Parameters
    ----------
    q
        Queries after RoPE, [..., n_head, n_queries, d].
    k
        Cached keys after RoPE, [..., n_head_kv, n_cells, d].
    q_pos
        Positions of the queries, [n_queries].
    k_pos
        Positions of the cells, [..., n_head_kv, n_cells]; a query sees cells up to its own.
    scale
        Of the dot products, usually ``1 / sqrt(d)``.
    reduce
        Over the queries: mean of a, max of a, or mean of a².

    Returns
    -------
    [..., n_head_kv, n_cells], or [..., n_head, n_cells] per query head
        The average over query heads comes last, after the reduction.
    """
    n_head_kv = k.shape[-3]
    k_pos = np.broadcast_to(k_pos, k.shape[:-1])
    logits = scale * _grouped(q, n_head_kv) @ _kv(k).swapaxes(-1, -2)  # [.., H_kv, G, n_q, n]
    hidden = k_pos[..., None, None, :] > np.asarray(q_pos)[:, None]
    logits = np.where(hidden, -np.inf, logits)
    a = _softmax(logits)
    reduced = {
        "mean": lambda: a.mean(axis=-2),
        "max": lambda: a.max(axis=-2),
        "second_moment": lambda: (a**2).mean(axis=-2),
    }[reduce]()  # [.., H_kv, G, n]
    return _merge(reduced, per_query_head)


def mean_rope(n_tokens: int, n_future: int, inv_freq: Array) -> tuple[F64, F64]:
    """Mean cosine and sine of RoPE at positions ``n_tokens .. n_tokens + n_future - 1``.

    Parameters
    ----------
    inv_freq
        Radians per position, [d / 2].

    Returns
    -------
    (cos, sin), each [d / 2]
    """
    angles = np.arange(n_tokens, n_tokens + n_future)[:, None] * _f64(inv_freq)
    return np.cos(angles).mean(axis=0), np.sin(angles).mean(axis=0)


def rotate(x: Array, cos: Array, sin: Array, *, interleaved: bool = False) -> F64:
    """Apply RoPE to the last axis of `x`, [..., d].

    Parameters
    ----------
    cos, sin
        [..., d / 2], one per pair of dimensions.
    interleaved
        Pairs are (0, 1), (2, 3), ... (llama.cpp's NORM type) instead of (0, d/2), (1, d/2 + 1),
        ... (its NEOX type, and transformers). Both hold the same model: rows are permuted.
    """
    x = _f64(x)
    half = x.shape[-1] // 2
    if interleaved:
        a, b = x[..., 0::2], x[..., 1::2]
        turned = np.stack([a * cos - b * sin, b * cos + a * sin], axis=-1)
        return _f64(turned.reshape(x.shape))
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def anchor(
    mean_query: Array,
    k: Array,
    n_tokens: int,
    inv_freq: Array,
    *,
    kind: Literal["cosine", "dot"] = "cosine",
    n_future: int = 512,
    scale: float | None = None,
    interleaved: bool = False,
) -> F64:
    """Alignment of the mean query, moved to future positions, with every cached key.

    Parameters
    ----------
    mean_query
        Mean of the queries *before* RoPE, sinks left out, [..., n_head, d].
    k
        Cached keys after RoPE, [..., n_head_kv, n_cells, d].
    n_tokens
        Tokens seen; the rotation is averaged over the `n_future` positions from here on.
    kind
        Cosine, or dot product times `scale`.
    scale
        None means ``1 / sqrt(d)``.

    Returns
    -------
    [..., n_head, n_cells]
    """
    cos, sin = mean_rope(n_tokens, n_future, inv_freq)
    mu = rotate(mean_query, cos, sin, interleaved=interleaved)  # [.., n_head, d]
    k = _f64(k)
    factor = 1.0
    if kind == "cosine":
        mu, k = _unit(mu), _unit(k)
    else:
        factor = mu.shape[-1] ** -0.5 if scale is None else scale
    dots = _grouped(mu[..., None, :], k.shape[-3]) @ _kv(k).swapaxes(-1, -2)
    return _merge(factor * dots[..., 0, :], per_query_head=True)


def norm(x: Array) -> F64:
    """Euclidean norm over the last axis: [..., n_cells, d] to [..., n_cells]."""
    return _f64(np.sqrt((_f64(x) ** 2).sum(axis=-1)))


def key_cosine(k: Array) -> F64:
    """Cosine of each key with the mean of the unit keys: [..., n, d] to [..., n]."""
    unit = _unit(_f64(k))
    mean = _unit(unit.mean(axis=-2, keepdims=True))
    return _f64((unit * mean).sum(axis=-1))


def capkv_paper_score(
    mean_query: Array,
    k: Array,
    v: Array,
    n_tokens: int,
    inv_freq: Array,
    *,
    tau: float = 5.0,
    n_sinks: int = 4,
    n_future: int = 512,
    noise: float = 1.0,
    epsilon: float = 1e-6,
    interleaved: bool = False,
) -> F64:
    """Score of the published CapKV (arXiv 2604.25975) in kvpress' form, with every detail.

    Differs from the policy only in keeping `epsilon` apart in every query head.

    Parameters
    ----------
    mean_query, k, v
        [..., n_head, d] before RoPE, and [..., n_head_kv, n_cells, d] from the cache.

    Returns
    -------
    [..., n_head_kv, n_cells - n_sinks]
        The sinks have no score: they are outside the sum, and always kept.
    """
    k, v = _f64(k)[..., n_sinks:, :], _f64(v)[..., n_sinks:, :]
    n_head_kv, _, d = v.shape[-3:]
    cosine = anchor(mean_query, k, n_tokens, inv_freq, n_future=n_future, interleaved=interleaved)
    w = np.exp(tau * (cosine - cosine.max(axis=-1, keepdims=True)))  # [.., n_head, n]
    w = w.reshape(*w.shape[:-2], n_head_kv, -1, w.shape[-1])  # [.., H_kv, G, n]
    v = v[..., None, :, :]  # [.., H_kv, 1, n, d]
    a = noise * np.eye(d) + np.swapaxes(v, -1, -2) @ ((w + epsilon)[..., None] * v)
    distance = np.einsum("...nd,...dn->...n", v, np.linalg.solve(a, np.swapaxes(v, -1, -2)))
    return _merge(w * distance, per_query_head=False)


# --- helpers ----------------------------------------------------------------------------------


def _f64(x: Any) -> F64:
    return np.asarray(x, np.float64)


def _unit(x: F64) -> F64:
    return _f64(x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), _TINY))


def _softmax(x: F64) -> F64:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return _f64(e / e.sum(axis=-1, keepdims=True))


def _grouped(q: Array, n_head_kv: int) -> F64:
    """[..., n_head, n_q, d] to [..., n_head_kv, G, n_q, d]."""
    *lead, n_head, n_q, d = q.shape
    return _f64(q).reshape(*lead, n_head_kv, n_head // n_head_kv, n_q, d)


def _kv(k: Array) -> F64:
    """[..., n_head_kv, n, d] to [..., n_head_kv, 1, n, d]."""
    return _f64(k)[..., None, :, :]


def _merge(x: F64, per_query_head: bool) -> F64:
    """[..., n_head_kv, G, n] to [..., n_head, n], or averaged to [..., n_head_kv, n]."""
    if per_query_head:
        return _f64(x.reshape(*x.shape[:-3], -1, x.shape[-1]))
    return _f64(x.mean(axis=-2))
