"""Attention that is added up while decoding, against the float64 reference on the real model.

The reference gets the rows that the cache stores and the queries of the same decodes, as in
test_statistics.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from capkv_local.errors import NativeError
from capkv_local.evaluate import reference
from capkv_local.native import Stat
from tests.model import oracle
from tests.model.capture import Session
from tests.model.test_statistics import Case, as_multiplied, close_attention

STATS = [(Stat.ATTN_MEAN, "mean"), (Stat.ATTN_MAX, "max"), (Stat.ATTN_SQR, "second_moment")]
N_READ = 220
# Longer and shorter than a part that is decoded at once (80); the last ones reuse a graph.
CHUNKS = (130, 30, 1, 30, 30)
KINDS = ("f32", "f16", "q8_0", "f16 ragged", "q8_0 ragged")


@pytest.fixture
def session(request: Any, model_path: Path, tokens: list[int]) -> Iterator[Session]:
    """A cache that has read a text; ragged: of which every head has kept its own number."""
    kind, *evicted = getattr(request, "param", "f16 ragged").split()
    session = Session(model_path, kind, n_window=32)
    session.decode(tokens[:N_READ])
    if evicted:
        rng = np.random.default_rng(11)
        session.kv.evict(oracle.random_mask(rng, session.kv.positions() >= 0))
    yield session
    session.close()


@pytest.mark.parametrize("session", KINDS, indirect=True)
def test_it_is_the_attention_of_the_decodes(session: Session, tokens: list[int]) -> None:
    for stat, reduce in STATS:
        start = session.n_past
        # Tokens before p0 are decoded, and do not count.
        p0 = start + 50
        session.kv.add_attention(stat, p0)
        for n in CHUNKS:
            session.decode(tokens[session.n_past : session.n_past + n])
        k, v = session.cells()
        q = as_multiplied(session.queries(rope=True), session.kind)
        case = Case(session, False, k, v, q, session.kv.positions())
        got = session.kv.attention(case.n_cells)
        session.kv.stop_attention()
        want = expected(case, np.arange(p0, session.n_past), reduce)
        if session.kind == "q8_0":
            close_but_for_steps(got, want)
        else:
            close_attention(got, want, session.kind)
        session.remove(start)


def close_but_for_steps(got: Any, want: Any) -> None:
    """With q8_0, a component on the edge of two steps now and then rounds the other way.

    That moves the logits of its query by 1e-2, of two such components by more (test_statistics).
    """
    got, want = got[want > 0], want[want > 0]
    off = np.abs(got - want) / want
    assert np.median(off) < 1e-4
    assert (off > 3e-2).mean() < 1e-3
    assert off.max() < 0.2


def expected(case: Case, observing: Any, reduce: Any) -> Any:
    def attention(layer: slice, head: slice, heads: slice, cells: slice) -> Any:
        rows = reference.window_attention(
            case.q[layer, heads, observing],
            case.k[layer, head, cells],
            observing,
            case.held[layer, head, cells],
            case.k.shape[-1] ** -0.5,
            reduce,
            reduce == "max",
        )
        return rows.max(axis=1, keepdims=True) if reduce == "max" else rows * len(observing)

    return case.by_head(case.n_cells, case.session.info.n_head_kv, attention)


def test_it_goes_on_until_it_is_stopped(session: Session, tokens: list[int]) -> None:
    kv, n = session.kv, session.n_past
    kv.add_attention(Stat.ATTN_SQR, n)
    session.decode(tokens[n : n + 20])
    once = kv.attention(kv.positions().shape[-1] - 20)
    session.remove(n)
    kv.add_attention(Stat.ATTN_SQR, n)  # the same: goes on
    session.decode(tokens[n : n + 20])
    twice = kv.attention(once.shape[-1])
    np.testing.assert_array_equal(twice, once + once)
    kv.add_attention(Stat.ATTN_MEAN, n)  # another: from the beginning
    assert not kv.attention(once.shape[-1]).any()
    kv.stop_attention()
    with pytest.raises(NativeError, match="not observed"):
        kv.attention(1)
    n_bytes = kv.info().n_bytes_observe
    kv.add_attention(Stat.ATTN_SQR, 0)
    assert kv.info().n_bytes_observe > n_bytes
    kv.stop_attention()
    assert kv.info().n_bytes_observe == n_bytes


def test_meanwhile_no_query_is_observed(session: Session, tokens: list[int]) -> None:
    kv, n = session.kv, session.n_past
    n_cells = kv.positions().shape[-1]

    def observed() -> list[Any]:
        asked = (Stat.ATTN_SQR, {}), (Stat.ANCHOR_DOT, {"n_future": 16})
        return [kv.score(stat, n_cells=n_cells, **more) for stat, more in asked]

    before = observed()
    kv.add_attention(Stat.ATTN_SQR, n)
    session.decode(tokens[n : n + 40])
    session.remove(n)
    kv.stop_attention()
    for one, other in zip(before, observed(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_what_moves_rows_ends_it(session: Session, tokens: list[int]) -> None:
    kv, n = session.kv, session.n_past
    kv.add_attention(Stat.ATTN_SQR, n)
    session.decode(tokens[n : n + 20])
    kv.evict(oracle.random_mask(np.random.default_rng(3), kv.positions() >= 0))
    with pytest.raises(NativeError, match="not observed"):
        kv.attention(1)
    session.decode(tokens[n + 20 : n + 40])  # as if it had never begun
    kv.add_attention(Stat.ATTN_SQR, n + 40)
    session.decode(tokens[n + 40 : n + 60])
    assert kv.attention(kv.positions().shape[-1]).any()
    kv.stop_attention()


def test_arguments_are_checked(session: Session) -> None:
    kv = session.kv
    with pytest.raises(NativeError):
        kv.add_attention(Stat.KEY_NORM, 0)
    with pytest.raises(NativeError, match="not observed"):
        kv.attention(1)
    kv.add_attention(Stat.ATTN_MEAN, 0)
    for n_cells in (0, 1 << 20):
        with pytest.raises(NativeError):
            kv.attention(n_cells)
    kv.stop_attention()
    kv.stop_attention()  # nothing to stop
