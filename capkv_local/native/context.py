"""What a context or a vocabulary is asked beside its cells: state, adapters, pieces of text."""

from __future__ import annotations

import ctypes
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt

from capkv_local.errors import NativeError


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
