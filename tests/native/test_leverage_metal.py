"""The Metal kernel of ``ggml_leverage_score`` against float64, with the host code that runs it.

Kernels run on the CPU (``metal/``). The tolerance is that of the CPU's op (``check``): here all
matrix work is in float32, which costs a few roundings of the unit diagonal more.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from . import ggml
from .contract import Case, LeverageContract, cases, check_case
from .ggml import CACHE_TYPES
from .leverage import check, expected, random_cache, random_weights
from .metal import ORDERS, Metal, Order


@pytest.fixture(scope="module")
def op(backend: Metal) -> Metal:
    return backend


class TestOnMetal(LeverageContract):
    """As on the CPU."""


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


def test_a_cell_without_weight_may_hold_anything(backend: Metal) -> None:
    cache = random_cache(11, 300, 2, 64, "F16")
    w = random_weights(12, 2, 300)
    w[:, 100:140] = 0
    want = backend.leverage_score(cache, "F16", 64, weights=w)
    cache[100:140] = 0xFF  # NaN
    np.testing.assert_array_equal(backend.leverage_score(cache, "F16", 64, weights=w), want)


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


@settings(max_examples=40)
@given(case=cases(blocks=8, heads=3), order=st.sampled_from(ORDERS))
def test_random_shapes(backend: Metal, case: Case, order: Order) -> None:
    check_case(backend.leverage_score, case, order=order)
