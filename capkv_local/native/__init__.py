"""ctypes binding of what ``patches/`` adds to llama.cpp, and of what llama-cpp-python leaves out.

Nothing else touches ctypes, but for :mod:`capkv_local.devices`.
"""

from __future__ import annotations

from capkv_local.native.cache_types import CACHE_TYPES, cache_type, cache_type_name
from capkv_local.native.context import get_state, set_lora, set_state, token_piece
from capkv_local.native.gguf import gguf_layout
from capkv_local.native.kv_cache import KVCache
from capkv_local.native.loading import abi, library, library_path, require
from capkv_local.native.logs import Log, log, show_problems
from capkv_local.native.structs import ABI, F32, I32, Info, Mask, Stat

__all__ = [
    "ABI",
    "CACHE_TYPES",
    "F32",
    "I32",
    "Info",
    "KVCache",
    "Log",
    "Mask",
    "Stat",
    "abi",
    "cache_type",
    "cache_type_name",
    "get_state",
    "gguf_layout",
    "library",
    "library_path",
    "log",
    "require",
    "set_lora",
    "set_state",
    "show_problems",
    "token_piece",
]
