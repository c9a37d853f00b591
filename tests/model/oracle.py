"""Eviction from outside: cells are cut and pasted in the state that llama.cpp's public API gives.

Independent of the native eviction: it runs on a stock context (``kv_policy=None``) and moves rows
in Python. The layout is that of ``llama_kv_cache::state_write`` for one sequence.
"""

from __future__ import annotations

import ctypes
import struct
from dataclasses import dataclass
from typing import Any

import llama_cpp
import numpy as np

I32 = np.ndarray[Any, np.dtype[np.int32]]
Bytes = np.ndarray[Any, np.dtype[np.uint8]]
Mask = np.ndarray[Any, np.dtype[np.bool_]]


@dataclass
class SequenceState:
    """One sequence: positions ``[n_cells]``; rows ``[n_layer][n_cells, row bytes]`` of K and V."""

    head: bytes
    pos: I32
    k: list[Bytes]
    v: list[Bytes]
    k_type: int
    v_type: int


def read(ctx: Any) -> SequenceState:
    size = llama_cpp.llama_state_seq_get_size(ctx, 0)
    buffer = (ctypes.c_uint8 * size)()
    assert llama_cpp.llama_state_seq_get_data(ctx, buffer, size, 0) == size
    data = bytes(buffer)
    n_stream, n_cells = struct.unpack_from("<II", data, 8)
    assert n_stream == 1, "the oracle reads stock states only"
    cells = np.frombuffer(data, dtype="<i4", count=3 * n_cells, offset=16).reshape(n_cells, 3)
    offset = 16 + 12 * n_cells
    v_trans, n_layer = struct.unpack_from("<II", data, offset)
    assert v_trans == 0
    offset += 8
    parts: list[list[Bytes]] = [[], []]
    types = [0, 0]
    for part in range(2):
        for _ in range(n_layer):
            types[part], row_size = struct.unpack_from("<iQ", data, offset)
            offset += 12
            rows = np.frombuffer(data, np.uint8, n_cells * row_size, offset)
            parts[part].append(rows.reshape(n_cells, row_size).copy())
            offset += n_cells * row_size
    assert offset == size
    return SequenceState(data[:8], cells[:, 0].copy(), parts[0], parts[1], types[0], types[1])


def write(ctx: Any, state: SequenceState) -> None:
    n_cells = len(state.pos)
    out = [state.head, struct.pack("<II", 1, n_cells)]
    cells = np.zeros((n_cells, 3), dtype="<i4")
    cells[:, 0], cells[:, 1] = state.pos, 1
    out += [cells.tobytes(), struct.pack("<II", 0, len(state.k))]
    for rows, kind in ((state.k, state.k_type), (state.v, state.v_type)):
        for layer in rows:
            out += [struct.pack("<iQ", kind, layer.shape[1]), layer.tobytes()]
    data = b"".join(out)
    buffer = (ctypes.c_uint8 * len(data)).from_buffer_copy(data)
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(ctx), True)
    assert llama_cpp.llama_state_seq_set_data(ctx, buffer, len(data), 0) == len(data)


def evict(state: SequenceState, keep: I32) -> SequenceState:
    """Keep the cells ``keep[n_layer, n_head_kv, n_keep]``, every head its own."""
    n_layer, n_head, n_keep = keep.shape

    def cut(rows: Bytes, lists: I32) -> Bytes:
        heads = rows.reshape(len(rows), n_head, -1)  # [n_cells, n_head_kv, bytes]
        return np.stack([heads[lists[h], h] for h in range(n_head)], axis=1).reshape(n_keep, -1)

    return SequenceState(
        head=state.head,
        pos=state.pos[keep.max(axis=(0, 1))],
        k=[cut(state.k[layer], keep[layer]) for layer in range(n_layer)],
        v=[cut(state.v[layer], keep[layer]) for layer in range(n_layer)],
        k_type=state.k_type,
        v_type=state.v_type,
    )


def as_mask(keep: I32, n_cells: int) -> Mask:
    """Keep lists ``[n_layer, n_head_kv, n]`` as a mask ``[n_layer, n_head_kv, n_cells]``."""
    mask = np.zeros((*keep.shape[:2], n_cells), np.bool_)
    np.put_along_axis(mask, keep, True, axis=-1)
    return mask


def random_mask(
    rng: np.random.Generator, held: Mask, counts: np.ndarray[Any, Any] | None = None
) -> Mask:
    """Some of the tokens that are held, the last one of each head among them.

    ``counts[n_layer, n_head_kv]`` of them; without, any number from 1 to all, its own in each head.
    """
    keep = np.zeros_like(held)
    for head in np.ndindex(*held.shape[:2]):
        tokens = np.flatnonzero(held[head])
        n = len(tokens)
        if counts is not None:
            n = min(n, int(counts[head]))
        elif (case := rng.random()) < 0.9:
            n = 1 if case < 0.1 else int(rng.integers(1, n + 1))
        keep[head][rng.choice(tokens[:-1], n - 1, replace=False)] = True
        keep[head][tokens[-1]] = True
    return keep


def random_keep(rng: np.random.Generator, shape: tuple[int, int], n_cells: int, n: int) -> I32:
    """Random ascending keep lists ``[n_layer, n_head_kv, n]`` that hold the last cell."""
    lists = [
        np.sort(np.append(rng.choice(n_cells - 1, n - 1, replace=False), n_cells - 1))
        for _ in range(shape[0] * shape[1])
    ]
    return np.array(lists, dtype=np.int32).reshape(*shape, n)
