"""ctypes binding of the functions that ``patches/`` adds to llama.cpp; nothing else touches ctypes.

Mirrors ``include/llama-kv-evict.h`` of the patched tree. Arrays go in and out as C-contiguous numpy
arrays of the shapes in the header; every status below 0 becomes a typed exception.
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
import functools
import logging
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import llama_cpp
import llama_cpp._logger
import numpy as np
import numpy.typing as npt

from capkv_local.errors import (
    CapKVError,
    NativeBuildMissing,
    NativeError,
    OutOfMemory,
    UnsupportedModel,
)

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]

ABI = 4

# llama_memory_evict_status: the codes that say what kind of model or setting cannot be evicted
_OK = 0
_UNSUPPORTED = (*range(-13, -1), -21)  # ERR_BLOCKS .. ERR_NO_MEMORY, ERR_SPLIT
_ERR_FLASH_ATTN = -9
_ERR_ALLOC = -19

_LOG_LEVEL_INFO = 2  # GGML_LOG_LEVEL_INFO
_LOG_LEVEL_WARN = 3
_LOG_LEVEL_ERROR = 4
_GGML_TYPE_BF16 = 30


class Stat(enum.IntEnum):
    """``llama_memory_stat``: what one :meth:`KVCache.score` call computes."""

    ATTN_MEAN = 0
    ATTN_MAX = 1
    ATTN_SQR = 2
    ANCHOR_COS = 3
    ANCHOR_DOT = 4
    KEY_NORM = 5
    VALUE_NORM = 6
    KEY_COS = 7
    LEVERAGE_K = 8
    LEVERAGE_V = 9


class _Info(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_uint32) for name in ("n_layer", "n_head_kv", "n_head")),
        *((name, ctypes.c_uint32) for name in ("n_embd_head_k", "n_embd_head_v")),
        *((name, ctypes.c_uint32) for name in ("n_cells", "n_cells_max", "n_compact")),
        ("pos_compact", ctypes.c_int32),
        ("n_queries", ctypes.c_uint32),
        *((name, ctypes.c_uint64) for name in ("n_rows", "n_rows_max")),
        *((name, ctypes.c_uint64) for name in ("n_bytes_cell", "n_bytes_kv")),
        *((name, ctypes.c_uint64) for name in ("n_bytes_other", "n_bytes_observe")),
    ]


class _ObserveParams(ctypes.Structure):
    _fields_ = [
        ("n_window", ctypes.c_uint32),
        ("mean_query", ctypes.c_bool),
        ("n_skip", ctypes.c_int32),
    ]


class _ScoreParams(ctypes.Structure):
    _fields_ = [
        ("stat", ctypes.c_int),
        ("n_cells", ctypes.c_uint32),
        ("n_queries", ctypes.c_uint32),
        ("n_stride", ctypes.c_uint32),
        ("per_head", ctypes.c_bool),
        ("n_future", ctypes.c_uint32),
        ("lambda_", ctypes.c_float),
        ("n_head_w", ctypes.c_uint32),
        ("weights", ctypes.c_void_p),
    ]


@dataclass(frozen=True)
class Info:
    """``llama_memory_evict_info``: sizes in cells, rows and bytes, see the header."""

    n_layer: int
    n_head_kv: int
    n_head: int
    n_embd_head_k: int
    n_embd_head_v: int
    n_cells: int
    n_cells_max: int
    n_compact: int
    pos_compact: int
    n_queries: int
    n_rows: int
    n_rows_max: int
    n_bytes_cell: int
    n_bytes_kv: int
    n_bytes_other: int
    n_bytes_observe: int

    @property
    def n_heads(self) -> int:
        """KV heads of all layers together."""
        return self.n_layer * self.n_head_kv

    @property
    def n_held(self) -> int:
        """Cells that a head holds, on average over all heads; rounded up."""
        return -(-self.n_rows // self.n_heads)

    @property
    def n_allocated(self) -> int:
        """Cells that are allocated for each head, on average over all heads."""
        return self.n_rows_max // self.n_heads

    @property
    def n_free(self) -> int:
        """Tokens that can be appended before rows have to be given up."""
        return self.n_cells_max - self.n_cells


_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "llama_memory_evict_status_str": (ctypes.c_char_p, [ctypes.c_int32]),
    "llama_memory_evict_abi": (ctypes.c_int32, []),
    "llama_memory_evict_supported": (ctypes.c_int32, [ctypes.c_void_p]),
    "llama_memory_evict_get_info": (ctypes.c_int32, [ctypes.c_void_p, ctypes.POINTER(_Info)]),
    "llama_memory_evict_positions": (
        ctypes.c_int32,
        [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t],
    ),
    "llama_memory_evict_pools": (
        ctypes.c_int32,
        [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t],
    ),
    "llama_memory_evict_resize": (ctypes.c_int32, [ctypes.c_void_p, ctypes.c_uint32]),
    "llama_memory_evict_set_n_ctx": (ctypes.c_int32, [ctypes.c_void_p, ctypes.c_uint32]),
    "llama_memory_observe": (ctypes.c_int32, [ctypes.c_void_p, _ObserveParams]),
    "llama_memory_observe_set_mean": (ctypes.c_int32, [ctypes.c_void_p, ctypes.c_bool]),
    "llama_memory_score": (
        ctypes.c_int32,
        [ctypes.c_void_p, _ScoreParams, ctypes.c_void_p, ctypes.c_size_t],
    ),
    "llama_memory_evict": (
        ctypes.c_int32,
        [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t],
    ),
}


CACHE_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")


def cache_type(name: str) -> int:
    """``ggml_type`` of one of :data:`CACHE_TYPES`.

    Raises
    ------
    UnsupportedModel
        Another name.
    """
    if name.lower() not in CACHE_TYPES:
        raise UnsupportedModel(f"no KV cache type '{name}': there are {', '.join(CACHE_TYPES)}")
    # llama-cpp-python does not name all of ggml's types
    return int(getattr(llama_cpp, f"GGML_TYPE_{name.upper()}", _GGML_TYPE_BF16))


def cache_type_name(number: int | None) -> str:
    """Name of a ``ggml_type``; None is llama.cpp's default.

    Raises
    ------
    UnsupportedModel
        No type of a cache.
    """
    if number is None:
        return "f16"
    for name in CACHE_TYPES:
        if cache_type(name) == number:
            return name
    raise UnsupportedModel(f"no KV cache type {number}: there are {', '.join(CACHE_TYPES)}")


def library_path() -> str:
    """Path of the loaded llama library."""
    return str(llama_cpp.llama_cpp._lib._name)


@functools.cache
def _functions() -> dict[str, Callable[..., Any]]:
    lib = llama_cpp.llama_cpp._lib
    functions: dict[str, Callable[..., Any]] = {}
    for name, (restype, argtypes) in _SIGNATURES.items():
        try:
            function = getattr(lib, name)
        except AttributeError:
            raise NativeBuildMissing(
                f"{library_path()} is a stock llama.cpp without {name}(): "
                "build the patched one with scripts/build, or use kv_policy=None"
            ) from None
        function.restype = restype
        function.argtypes = argtypes
        functions[name] = function
    abi = functions["llama_memory_evict_abi"]()
    if abi != ABI:
        raise NativeBuildMissing(
            f"{library_path()} has version {abi} of the eviction functions, this package needs "
            f"{ABI}: rebuild with scripts/build"
        )
    return functions


def require() -> None:
    """Raise :class:`NativeBuildMissing` unless the loaded library is the patched one."""
    _functions()


def _status_text(status: int) -> str:
    text: bytes = _functions()["llama_memory_evict_status_str"](status)
    return text.decode()


def _check(status: int, what: str) -> None:
    if status == _OK:
        return
    reason = _status_text(status)
    if status == _ERR_FLASH_ATTN:
        reason += " (flash_attn=True where the model has it)"
    if status in _UNSUPPORTED:
        raise UnsupportedModel(f"cannot {what} because {reason}; use kv_policy=None")
    raise NativeError(f"cannot {what}: {reason} (status {status})")


class _GGUFParams(ctypes.Structure):
    _fields_ = [("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p)]


def gguf_layout(path: str | Path) -> tuple[int, list[tuple[int, int]]] | None:
    """Where a GGUF's tensors begin, and offset from there and size of each, in bytes.

    None if llama.cpp cannot read what stands before them.
    """
    lib, pointer, size = library("ggml-base"), ctypes.c_void_p, ctypes.c_size_t
    lib.gguf_init_from_file.argtypes = [ctypes.c_char_p, _GGUFParams]
    lib.gguf_init_from_file.restype = pointer
    lib.gguf_free.argtypes, lib.gguf_get_data_offset.argtypes = [pointer], [pointer]
    lib.gguf_get_n_tensors.argtypes, lib.gguf_get_n_tensors.restype = [pointer], ctypes.c_int64
    lib.gguf_get_data_offset.restype = size
    for function in (lib.gguf_get_tensor_offset, lib.gguf_get_tensor_size):
        function.argtypes, function.restype = [pointer, ctypes.c_int64], size
    with log():
        gguf = lib.gguf_init_from_file(os.fsencode(path), _GGUFParams(True, None))
    if not gguf:
        return None
    try:
        return lib.gguf_get_data_offset(gguf), [
            (lib.gguf_get_tensor_offset(gguf, i), lib.gguf_get_tensor_size(gguf, i))
            for i in range(lib.gguf_get_n_tensors(gguf))
        ]
    finally:
        lib.gguf_free(gguf)


class KVCache:
    """The part of a context's KV cache that can be evicted per head.

    Every head of every layer holds as many cells as it keeps. Cells are numbered from the end, so
    that arrays are dense: a head that holds fewer cells than others lacks the first ones.

    Parameters
    ----------
    ctx
        ``llama_context *`` as llama-cpp-python holds it; must outlive this object.

    Raises
    ------
    NativeBuildMissing
        The library is a stock one.
    UnsupportedModel
        The memory of the model, or a setting of the context, does not allow eviction.
    """

    def __init__(self, ctx: Any) -> None:
        self._ctx = ctx
        self._f = _functions()
        _check(self._f["llama_memory_evict_supported"](ctx), "evict KV cells per head")

    def info(self) -> Info:
        raw = _Info()
        _check(
            self._f["llama_memory_evict_get_info"](self._ctx, ctypes.byref(raw)),
            "read the state of the KV cache",
        )
        return Info(**{name: int(getattr(raw, name)) for name, _ in raw._fields_})  # type: ignore[misc]

    def positions(self) -> I32:
        """Token position in every used cell, ``[n_layer, n_head_kv, n_cells]``; -1: not held."""
        info = self.info()
        out = np.empty((info.n_layer, info.n_head_kv, info.n_cells), dtype=np.int32)
        status = self._f["llama_memory_evict_positions"](self._ctx, out.ctypes.data, out.size)
        _check(status, "read the positions of the KV cells")
        return out

    def pools(self) -> I32:
        """Pool of rows of every layer, ``[n_layer]``: one for each device."""
        out = np.empty(self.info().n_layer, dtype=np.int32)
        status = self._f["llama_memory_evict_pools"](self._ctx, out.ctypes.data, out.size)
        _check(status, "read where the KV cells lie")
        return out

    def held_range(self) -> tuple[int, int]:
        """Fewest and most cells that a head holds."""
        if self.info().n_cells == 0:
            return 0, 0
        held = (self.positions() >= 0).sum(axis=-1)
        return int(held.min()), int(held.max())

    def resize(self, n_cells: int) -> None:
        """Allocate ``n_cells`` cells per head on average; what is held moves along.

        Needed once before anything is decoded or evicted. Old and new memory exist side by side
        for a moment.

        Raises
        ------
        OutOfMemory
            Not that much memory; nothing has changed.
        NativeError
            Fewer cells than are held; nothing has changed.
        """
        status = self._f["llama_memory_evict_resize"](self._ctx, n_cells)
        if status == _ERR_ALLOC:
            n_mib = n_cells * self.info().n_bytes_cell / 2**20
            raise OutOfMemory(
                f"no memory for {n_cells} KV cells per head ({n_mib:.0f} MiB): take a smaller "
                "kv_budget, kv_room or n_batch, or a smaller cache type (type_k, type_v)"
            )
        _check(status, f"make room for {n_cells} KV cells per head")

    def set_n_ctx(self, n_ctx: int) -> None:
        """Declare the logical context length (tokens) of a cache of fewer cells."""
        _check(
            self._f["llama_memory_evict_set_n_ctx"](self._ctx, n_ctx),
            f"use a context of {n_ctx} tokens",
        )

    def observe(self, n_window: int, *, mean_query: bool = False, n_skip: int = 0) -> None:
        """Observe the last ``n_window`` queries (0 and no mean: stop) from the next decode on."""
        params = _ObserveParams(n_window, mean_query, n_skip)
        _check(self._f["llama_memory_observe"](self._ctx, params), "observe queries")

    def set_mean(self, enabled: bool) -> None:
        """Whether the next decodes enter the mean query."""
        _check(self._f["llama_memory_observe_set_mean"](self._ctx, enabled), "observe queries")

    def score(
        self,
        stat: Stat,
        *,
        n_cells: int,
        n_queries: int = 0,
        stride: int = 1,
        per_head: bool = False,
        n_future: int = 0,
        noise: float = 0.0,
        weights: F32 | None = None,
    ) -> F32:
        """One statistic of the first ``n_cells`` cells, ``[n_layer, n_rows, n_cells]``.

        0 in cells that a head does not hold. With ``stride``, only the newest of the ``n_queries``
        and every ``stride``-th before it observe. ``n_rows`` is ``n_head`` for the anchor and with
        ``per_head``, else ``n_head_kv``. ``weights`` is ``[n_layer, n_head_w, n_cells]`` with
        ``n_head_w`` a multiple of ``n_head_kv``.
        """
        info = self.info()
        attention = stat <= Stat.ATTN_SQR
        anchor = stat in (Stat.ANCHOR_COS, Stat.ANCHOR_DOT)
        n_rows = info.n_head if anchor or (attention and per_head) else info.n_head_kv
        params = _ScoreParams(
            stat=int(stat),
            n_cells=n_cells,
            n_queries=n_queries,
            n_stride=stride,
            per_head=per_head,
            n_future=n_future,
            lambda_=noise,
        )
        if weights is not None:
            weights = np.ascontiguousarray(weights, dtype=np.float32)
            if weights.ndim != 3 or weights.shape[::2] != (info.n_layer, n_cells):
                raise NativeError(
                    f"weights have shape {weights.shape} instead of "
                    f"({info.n_layer}, n_head, {n_cells})"
                )
            params.n_head_w = weights.shape[1]
            params.weights = weights.ctypes.data
        out = np.empty((info.n_layer, n_rows, n_cells), dtype=np.float32)
        status = self._f["llama_memory_score"](self._ctx, params, out.ctypes.data, out.size)
        _check(status, f"compute {stat.name}")
        return out

    def evict(self, keep: Mask) -> None:
        """Every head keeps the cells marked in ``keep[n_layer, n_head_kv, n_cells]``.

        Any number per head, the last cell always among them; afterwards the largest number is in
        use and every head holds the last of those cells.
        """
        n_keep = np.ascontiguousarray(keep.sum(axis=-1), dtype=np.uint32)
        # nonzero walks heads and cells in order: the lists of the heads, one behind the other.
        lists = [np.nonzero(layer)[-1].astype(np.int32) for layer in keep]
        cells = np.concatenate(lists, dtype=np.int32)
        expected = self.info()
        if keep.shape != (expected.n_layer, expected.n_head_kv, expected.n_cells):
            raise NativeError(
                f"the mask of kept cells has shape {keep.shape} instead of "
                f"{(expected.n_layer, expected.n_head_kv, expected.n_cells)}"
            )
        status = self._f["llama_memory_evict"](
            self._ctx, n_keep.ctypes.data, cells.ctypes.data, cells.size
        )
        _check(status, "evict KV cells")


def token_piece(vocab: Any, token: int, *, special: bool = True) -> bytes:
    """The bytes of text that a token is; special tokens by their names, or else nothing."""
    # Without a buffer, llama.cpp says how long it would have to be.
    size = abs(llama_cpp.llama_token_to_piece(vocab, token, None, 0, 0, special))
    buffer = ctypes.create_string_buffer(size)
    llama_cpp.llama_token_to_piece(vocab, token, buffer, size, 0, special)
    return buffer.raw


def get_state(ctx: Any) -> bytes:
    """The whole state of a context: cells, their compaction and the observed queries."""
    size = llama_cpp.llama_state_get_size(ctx)
    buffer = (ctypes.c_uint8 * size)()
    n = llama_cpp.llama_state_get_data(ctx, buffer, size)
    if n != size:
        raise NativeError(f"llama.cpp wrote {n} of {size} bytes of its state")
    return bytes(buffer)


def set_state(ctx: Any, data: bytes | npt.NDArray[np.uint8]) -> bool:
    """Restore what :func:`get_state` returned; False if it does not fit (the cells are lost)."""
    pointer = np.frombuffer(data, np.uint8).ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
    return bool(llama_cpp.llama_state_set_data(ctx, pointer, len(data)) == len(data))


def set_lora(ctx: Any, adapter: Any, scale: float) -> None:
    """Use one LoRA adapter in a context."""
    adapters = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(adapter)
    if llama_cpp.llama_set_adapters_lora(ctx, adapters, 1, (ctypes.c_float * 1)(scale)):
        raise NativeError("the LoRA adapter cannot be set on a new context")


@dataclass
class Log:
    """What llama.cpp logged, one line each."""

    errors: list[str] = field(default_factory=list)
    infos: list[str] = field(default_factory=list)


@contextlib.contextmanager
def log(*, quiet: bool = False) -> Iterator[Log]:
    """Collect what llama.cpp logs inside the block; ``quiet`` keeps it off the screen."""
    collected = Log()
    lines = {_LOG_LEVEL_ERROR: collected.errors, _LOG_LEVEL_INFO: collected.infos}

    @llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
    def collect(level: int, text: bytes, user_data: ctypes.c_void_p) -> None:
        if level in lines:
            lines[level].append(text.decode(errors="replace").strip())
        if not quiet:
            _show_log(level, text, user_data)

    llama_cpp.llama_log_set(collect, ctypes.c_void_p(0))
    try:
        yield collected
    finally:
        llama_cpp.llama_log_set(_show_log, ctypes.c_void_p(0))


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def _show_log(level: int, text: bytes, user_data: ctypes.c_void_p) -> None:
    """Show llama.cpp's log if ``verbose``, else nothing.

    llama-cpp-python's own callback is off by one in the levels: it takes warnings for errors, and
    shows them whatever is asked for.
    """
    if 0 < llama_cpp._logger.logger.level <= logging.DEBUG and sys.stderr is not None:
        print(text.decode(errors="replace"), end="", flush=True, file=sys.stderr)


llama_cpp.llama_log_set(_show_log, ctypes.c_void_p(0))


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def _show_problems(level: int, text: bytes, user_data: ctypes.c_void_p) -> None:
    if level in (_LOG_LEVEL_WARN, _LOG_LEVEL_ERROR) or "GGML_RPC_DEBUG" in os.environ:
        print(text.decode(errors="replace"), end="", flush=True, file=sys.stderr)


def show_problems() -> None:
    """Show llama.cpp's warnings and errors from now on: for a server, which has nobody to raise."""
    llama_cpp.llama_log_set(_show_problems, ctypes.c_void_p(0))


def doctor() -> dict[str, Any]:
    """What is loaded: for ``capkv doctor`` and bug reports.

    Keys: ``library``, ``patched``, ``abi``, ``features``, ``devices``, ``system_info``,
    ``problems`` (one sentence each).
    """
    from capkv_local.devices import local_devices  # built on this module

    problems: list[str] = []
    abi: int | None = None
    devices: list[dict[str, str]] = []
    with contextlib.suppress(NativeBuildMissing):
        devices = [{"name": d.name, "description": d.description} for d in local_devices()]
    try:
        abi = int(_functions()["llama_memory_evict_abi"]())
    except CapKVError as error:
        problems.append(str(error))
    return {
        "library": library_path(),
        "patched": abi is not None,
        "abi": abi,
        "features": [stat.name.lower() for stat in Stat] if abi is not None else [],
        "devices": devices,
        "system_info": llama_cpp.llama_print_system_info().decode(errors="replace").strip(),
        "problems": problems,
    }


def library(name: str) -> ctypes.CDLL:
    """Another library of the build that is loaded."""
    suffix = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
    prefix = "" if os.name == "nt" else "lib"
    return ctypes.CDLL(str(Path(library_path()).parent / f"{prefix}{name}{suffix}"))
