"""The pieces of ggml's C interface that op tests need, over ctypes.

Works on the libraries of the built ``llama_cpp`` package, or on those in the folder that
``LLAMA_CPP_LIB_PATH`` names; on the CPU, or with ``CAPKV_TEST_DEVICE=gpu`` on the first GPU.
Nothing here is used by the product.
"""

from __future__ import annotations

import ctypes as ct
import functools
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType as GGMLType
from gguf import quants
from numpy.typing import NDArray

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
U8 = NDArray[np.uint8]

CACHE_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "IQ4_NL")
"""The types that llama.cpp allows for a K or V cache."""

_HEADROOM = 128 << 20
"""Bytes of a ggml context beside the tensors: graph and work buffer (pages untouched are free)."""


class _InitParams(ct.Structure):
    _fields_ = (("mem_size", ct.c_size_t), ("mem_buffer", ct.c_void_p), ("no_alloc", ct.c_bool))


ON_GPU = os.environ.get("CAPKV_TEST_DEVICE") == "gpu"
"""Whether the operators run on the first GPU instead of the CPU."""

MAX_D_GPU = 256
"""The largest head size that a GPU computes; larger ones are left to the CPU."""

_GPU, _IGPU = 1, 2  # ggml_backend_dev_type

_POINTER, _I64, _SIZE, _INT = ct.c_void_p, ct.c_int64, ct.c_size_t, ct.c_int

# name: (library, result, arguments)
_FUNCTIONS: dict[str, tuple[str, Any, list[Any]]] = {
    "ggml_init": ("ggml-base", _POINTER, [_InitParams]),
    "ggml_free": ("ggml-base", None, [_POINTER]),
    "ggml_new_tensor_1d": ("ggml-base", _POINTER, [_POINTER, _INT, _I64]),
    "ggml_new_tensor_2d": ("ggml-base", _POINTER, [_POINTER, _INT, _I64, _I64]),
    "ggml_new_tensor_3d": ("ggml-base", _POINTER, [_POINTER, _INT, *[_I64] * 3]),
    "ggml_set_name": ("ggml-base", _POINTER, [_POINTER, ct.c_char_p]),
    "ggml_permute": ("ggml-base", _POINTER, [_POINTER, _POINTER, *[_INT] * 4]),
    "ggml_view_3d": ("ggml-base", _POINTER, [_POINTER, _POINTER, *[_I64] * 3, *[_SIZE] * 3]),
    "ggml_get_data": ("ggml-base", _POINTER, [_POINTER]),
    "ggml_row_size": ("ggml-base", _SIZE, [_INT, _I64]),
    "ggml_new_graph": ("ggml-base", _POINTER, [_POINTER]),
    "ggml_build_forward_expand": ("ggml-base", None, [_POINTER, _POINTER]),
    "ggml_quantize_chunk": ("ggml-base", _SIZE, [_INT, _POINTER, _POINTER, *[_I64] * 3, _POINTER]),
    "ggml_graph_compute_with_ctx": ("ggml-cpu", _INT, [_POINTER, _POINTER, _INT]),
    "ggml_backend_dev_by_type": ("ggml", _POINTER, [_INT]),
    "ggml_backend_reg_dev_get": ("ggml-base", _POINTER, [_POINTER, _SIZE]),
    "ggml_backend_meta_device": ("ggml-base", _POINTER, [_POINTER, _SIZE, _POINTER, _POINTER]),
    "ggml_backend_dev_init": ("ggml-base", _POINTER, [_POINTER, ct.c_char_p]),
    "ggml_backend_free": ("ggml-base", None, [_POINTER]),
    "ggml_backend_get_default_buffer_type": ("ggml-base", _POINTER, [_POINTER]),
    "ggml_backend_alloc_ctx_tensors": ("ggml-base", _POINTER, [_POINTER, _POINTER]),
    "ggml_backend_buffer_free": ("ggml-base", None, [_POINTER]),
    "ggml_backend_tensor_set": ("ggml-base", None, [_POINTER, _POINTER, _SIZE, _SIZE]),
    "ggml_backend_tensor_get": ("ggml-base", None, [_POINTER, _POINTER, _SIZE, _SIZE]),
    "ggml_backend_supports_op": ("ggml-base", ct.c_bool, [_POINTER, _POINTER]),
    "ggml_backend_graph_compute": ("ggml-base", _INT, [_POINTER, _POINTER]),
    "ggml_gallocr_new": ("ggml-base", _POINTER, [_POINTER]),
    "ggml_gallocr_alloc_graph": ("ggml-base", ct.c_bool, [_POINTER, _POINTER]),
    "ggml_gallocr_free": ("ggml-base", None, [_POINTER]),
    "ggml_lightning_indexer": ("ggml-base", _POINTER, [_POINTER] * 5),
    "ggml_leverage_score": (
        "ggml-base",
        _POINTER,
        [_POINTER, _POINTER, _POINTER, ct.c_float, ct.c_float],
    ),
}


