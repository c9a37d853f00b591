"""CapKV with observed relevance: what the last queries look at, no two cells for the same thing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from capkv_local.policies.base import F32, BasePolicy, KVStats, above_all, pool_cells, register
from capkv_local.policies.base import window_mask as in_window
from capkv_local.select import contested


@register
@dataclass(frozen=True)
class CapKV(BasePolicy):
    """Capacity of each cell under the attention that was observed; the default.

    Source: the capacity score of CapKV (arXiv 2604.25975) with another relevance. Per KV head,
    over the contested cells (all but sinks and recent window)::

        r_i = max(pool_j(E[a_j²]), carried_i)          a: attention of the last n_window queries
        w_i = r_i + consensus * R * mean over all heads h of (r_h,i / R_h),    R_h = sum_j r_h,j
        s_i = w_i u_i' (noise I + sum_j w_j u_j u_j')^-1 u_i,   u_i = v_i / ||v_i||

    The output ``sum_i a_i v_i`` for a random query has the signal covariance
    ``sum_i E[a_i²] v_i v_i'``, so the second moment is the weight that the linear-Gaussian model
    itself asks for, averaged over queries and the query heads of the KV head. A large `noise`
    ranks by relevance alone; a small one by diversity.

    The noise is the same for all heads. Giving up cell i costs a head ``-log(1 - s_i) / 2`` nats
    of capacity, and capacities of heads add up: so scores compare across heads and layers, and
    one comparison over all of them decides how many cells each keeps (``allocation``).

    A head cannot see beforehand which cells it will need: those that copy a number look at its
    digits only while it is being copied. So every head also gets a share of what the heads
    together find relevant, token by token.

    Parameters
    ----------
    n_sinks, n_recent
        See :class:`~capkv_local.policies.base.BasePolicy`. Both stay outside the sums: they are
        kept anyway, and the sinks' attention would drown all other.
    n_window
        Last queries observed. 32 keep scoring below 5% of a small model's prefill on a CPU.
    pool
        Odd kernel of the average over neighbouring contested cells; 1 switches it off. 15 keeps
        whole numbers whose first digits were looked at; 7 loses last digits.
    consensus
        Weight of the other heads' relevance; 0 lets each head judge alone. docs/policies.md has
        what it changes.
    u
        Capacity vectors, ``"value"`` (the direction in which a cell moves the output) or
        ``"key"``, of length 1.
    noise
        Variance of the noise, in units of a squared attention. docs/policies.md has the numbers
        behind the defaults.

    Notes
    -----
    Departures from the paper: observed attention instead of one mean query, second moments, the
    consensus of the heads, values of length 1, one capacity matrix per KV head instead of per
    query head.

    Streaming: a survivor's relevance is the largest it ever had, since a passage that some past
    window needed is not worthless because the present one looks elsewhere. Cells inside the
    window are looked at by their own neighbours and would keep that as fame: they are carried
    only once a later window has judged them.
    """

    name: ClassVar[str] = "capkv"
    needs: ClassVar[frozenset[str]] = frozenset({"queries"})
    allocation: ClassVar[str] = "global"

    n_window: int = 32
    pool: int = 15
    consensus: float = 1.0
    u: Literal["value", "key"] = "value"
    noise: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("pool", self.pool >= 1 and self.pool % 2 == 1, "odd and 1 or more")
        self._require("consensus", 0 <= self.consensus < np.inf, "finite and 0 or more")
        self._require("u", self.u in ("value", "key"), "'value' or 'key'")
        self._require("noise", 0 < self.noise < np.inf, "finite and above 0")

    def score(self, stats: KVStats) -> F32:
        """Capacity, sinks and recent above all; hands the relevance on to the next round."""
        held = stats.positions >= 0
        open_ = contested(held, n_sinks=self.n_sinks, n_recent=self.n_recent)
        relevance = self._relevance(stats, open_)  # [n_layer, n_head_kv, n_cells]
        stats.carry(np.where(in_window(stats), np.float32(0), relevance))
        relevance = relevance + self.consensus * _consensus(stats.positions, relevance)
        norm = stats.value_norm() if self.u == "value" else stats.key_norm()
        square = norm.astype(np.float64) ** 2
        # Vectors of length 1 are a matter of the weights; a vector of 0 has no direction.
        weights = np.divide(relevance, square, out=np.zeros_like(square), where=square > 0)
        # Leverage depends on weight / noise alone.
        score = stats.leverage(self.u, (weights / self.noise).astype(np.float32), noise=1.0)
        return above_all(score, held & ~open_)

    def _relevance(self, stats: KVStats, open_: NDArray[np.bool_]) -> F32:
        """Pooled second moment or what was carried, whichever is larger; 0 outside `open_`."""
        attention = stats.window_attention(reduce="second_moment")
        if (open_ == open_[:1, :1]).all():  # the usual case, and much less to pool
            open_ = open_[:1, :1]
        weight = open_.astype(np.float32)
        pooled = pool_cells(attention * weight, self.pool)
        # Near the ends the pool sees fewer contested cells: average over those alone.
        share = np.maximum(pool_cells(weight, self.pool), np.float32(1.0 / self.pool))
        relevance = pooled / share
        if stats.carried is not None:
            relevance = np.maximum(relevance, stats.carried)
        return np.asarray(relevance * weight, np.float32)


def _consensus(positions: NDArray[np.int32], relevance: F32) -> F32:
    """What the heads together think of the token in each cell, on each head's own scale.

    Parameters
    ----------
    positions, relevance
        [n_layer, n_head_kv, n_cells]

    Returns
    -------
    float32 [n_layer, n_head_kv, n_cells]
        Mean over all heads of the share that the token has of a head's relevance, times the
        relevance of the head; a head that gave the token up counts as 0.
    """
    total = relevance.sum(axis=-1, keepdims=True, dtype=np.float64)
    share = relevance / np.maximum(total, np.finfo(np.float64).tiny)
    # Cells that a head does not hold have position -1 and relevance 0.
    by_token = np.bincount(positions.ravel() + 1, weights=share.ravel())
    n_heads = positions.shape[0] * positions.shape[1]
    return np.asarray(by_token[positions + 1] / n_heads * total, np.float32)
