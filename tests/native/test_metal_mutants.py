"""Mistakes in the Metal kernel and its host code turn the comparison with float64 red.

Every barrier of the kernel is taken out once, so that each is known to be needed and to be missed.
"""

from __future__ import annotations

import faulthandler
import os
import re
import sys
import traceback
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from . import ggml, metal_build
from .leverage import KernelError, check, expected, random_cache, random_weights
from .metal import ORDERS, Job, Metal
from .metal_build import KERNEL

_HOST = "ggml-metal-ops.cpp"
_BARRIER = re.compile(r"^ +(?:threadgroup|simdgroup)_barrier\(.*\);$", re.M)
_OTHER_TYPES = re.compile(
    r'^template \[\[host_name\("kernel_[a-z]+_[a-z]+_[a-z]+_(?!f16").*$', re.M
)

# file, text as it is, text with a mistake
MISTAKES = {
    "transposed": (KERNEL, "8, 0, true)", "8, 0, false)"),
    "block of a simdgroup": (KERNEL, "c0 = NB*(sgitg%2)", "c0 = NB*(sgitg/2)"),
    "other panel": (KERNEL, "(cell, p*NP + c, args.d)", "(cell, q*NP + c, args.d)"),
    "cells in the tail of a block": (KERNEL, "== 0 || i + NK >= i1", "== 0"),
    "end of the block": (KERNEL, "min(i0 + args.block_cells, args.n_kv)", "args.n_kv"),
    "partial sums": (
        KERNEL,
        "ib < args.n_block; ++ib) {\n        diag",
        "ib < 1; ++ib) {\n        diag",
    ),
    "dimensions beyond the end": (KERNEL, "if (c < d) {", "if (c < 256) {"),
    "weight of a cell": (KERNEL, "= wi*xp;", "= xp;"),
    "content without weight": (KERNEL, "if (wi > 0.0f) {", "if (ic < i1) {"),
    "other head's weights": (KERNEL, "(w + h*args.nbw1)", "(w + 0*args.nbw1)"),
    "KV head of a query head": (KERNEL, "u + (h/args.n_group)*args.nbu1", "u + (h%2)*args.nbu1"),
    "no mean": (KERNEL, "? si/args.n_group :", "? si :"),
    "no ridge": (KERNEL, "max(args.lambda, OP_LEVERAGE_SCORE_EPS*diag)", "args.lambda"),
    "dead dimensions": (KERNEL, "pivot > 0.0f ? rsqrt(pivot) : 0.0f", "rsqrt(pivot)"),
    "scaling": (KERNEL, "*= ss[r];", "*= 1.0f;"),
    "elimination": (KERNEL, "acc[s] -= st[r*NB + s]*acc[r];", "acc[s] -= st[s*NB + r]*acc[r];"),
    "not transposed": (KERNEL, "st[(e%NB)*NB + e/NB]", "st[e]"),
    "last block of a column": (KERNEL, "k < kc + NB", "k < kc"),
    "columns of the norm": (KERNEL, "norm += dot(sz4[2*tiisg + 1]", "norm += dot(sz4[2*tiisg + 0]"),
    "a barrier that not all reach": (
        KERNEL,
        "        threadgroup_barrier(mem_flags::mem_threadgroup);\n\n        if (active) {",
        "        if (active) {\n        threadgroup_barrier(mem_flags::mem_threadgroup);",
    ),
    "last tile of cells": (_HOST, "(args.n_kv + OP_LEVERAGE_SCORE_NP - 1)", "(args.n_kv + 0)"),
    "barriers between the passes": (_HOST, "if (pass > GRAM) {", "if (pass > NORM) {"),
    "an op that needs another": (_HOST, "!ggml_metal_op_concurrency_check(ctx, next)", "false"),
    "room for the matrices": (_HOST, "return 32 + n_head*args.n_slot", "return 0*args.n_slot"),
    "room for R": (_HOST, "std::max<int64_t>(2, n_block)", "n_block"),
}


@cache
def texts() -> dict[str, str]:
    try:
        return metal_build.sources()
    except FileNotFoundError as error:
        pytest.skip(str(error))


def is_right(backend: Metal) -> bool:
    """Whether a few ops, in every order of the threads, agree with float64."""
    jobs = []
    for i, (d, n_head_kv, group, n_kv, noise) in enumerate(
        [(96, 2, 2, 700, 1.0), (256, 1, 1, 70, 0.0), (40, 1, 2, 33, 0.0)]
    ):
        weights = random_weights(i, n_head_kv * group, n_kv)
        weights[:, 5], weights[:, 6:8] = np.nan, -1.0
        cache = random_cache(i, n_kv, n_head_kv, d, "F16")
        cache[5] = 0xFF  # NaN
        jobs.append(Job(cache, "F16", d, weights, noise=noise))
    twins = np.repeat(random_cache(8, 1, 1, 64, "F16"), 40, axis=0)  # all in one direction
    jobs.append(Job(twins, "F16", 64, noise=0.0))
    chained = Job(jobs[2].cache, "F16", 40, weights=2)
    try:
        for order in ORDERS:
            *results, last = backend.run([*jobs, chained], order)
            for job, got in zip([*jobs, chained], [*results, last], strict=True):
                w = results[2] if job is chained else job.weights
                assert not isinstance(w, int)
                w = None if w is None else np.nan_to_num(w)
                u = np.nan_to_num(ggml.dequantize(job.cache, "F16"))
                check(got, *expected(u, w, noise=job.noise))
    except (AssertionError, KernelError):
        return False
    return True


def survives(changed: dict[str, str], folder: Path) -> bool:
    """Build with one type and run in a process of its own: a mistake may end it."""
    kernel = _OTHER_TYPES.sub("", changed[KERNEL])
    library = metal_build.build(changed, {KERNEL: kernel}, folder=folder, optimise="-O1")
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        try:
            os._exit(0 if is_right(Metal(library)) else 1)
        except BaseException:
            traceback.print_exc(file=sys.stderr)
            os._exit(2)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status != 2, "the comparison itself failed"
    return status == 0


def test_without_a_mistake_all_is_right(tmp_path: Path) -> None:
    assert survives(texts(), tmp_path)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_seen(mistake: str, tmp_path: Path) -> None:
    file, old, new = MISTAKES[mistake]
    text = texts()[file]
    assert old in text, f"{file} has changed: {old!r}"
    assert not survives(texts() | {file: text.replace(old, new, 1)}, tmp_path)


def test_every_barrier_is_needed(tmp_path: Path) -> None:
    text = texts()[KERNEL]
    survivors = []
    for found in _BARRIER.finditer(text):
        line = text.count("\n", 0, found.start()) + 1
        if survives(texts() | {KERNEL: text[: found.start()] + text[found.end() :]}, tmp_path):
            survivors.append(line)
    assert survivors == [], f"{KERNEL} passes without the barriers in these lines"
