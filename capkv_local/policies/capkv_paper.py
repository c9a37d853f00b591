"""CapKV as published: leverage of the values under weights from one mean query."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from capkv_local.budget.select import contested
from capkv_local.policies.base import (
    F32,
    BasePolicy,
    KVStats,
    above_all,
    exp_below_peak,
    group_mean,
    register,
)


@register
@dataclass(frozen=True)
class CapKVPaper(BasePolicy):
    """The published capacity score, the reference to compare others with.

    Source: "CapKV", arXiv 2604.25975, in the form that kvpress 0.5.5 computes (``CapPress``).
    Per query head, over the cells behind the sinks::

        w_i = exp(tau (cos(mu, k_i) - max_j cos(mu, k_j)))
        A   = noise I + sum_j (w_j + epsilon) v_j v_j'
        s_i = w_i v_i' A^-1 v_i

    with ``mu`` the mean un-rotated query of all tokens behind the sinks, rotated by the RoPE
    averaged over the next `n_future` positions, and ``k_i`` after RoPE. Scores are averaged over
    the query heads of a KV head; sinks are outside the mean, the maximum and the sum.

    Parameters
    ----------
    n_sinks, n_recent, n_window
        See :class:`~capkv_local.policies.base.BasePolicy`; no window is observed.
    tau
        Sharpness of the weights, at least 0; 0 weighs all cells alike.
    n_future
        Positions that the rotation of the mean query is averaged over.
    noise
        Ridge of the capacity matrix, above 0.
    epsilon
        Added to the weights inside the capacity matrix only.

    Notes
    -----
    Departures from the paper, shared with kvpress: cosines instead of plain dot products, the
    shift by the maximum, the averaged RoPE. Departures from kvpress: the last `n_recent` cells
    are kept whatever their score (kvpress keeps only the sinks so), and `epsilon`, which counts
    inside the sum but not in the factor before it, is taken out of that factor after the average
    over query heads instead of before. That is exact where a group's heads agree; on the default
    model it moves a score by 2e-5 of itself at most (median 6e-8), while the rest agrees to 1e-6.
    ``capkv_local.evaluate.reference.capkv_paper_score`` has no such step.

    In streaming, the mean query is of every token seen, evicted ones too.
    """

    name: ClassVar[str] = "capkv-paper"
    needs: ClassVar[frozenset[str]] = frozenset({"mean_query"})

    tau: float = 5.0
    n_future: int = 512
    noise: float = 1.0
    epsilon: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("tau", 0 <= self.tau < np.inf, "finite and 0 or more")
        self._require("n_future", self.n_future >= 1, "1 or more")
        self._require("noise", 0 < self.noise < np.inf, "finite and above 0")
        self._require("epsilon", 0 <= self.epsilon < 1, "0 or more and below 1")

    def score(self, stats: KVStats) -> F32:
        """Published score, sinks above all; float32 [n_layer, n_head_kv, n_cells]."""
        if stats.n_cells <= self.n_sinks:
            return np.ones((stats.n_layer, stats.n_head_kv, stats.n_cells), np.float32)
        cosine = stats.anchor(kind="cosine", n_future=self.n_future)  # [n_layer, n_head, n_cells]
        logits = self.tau * np.clip(cosine.astype(np.float64), -1.0, 1.0)
        held = stats.positions >= 0
        behind = contested(held, n_sinks=self.n_sinks, n_recent=0)
        behind_heads = np.repeat(behind, stats.n_head // stats.n_head_kv, axis=1)
        w = exp_below_peak(logits, behind_heads)  # 0 for sinks and absent cells
        inside = np.where(behind_heads, w + self.epsilon, 0.0).astype(np.float32)
        leverage = stats.leverage("value", inside, self.noise).astype(np.float64)
        mean_w = group_mean(w, stats.n_head_kv)
        # A cell that every head weighs 0 (a large tau underflows) has no relevance at all.
        factor = mean_w / np.maximum(mean_w + self.epsilon, np.finfo(np.float64).tiny)
        return above_all(leverage * factor, held & ~behind)
