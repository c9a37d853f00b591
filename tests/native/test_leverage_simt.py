"""The CUDA kernel on the CPU against float64, and proof that mistakes in it would be noticed."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from . import ggml, simt
from .contract import Case, LeverageContract, cases, check_case, check_view
from .ggml import CACHE_TYPES
from .leverage import KernelError, check, expected, random_cache, random_weights
from .simt import ORDERS, Kernel, Order

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="the shim needs Linux's signals and contexts"
)


@pytest.fixture(scope="module")
def kernel(simt_folder: Path) -> Kernel:
    return Kernel(simt.build(simt_folder, simt.sources()))


@pytest.fixture(scope="module")
def op(kernel: Kernel) -> Kernel:
    return kernel


class TestOnCUDA(LeverageContract):
    """As on the CPU; behind the last byte of a view no page is readable."""

    @pytest.mark.parametrize("kind", CACHE_TYPES)
    def test_a_view_reads_nothing_before_itself(self, op: Kernel, kind: str) -> None:
        check_view(op.leverage_score, kind, order=ORDERS[1])  # nor is one before the first


@pytest.mark.parametrize("n_kv", [1, 7, 77, 513])
@pytest.mark.parametrize("d", [32, 64, 128, 256])
@pytest.mark.parametrize("kind", CACHE_TYPES)
def test_types_and_shapes(kernel: Kernel, kind: str, d: int, n_kv: int) -> None:
    cache = random_cache(1, n_kv, 2, d, kind)
    w = random_weights(2, 4, n_kv)
    got = kernel.leverage_score(cache, kind, d, weights=w, order=ORDERS[1])
    check(got, *expected(ggml.dequantize(cache, kind), w))


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("d", [1, 7, 8, 33, 40, 72, 80, 96, 192, 200, 576])
def test_head_sizes_beside_the_usual_ones(kernel: Kernel, d: int, kind: str) -> None:
    cache = random_cache(3, 130, 2, d, kind)
    got = kernel.leverage_score(cache, kind, d)
    check(got, *expected(ggml.dequantize(cache, kind)))


@pytest.mark.parametrize("n_kv", [4096, 30011])
def test_long_caches(kernel: Kernel, n_kv: int) -> None:
    cache = random_cache(11, n_kv, 1, 64, "F16")
    w = random_weights(12, 2, n_kv)
    got = kernel.leverage_score(cache, "F16", 64, weights=w)
    check(got, *expected(ggml.dequantize(cache, "F16"), w))


@pytest.mark.parametrize("shape", [(64, 3, 3, 700), (128, 2, 1, 300), (256, 1, 2, 77)])
def test_no_order_of_threads_and_blocks_changes_a_bit(
    kernel: Kernel, shape: tuple[int, int, int, int]
) -> None:
    d, n_head_kv, group, n_kv = shape
    cache = random_cache(13, n_kv, n_head_kv, d, "Q8_0")
    w = random_weights(14, n_head_kv * group, n_kv)
    one = kernel.leverage_score(cache, "Q8_0", d, weights=w)
    for order in (*ORDERS[1:], *(Order(order=2, seed=seed) for seed in range(10, 14))):
        got = kernel.leverage_score(cache, "Q8_0", d, weights=w, order=order)
        np.testing.assert_array_equal(got, one)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("LEVERAGE_MAX_FLOATS", "1"),  # one KV head at a time
        ("LEVERAGE_MAX_FACTOR", "64"),  # several rounds over the columns
        ("LEVERAGE_MIN_CELLS", "32"),  # many blocks of cells
        ("LEVERAGE_BLOCKS", "1"),  # few
    ],
)
def test_splits_are_only_splits(simt_folder: Path, name: str, value: str) -> None:
    texts = simt.only_types(simt.defined(simt.sources(), name, value), "F16")
    variant = Kernel(simt.build(simt_folder, texts, "-O1"))
    cache = random_cache(6, 333, 3, 128, "F16")
    w = random_weights(7, 6, 333)
    got = variant.leverage_score(cache, "F16", 128, weights=w)
    check(got, *expected(ggml.dequantize(cache, "F16"), w))


@pytest.mark.parametrize("mean", [0.0, 30.0])
@pytest.mark.parametrize("smallest", [1e-1, 1e-2, 1e-3])
@pytest.mark.parametrize("d", [64, 128, 256])
def test_ill_conditioned_caches(kernel: Kernel, d: int, smallest: float, mean: float) -> None:
    # The factorization is in float32, unlike the CPU's: here its errors would show.
    rng = np.random.default_rng(25)
    basis, _ = np.linalg.qr(rng.standard_normal((d, d)))
    x = rng.standard_normal((400, d)) * np.geomspace(1, smallest, d) @ basis * 10 + mean
    cache = ggml.quantize(x[:, None].astype(np.float32), "F32")
    got = kernel.leverage_score(cache, "F32", d, noise=0.0)
    check(got, *expected(ggml.dequantize(cache, "F32"), noise=0.0))


@pytest.mark.parametrize("noise", [0.0, 100.0])
@pytest.mark.parametrize("d", [40, 64, 80, 96, 192])
def test_the_error_that_test_backend_ops_looks_at(kernel: Kernel, d: int, noise: float) -> None:
    # Its hardest shapes, and a tenth of the normalised mean square error that it allows.
    rng = np.random.default_rng(26)
    cache = ggml.quantize(rng.uniform(-1, 1, (77, 2, d)).astype(np.float32), "F16")
    w = rng.uniform(-0.25, 1, (2, 77)).astype(np.float32)
    got = kernel.leverage_score(cache, "F16", d, weights=w, scale=0.5, noise=noise)
    want, _ = expected(ggml.dequantize(cache, "F16"), w, 0.5, noise)
    assert np.square(got - want).sum() < 1e-8 * np.square(want).sum()


@settings(max_examples=40)
@given(
    case=cases(blocks=5, heads=4),
    order=st.builds(Order, st.integers(0, 2), st.integers(0, 99), align_end=st.booleans()),
)
def test_random_shapes(kernel: Kernel, case: Case, order: Order) -> None:
    check_case(kernel.leverage_score, case, order=order)


# --- mistakes ----------------------------------------------------------------------------------

_BARRIER = "__syncthreads();"

MISTAKES = {
    "last cell of a block": ("i < last ? leverage_weight", "i < last - 1 ? leverage_weight"),
    "last block of cells": ("is < n_split; ++is", "is < n_split - 1; ++is"),
    "one of four partial sums": ("(sum[2] + sum[3])", "sum[2]"),
    "last step of a block": ("first + h.n_cells)", "first + h.n_cells - LEVERAGE_STEP)"),
    "a cell too many": ("i0 + i < n_kv ? p.d : 0", "i0 + i <= n_kv ? p.d : 0"),
    "a column too many": ("if (i0 < d) {", "if (i0 <= d) {"),
    "a column too few": ("if (i0 < d) {", "if (i0 < d - 2) {"),
    "weights on one side only": ("y[i][c.x] = wi*v.x;", "y[i][c.x] = v.x;"),
    "weights of another head": ("leverage_weights(h, blockIdx.y)", "leverage_weights(h, 0)"),
    "tile of the wrong row": ("i0, tr*LEVERAGE_TILE, x, y", "i0, tc*LEVERAGE_TILE, x, y"),
    "ridge": ("fmaxf(p.lambda, LEVERAGE_EPS*a)", "p.lambda"),
    "ridge on top of lambda": (
        "fmaxf(p.lambda, LEVERAGE_EPS*a)",
        "p.lambda + LEVERAGE_EPS*a",
    ),
    "pivot of a dead dimension": ("pivot > 0.0f ? rsqrtf(pivot) : 0.0f", "rsqrtf(pivot)"),
    "a row of the elimination": ("int r = k + 1; r < LEVERAGE_STEP", "int r = k + 2; r < 32"),
    "first block of the identity": ("active && k0 >= row0;", "active && k0 > row0;"),
    "upper triangle of U^-T": ("&& k0 + 2*k <= c0 + i)", ")"),
    "diagonal of U^-T": ("k0 + 2*k <= c0 + i)", "k0 + 2*k < c0 + i)"),
    "last panel of U^-1": ("c0 < p.dp; c0 += LEVERAGE_TILE", "c0 < p.dp - 32; c0 += 64"),
    "half of a tile": ("LEVERAGE_TILE/2);\n\n    const float av", "0);\n\n    const float av"),
    "sum over the columns": ("warp_reduce_sum<8>(norm[r])", "norm[r]"),
    "lanes of the sum": ("warp_reduce_sum<8>", "warp_reduce_sum<16>"),
    "mean over the group": ("(wi*norm[r])/p.n_group", "(wi*norm[r])"),
    "scores that are not finite": ("leverage_finite(wi*norm[r])", "wi*norm[r]"),
    "vectors from an array of floats": ("__align__(16) float z[", "float z["),
    "a store behind the end": ("            if (i < n_kv) {\n                h.dst", "{h.dst"),
}


@pytest.fixture(scope="module")
def n_barriers() -> int:
    return simt.sources()[simt.KERNEL].count(_BARRIER)


def test_the_unbroken_kernel_passes(simt_folder: Path) -> None:
    _probe(simt_folder, _for_probe(simt.sources()))


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_noticed(simt_folder: Path, name: str) -> None:
    texts = _for_probe(simt.sources())
    before, after = MISTAKES[name]
    assert texts[simt.KERNEL].count(before) == 1, f"{before!r} is not in the kernel once"
    broken = texts | {simt.KERNEL: texts[simt.KERNEL].replace(before, after)}
    with pytest.raises((AssertionError, KernelError)):
        _probe(simt_folder, broken)


@pytest.mark.parametrize("index", range(7))
def test_a_missing_barrier_is_noticed(simt_folder: Path, index: int, n_barriers: int) -> None:
    assert n_barriers == 7  # one test for each
    texts = _for_probe(simt.sources())
    parts = texts[simt.KERNEL].split(_BARRIER)
    parts[index : index + 2] = ["".join(parts[index : index + 2])]
    broken = texts | {simt.KERNEL: _BARRIER.join(parts)}
    with pytest.raises((AssertionError, KernelError)):
        _probe(simt_folder, broken)


def _for_probe(texts: dict[str, str]) -> dict[str, str]:
    # Blocks of two steps, so that few cells make enough of them.
    return simt.only_types(simt.defined(texts, "LEVERAGE_MIN_CELLS", "64"), "F16", "Q4_0")


def _probe(folder: Path, texts: dict[str, str]) -> None:
    """A few small cases in which every line of the kernel matters."""
    kernel = Kernel(simt.build(folder, texts, "-O0"))
    n, d = 330, 96
    for kind, noise in (("F16", 0.0), ("Q4_0", 1e-3)):
        cache = random_cache(31, n, 2, d, kind)
        if kind == "F16":
            cache[:, :, : 2 * 2] = 0  # two dead dimensions
        w = random_weights(32, 4, n)
        results = []
        for order in ORDERS if kind == "F16" else ORDERS[:1]:
            got = kernel.leverage_score(cache, kind, d, weights=w, noise=noise, order=order)
            check(got, *expected(ggml.dequantize(cache, kind), w, noise=noise))
            results.append(got)
        for got in results[1:]:
            np.testing.assert_array_equal(got, results[0])
    # one cell, where a ridge of 1e-5 shows although there is enough lambda
    one = ggml.quantize(np.ones((1, 1, 1), np.float32), "F16")
    w = np.full((1, 1), 10, np.float32)
    check(
        kernel.leverage_score(one, "F16", 1, weights=w), *expected(ggml.dequantize(one, "F16"), w)
    )
    # fewer cells than dimensions: the ridge matters; a value that is not finite
    cache = random_cache(33, 40, 1, d, "F16")
    check(
        kernel.leverage_score(cache, "F16", d, noise=0.0),
        *expected(ggml.dequantize(cache, "F16"), noise=0.0),
    )
    x = np.ones((3, 1, d), np.float32)
    x[1] = np.inf
    got = kernel.leverage_score(ggml.quantize(x, "F16"), "F16", d)
    assert np.isfinite(got).all()
