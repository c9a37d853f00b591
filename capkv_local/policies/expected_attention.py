"""Expected Attention: what a typical future query would attend to."""

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
class ExpectedAttention(BasePolicy):
    """Keep what the mean query, moved to future positions, attends to.

    Source: "Expected Attention", arXiv 2510.00636, in the form that kvpress 0.5.5 computes with
    ``ExpectedAttentionPress(use_covariance=False)``. Per query head, over the cells behind the
    sinks, averaged over the query heads of a KV head::

        s_i = (softmax_i(mu' k_i / sqrt(d)) + epsilon) ||v_i||

    with ``mu`` as in ``capkv-paper``.

    Parameters
    ----------
    n_sinks, n_recent, n_window
        See :class:`~capkv_local.policies.base.BasePolicy`; no window is observed.
    n_future
        Positions that the rotation of the mean query is averaged over.
    value_norm
        Multiply by the norm of the value.
    epsilon
        Added to the expected attention before that.

    Notes
    -----
    Departure from the paper: **mean only**. The paper adds ``k' cov(q) k / 2d`` to the logit; the
    covariance of the queries is not observed (``d`` numbers per head become ``d²``), so this
    policy cannot be the paper's and says so. Models with another attention scale than
    ``1 / sqrt(d)`` use their own.
    """

    name: ClassVar[str] = "expected-attention"
    needs: ClassVar[frozenset[str]] = frozenset({"mean_query"})

    n_future: int = 512
    value_norm: bool = True
    epsilon: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("n_future", self.n_future >= 1, "1 or more")
        self._require("epsilon", 0 <= self.epsilon < np.inf, "finite and 0 or more")

    def score(self, stats: KVStats) -> F32:
        """Expected attention times value norm, sinks above all; [n_layer, n_head_kv, n_cells]."""
        if stats.n_cells <= self.n_sinks:
            return np.ones((stats.n_layer, stats.n_head_kv, stats.n_cells), np.float32)
        logits = stats.anchor(kind="dot", n_future=self.n_future).astype(np.float64)
        held = stats.positions >= 0
        behind = contested(held, n_sinks=self.n_sinks, n_recent=0)
        behind_heads = np.repeat(behind, stats.n_head // stats.n_head_kv, axis=1)
        attention = exp_below_peak(logits, behind_heads)
        attention /= attention.sum(axis=-1, keepdims=True)  # [n_layer, n_head, n_cells]
        score = group_mean(attention, stats.n_head_kv) + self.epsilon
        if self.value_norm:
            score = score * stats.value_norm()
        return above_all(score, held & ~behind)
