"""What is done layer by layer, against the same over all layers at once, bit for bit."""

from __future__ import annotations

import dataclasses
import tracemalloc
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from capkv_local.budget import allocate, select
from capkv_local.cache.compact import CompactCache
from capkv_local.native import Stat
from capkv_local.plan import planner
from capkv_local.policies import base, get_policy
from capkv_local.policies.capkv import CapKV, _in_order_of, _in_turn
from tests.golden.array_stats import asked, synthetic

SLOW = settings(max_examples=40)


# --- over all layers at once ------------------------------------------------------------------


def top_cells(scores: Any, among: Any, counts: Any) -> Any:
    n = scores.shape[-1]
    if n == 0:
        return np.zeros(scores.shape, bool)
    masked = np.where(among, scores, -np.inf)
    first = np.minimum(n - counts, n - 1)[..., None]
    cut = np.take_along_axis(np.sort(masked, axis=-1), first, axis=-1)
    above, equal = masked > cut, masked == cut
    missing = counts[..., None] - above.sum(axis=-1, keepdims=True)
    rank_from_end = np.cumsum(equal[..., ::-1], axis=-1)[..., ::-1]
    return above | (equal & (rank_from_end <= missing))


def compete(scores: Any, contested: Any, totals: Any, floor: int) -> Any:
    n_group, n_head, n_cells = scores.shape
    floors = allocate._fill(np.minimum(contested.sum(axis=-1, dtype=np.int64), floor), totals)
    rest = contested & ~top_cells(scores, contested, floors)
    flat = (n_group, n_cells * n_head)
    won = top_cells(
        scores.swapaxes(1, 2).reshape(flat),
        rest.swapaxes(1, 2).reshape(flat),
        totals - floors.sum(axis=-1),
    )
    return floors + won.reshape(n_group, n_cells, n_head).sum(axis=1)


def contested(held: Any, n_sinks: int, n_recent: int) -> Any:
    rank = np.cumsum(held, axis=-1)
    return held & (rank > n_sinks) & (rank <= held.sum(axis=-1, keepdims=True) - n_recent)


def above_all(scores: Any, mask: Any) -> Any:
    out = np.array(scores, np.float32)
    rest = np.where(mask, -np.inf, out).max(axis=(1, 2), keepdims=True)
    top = np.where(np.isfinite(rest), rest, 0.0) + 1.0
    return np.where(mask, top, out).astype(np.float32)


def pooled(x: Any, open_: Any, kernel: int) -> Any:
    weight = open_.astype(np.float32)
    share = np.maximum(base.pool_cells(weight, kernel), np.float32(1.0 / kernel))
    return np.asarray(base.pool_cells(x * weight, kernel) / share * weight, np.float32)


def mean_over_heads(positions: Any, x: Any) -> Any:
    by_token = np.bincount(positions.ravel() + 1, weights=x.ravel())
    return np.asarray(by_token[positions + 1] / (x.shape[0] * x.shape[1]), np.float32)


def consensus(positions: Any, relevance: Any) -> Any:
    total = relevance.sum(axis=-1, keepdims=True, dtype=np.float64)
    share = relevance / np.maximum(total, np.finfo(np.float64).tiny)
    return np.asarray(mean_over_heads(positions, share) * total, np.float32)


