"""``ggml_leverage_score`` against float64, over cache types, shapes, weights and corner cases."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from . import ggml
from .ggml import CACHE_TYPES
from .leverage import check, expected, random_cache, random_weights


@pytest.fixture(scope="module", autouse=True)
def _built() -> None:
    try:
        ggml.load()
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("n_kv", [1, 7, 77, 513])
@pytest.mark.parametrize("d", [32, 64, 128, 256])
@pytest.mark.parametrize("kind", CACHE_TYPES)
def test_types_and_shapes(kind: str, d: int, n_kv: int) -> None:
    cache = random_cache(1, n_kv, 2, d, kind)
    w = random_weights(2, 4, n_kv)
    got = ggml.leverage_score(cache, kind, d, weights=w)
    check(got, *expected(ggml.dequantize(cache, kind), w))


@pytest.mark.parametrize("d", [8, 40, 72, 80, 96, 192, 200, 576])
def test_head_sizes_beside_the_usual_ones(d: int) -> None:
    if ggml.ON_GPU and d > ggml.MAX_D_GPU:
        pytest.skip("left to the CPU")
    cache = random_cache(3, 130, 2, d, "F16")
    got = ggml.leverage_score(cache, "F16", d)
    check(got, *expected(ggml.dequantize(cache, "F16")))


@pytest.mark.parametrize(("n_head_kv", "group"), [(1, 1), (3, 1), (3, 3), (2, 8), (1, 40)])
@pytest.mark.parametrize("n_kv", [5, 300])
def test_query_heads_are_averaged(n_head_kv: int, group: int, n_kv: int) -> None:
    cache = random_cache(4, n_kv, n_head_kv, 64, "Q8_0")
    w = random_weights(5, n_head_kv * group, n_kv)
    got = ggml.leverage_score(cache, "Q8_0", 64, weights=w, scale=3.0, noise=0.5)
    check(got, *expected(ggml.dequantize(cache, "Q8_0"), w, 3.0, 0.5))


def test_more_gram_matrices_than_the_work_buffer_holds() -> None:
    # 480 upper triangles of d = 256 do not fit at once: the rounds cut through a group
    cache = random_cache(6, 40, 2, 256, "F16")
    w = random_weights(7, 4, 40)
    got = ggml.leverage_score(cache, "F16", 256, weights=np.repeat(w, 120, axis=0))
    check(got, *expected(ggml.dequantize(cache, "F16"), w))  # a mean of equal terms


@pytest.mark.parametrize("kind", CACHE_TYPES)
def test_a_view_reads_nothing_beside_itself(kind: str) -> None:
    cells, heads = slice(3, 80), slice(1, 3)
    cache = np.full_like(random_cache(8, 90, 4, 64, kind), 0xFF)  # NaN in the float types
    inner = random_cache(9, 77, 2, 64, kind)
    cache[cells, heads] = inner
    w = random_weights(10, 2, 77)
    got = ggml.leverage_score(cache, kind, 64, weights=w, cells=cells, heads=heads)
    np.testing.assert_array_equal(got, ggml.leverage_score(inner, kind, 64, weights=w))
    check(got, *expected(ggml.dequantize(inner, kind), w))


@pytest.mark.parametrize("n_kv", [4096, 30011])
def test_long_caches(n_kv: int) -> None:
    cache = random_cache(11, n_kv, 1, 64, "F16")
    w = random_weights(12, 2, n_kv)
    got = ggml.leverage_score(cache, "F16", 64, weights=w)
    check(got, *expected(ggml.dequantize(cache, "F16"), w))


@pytest.mark.parametrize("shape", [(64, 3, 3, 1536), (128, 2, 1, 700), (256, 1, 4, 513)])
def test_thread_count_changes_no_bit(shape: tuple[int, int, int, int]) -> None:
    d, n_head_kv, group, n_kv = shape
    cache = random_cache(13, n_kv, n_head_kv, d, "Q8_0")
    w = random_weights(14, n_head_kv * group, n_kv)
    one = ggml.leverage_score(cache, "Q8_0", d, weights=w, n_threads=1)
    for n_threads in (2, 3, 5, 8):
        got = ggml.leverage_score(cache, "Q8_0", d, weights=w, n_threads=n_threads)
        np.testing.assert_array_equal(got, one)


def test_no_weights_means_ones() -> None:
    cache = random_cache(15, 200, 2, 64, "F16")
    ones = np.ones((2, 200), np.float32)
    np.testing.assert_array_equal(
        ggml.leverage_score(cache, "F16", 64, scale=0.3),
        ggml.leverage_score(cache, "F16", 64, scale=0.3, weights=ones),
    )


def test_negative_and_nan_weights_count_as_zero() -> None:
    cache = random_cache(16, 300, 2, 64, "F16")
    w = random_weights(17, 2, 300)
    bad = w.copy()
    bad[:, ::3], w[:, ::3] = -1.0, 0.0
    bad[:, 1::3], w[:, 1::3] = np.nan, 0.0
    got = ggml.leverage_score(cache, "F16", 64, weights=bad)
    np.testing.assert_array_equal(got, ggml.leverage_score(cache, "F16", 64, weights=w))
    assert not got[w == 0].any()


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_zero_weights_give_zero(noise: float) -> None:
    cache = random_cache(18, 150, 2, 64, "F16")
    w = np.zeros((2, 150), np.float32)
    assert not ggml.leverage_score(cache, "F16", 64, weights=w, noise=noise).any()
    assert not ggml.leverage_score(cache, "F16", 64, scale=0.0, noise=noise).any()


@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize("n_kv", [1, 20, 63])
def test_fewer_cells_than_dimensions_without_noise(n_kv: int, d: int) -> None:
    # Each cell is alone in its direction: scores are 1, less the ridge that float32 needs. That
    # shows where a cell is nearly explained by the others (63 random cells in 64 dimensions).
    cache = random_cache(19, n_kv, 1, d, "F32")
    got = ggml.leverage_score(cache, "F32", d, noise=0.0)
    check(got, *expected(ggml.dequantize(cache, "F32"), noise=0.0))
    np.testing.assert_allclose(got, 1.0, atol=1e-2)


def test_equal_cells_without_noise_share_one_direction() -> None:
    cache = np.repeat(random_cache(20, 1, 1, 128, "F32"), 50, axis=0)
    got = ggml.leverage_score(cache, "F32", 128, noise=0.0)
    np.testing.assert_allclose(got, 1 / 50, rtol=1e-4)


def test_dimensions_without_content_are_left_out() -> None:
    x = np.random.default_rng(21).standard_normal((200, 1, 64)).astype(np.float32)
    x[:, :, 10:30] = 0
    got = ggml.leverage_score(ggml.quantize(x, "F32"), "F32", 64, noise=0.0)
    check(got, *expected(x.astype(np.float64), noise=0.0))
    assert got.sum() == pytest.approx(44, rel=1e-4)  # the rank


def test_outlier_channels_keep_the_noise_of_the_others() -> None:
    # Keys have channels that are far larger than the rest; noise must not be raised for those.
    x = np.random.default_rng(22).standard_normal((400, 1, 64)).astype(np.float32)
    x[:, :, 5] *= 300
    got = ggml.leverage_score(ggml.quantize(x, "F32"), "F32", 64)
    check(got, *expected(x.astype(np.float64)))


@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_never_nan(value: float, noise: float) -> None:
    x = np.random.default_rng(23).standard_normal((200, 2, 64)).astype(np.float32)
    x[17, 0, 3] = value
    got = ggml.leverage_score(ggml.quantize(x, "F32"), "F32", 64, noise=noise)
    assert np.isfinite(got).all()
    check(got[1:], *expected(x[:, 1:].astype(np.float64), noise=noise))  # the other head is right


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e6, 1e30])
def test_extreme_scales(scale: float) -> None:
    cache = random_cache(24, 200, 1, 64, "F16")
    got = ggml.leverage_score(cache, "F16", 64, scale=scale)
    want, condition = expected(ggml.dequantize(cache, "F16"), scale=scale)
    np.testing.assert_allclose(got, want, rtol=min(1e-6 + 1e-7 * condition, 1e-2))


@settings(max_examples=50, deadline=None)
@given(
    kind=st.sampled_from(CACHE_TYPES),
    blocks=st.integers(1, 5),
    n_head_kv=st.integers(1, 4),
    group=st.integers(0, 4),
    n_kv=st.integers(1, 600),
    before=st.integers(0, 3),
    log_scale=st.floats(-4, 4),
    noise=st.sampled_from([0.0, 1e-3, 1.0, 50.0]),
    n_threads=st.integers(1, 4),
    seed=st.integers(0, 2**32 - 1),
)
def test_random_shapes(
    kind: str,
    blocks: int,
    n_head_kv: int,
    group: int,
    n_kv: int,
    before: int,
    log_scale: float,
    noise: float,
    n_threads: int,
    seed: int,
) -> None:
    d = 32 * blocks
    cache = random_cache(seed, n_kv + 2 * before, n_head_kv, d, kind)
    w = random_weights(seed, n_head_kv * group, n_kv) if group else None
    cells, scale = slice(before, before + n_kv), 10.0**log_scale
    got = ggml.leverage_score(
        cache, kind, d, weights=w, scale=scale, noise=noise, cells=cells, n_threads=n_threads
    )
    check(got, *expected(ggml.dequantize(cache[cells], kind), w, scale, noise))
