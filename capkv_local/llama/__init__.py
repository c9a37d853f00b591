"""``Llama``: llama-cpp-python's class with a KV cache that stays as small as its budget."""

from __future__ import annotations

from capkv_local.llama.arguments import Budget, Observe
from capkv_local.llama.llama import Llama
from capkv_local.llama.state import CompactedState

__all__ = ["Budget", "CompactedState", "Llama", "Observe"]
