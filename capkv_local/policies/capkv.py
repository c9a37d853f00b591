"""CapKV with observed relevance: what the last queries look at, no two cells for the same thing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from capkv_local.budget.select import Mask, contested
from capkv_local.policies.base import F32, BasePolicy, KVStats, above_all, pool_cells, register
from capkv_local.policies.base import window_mask as in_window


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

    With a known question, whose tokens lie behind the text, that share is one of cells: s_i, with
    w_i = r_i, says how many a head keeps, and it takes them in turn from two lists, by its own r
    and by that of the heads together. Why not always: docs/evaluation.md, A known question.

    With a probe, every cell has been looked for, and the sums are over all repeated tokens::

        r_i = sum_q a_qi² over all repetitions so far                   (no window, no maximum)
        s_i as above from r and probe_noise, times the weight of the layer: how many a head keeps

    Which ones is another question. A head takes them in turn from three lists, since there are
    three kinds of tokens to come: those for which this head looks something up (r), those for
    which another does (the mean of r over all heads, by token), and those that go on with the
    text (the mean attention of the last queries). What is kept for others the KV heads of a layer
    share: of n, each spends an n-th of the second and third share on it and the rest on its own.

    What an early layer no longer finds, a later one can still look up, but not the other way
    round. So where heads share the cells, the first third of the layers counts for half, the last
    third in full, and those between rise from one to the other.

    Parameters
    ----------
    n_sinks, n_recent
        See :class:`~capkv_local.policies.base.BasePolicy`. Both stay outside the sums: they are
        kept anyway, and the sinks' attention would drown all other. With a probe half of
        `n_recent` is enough: the tail's list takes the others that are wanted.
    n_window
        Last queries observed. 32 keep scoring below 5% of a small model's prefill on a CPU.
    pool
        Odd kernel of the average over neighbouring contested cells; 1 switches it off. 15 keeps
        whole numbers whose first digits were looked at; 7 loses last digits.
    consensus
        Weight of the other heads' relevance; with a known question, cells taken for it, for each
        that a head takes for itself. 0 lets each head judge alone. docs/policies.md has what it
        changes.
    u
        Capacity vectors, ``"value"`` (the direction in which a cell moves the output) or
        ``"key"``, of length 1.
    noise
        Variance of the noise, in units of a squared attention. docs/policies.md has the numbers
        behind the defaults.
    probe_own, probe_consensus, probe_tail
        With a probe, shares of the cells that are chosen by the head's own relevance, by that of
        all heads and by the tail's attention, where a layer has one KV head; they are divided by
        their sum.
    probe_pool, probe_noise
        With a probe, the pool of what all heads find relevant, and the noise, in units of a summed
        squared attention. Chosen on two models, see docs/evaluation.md.
    probe_early
        With a probe, the weight of the first third of the layers; 1 makes all layers equal.

    Notes
    -----
    Departures from the paper: observed attention instead of one mean query, second moments, the
    consensus of the heads, values of length 1, one capacity matrix per KV head instead of per
    query head.

    Streaming: a survivor's relevance is the largest it ever had, since a passage that some past
    window needed is not worthless because the present one looks elsewhere. Cells inside the
    window are looked at by their own neighbours and would keep that as fame: they are carried
    only once a later window has judged them. With a probe, survivors add what every repetition
    finds in them to what they had.
    """

    name: ClassVar[str] = "capkv"
    needs: ClassVar[frozenset[str]] = frozenset({"queries"})
    allocation: ClassVar[str] = "global"

    n_window: int = 32
    pool: int = 15
    consensus: float = 1.0
    u: Literal["value", "key"] = "value"
    noise: float = 0.01
    probe_own: float = 0.45
    probe_consensus: float = 0.35
    probe_tail: float = 0.2
    probe_pool: int = 3
    probe_noise: float = 1.0
    probe_early: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("pool", "probe_pool"):
            pool = getattr(self, name)
            self._require(name, pool >= 1 and pool % 2 == 1, "odd and 1 or more")
        for name in ("consensus", "probe_own", "probe_consensus", "probe_tail"):
            self._require(name, 0 <= getattr(self, name) < np.inf, "finite and 0 or more")
        self._require(
            "probe_own",
            self.probe_own + self.probe_consensus + self.probe_tail > 0,
            "above 0 if the other two are 0",
        )
        for name in ("noise", "probe_noise"):
            self._require(name, 0 < getattr(self, name) < np.inf, "finite and above 0")
        self._require("probe_early", 0 < self.probe_early <= 1, "above 0 and at most 1")
        self._require("u", self.u in ("value", "key"), "'value' or 'key'")

    @property
    def n_recent_probed(self) -> int:
        return (self.n_recent + 1) // 2

    def score(self, stats: KVStats) -> F32:
        """Capacity, sinks and recent above all; hands the relevance on to the next round."""
        held = stats.positions >= 0
        repeated = stats.probe_attention(reduce="second_moment")
        n_last = self.n_recent if repeated is None else self.n_recent_probed
        open_ = contested(held, n_sinks=self.n_sinks, n_recent=n_last)
        if repeated is None:
            score = self._from_window(stats, open_)
        else:
            if stats.carried is not None:
                repeated = repeated + stats.carried
            score = self._from_probe(stats, open_, repeated)
        return above_all(score, held & ~open_)

    # All go layer by layer: what all layers have at once decides, beside the cells, what budget
    # fits into memory (capkv_local/plan/planner.py counts it).

    def _from_window(self, stats: KVStats, open_: Mask) -> F32:
        relevance = self._relevance(stats, open_)  # [n_layer, n_head_kv, n_cells]
        window = in_window(stats)
        stats.carry(np.where(window, np.float32(0), relevance))
        if stats.n_queries > 0 and not window.any():  # of a question: no cell holds its tokens
            return self._from_question(stats, open_, relevance)
        others = _consensus(stats.positions, relevance)
        others *= self.consensus
        relevance += others
        del others
        return self._capacity(stats, lambda layer: relevance[layer], self.noise)

    def _from_question(self, stats: KVStats, open_: Mask, relevance: F32) -> F32:
        capacity = self._capacity(stats, lambda layer: relevance[layer], self.noise)
        others = _consensus(stats.positions, relevance)
        for layer, mask in enumerate(open_):
            lists = relevance[layer], others[layer]
            capacity[layer] = _given_in_turn(capacity[layer], lists, (1.0, self.consensus), mask)
        return capacity

    def _from_probe(self, stats: KVStats, open_: Mask, repeated: F32) -> F32:
        stats.carry(repeated)

        def own(layer: int) -> F32:
            return np.where(open_[layer], repeated[layer], np.float32(0))

        capacity = self._capacity(stats, own, self.probe_noise)
        shares = self._shares(open_.shape[1])
        tail = stats.window_attention(reduce="mean")
        by_token = _sum_by_token(stats.positions, own)
        for layer, mask in enumerate(open_):
            shared = _mean_over_heads(by_token, stats.positions[layer], mask.shape[0] * len(open_))
            lists = (
                own(layer),
                _pooled(shared, mask, self.probe_pool),
                _pooled(tail[layer], mask, self.pool),
            )
            capacity[layer] = _given_in_turn(capacity[layer], lists, shares, mask)
            capacity[layer] *= _depth_weight(layer, len(open_), self.probe_early)
        return capacity

    def _shares(self, n_head_kv: int) -> tuple[float, float, float]:
        """Of a head's cells: by its own relevance, by that of all heads, by the tail's attention.

        Examples
        --------
        >>> [round(share, 3) for share in CapKV()._shares(5)]
        [0.89, 0.07, 0.04]
        """
        total = self.probe_own + self.probe_consensus + self.probe_tail
        others = self.probe_consensus / n_head_kv, self.probe_tail / n_head_kv
        return total - sum(others), *others

    def _capacity(self, stats: KVStats, relevance: Callable[[int], F32], noise: float) -> F32:
        """Leverage of vectors of length 1 under the weights that each layer is given."""
        norm = stats.value_norm() if self.u == "value" else stats.key_norm()
        weights = np.empty(norm.shape, np.float32)
        for layer, length in enumerate(norm):
            square = length.astype(np.float64) ** 2
            # Vectors of length 1 are a matter of the weights; a vector of 0 has no direction.
            weight = np.divide(
                relevance(layer), square, out=np.zeros_like(square), where=square > 0
            )
            # Leverage depends on weight / noise alone.
            weights[layer] = weight / noise
        del norm, length  # a view of it
        return stats.leverage(self.u, weights, noise=1.0)

    def _relevance(self, stats: KVStats, open_: Mask) -> F32:
        """Pooled second moment or what was carried, whichever is larger; 0 outside `open_`."""
        attention = stats.window_attention(reduce="second_moment")
        relevance = np.empty(open_.shape, np.float32)
        for layer, mask in enumerate(open_):
            relevance[layer] = _pooled(attention[layer], mask, self.pool)
            if stats.carried is not None:
                carried = np.where(mask, stats.carried[layer], np.float32(0))
                np.maximum(relevance[layer], carried, out=relevance[layer])
        return relevance


