"""The float64 reference of ``ggml_leverage_score``, and the inputs that its tests share."""

from __future__ import annotations

import numpy as np

from . import ggml
from .ggml import F32, F64, U8

RIDGE = 1e-5
"""The op's rule: dimension k gets max(noise, RIDGE * sum_j w_j u_jk^2)."""


class KernelError(Exception):
    """A kernel, or the host code around it, did what would be undefined on a GPU."""


def expected(
    u: F64, weights: F32 | None = None, scale: float = 1.0, noise: float = 1.0
) -> tuple[F64, float]:
    """Scores [n_head_kv, n_kv] of u [n_kv, n_head_kv, d], and the largest condition number."""
    n_kv, n_head_kv, _ = u.shape
    if weights is None:
        weights = np.ones((n_head_kv, n_kv), np.float32)
    w = (np.float32(scale) * weights).astype(np.float64)
    w = np.where(w > 0, w, 0)
    group = len(w) // n_head_kv
    scores, worst = np.zeros((n_head_kv, n_kv)), 1.0
    for head, w_head in enumerate(w):
        x = u[:, head // group]
        gram = (w_head * x.T) @ x
        a = gram + np.diag(np.maximum(noise, RIDGE * gram.diagonal()))
        alive = a.diagonal() > 0  # a dimension without weight and noise is left out
        if not alive.any():
            continue
        a, x = a[np.ix_(alive, alive)], x[:, alive]
        scores[head // group] += w_head * np.einsum("nd,dn->n", x, np.linalg.solve(a, x.T)) / group
        root = np.sqrt(a.diagonal())
        eigenvalues = np.linalg.eigvalsh(a / np.outer(root, root))
        worst = max(worst, float(eigenvalues[-1] / max(eigenvalues[0], 1e-16)))
    return scores, worst


def check(got: F32, want: F64, condition: float) -> None:
    """The op sums the Gram matrix in float32 and does the rest of the matrix work in float64.

    A float32 rounding is 6e-8. Errors of a few of them in the Gram matrix (scaled to a unit
    diagonal) reach the scores multiplied by at most its condition number; measured, it is half
    of the 1e-7 allowed here. The ridge rule keeps the condition below 1e7, where the measured
    error is 5e-3, so that the tolerance need not grow beyond 1e-2. The final product and norm in
    float32 have the 1e-6 to themselves. All of that is relative; the absolute part is for scores
    that are nearly zero because two large terms cancel.
    """
    tolerance = min(1e-6 + 1e-7 * condition, 1e-2)
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance / 10)
    assert got.min() >= 0
    assert got.max() <= 1 + 1e-5  # never above 1 but for rounding


def random_cache(seed: int, n: int, n_head_kv: int, d: int, kind: str) -> U8:
    rng = np.random.default_rng(seed)
    return ggml.quantize(rng.standard_normal((n, n_head_kv, d)).astype(np.float32), kind)


def random_weights(seed: int, n_head: int, n: int) -> F32:
    """Like attention: most are small, a tenth is zero."""
    rng = np.random.default_rng(seed)
    w = rng.exponential(size=(n_head, n)) ** 2 * (rng.random((n_head, n)) > 0.1)
    return w.astype(np.float32)
