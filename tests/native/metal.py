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


class KernelError(Exception):
    """The kernel or its host code did what would be undefined on a GPU."""


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


_P, _I64, _SIZE, _INT = ct.c_void_p, ct.c_int64, ct.c_size_t, ct.c_int
_BACKEND: dict[str, tuple[Any, list[Any]]] = {
    "ggml_new_tensor_3d": (_P, [_P, _INT, *[_I64] * 3]),
    "ggml_permute": (_P, [_P, _P, *[_INT] * 4]),
    "ggml_lightning_indexer": (_P, [_P] * 5),
    "ggml_backend_reg_dev_get": (_P, [_P, _SIZE]),
    "ggml_backend_dev_init": (_P, [_P, _P]),
    "ggml_backend_free": (None, [_P]),
    "ggml_backend_supports_op": (ct.c_bool, [_P, _P]),
    "ggml_backend_alloc_ctx_tensors": (_P, [_P, _P]),
    "ggml_backend_buffer_free": (None, [_P]),
    "ggml_backend_tensor_set": (None, [_P, _P, _SIZE, _SIZE]),
    "ggml_backend_tensor_get": (None, [_P, _P, _SIZE, _SIZE]),
    "ggml_backend_graph_compute": (_INT, [_P, _P]),
}


class Metal:
    """The backend in a compiled library."""

    def __init__(self, library: Path) -> None:
        folder = ggml.library_folder()
        assert folder is not None
        ggml.load()
        base = ct.CDLL(str(folder / "libggml-base.so"))
        self.c = dict(ggml.load())
        for name, (result, arguments) in _BACKEND.items():
            function = getattr(base, name)
            function.restype, function.argtypes = result, arguments
            self.c[name] = function
        self._lib = ct.CDLL(str(library))
        self._lib.ggml_backend_init.restype = _P
        self._lib.metal_options.argtypes = [_INT, ct.c_uint64]
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
        ctx = self.context()
        try:
            out, _ = self._build(ctx, job, [])
            return bool(self.c["ggml_backend_supports_op"](self._backend, out))
        finally:
            self._lib.metal_set_has_bfloat(True)
            self.c["ggml_free"](ctx)

    def run(self, jobs: Sequence[Job], order: Order = ORDERS[0]) -> list[F32]:
        """Run a graph and return the scores of every job, [n_head_kv, n_kv]."""
        ctx = self.context()
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
                array = np.ascontiguousarray(array)
                c["ggml_backend_tensor_set"](tensor, array.ctypes.data, 0, array.nbytes)
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

    def context(self) -> int:
        """Room for tensors whose data are on the backend."""
        init = self.c["ggml_init"]
        (parameters,) = init.argtypes
        return int(init(parameters(1 << 20, None, True)))

    def _build(self, ctx: int, job: Job, outs: Sequence[int]) -> tuple[int, list[tuple[int, Any]]]:
        """Return the op, and the tensors that need data."""
        c, value = self.c, GGMLType[job.kind].value
        n_ctx, n_head, row = job.cache.shape
        first_cell, last_cell, _ = job.cells.indices(n_ctx)
        first_head, last_head, _ = job.heads.indices(n_head)
        n_kv, stride = last_cell - first_cell, row * n_head
        base = c["ggml_new_tensor_2d"](ctx, value, job.d * n_head, n_ctx)
        offset = first_cell * stride + first_head * row
        shape = (job.d, last_head - first_head, n_kv)
        u = c["ggml_view_3d"](ctx, base, *shape, row, stride, offset)
        inputs: list[tuple[int, Any]] = [(base, job.cache)]
        w: int | None = None
        if isinstance(job.weights, int):
            w = outs[job.weights]
        elif job.weights is not None:
            w = c["ggml_new_tensor_2d"](ctx, GGMLType.F32.value, n_kv, len(job.weights))
            assert w is not None
            inputs.append((w, job.weights.astype(np.float32)))
        return c["ggml_leverage_score"](ctx, u, w, job.scale, job.noise), inputs


def backend() -> Metal:
    """The backend with our kernel.

    Raises
    ------
    FileNotFoundError
        The sources are not there, or lack our kernel.
    """
    return Metal(metal_build.build(metal_build.sources()))