def _pooled(x: F32, open_: Mask, kernel: int) -> F32:
    """Average over neighbouring contested cells of one layer, 0 outside them."""
    if (open_ == open_[:1]).all():  # the usual case, and much less to pool
        open_ = open_[:1]
    weight = open_.astype(np.float32)
    # Near the ends the pool sees fewer contested cells: average over those alone.
    share = np.maximum(pool_cells(weight, kernel), np.float32(1.0 / kernel))
    return np.asarray(pool_cells(x * weight, kernel) / share * weight, np.float32)


def _sum_by_token(
    positions: NDArray[np.int32], values: Callable[[int], NDArray[np.floating[Any]]]
) -> NDArray[np.float64]:
    """Sum over all heads of what the token at each position has, behind one entry for none.

    ``values`` gives those of a layer, [n_head_kv, n_cells].
    """
    by_token = np.zeros(int(positions.max(initial=-1)) + 2)
    for layer, where in enumerate(positions):
        for head, row in zip(where, values(layer), strict=True):
            held = head >= 0  # a head holds a token once
            by_token[head[held] + 1] += row[held]
    return by_token


def _mean_over_heads(
    by_token: NDArray[np.float64], positions: NDArray[np.int32], n_heads: int
) -> F32:
    """Mean of what the token in each cell of a layer has; 0 where a head gave it up."""
    return np.asarray(by_token[positions + 1] / n_heads, np.float32)


