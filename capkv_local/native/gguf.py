"""Where the tensors of a GGUF lie."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from capkv_local.native.loading import library
from capkv_local.native.logs import log


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
