"""Runs ops on ggml's Metal backend, compiled for the CPU by ``metal_build``."""

from __future__ import annotations

import ctypes as ct
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType as GGMLType

from . import ggml, metal_build
from .ggml import F32, U8
from .leverage import KernelError


@dataclass(frozen=True)
class Order:
    """How threads, threadgroups and dispatches that no barrier separates take turns."""

    order: int = 0  # 0: ascending, 1: descending, 2: shuffled at every barrier
    seed: int = 0


ORDERS = (Order(), Order(1), Order(2, 1), Order(2, 2))


@dataclass(frozen=True)
class Job:
    """One op of a graph; see :func:`ggml.leverage_score`.

    The weights may be the result of an earlier job, by its number.
    """

    cache: U8
    kind: str
    d: int
    weights: F32 | int | None = None
    scale: float = 1.0
    noise: float = 1.0
    cells: slice = field(default_factory=lambda: slice(None))
    heads: slice = field(default_factory=lambda: slice(None))


class Metal:
    """The backend in a compiled library."""

    def __init__(self, library: Path) -> None:
        self.c = ggml.load()
        self._lib = ct.CDLL(str(library))
        self._lib.ggml_backend_init.restype = ct.c_void_p
        self._lib.metal_options.argtypes = [ct.c_int, ct.c_uint64]
        self._lib.metal_error.restype = ct.c_char_p
        self._lib.metal_set_has_bfloat.argtypes = [ct.c_bool]
        device = self.c["ggml_backend_reg_dev_get"](self._lib.ggml_backend_init(), 0)
        self._backend = self.c["ggml_backend_dev_init"](device, None)

    @property
    def counters(self) -> dict[str, int]:
        """What the last graph took: dispatches, barriers and the most threadgroup memory."""
        names = ("n_dispatch", "n_barrier", "max_shmem")
        return {name: getattr(self._lib, f"metal_{name}")() for name in names}

    def leverage_score(
        self, cache: U8, kind: str, d: int, *, order: Order = ORDERS[0], **options: Any
    ) -> F32:
        """Run one op; the options are those of :class:`Job`."""
        return self.run([Job(cache, kind, d, **options)], order)[0]

    def supports(self, job: Job, *, has_bfloat: bool = True) -> bool:
        """Whether the backend takes the op, on a GPU that knows bfloat or not."""
        self._lib.metal_set_has_bfloat(has_bfloat)
        ctx = ggml.context()
        try:
            out, _ = self._build(ctx, job, [])
            return bool(self.c["ggml_backend_supports_op"](self._backend, out))
        finally:
            self._lib.metal_set_has_bfloat(True)
            self.c["ggml_free"](ctx)

    def run(self, jobs: Sequence[Job], order: Order = ORDERS[0]) -> list[F32]:
        """Run a graph and return the scores of every job, [n_head_kv, n_kv]."""
        ctx = ggml.context()
        outs: list[tuple[int, tuple[int, ...]]] = []
        inputs: list[tuple[int, Any]] = []
        for job in jobs:
            out, new = self._build(ctx, job, [tensor for tensor, _ in outs])
            n_kv, n_head_kv, _ = job.cache[job.cells, job.heads].shape
            outs.append((out, (n_head_kv, n_kv)))
            inputs += new
        return self.compute(ctx, inputs, outs, order)

    def compute(
        self,
        ctx: int,
        inputs: Sequence[tuple[int, Any]],
        outs: Sequence[tuple[int, tuple[int, ...]]],
        order: Order = ORDERS[0],
    ) -> list[F32]:
        """Compute tensors of a context, which is freed.

        Raises
        ------
        KernelError
            A write behind a buffer, a barrier that not all threads reach, and the like.
        """
        c, buffer = self.c, None
        try:
            graph = c["ggml_new_graph"](ctx)
            for out, _ in outs:
                assert c["ggml_backend_supports_op"](self._backend, out)
                c["ggml_build_forward_expand"](graph, out)
            buffer = c["ggml_backend_alloc_ctx_tensors"](ctx, self._backend)
            for tensor, array in inputs:
                ggml.set_tensor(tensor, array)
            self._lib.metal_options(order.order, order.seed)
            status = c["ggml_backend_graph_compute"](self._backend, graph)
            results = [np.empty(shape, np.float32) for _, shape in outs]
            for (out, _), result in zip(outs, results, strict=True):
                c["ggml_backend_tensor_get"](out, result.ctypes.data, 0, result.nbytes)
        finally:
            if buffer:
                c["ggml_backend_buffer_free"](buffer)
            c["ggml_free"](ctx)
        if error := self._lib.metal_error().decode():
            raise KernelError(error)
        assert status == 0
        return results

    def _build(self, ctx: int, job: Job, outs: Sequence[int]) -> tuple[int, list[tuple[int, Any]]]:
        """Return the op, and the tensors that need data."""
        base, u = ggml.cache_view(ctx, job.cache, job.kind, job.d, job.cells, job.heads)
        inputs: list[tuple[int, Any]] = [(base, job.cache)]
        w: int | None = None
        if isinstance(job.weights, int):
            w = outs[job.weights]
        elif job.weights is not None:
            n_head, n_kv = job.weights.shape
            w = self.c["ggml_new_tensor_2d"](ctx, GGMLType.F32.value, n_kv, n_head)
            assert w is not None
            inputs.append((w, job.weights.astype(np.float32)))
        return self.c["ggml_leverage_score"](ctx, u, w, job.scale, job.noise), inputs


def backend() -> Metal:
    """The backend with our kernel.

    Raises
    ------
    FileNotFoundError
        The sources are not there, or lack our kernel.
    """
    return Metal(metal_build.build(metal_build.sources()))
