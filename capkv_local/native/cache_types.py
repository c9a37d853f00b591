"""Types of K and V in a cache, by ggml's names."""

from __future__ import annotations

import llama_cpp

from capkv_local.errors import UnsupportedModel

CACHE_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")

_GGML_TYPE_BF16 = 30


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
