"""``ggml_leverage_score`` against float64, over cache types, shapes, weights and corner cases."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from . import ggml
from .contract import Case, LeverageContract, cases, check_case
from .ggml import CACHE_TYPES
from .leverage import check, expected, random_cache, random_weights

pytestmark = pytest.mark.usefixtures("built")


@pytest.fixture(scope="module")
def op() -> ModuleType:
    return ggml


class TestOnTheDevice(LeverageContract):
    """The CPU, or with ``CAPKV_TEST_DEVICE=gpu`` the first GPU."""


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


def test_more_gram_matrices_than_the_work_buffer_holds() -> None:
    # 480 upper triangles of d = 256 do not fit at once: the rounds cut through a group
    cache = random_cache(6, 40, 2, 256, "F16")
    w = random_weights(7, 4, 40)
    got = ggml.leverage_score(cache, "F16", 256, weights=np.repeat(w, 120, axis=0))
    check(got, *expected(ggml.dequantize(cache, "F16"), w))  # a mean of equal terms


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


@settings(max_examples=50)
@given(case=cases(blocks=5, heads=4), n_threads=st.integers(1, 4))
def test_random_shapes(case: Case, n_threads: int) -> None:
    check_case(ggml.leverage_score, case, n_threads=n_threads)
