"""The Metal backend as a whole: graphs of several ops, what it supports, the shim itself."""

from __future__ import annotations

import re

import numpy as np
import pytest
from gguf import GGMLQuantizationType as GGMLType

from . import ggml, metal_build
from .leverage import check, expected, random_cache, random_weights
from .metal import ORDERS, Job, Metal, Order


def test_a_kernel_that_is_known_to_work_works_here() -> None:
    """Upstream's lightning indexer, which runs on Macs, gives what its definition says."""
    texts = metal_build.sources()
    text = texts["fa_aux.metal"]
    start = text.rindex("template<", 0, text.index("kernel void kernel_lightning_indexer("))
    includes = '#include "common.h"\n#include "dequantize.h"\n'
    backend = Metal(metal_build.build(texts, {"fa_aux.metal": includes + text[start:]}))
    n_head, n_batch, n_kv, d = 64, 5, 70, 128
    rng = np.random.default_rng(28)
    q = rng.standard_normal((n_batch, n_head, d)).astype(np.float16)
    k = random_cache(29, n_kv, 1, d, "Q8_0")
    w = rng.standard_normal((n_batch, n_head)).astype(np.float32)
    mask = rng.standard_normal((n_batch, n_kv)).astype(np.float16)

    def tensor(ctx: int, kind: GGMLType, *shape: int) -> int:
        return int(backend.c["ggml_new_tensor_3d"](ctx, kind.value, *shape))

    for order in ORDERS:
        ctx = ggml.context()
        tensors = (
            tensor(ctx, GGMLType.F32, d, n_head, n_batch),
            tensor(ctx, GGMLType.Q8_0, d, 1, n_kv),
            tensor(ctx, GGMLType.F32, n_head, n_batch, 1),
            tensor(ctx, GGMLType.F16, n_kv, n_batch, 1),
        )
        out = backend.c["ggml_lightning_indexer"](ctx, *tensors)
        arrays = (q.astype(np.float32), k, w, mask)
        (got,) = backend.compute(
            ctx, list(zip(tensors, arrays, strict=True)), [(out, (n_batch, n_kv))], order
        )
        keys = ggml.dequantize(k, "Q8_0")[:, 0].astype(np.float16).astype(np.float64)
        dots = np.maximum(np.einsum("bhd,nd->bhn", q.astype(np.float64), keys), 0)
        want = np.einsum("bh,bhn->bn", w, dots) + mask
        # sums of 64 terms of about 10 in float32
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-3)


def test_the_file_is_compiled_wherever_kernels_are_listed() -> None:
    texts = metal_build.sources()
    (listed,) = re.findall(
        r"^set\(METALLIB_KERNEL_SOURCES$(.*?)^\)", texts["CMakeLists.txt"], re.M | re.S
    )
    (libraries,) = re.findall(
        r"^#define GGML_METAL_LIBS (.*?[^\\])$", texts["ggml-metal-device.m"], re.M | re.S
    )
    built = re.findall(r"kernels/(\w+)\.metal", listed)
    assert built.count("leverage_score") == 1
    assert sorted(re.findall(r"X\(\w+, +(\w+)\)", libraries)) == sorted(built)


def some_jobs(n: int) -> list[Job]:
    """One head each, as ragged caches have them."""
    lengths = np.random.default_rng(25).integers(1, 600, n)
    return [
        Job(random_cache(i, n_kv, 1, 64, "F16"), "F16", 64, random_weights(i, 2, n_kv))
        for i, n_kv in enumerate(lengths)
    ]


@pytest.mark.parametrize("order", ORDERS)
def test_ops_of_a_graph_go_pass_by_pass(backend: Metal, order: Order) -> None:
    jobs = some_jobs(5)
    together = backend.run(jobs, order)
    assert backend.counters["n_barrier"] == 2
    assert backend.counters["n_dispatch"] == 15
    for job, got in zip(jobs, together, strict=True):
        np.testing.assert_array_equal(got, backend.run([job])[0])


@pytest.mark.parametrize("order", ORDERS)
def test_an_op_waits_for_its_weights(backend: Metal, order: Order) -> None:
    first, second, *_ = some_jobs(2)
    chained = Job(first.cache, "F16", 64, weights=0)
    got = backend.run([first, second, chained], order)
    assert backend.counters["n_barrier"] == 5
    want = backend.run([Job(first.cache, "F16", 64, weights=got[0])])[0]
    np.testing.assert_array_equal(got[2], want)


@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
def test_heads_of_a_pool(backend: Metal, kind: str) -> None:
    """Rows of a head lie together, as in a cache with rows per head: [d, cells, heads] permuted."""
    c, d, first, n_kv = backend.c, 64, 40, 77
    pool = random_cache(31, 500, 1, d, kind)  # [rows, 1, bytes of a row]
    row = pool.shape[2]
    ctx = ggml.context()
    rows = c["ggml_new_tensor_2d"](ctx, GGMLType[kind].value, d, len(pool))
    outs = []
    for n_head, stride in ((1, n_kv), (3, 100)):
        shape, strides = (d, n_kv, n_head), (row, stride * row, first * row)
        view = c["ggml_permute"](ctx, c["ggml_view_3d"](ctx, rows, *shape, *strides), 0, 2, 1, 3)
        outs.append((c["ggml_leverage_score"](ctx, view, None, 1.0, 1.0), (n_head, n_kv)))
    results = backend.compute(ctx, [(rows, pool)], outs, ORDERS[2])
    for got, stride in zip(results, (n_kv, 100), strict=True):
        heads = [pool[first + i * stride :][:n_kv] for i in range(len(got))]
        u = ggml.dequantize(np.concatenate(heads, axis=1), kind)
        check(got, *expected(u))


def test_threadgroup_memory_stays_within_the_device(backend: Metal) -> None:
    backend.leverage_score(random_cache(26, 70, 1, 256, "F16"), "F16", 256)
    assert backend.counters["max_shmem"] <= 16 * 1024  # of 32 KiB: two groups at least


def test_what_is_not_supported_is_left_to_the_cpu(backend: Metal) -> None:
    def job(kind: str, d: int) -> Job:
        cells, heads = slice(1, 5), slice(1, 3)
        return Job(random_cache(27, 8, 4, d, kind), kind, d, cells=cells, heads=heads)

    assert backend.supports(job("F16", 64))
    assert backend.supports(job("Q8_0", 256))
    assert not backend.supports(job("F16", 260))  # more columns than threads
    assert not backend.supports(job("F16", 62))  # not in vectors of 4
    assert not backend.supports(job("Q8_0", 288))
    assert backend.supports(job("BF16", 64))
    assert not backend.supports(job("BF16", 64), has_bfloat=False)