def _depth_weight(layer: int, n_layer: int, early: float) -> float:
    """Weight of a layer: ``early`` in the first third, 1 in the last, a line in between.

    Examples
    --------
    >>> [_depth_weight(layer, 12, 0.5) for layer in (0, 3, 5, 7, 11)]
    [0.5, 0.5, 0.75, 1.0, 1.0]
    """
    depth = (layer + 1) / n_layer
    return float(np.interp(depth, (1 / 3, 2 / 3), (early, 1.0)))


def _in_turn(lists: Sequence[F32], shares: Sequence[float], open_: Mask) -> NDArray[np.float64]:
    """A score that takes the contested cells from several lists in turn, each in its own order.

    However many cells a head keeps, the best ``share`` of them of each list are among them.

    Parameters
    ----------
    lists
        Each [..., n_cells], higher means earlier.
    shares
        One per list, not negative, their sum above 0.

    Examples
    --------
    >>> a, b = np.array([[[4.0, 3.0, 2.0, 1.0]]]), np.array([[[1.0, 2.0, 3.0, 4.0]]])
    >>> _in_turn((a, b), (0.7, 0.3), np.ones((1, 1, 4), bool)).argsort()[..., ::-1].tolist()
    [[[0, 1, 3, 2]]]
    """
    when = np.full(open_.shape, np.inf)
    total = sum(shares)
    for values, share in zip(lists, shares, strict=True):
        if share > 0:
            first = np.where(open_, -values, np.inf).argsort(axis=-1, kind="stable")
            place = np.empty(open_.shape)
            np.put_along_axis(place, first, np.arange(1.0, 1.0 + open_.shape[-1]), axis=-1)
            np.minimum(when, place * (total / share), out=when)
    return -when


def _given_in_turn(values: F32, lists: Sequence[F32], shares: Sequence[float], open_: Mask) -> F32:
    """The contested `values` of each head, the largest to what :func:`_in_turn` takes first."""
    return _in_order_of(_in_turn(lists, shares, open_), values, open_)


def _in_order_of(order: NDArray[np.floating[Any]], values: F32, open_: Mask) -> F32:
    """The contested `values` of each head, given out again in the order of `order`.

    Examples
    --------
    >>> order, values = np.array([[[1.0, 3.0, 2.0]]]), np.array([[[7.0, 8.0, 9.0]]])
    >>> _in_order_of(order, values, np.ones((1, 1, 3), bool)).tolist()
    [[[7.0, 9.0, 8.0]]]
    """
    first = np.where(open_, order, -np.inf).argsort(axis=-1, kind="stable")
    out = np.zeros(values.shape, np.float32)
    np.put_along_axis(out, first, np.sort(np.where(open_, values, -np.inf), axis=-1), axis=-1)
    return np.where(open_, out, np.float32(0))


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
    least = np.finfo(np.float64).tiny

    def share(layer: int) -> NDArray[np.float64]:
        return np.asarray(relevance[layer] / np.maximum(total[layer], least))

    by_token = _sum_by_token(positions, share)
    out = np.empty(relevance.shape, np.float32)
    n_heads = relevance.shape[0] * relevance.shape[1]
    for layer, where in enumerate(positions):
        out[layer] = _mean_over_heads(by_token, where, n_heads) * total[layer]
    return out