class AtOnce(CapKV):
    """The default policy in as few lines as it takes if memory does not matter."""

    name: ClassVar[str] = "at-once"

    def score(self, stats: Any) -> Any:
        held = stats.positions >= 0
        repeated = stats.probe_attention(reduce="second_moment")
        n_last = self.n_recent if repeated is None else (self.n_recent + 1) // 2
        open_ = contested(held, self.n_sinks, n_last)
        carried = stats.carried
        if repeated is None:
            relevance = pooled(stats.window_attention(reduce="second_moment"), open_, self.pool)
            if carried is not None:
                relevance = np.maximum(relevance, np.where(open_, carried, np.float32(0)))
            window = base.window_mask(stats)
            stats.carry(np.where(window, np.float32(0), relevance))
            others = consensus(stats.positions, relevance)
            if not window.any():
                order = _in_turn((relevance, others), (1.0, self.consensus), open_)
                score = _in_order_of(order, self.weighed(stats, relevance, self.noise), open_)
                return above_all(score, held & ~open_)
            relevance = relevance + self.consensus * others
            return above_all(self.weighed(stats, relevance, self.noise), held & ~open_)
        if carried is not None:
            repeated = repeated + carried
        stats.carry(repeated)
        own = np.where(open_, repeated, np.float32(0))
        shared = pooled(mean_over_heads(stats.positions, own), open_, self.probe_pool)
        tail = pooled(stats.window_attention(reduce="mean"), open_, self.pool)
        n_head_kv = open_.shape[1]
        parts = self.probe_own, self.probe_consensus, self.probe_tail
        others = [part / n_head_kv for part in parts[1:]]
        order = _in_turn((own, shared, tail), (sum(parts) - sum(others), *others), open_)
        score = _in_order_of(order, self.weighed(stats, own, self.probe_noise), open_)
        depth = np.arange(1, len(open_) + 1) / len(open_)
        score *= np.interp(depth, (1 / 3, 2 / 3), (self.probe_early, 1))[:, None, None]
        return above_all(score, held & ~open_)

    def weighed(self, stats: Any, relevance: Any, noise: float) -> Any:
        norm = stats.value_norm() if self.u == "value" else stats.key_norm()
        square = norm.astype(np.float64) ** 2
        weights = np.divide(relevance, square, out=np.zeros_like(square), where=square > 0)
        return stats.leverage(self.u, (weights / noise).astype(np.float32), noise=1.0)


# --- the same, bit for bit --------------------------------------------------------------------


@pytest.mark.parametrize("observed", ["tail", "question", "probe"])
@pytest.mark.parametrize("u", ["value", "key"])
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=15)
def test_the_default_policy(u: Any, observed: str, seed: int) -> None:
    stats = synthetic(seed, probed=observed == "probe")
    if observed == "question":
        stats = asked(stats)
    rng = np.random.default_rng(seed)
    absent = np.arange(stats.n_cells) < rng.integers(0, 8, (2, 2))[..., None]
    # A head that holds fewer cells lacks the first ones, and they are 0 in all statistics.
    stats.positions[absent] = -1
    if seed % 3:
        stats.carried = np.where(absent, 0, rng.random(absent.shape)).astype(np.float32)
    settings_ = {"u": u, "n_sinks": seed % 4, "n_recent": 1 + seed % 9, "n_window": 8}
    other = dataclasses.replace(stats)
    got = get_policy("capkv", **settings_).score(_Blind(stats, absent))
    want = AtOnce(**settings_).score(_Blind(other, absent))
    assert np.array_equal(got, want)
    assert got.dtype == want.dtype
    assert np.array_equal(stats.handed, other.handed)


class _Blind:
    """Statistics that are 0 in cells that a head does not hold, as the native ones."""

    def __init__(self, stats: Any, absent: Any) -> None:
        self._stats, self._absent = stats, absent

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._stats, name)
        if name not in ("window_attention", "probe_attention", "key_norm", "value_norm"):
            return value

        def without(**options: Any) -> Any:
            out = value(**options)
            return None if out is None else np.where(self._absent, np.float32(0), out)

        return without


SHAPES = st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(0, 12))
FEW = st.sampled_from([-1.0, -0.0, 0.0, 1.0, 2.0])  # ties
ANY = st.floats(-1024, 1024, width=32)


@st.composite
def cells(draw: st.DrawFn) -> tuple[Any, Any]:
    """Scores and which cells count, [n_layer, n_head_kv, n_cells]."""
    shape = draw(SHAPES)
    scores = draw(hnp.arrays(np.float32, shape, elements=draw(st.sampled_from([FEW, ANY]))))
    return scores, draw(hnp.arrays(np.bool_, shape))


@given(cells(), st.data())
@SLOW
def test_top_cells(case: tuple[Any, Any], data: st.DataObject) -> None:
    scores, among = case
    counts = np.array([data.draw(st.integers(0, int(n))) for n in among.sum(axis=-1).ravel()])
    counts = counts.reshape(scores.shape[:2])
    assert np.array_equal(select.top_cells(scores, among, counts), top_cells(scores, among, counts))