def library_folder() -> Path | None:
    """Folder of the ggml libraries to test, or None when there is no build."""
    if named := os.environ.get("LLAMA_CPP_LIB_PATH"):
        return Path(named)
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent / "lib"


@functools.cache
def load() -> dict[str, Any]:
    """The C functions by name, with their signatures set.

    Raises
    ------
    FileNotFoundError
        There is no build, or it lacks a library.
    AttributeError
        The build lacks a function: it is not the patched one.
    """
    libraries = {
        name: ct.CDLL(str(library_file(name)))
        for name in ("ggml-base", "ggml-cpu", "ggml")  # in the order in which they need each other
    }
    functions: dict[str, Any] = {}
    for name, (library, result, arguments) in _FUNCTIONS.items():
        function = getattr(libraries[library], name)
        function.restype, function.argtypes = result, arguments
        functions[name] = function
    return functions


def library_file(name: str) -> Path:
    """The file of a library.

    Raises
    ------
    FileNotFoundError
        There is no build, or it lacks the library.
    """
    folder = library_folder()
    if folder is None:
        raise FileNotFoundError("llama_cpp is not installed and LLAMA_CPP_LIB_PATH is not set")
    prefix, suffix = {"win32": ("", ".dll"), "darwin": ("lib", ".dylib")}.get(
        sys.platform, ("lib", ".so")
    )
    path = folder / f"{prefix}{name}{suffix}"
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: build the native libraries first")
    return path


def quantize(x: F32, kind: str) -> U8:
    """Bytes of ``x`` [..., d] in a cache type, [..., bytes of a row]."""
    c, value = load(), GGMLType[kind].value
    x = np.ascontiguousarray(x, np.float32)
    n_rows, d = x.size // x.shape[-1], x.shape[-1]
    out = np.empty((*x.shape[:-1], c["ggml_row_size"](value, d)), np.uint8)
    if kind == "F32":  # ggml_quantize_chunk takes it too, but there is nothing to do
        return x.view(np.uint8).reshape(out.shape)
    c["ggml_quantize_chunk"](value, x.ctypes.data, out.ctypes.data, 0, n_rows, d, None)
    return out


def dequantize(rows: U8, kind: str) -> F64:
    """Values of ``rows`` [..., bytes of a row] as [..., d], by gguf's numpy code, not ggml's."""
    return quants.dequantize(rows, GGMLType[kind]).astype(np.float64)


def context(n_bytes: int = 1 << 20, *, no_alloc: bool = True) -> int:
    """Room for tensors; their data are elsewhere with ``no_alloc``."""
    return int(load()["ggml_init"](_InitParams(n_bytes, None, no_alloc)))


def cache_view(
    ctx: int, cache: U8, kind: str, d: int, cells: slice, heads: slice
) -> tuple[int, int]:
    """A tensor for a whole cache, and the view of it; see :func:`leverage_score`."""
    c = load()
    n_ctx, n_head, row = cache.shape
    first_cell, last_cell, _ = cells.indices(n_ctx)
    first_head, last_head, _ = heads.indices(n_head)
    stride = row * n_head
    base = c["ggml_new_tensor_2d"](ctx, GGMLType[kind].value, d * n_head, n_ctx)
    shape = (d, last_head - first_head, last_cell - first_cell)
    offset = first_cell * stride + first_head * row
    return base, c["ggml_view_3d"](ctx, base, *shape, row, stride, offset)


