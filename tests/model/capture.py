"""A real model with its queries laid open, to check the native statistics from raw arrays.

Keys and values come from the state that llama.cpp's public API gives; queries are in no public
place, so the scheduler's eval callback copies them while a decode computes them.
"""

from __future__ import annotations

import ctypes as ct
import struct
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from gguf import GGMLQuantizationType, quants
from numpy.typing import NDArray

from capkv_local.native import KVCache, cache_type

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

N_UBATCH = 80
"""Longer chunks are split: one part larger than a window of 64, one smaller."""

_STATE_EXT = 1 << 31  # in the first word of a state that is compacted or observed


class Tensor(ct.Structure):
    """``ggml_tensor``, as far as it is read here."""

    _fields_ = (
        ("type", ct.c_int),
        ("buffer", ct.c_void_p),
        ("ne", ct.c_int64 * 4),
        ("nb", ct.c_size_t * 4),
        ("op", ct.c_int),
        ("op_params", ct.c_int32 * 16),
        ("flags", ct.c_int32),
        ("src", ct.c_void_p * 10),
        ("view_src", ct.c_void_p),
        ("view_offs", ct.c_size_t),
        ("data", ct.c_void_p),
    )


class Session:
    """A context with observed queries, its cells, and every query that was computed in it.

    Parameters
    ----------
    kind
        Type of the K and V cache, a name of :data:`capkv_local.native.CACHE_TYPES`.
    n_window, n_skip
        As :meth:`KVCache.observe`; the mean query is always observed.
    """

    def __init__(
        self,
        path: Path,
        kind: str,
        *,
        n_window: int = 64,
        n_skip: int = 4,
        n_ubatch: int = N_UBATCH,
    ) -> None:
        model_params = llama_cpp.llama_model_default_params()
        model_params.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), model_params)
        self.kind = kind
        self.n_past = 0
        self._lib = llama_cpp.llama_cpp._lib  # exports what the ggml libraries below it export
        self._lib.ggml_get_name.argtypes = self._lib.ggml_op_name.argtypes = None
        self._lib.ggml_get_name.restype = self._lib.ggml_op_name.restype = ct.c_char_p
        self._rows: dict[tuple[str, int], list[F32]] = {}
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = 512, 512, n_ubatch
        params.n_threads = params.n_threads_batch = 2
        params.type_k = params.type_v = cache_type(kind)
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        self._callback = llama_cpp.ggml_backend_sched_eval_callback(self._on_tensor)
        params.cb_eval = self._callback
        self.ctx = llama_cpp.llama_init_from_model(self.model, params)
        self.kv = KVCache(self.ctx)
        self.kv.resize(512)
        self.kv.observe(n_window, mean_query=True, n_skip=n_skip)
        self.info = self.kv.info()

    def close(self) -> None:
        llama_cpp.llama_free(self.ctx)
        llama_cpp.llama_model_free(self.model)

    def decode(self, tokens: list[int]) -> None:
        """Append ``tokens`` in one decode."""
        batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i] = token, self.n_past + i
            batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, 0, False
        assert llama_cpp.llama_decode(self.ctx, batch) == 0
        llama_cpp.llama_batch_free(batch)
        self.n_past += len(tokens)

    def remove(self, n_past: int) -> None:
        """Take the tokens from position ``n_past`` on back, and forget their queries."""
        memory = llama_cpp.llama_get_memory(self.ctx)
        assert llama_cpp.llama_memory_seq_rm(memory, 0, n_past, -1)
        for key, rows in self._rows.items():
            self._rows[key] = [np.concatenate(rows)[:n_past]]
        self.n_past = n_past

    def inv_freq(self) -> F64:
        """Radians per position, [d / 2]."""
        value = ct.create_string_buffer(64)
        llama_cpp.llama_model_meta_val_str(self.model, b"llama.rope.freq_base", value, 64)
        d = self.info.n_embd_head_k
        return np.asarray(float(value.value) ** -(np.arange(0, d, 2) / d), np.float64)

    def queries(self, *, rope: bool) -> F32:
        """All queries so far, before or after RoPE, [n_layer, n_head, n_tokens, d]."""
        op = "ROPE" if rope else "MUL_MAT"
        layers = [np.concatenate(self._rows[op, il]) for il in range(self.info.n_layer)]
        out = np.stack(layers).reshape(len(layers), self.n_past, self.info.n_head, -1)
        return out.swapaxes(1, 2)

    def cells(self) -> tuple[F32, F32]:
        """K and V as the cache stores them, dequantised, [n_layer, n_head_kv, n_cells, d] each.

        0 in cells that a head does not hold. Quantised types are stored rotated by
        :func:`hadamard`.
        """
        size = llama_cpp.llama_state_seq_get_size(self.ctx, 0)
        data = (ct.c_uint8 * size)()
        assert llama_cpp.llama_state_seq_get_data(self.ctx, data, size, 0) == size
        word, per_head, observed, *_, n_compact, _ = struct.unpack_from("<9I", data, 8)
        assert word & _STATE_EXT and per_head and observed
        offset = 8 + 9 * 4
        first = np.zeros((self.info.n_layer, self.info.n_head_kv), np.int64)
        for index in np.ndindex(first.shape):
            (first[index],) = struct.unpack_from("<I", data, offset)
            offset += 4 + 4 * max(0, n_compact - int(first[index]))
        (n_losses,) = struct.unpack_from("<I", data, offset)
        offset += 4 + 8 * n_losses  # two positions for each eviction that took something
        (n_window,) = struct.unpack_from("<I", data, offset + 4)
        n_embd = self.info.n_head * self.info.n_embd_head_k
        # 4 numbers, the count of the mean, positions; then the queries and their sum.
        offset += 24 + 4 * n_window + 4 * self.info.n_layer * n_embd * (n_window + 1)
        (n_cells,) = struct.unpack_from("<I", data, offset)
        offset += 4 + 12 * n_cells  # (position, 1, sequence) of every cell
        shape = (self.info.n_layer, self.info.n_head_kv, n_cells, self.info.n_embd_head_k)
        parts = np.zeros((2, *shape), np.float32)
        for il, part in np.ndindex(self.info.n_layer, 2):
            (row_size,) = struct.unpack_from("<Q", data, offset + 4)
            offset += 12
            for ih in range(self.info.n_head_kv):
                n = n_cells - int(first[il, ih])
                rows = np.frombuffer(data, np.uint8, n * row_size, offset)
                parts[part, il, ih, n_cells - n :] = self._dequantize(rows.reshape(n, row_size))
                offset += n * row_size
        assert offset == size
        return parts[0], parts[1]

    def _dequantize(self, rows: NDArray[np.uint8]) -> F32:
        return quants.dequantize(rows, GGMLQuantizationType[self.kind.upper()])

    def _on_tensor(self, address: int, ask: bool, user_data: Any) -> bool:
        """Copy queries as soon as they are computed; ``ask``: is this tensor wanted?"""
        name: bytes = self._lib.ggml_get_name(ct.c_void_p(address))
        if not name.startswith(b"Qcur-"):
            return not ask
        tensor = Tensor.from_address(address)
        # The product with the weights, then a reshape of it, then RoPE: all of one name.
        op = self._lib.ggml_op_name(tensor.op).decode()
        if op not in ("MUL_MAT", "ROPE"):
            return not ask
        if not ask:
            out = np.empty(int(np.prod(tensor.ne[:])), np.float32)
            assert tensor.nb[0] == 4 and tensor.nb[2] == 4 * tensor.ne[0] * tensor.ne[1]
            self._lib.ggml_backend_tensor_get(
                ct.c_void_p(address),
                ct.c_void_p(out.ctypes.data),
                ct.c_size_t(0),
                ct.c_size_t(out.nbytes),
            )
            n_embd = self.info.n_head * self.info.n_embd_head_k
            self._rows.setdefault((op, int(name[5:])), []).append(out.reshape(-1, n_embd))
        return True


def hadamard(d: int) -> F64:
    """The symmetric orthonormal matrix that quantised keys and values are rotated by."""
    out = np.ones((1, 1))
    while len(out) < d:
        out = np.block([[out, out], [out, -out]])
    return np.asarray(out / np.sqrt(d), np.float64)
