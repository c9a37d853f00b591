"""What ``include/llama-kv-evict.h`` of the patched tree declares: codes, structures, signatures."""

from __future__ import annotations

import ctypes
import enum
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]

ABI = 5

# llama_memory_evict_status: the codes that say what kind of model or setting cannot be evicted
OK = 0
UNSUPPORTED = (*range(-13, -1), -21)  # ERR_BLOCKS .. ERR_NO_MEMORY, ERR_SPLIT
ERR_FLASH_ATTN = -9
ERR_ALLOC = -19


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


class RawInfo(ctypes.Structure):
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


class ObserveParams(ctypes.Structure):
    _fields_ = [
        ("n_window", ctypes.c_uint32),
        ("mean_query", ctypes.c_bool),
        ("n_skip", ctypes.c_int32),
    ]


class ScoreParams(ctypes.Structure):
    _fields_ = [
        ("stat", ctypes.c_int),
        ("n_cells", ctypes.c_uint32),
        ("n_queries", ctypes.c_uint32),
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


SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "llama_memory_evict_status_str": (ctypes.c_char_p, [ctypes.c_int32]),
    "llama_memory_evict_abi": (ctypes.c_int32, []),
    "llama_memory_evict_supported": (ctypes.c_int32, [ctypes.c_void_p]),
    "llama_memory_evict_get_info": (ctypes.c_int32, [ctypes.c_void_p, ctypes.POINTER(RawInfo)]),
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
    "llama_memory_observe": (ctypes.c_int32, [ctypes.c_void_p, ObserveParams]),
    "llama_memory_observe_set_mean": (ctypes.c_int32, [ctypes.c_void_p, ctypes.c_bool]),
    "llama_memory_observe_attn": (
        ctypes.c_int32,
        [ctypes.c_void_p, ctypes.c_int, ctypes.c_int32],
    ),
    "llama_memory_get_attn": (
        ctypes.c_int32,
        [ctypes.c_void_p, ctypes.c_uint32, ctypes.c_void_p, ctypes.c_size_t],
    ),
    "llama_memory_score": (
        ctypes.c_int32,
        [ctypes.c_void_p, ScoreParams, ctypes.c_void_p, ctypes.c_size_t],
    ),
    "llama_memory_evict": (
        ctypes.c_int32,
        [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t],
    ),
}
