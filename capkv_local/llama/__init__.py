"""``Llama``: llama-cpp-python's class with a KV cache that stays as small as its budget."""

from __future__ import annotations

from capkv_local.llama.llama import Budget, CompactedState, Llama, Observe

__all__ = ["Budget", "CompactedState", "Llama", "Observe"]
