"""What ``ggml_leverage_score`` does wherever it runs: each backend's tests inherit this."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pytest
from hypothesis import strategies as st

from . import ggml
from .ggml import CACHE_TYPES, F32
from .leverage import check, expected, random_cache, random_weights


class Op(Protocol):
    """The operator on one backend; :func:`ggml.leverage_score` says what it takes."""

    @property
    def leverage_score(self) -> Callable[..., F32]: ...


class LeverageContract:
    """Views, weights and corner cases; the fixture ``op`` is the operator on a backend."""

    @pytest.mark.parametrize(("n_head_kv", "group"), [(1, 1), (3, 1), (3, 3), (2, 8), (1, 40)])
    @pytest.mark.parametrize("n_kv", [5, 300])
    def test_query_heads_are_averaged(self, op: Op, n_head_kv: int, group: int, n_kv: int) -> None:
        cache = random_cache(4, n_kv, n_head_kv, 64, "Q8_0")
        w = random_weights(5, n_head_kv * group, n_kv)
        got = op.leverage_score(cache, "Q8_0", 64, weights=w, scale=3.0, noise=0.5)
        check(got, *expected(ggml.dequantize(cache, "Q8_0"), w, 3.0, 0.5))

    @pytest.mark.parametrize("kind", CACHE_TYPES)
    def test_a_view_reads_nothing_beside_itself(self, op: Op, kind: str) -> None:
        check_view(op.leverage_score, kind)

    def test_no_weights_means_ones(self, op: Op) -> None:
        cache = random_cache(15, 200, 2, 64, "F16")
        ones = np.ones((2, 200), np.float32)
        np.testing.assert_array_equal(
            op.leverage_score(cache, "F16", 64, scale=0.3),
            op.leverage_score(cache, "F16", 64, scale=0.3, weights=ones),
        )

    def test_negative_and_nan_weights_count_as_zero(self, op: Op) -> None:
        cache = random_cache(16, 300, 2, 64, "F16")
        w = random_weights(17, 2, 300)
        bad = w.copy()
        bad[:, ::3], w[:, ::3] = -1.0, 0.0
        bad[:, 1::3], w[:, 1::3] = np.nan, 0.0
        bad[:, 5], w[:, 5] = -np.inf, 0.0
        got = op.leverage_score(cache, "F16", 64, weights=bad)
        np.testing.assert_array_equal(got, op.leverage_score(cache, "F16", 64, weights=w))
        assert not got[w == 0].any()

    @pytest.mark.parametrize("noise", [0.0, 1.0])
    def test_zero_weights_give_zero(self, op: Op, noise: float) -> None:
        cache = random_cache(18, 150, 2, 64, "F16")
        w = np.zeros((2, 150), np.float32)
        assert not op.leverage_score(cache, "F16", 64, weights=w, noise=noise).any()
        assert not op.leverage_score(cache, "F16", 64, scale=0.0, noise=noise).any()

    @pytest.mark.parametrize("d", [64, 128, 256])
    @pytest.mark.parametrize("n_kv", [1, 20, 63])
    def test_fewer_cells_than_dimensions_without_noise(self, op: Op, n_kv: int, d: int) -> None:
        # Each cell is alone in its direction: scores are 1, less the ridge that float32 needs.
        # That shows where a cell is nearly explained by the others (63 random cells in 64
        # dimensions).
        cache = random_cache(19, n_kv, 1, d, "F32")
        got = op.leverage_score(cache, "F32", d, noise=0.0)
        check(got, *expected(ggml.dequantize(cache, "F32"), noise=0.0))
        np.testing.assert_allclose(got, 1.0, atol=1e-2)

    def test_equal_cells_without_noise_share_one_direction(self, op: Op) -> None:
        cache = np.repeat(random_cache(20, 1, 1, 128, "F32"), 50, axis=0)
        got = op.leverage_score(cache, "F32", 128, noise=0.0)
        np.testing.assert_allclose(got, 1 / 50, rtol=1e-4)

    def test_dimensions_without_content_are_left_out(self, op: Op) -> None:
        x = np.random.default_rng(21).standard_normal((200, 1, 64)).astype(np.float32)
        x[:, :, 10:30] = 0
        got = op.leverage_score(ggml.quantize(x, "F32"), "F32", 64, noise=0.0)
        check(got, *expected(x.astype(np.float64), noise=0.0))
        assert got.sum() == pytest.approx(44, rel=1e-4)  # the rank

    def test_outlier_channels_keep_the_noise_of_the_others(self, op: Op) -> None:
        # Keys have channels that are far larger than the rest; noise must not be raised for those.
        x = np.random.default_rng(22).standard_normal((400, 1, 64)).astype(np.float32)
        x[:, :, 5] *= 300
        got = op.leverage_score(ggml.quantize(x, "F32"), "F32", 64)
        check(got, *expected(x.astype(np.float64)))

    @pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
    @pytest.mark.parametrize("noise", [0.0, 1.0])
    def test_never_nan(self, op: Op, value: float, noise: float) -> None:
        x = np.random.default_rng(23).standard_normal((200, 2, 64)).astype(np.float32)
        x[17, 0, 3] = value
        got = op.leverage_score(ggml.quantize(x, "F32"), "F32", 64, noise=noise)
        assert np.isfinite(got).all()
        check(got[1:], *expected(x[:, 1:].astype(np.float64), noise=noise))  # the other head: right

    @pytest.mark.parametrize("noise", [0.0, 1.0])
    @pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e6, 1e30])
    def test_extreme_scales(self, op: Op, scale: float, noise: float) -> None:
        cache = random_cache(24, 200, 1, 64, "F16")
        got = op.leverage_score(cache, "F16", 64, scale=scale, noise=noise)
        want, condition = expected(ggml.dequantize(cache, "F16"), scale=scale, noise=noise)
        np.testing.assert_allclose(got, want, rtol=min(1e-6 + 1e-7 * condition, 1e-2))


def check_view(run: Callable[..., F32], kind: str, **how: Any) -> None:
    """Run on a part of a cache whose other cells hold NaN; ``how`` goes to ``run``."""
    cells, heads = slice(3, 80), slice(1, 3)
    cache = np.full_like(random_cache(8, 90, 4, 64, kind), 0xFF)  # NaN in the float types
    inner = random_cache(9, 77, 2, 64, kind)
    cache[cells, heads] = inner
    w = random_weights(10, 2, 77)
    got = run(cache, kind, 64, weights=w, cells=cells, heads=heads, **how)
    np.testing.assert_array_equal(got, run(inner, kind, 64, weights=w))
    check(got, *expected(ggml.dequantize(inner, kind), w))


@dataclass(frozen=True)
class Case:
    """A random operator: ``before`` cells on either side of the view."""

    kind: str
    d: int
    n_head_kv: int
    group: int  # query heads per KV head; 0: no weights
    n_kv: int
    before: int
    log_scale: float
    noise: float
    seed: int


def cases(*, blocks: int, heads: int) -> st.SearchStrategy[Case]:
    """Heads of at most ``blocks`` times 32 dimensions, ``heads`` KV heads with as many each."""
    return st.builds(
        Case,
        kind=st.sampled_from(CACHE_TYPES),
        d=st.integers(1, blocks).map(lambda n: 32 * n),
        n_head_kv=st.integers(1, heads),
        group=st.integers(0, heads),
        n_kv=st.integers(1, 600),
        before=st.integers(0, 3),
        log_scale=st.floats(-4, 4),
        noise=st.sampled_from([0.0, 1e-3, 1.0, 50.0]),
        seed=st.integers(0, 2**32 - 1),
    )


def check_case(run: Callable[..., F32], case: Case, **how: Any) -> None:
    """Run a case and compare; ``how`` goes to ``run``."""
    n = case.n_kv + 2 * case.before
    cache = random_cache(case.seed, n, case.n_head_kv, case.d, case.kind)
    w = random_weights(case.seed, case.n_head_kv * case.group, case.n_kv) if case.group else None
    options = {
        "weights": w,
        "scale": 10.0**case.log_scale,
        "noise": case.noise,
        "cells": slice(case.before, case.before + case.n_kv),
    }
    got = run(cache, case.kind, case.d, **options, **how)
    u = ggml.dequantize(cache[options["cells"]], case.kind)
    check(got, *expected(u, w, options["scale"], case.noise))