@given(cells(), st.floats(0, 1), st.integers(0, 5))
@SLOW
def test_heads_that_compete(case: tuple[Any, Any], share: float, floor: int) -> None:
    scores, among = case
    totals = (among.sum(axis=(1, 2)) * share).astype(np.int64)
    got = allocate._compete(scores, among, totals, floor)
    assert np.array_equal(got, compete(scores, among, totals, floor))
    assert got.dtype == np.int64


@given(cells(), st.integers(0, 3), st.integers(0, 3))
@SLOW
def test_contested_cells(case: tuple[Any, Any], n_sinks: int, n_recent: int) -> None:
    held = case[1]
    got = select.contested(held, n_sinks=n_sinks, n_recent=n_recent)
    assert np.array_equal(got, contested(held, n_sinks, n_recent))


@given(cells())
@SLOW
def test_above_all(case: tuple[Any, Any]) -> None:
    scores, mask = case
    if scores.size:
        assert np.array_equal(base.above_all(scores, mask), above_all(scores, mask))


# --- what it takes ----------------------------------------------------------------------------


class Cells:
    """Stands for a native cache of random cells; ``n_held`` [n_layer, n_head_kv] of ``n_cells``."""

    def __init__(self, n_held: Any, n_cells: int) -> None:
        self.n_held, self.n_cells = n_held, n_cells
        self.absent = np.arange(n_cells) < n_cells - n_held[..., None]
        self.rng = np.random.default_rng(7)

    def info(self) -> Any:
        n_layer, n_head_kv = self.n_held.shape
        return SimpleNamespace(
            n_layer=n_layer,
            n_head_kv=n_head_kv,
            n_head=4 * n_head_kv,
            n_heads=n_layer * n_head_kv,
            n_rows=int(self.n_held.sum()),
            n_queries=64,
        )

    def observe(self, *_: Any, **__: Any) -> None:
        pass

    def pools(self) -> Any:
        return np.zeros(len(self.n_held), np.int64)

    def positions(self) -> Any:
        out = np.broadcast_to(np.arange(self.n_cells, dtype=np.int32), self.absent.shape).copy()
        out[self.absent] = -1
        return out

    def score(self, stat: Stat, *, n_cells: int, weights: Any = None, **_: Any) -> Any:
        n_layer, n_head_kv = self.n_held.shape
        if stat in (Stat.ANCHOR_COS, Stat.ANCHOR_DOT):
            n_head_kv *= 4
        out = self.rng.random((n_layer, n_head_kv, n_cells), np.float32)
        if out.shape == self.absent.shape:
            out[self.absent] = 0
        return out


@pytest.mark.parametrize("shape", [(32, 2), (1, 64)], ids=["layers", "heads"])
@pytest.mark.parametrize("ragged", [False, True], ids=["even", "ragged"])
@pytest.mark.parametrize(
    ("policy", "probed"),
    [("capkv", False), ("capkv", True), ("snapkv", False), ("kvzip", True), ("capkv-paper", False)],
)
def test_deciding_takes_no_more_than_is_planned(
    policy: str, probed: bool, ragged: bool, shape: tuple[int, int]
) -> None:
    n_cells = 2000
    n_held = np.full(shape, n_cells // 8 if ragged else n_cells)
    n_held[-1, -1] = n_cells
    kv: Any = Cells(n_held, n_cells)
    made = get_policy(policy)

    def decide() -> None:
        cache = CompactCache(kv, made, int(n_held.mean()) // 2, made.allocation, n_probe=64)
        cache.carried = kv.score(Stat.ATTN_SQR, n_cells=n_cells)
        repeat = (lambda reduce: kv.score(Stat.ATTN_SQR, n_cells=n_cells)) if probed else None
        cache.choose(n_tokens=n_cells, n_cells=n_cells, repeat=repeat)

    decide()  # what Python loads only once does not count
    tracemalloc.start()
    try:
        decide()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    planned = n_held.size * planner._BYTES_DECIDING + shape[1] * planner._BYTES_LAYER
    if "mean_query" in made.needs:
        planned += kv.info().n_layer * kv.info().n_head * planner._BYTES_QUERY_HEAD
    assert peak < n_cells * planned
    if policy == "capkv":
        assert peak > n_cells * planned * 0.6  # what is planned is not far from it
