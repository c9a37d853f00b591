"""The Metal kernel of ``ggml_leverage_score`` against float64, with the host code that runs it.

Kernels run on the CPU (``metal/``). The tolerance is that of the CPU's op (``check``): here all
matrix work is in float32, which costs a few roundings of the unit diagonal more.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from . import ggml, metal
from .ggml import CACHE_TYPES, F32
from .metal import ORDERS, Metal, Order
from .test_leverage_op import check, expected, random_cache, random_weights


@pytest.fixture(scope="module")
def backend() -> Metal:
    try:
        return metal.backend()
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("n_kv", [1, 7, 77, 513])
@pytest.mark.parametrize("d", [32, 64, 128, 256])
@pytest.mark.parametrize("kind", CACHE_TYPES)
def test_types_and_shapes(backend: Metal, kind: str, d: int, n_kv: int) -> None:
    cache = random_cache(1, n_kv, 2, d, kind)
    w = random_weights(2, 4, n_kv)
    got = backend.leverage_score(cache, kind, d, weights=w)
    check(got, *expected(ggml.dequantize(cache, kind), w))


@pytest.mark.parametrize("d", [4, 8, 40, 72, 80, 96, 100, 112, 160, 192, 200, 224, 252])
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_head_sizes_beside_the_usual_ones(backend: Metal, kind: str, d: int) -> None:
    cache = random_cache(3, 130, 2, d, kind)
    got = backend.leverage_score(cache, kind, d)
    check(got, *expected(ggml.dequantize(cache, kind)))


@pytest.mark.parametrize(("n_head_kv", "group"), [(1, 1), (3, 1), (3, 3), (2, 8), (1, 40)])
@pytest.mark.parametrize("n_kv", [5, 300])
def test_query_heads_are_averaged(backend: Metal, n_head_kv: int, group: int, n_kv: int) -> None:
    cache = random_cache(4, n_kv, n_head_kv, 64, "Q8_0")
    w = random_weights(5, n_head_kv * group, n_kv)
    got = backend.leverage_score(cache, "Q8_0", 64, weights=w, scale=3.0, noise=0.5)
    check(got, *expected(ggml.dequantize(cache, "Q8_0"), w, 3.0, 0.5))


# 256 cells are summed on their own, 64 are scored at once; the number of blocks of cells follows
# from the length, up to 8.
@pytest.mark.parametrize(
    "n_kv", [31, 32, 33, 63, 64, 65, 255, 256, 257, 511, 769, 2047, 2305, 9001]
)
@pytest.mark.parametrize("kind", ["F16", "Q4_0"])
def test_lengths_around_the_blocks(backend: Metal, kind: str, n_kv: int) -> None:
    cache = random_cache(6, n_kv, 1, 64, kind)
    w = random_weights(7, 2, n_kv)
    got = backend.leverage_score(cache, kind, 64, weights=w)
    check(got, *expected(ggml.dequantize(cache, kind), w))


@pytest.mark.parametrize("kind", CACHE_TYPES)
def test_a_view_reads_nothing_beside_itself(backend: Metal, kind: str) -> None:
    cells, heads = slice(3, 80), slice(1, 3)
    cache = np.full_like(random_cache(8, 90, 4, 64, kind), 0xFF)  # NaN in the float types
    inner = random_cache(9, 77, 2, 64, kind)
    cache[cells, heads] = inner
    w = random_weights(10, 2, 77)
    got = backend.leverage_score(cache, kind, 64, weights=w, cells=cells, heads=heads)
    np.testing.assert_array_equal(got, backend.leverage_score(inner, kind, 64, weights=w))
    check(got, *expected(ggml.dequantize(inner, kind), w))


def test_a_cell_without_weight_may_hold_anything(backend: Metal) -> None:
    cache = random_cache(11, 300, 2, 64, "F16")
    w = random_weights(12, 2, 300)
    w[:, 100:140] = 0
    want = backend.leverage_score(cache, "F16", 64, weights=w)
    cache[100:140] = 0xFF  # NaN
    np.testing.assert_array_equal(backend.leverage_score(cache, "F16", 64, weights=w), want)


def test_no_weights_means_ones(backend: Metal) -> None:
    cache = random_cache(15, 200, 2, 64, "F16")
    ones = np.ones((2, 200), np.float32)
    np.testing.assert_array_equal(
        backend.leverage_score(cache, "F16", 64, scale=0.3),
        backend.leverage_score(cache, "F16", 64, scale=0.3, weights=ones),
    )


def test_negative_and_nan_weights_count_as_zero(backend: Metal) -> None:
    cache = random_cache(16, 300, 2, 64, "F16")
    w = random_weights(17, 2, 300)
    bad = w.copy()
    bad[:, ::3], w[:, ::3] = -1.0, 0.0
    bad[:, 1::3], w[:, 1::3] = np.nan, 0.0
    bad[:, 5], w[:, 5] = -np.inf, 0.0
    got = backend.leverage_score(cache, "F16", 64, weights=bad)
    np.testing.assert_array_equal(got, backend.leverage_score(cache, "F16", 64, weights=w))
    assert not got[w == 0].any()


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_zero_weights_give_zero(backend: Metal, noise: float) -> None:
    cache = random_cache(18, 150, 2, 64, "F16")
    w = np.zeros((2, 150), np.float32)
    assert not backend.leverage_score(cache, "F16", 64, weights=w, noise=noise).any()
    assert not backend.leverage_score(cache, "F16", 64, scale=0.0, noise=noise).any()


@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize("n_kv", [1, 20, 63])
def test_fewer_cells_than_dimensions_without_noise(backend: Metal, n_kv: int, d: int) -> None:
    cache = random_cache(19, n_kv, 1, d, "F32")
    got = backend.leverage_score(cache, "F32", d, noise=0.0)
    check(got, *expected(ggml.dequantize(cache, "F32"), noise=0.0))
    np.testing.assert_allclose(got, 1.0, atol=1e-2)


def test_equal_cells_without_noise_share_one_direction(backend: Metal) -> None:
    cache = np.repeat(random_cache(20, 1, 1, 128, "F32"), 50, axis=0)
    got = backend.leverage_score(cache, "F32", 128, noise=0.0)
    np.testing.assert_allclose(got, 1 / 50, rtol=1e-4)


def test_dimensions_without_content_are_left_out(backend: Metal) -> None:
    x = np.random.default_rng(21).standard_normal((200, 1, 64)).astype(np.float32)
    x[:, :, 10:30] = 0
    got = backend.leverage_score(ggml.quantize(x, "F32"), "F32", 64, noise=0.0)
    check(got, *expected(x.astype(np.float64), noise=0.0))
    assert got.sum() == pytest.approx(44, rel=1e-4)  # the rank


def test_outlier_channels_keep_the_noise_of_the_others(backend: Metal) -> None:
    x = np.random.default_rng(22).standard_normal((400, 1, 64)).astype(np.float32)
    x[:, :, 5] *= 300
    got = backend.leverage_score(ggml.quantize(x, "F32"), "F32", 64)
    check(got, *expected(x.astype(np.float64)))


@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_never_nan(backend: Metal, value: float, noise: float) -> None:
    x = np.random.default_rng(23).standard_normal((200, 2, 64)).astype(np.float32)
    x[17, 0, 3] = value
    got = backend.leverage_score(ggml.quantize(x, "F32"), "F32", 64, noise=noise)
    assert np.isfinite(got).all()
    check(got[1:], *expected(x[:, 1:].astype(np.float64), noise=noise))  # the other head is right


@pytest.mark.parametrize("noise", [0.0, 1.0])
@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e6, 1e30])
def test_extreme_scales(backend: Metal, scale: float, noise: float) -> None:
    cache = random_cache(24, 200, 1, 64, "F16")
    got = backend.leverage_score(cache, "F16", 64, scale=scale, noise=noise)
    want, condition = expected(ggml.dequantize(cache, "F16"), scale=scale, noise=noise)
    np.testing.assert_allclose(got, want, rtol=min(1e-6 + 1e-7 * condition, 1e-2))


@pytest.mark.parametrize("shape", [(64, 3, 3, 700), (96, 1, 2, 300), (256, 1, 2, 513)])
@pytest.mark.parametrize("kind", ["F16", "Q4_0"])
def test_the_order_of_threads_changes_no_bit(
    backend: Metal, kind: str, shape: tuple[int, int, int, int]
) -> None:
    d, n_head_kv, group, n_kv = shape
    cache = random_cache(13, n_kv, n_head_kv, d, kind)
    w = random_weights(14, n_head_kv * group, n_kv)
    first = backend.leverage_score(cache, kind, d, weights=w)
    for order in ORDERS[1:]:
        got = backend.leverage_score(cache, kind, d, weights=w, order=order)
        np.testing.assert_array_equal(got, first)


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(CACHE_TYPES),
    blocks=st.integers(1, 8),
    n_head_kv=st.integers(1, 3),
    group=st.integers(0, 3),
    n_kv=st.integers(1, 600),
    before=st.integers(0, 3),
    log_scale=st.floats(-4, 4),
    noise=st.sampled_from([0.0, 1e-3, 1.0, 50.0]),
    order=st.sampled_from(ORDERS),
    seed=st.integers(0, 2**32 - 1),
)
def test_random_shapes(
    backend: Metal,
    kind: str,
    blocks: int,
    n_head_kv: int,
    group: int,
    n_kv: int,
    before: int,
    log_scale: float,
    noise: float,
    order: Order,
    seed: int,
) -> None:
    d = 32 * blocks
    cache = random_cache(seed, n_kv + 2 * before, n_head_kv, d, kind)
    w: F32 | None = random_weights(seed, n_head_kv * group, n_kv) if group else None
    cells, scale = slice(before, before + n_kv), 10.0**log_scale
    got = backend.leverage_score(
        cache, kind, d, weights=w, scale=scale, noise=noise, cells=cells, order=order
    )
    check(got, *expected(ggml.dequantize(cache[cells], kind), w, scale, noise))