def set_tensor(tensor: int, array: NDArray[Any]) -> None:
    """Copy the data of a tensor to where its backend has it."""
    array = np.ascontiguousarray(array)
    load()["ggml_backend_tensor_set"](tensor, array.ctypes.data, 0, array.nbytes)


def leverage_score(
    cache: U8,
    kind: str,
    d: int,
    *,
    weights: F32 | None = None,
    scale: float = 1.0,
    noise: float = 1.0,
    cells: slice = slice(None),
    heads: slice = slice(None),
    n_threads: int = 2,
) -> F32:
    """Run ``ggml_leverage_score`` on a view of a cache.

    Parameters
    ----------
    cache
        [n_ctx, n_head_kv, bytes of a row]
    kind, d
        Cache type and head size.
    weights
        [n_head, n_kv] for the cells of the view, or None for 1.
    scale, noise
        Factor of the weights; lambda.
    cells, heads
        The view, without steps: the op then sees ``cache[cells, heads]`` with the cache's strides.

    Returns
    -------
    [n_head_kv, n_kv]
    """
    c = load()
    n_kv, n_head_kv, _ = cache[cells, heads].shape
    memory = cache.nbytes + (0 if weights is None else weights.nbytes) + 4 * n_kv * n_head_kv
    ctx = context(memory + _HEADROOM, no_alloc=ON_GPU)
    try:
        base, u = cache_view(ctx, cache, kind, d, cells, heads)
        inputs = [(base, cache)]
        w = None
        if weights is not None:
            w = c["ggml_new_tensor_2d"](ctx, GGMLType.F32.value, n_kv, len(weights))
            inputs.append((w, np.ascontiguousarray(weights, np.float32)))
        out = c["ggml_leverage_score"](ctx, u, w, scale, noise)
        graph = c["ggml_new_graph"](ctx)
        c["ggml_build_forward_expand"](graph, out)
        result = np.empty((n_head_kv, n_kv), np.float32)
        if ON_GPU:
            _compute_on_gpu(ctx, graph, inputs, out, result)
            return result
        for tensor, array in inputs:
            _write(c["ggml_get_data"](tensor), array)
        status = c["ggml_graph_compute_with_ctx"](ctx, graph, n_threads)
        assert status == 0, f"ggml_graph_compute_with_ctx returned {status}"
        ct.memmove(result.ctypes.data, c["ggml_get_data"](out), result.nbytes)
        return result
    finally:
        c["ggml_free"](ctx)


def _compute_on_gpu(
    ctx: int, graph: int, inputs: list[tuple[int, NDArray[Any]]], out: int, result: F32
) -> None:
    c, backend = load(), _backend()
    assert c["ggml_backend_supports_op"](backend, out), "the GPU does not support the operator"
    buffer = c["ggml_backend_alloc_ctx_tensors"](ctx, backend)
    assert buffer, "no memory on the GPU for the tensors"
    try:
        for tensor, array in inputs:
            set_tensor(tensor, array)
        status = c["ggml_backend_graph_compute"](backend, graph)
        assert status == 0, f"ggml_backend_graph_compute returned {status}"
        c["ggml_backend_tensor_get"](out, result.ctypes.data, 0, result.nbytes)
    finally:
        c["ggml_backend_buffer_free"](buffer)


@functools.cache
def _backend() -> int:
    """The first GPU, opened once for all tests."""
    c = load()
    by_type = c["ggml_backend_dev_by_type"]
    device = by_type(_GPU) or by_type(_IGPU)
    assert device, "CAPKV_TEST_DEVICE=gpu, but ggml sees no GPU: is it built for one?"
    return int(c["ggml_backend_dev_init"](device, None))


def _write(target: int, array: NDArray[Any]) -> None:
    array = np.ascontiguousarray(array)
    ct.memmove(target, array.ctypes.data, array.nbytes)
