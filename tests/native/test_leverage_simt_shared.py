"""Ops that share launches of the CUDA kernel: whatever their lengths, the bits of one by one."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from . import ggml, simt
from .ggml import CACHE_TYPES
from .leverage import KernelError, check, expected, random_cache, random_weights
from .simt import ORDERS, Kernel, Order, Score

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="the shim needs Linux's signals and contexts"
)

KERNELS = 4  # that are launched for ops which share


@pytest.fixture(scope="module")
def kernel(simt_folder: Path) -> Kernel:
    return Kernel(simt.build(simt_folder, simt.sources()))


def score(
    seed: int, n_kv: int, n_head_kv: int = 1, *, d: int = 64, kind: str = "F16", group: int = 1
) -> Score:
    """An op; group 0: without weights, which is one query head per KV head."""
    cache = random_cache(seed, n_kv, n_head_kv, d, kind)
    w = random_weights(seed + 1000, n_head_kv * group, n_kv) if group else None
    return Score(cache, kind, d, w, scale=0.7, noise=0.5)


def other(op: str, **how: bool) -> Score:
    """A node that is not ours."""
    return replace(score(0, 3, d=32), op=op, **how)


def check_graph(
    kernel: Kernel, nodes: Sequence[Score], n_launches: int, order: Order = ORDERS[0]
) -> None:
    """Ops that share launches as far as they may: as one by one, bit for bit, and right."""
    got, n = kernel.graph(nodes, order=order)
    alone, _ = kernel.graph(nodes, fused=False)
    for node, mine, his in zip(nodes, got, alone, strict=True):
        if node.op != "leverage_score" or not node.is_computed:
            assert np.isnan(mine).all()  # untouched
            continue
        np.testing.assert_array_equal(mine, his)
        if mine.size and node.weights_of is None:
            u = ggml.dequantize(node.cache, node.kind)
            check(mine, *expected(u, node.weights, node.scale, node.noise))
    assert n == n_launches


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("kind", CACHE_TYPES)
def test_lengths(kernel: Kernel, kind: str, group: int) -> None:
    lengths = (1, 64, 129, 700, 7, 128)
    nodes = [score(i, n, kind=kind, group=group) for i, n in enumerate(lengths)]
    check_graph(kernel, nodes, KERNELS)


@pytest.mark.parametrize("d", [33, 80, 256])
def test_head_sizes(kernel: Kernel, d: int) -> None:
    check_graph(kernel, [score(i, n, d=d) for i, n in enumerate((65, 3, 200))], KERNELS)


@pytest.mark.parametrize("at", range(3))
def test_one_op_is_far_longer(kernel: Kernel, at: int) -> None:
    nodes = [score(i, 9001 if i == at else 30 + i, d=32) for i in range(3)]
    check_graph(kernel, nodes, KERNELS)


def test_with_and_without_weights(kernel: Kernel) -> None:
    nodes = [score(i, 60 + 40 * i, 1 + i % 2, group=i % 2) for i in range(4)]
    check_graph(kernel, nodes, KERNELS)


@pytest.mark.parametrize(
    ("heads", "n_launches"),
    [
        ([1, 3, 2], 1),
        ([3] * 11, 2),  # 33 heads, of 32 in flight
        ([40, 1], 2),
        ([1] * 33, 2),  # 33 ops
        ([1] * 32, 1),
    ],
)
def test_heads(kernel: Kernel, heads: list[int], n_launches: int) -> None:
    nodes = [score(i, 20 + 13 * (i % 4), n, d=32) for i, n in enumerate(heads)]
    check_graph(kernel, nodes, n_launches * KERNELS)


@pytest.mark.parametrize("order", ORDERS)
def test_no_order_of_threads_and_blocks_changes_a_bit(kernel: Kernel, order: Order) -> None:
    nodes = [score(i, n, kind="Q8_0", group=2) for i, n in enumerate((300, 40, 129))]
    check_graph(kernel, nodes, KERNELS, order)


def test_work_buffers_are_bounded(simt_folder: Path) -> None:
    texts = simt.only_types(simt.defined(simt.sources(), "LEVERAGE_MAX_FLOATS", "30000"), "F16")
    kernel = Kernel(simt.build(simt_folder, texts, "-O1"))
    # Partial Gram matrices of 64x64 and two matrices: 12,288 floats a head, and 16,384 of the long.
    check_graph(kernel, [score(i, n) for i, n in enumerate((100, 50, 200, 60))], 2 * KERNELS)


# --- what is between two ops -------------------------------------------------------------------


@pytest.mark.parametrize("op", ["view", "reshape", "permute", "transpose", "none"])
def test_what_only_looks_at_tensors_is_no_obstacle(kernel: Kernel, op: str) -> None:
    check_graph(kernel, [score(1, 70), other(op), other(op), score(2, 40), other(op)], KERNELS)


def test_what_is_not_computed_is_no_obstacle(kernel: Kernel) -> None:
    idle = [other("concat", is_computed=False), replace(score(3, 30), is_computed=False)]
    check_graph(kernel, [score(1, 70), *idle, score(2, 40)], KERNELS)


def test_an_op_without_cells_is_no_obstacle(kernel: Kernel) -> None:
    empty = replace(score(3, 30), cells=slice(0, 0), weights=None)
    check_graph(kernel, [score(1, 70), empty, score(2, 40)], KERNELS)


def test_another_op_is_one(kernel: Kernel) -> None:
    nodes = [score(1, 70), score(2, 40), other("concat"), score(3, 50), score(4, 30)]
    check_graph(kernel, nodes, 2 * KERNELS)


@pytest.mark.parametrize(
    "second",
    [
        score(2, 50, kind="Q8_0"),
        score(2, 50, d=32),
        score(2, 50, group=2),
        replace(score(2, 50), scale=2.0),
        replace(score(2, 50), noise=2.0),
    ],
    ids=["type", "head size", "group", "scale", "noise"],
)
def test_an_op_of_another_kind_is_one(kernel: Kernel, second: Score) -> None:
    check_graph(kernel, [score(1, 50), score(3, 70), second, second], 2 * KERNELS)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "third",
    [
        replace(score(3, 50), weights_of=1, weights=None),  # reads an earlier result
        replace(score(3, 50), over=1),  # writes where an earlier one reads its weights
    ],
    ids=["reads", "overwrites"],
)
def test_an_op_that_depends_on_one_before_is_one(
    kernel: Kernel, third: Score, order: Order
) -> None:
    check_graph(kernel, [score(1, 90), score(2, 50), third, score(4, 20)], 2 * KERNELS, order)


def test_two_results_in_one_place_are_one(kernel: Kernel) -> None:
    first, weights = score(1, 90), replace(score(2, 50), is_computed=False)
    nodes = [weights, first, replace(score(3, 50), over=0), replace(score(4, 50), over=0)]
    got, n = kernel.graph(nodes)
    assert n == 2 * KERNELS
    np.testing.assert_array_equal(got[2], got[3])  # the place
    np.testing.assert_array_equal(got[3], kernel.graph([score(4, 50)])[0][0])


@settings(max_examples=25)
@given(
    lengths=st.lists(st.integers(1, 400), min_size=2, max_size=6),
    d=st.sampled_from([32, 64, 96]),
    kind=st.sampled_from(CACHE_TYPES),
    group=st.integers(1, 3),
    heads=st.integers(1, 2),
    order=st.builds(Order, st.integers(0, 2), st.integers(0, 99), align_end=st.booleans()),
)
def test_random_ops(
    kernel: Kernel, lengths: list[int], d: int, kind: str, group: int, heads: int, order: Order
) -> None:
    nodes = [
        score(i, n, 1 + (i + heads) % 2, d=d, kind=kind, group=group) for i, n in enumerate(lengths)
    ]
    check_graph(kernel, nodes, KERNELS, order)


# --- mistakes ----------------------------------------------------------------------------------

MISTAKES = {
    "block of the next head": ("first[head + 1] <= i", "first[head + 1] < i"),
    "last head": ("head + 1 < n_heads", "head + 2 < n_heads"),
    "cells of the first head": ("head  = leverage_find(p.split0, p.n_heads, split)", "head = 0"),
    "first block of cells": ("(split - p.split0[head])*h", "split*h"),
    "length of another head": ("min(h.n_kv, first", "min(p.heads[0].n_kv, first"),
    "length of another head in norm": ("n_kv = h.n_kv;", "n_kv = p.heads[0].n_kv;"),
    "partial sums of another head": ("part = p.part + split0*step", "part = p.part + 0*step"),
    "number of partial sums": ("p.split0[head + 1] - split0", "p.split0[1]"),
    "matrix of another head": ("head*p.n_group + g, p.dp + k0", "g, p.dp + k0"),
    "weights of the first KV head": ("ih*p.n_group*w->nb[1]", "ih*w->nb[1]"),
    "result of the first KV head": ("(char *) dst->data + ih*dst->nb[1]", "(char *) dst->data"),
    "splits of the whole launch": ("n_block   = p.n_tile*std", "n_block = n_ops*p.n_tile*std"),
    "one op too often": ("        last = i;", "        last = i - 1;"),
    "ops behind another one": (
        "            break;\n        }\n\n        ops[n_ops++]",
        "            continue;\n        }\n\n        ops[n_ops++]",
    ),
    "another scale": ("ggml_get_op_params_f32(b, 0)", "ggml_get_op_params_f32(a, 0)"),
    "a result that is read": ("(b->src[i] && overlap(b->src[i], a))", "false"),
    "an input that is overwritten": ("(a->src[i] && overlap(a->src[i], b))", "false"),
}


def test_the_unbroken_kernel_passes(simt_folder: Path) -> None:
    _probe(simt_folder, _for_probe())


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_noticed(simt_folder: Path, name: str) -> None:
    texts = _for_probe()
    before, after = MISTAKES[name]
    assert texts[simt.KERNEL].count(before) == 1, f"{before!r} is not in the kernel once"
    broken = texts | {simt.KERNEL: texts[simt.KERNEL].replace(before, after)}
    with pytest.raises((AssertionError, KernelError)):
        _probe(simt_folder, broken)


def _for_probe() -> dict[str, str]:
    # Blocks of few cells, and few blocks, so that little is enough to have both.
    texts = simt.defined(simt.sources(), "LEVERAGE_MIN_CELLS", "32")
    return simt.only_types(simt.defined(texts, "LEVERAGE_BLOCKS", "64"), "F16")


def _probe(folder: Path, texts: dict[str, str]) -> None:
    kernel = Kernel(simt.build(folder, texts, "-O0"))

    def ops(*lengths: int) -> list[Score]:
        return [score(i, n, 1 + i % 2, d=33, group=2) for i, n in enumerate(lengths)]

    check_graph(kernel, ops(200, 40, 130), KERNELS)
    check_graph(kernel, ops(40, 200, 9), KERNELS, ORDERS[1])
    one, two = score(1, 50, d=32), score(2, 50, d=32)
    for nodes in (
        [one, two, other("concat"), one],
        [one, two, replace(two, scale=2.0)],
        [one, two, replace(two, weights_of=1, weights=None)],
        [one, two, replace(two, over=1)],
    ):
        check_graph(kernel, nodes, 2 * KERNELS)
