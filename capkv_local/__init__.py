"""Long documents on small memory: per-head KV cache eviction for llama.cpp.

>>> import capkv_local
>>> capkv_local.__version__
'0.1.0'
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from capkv_local.cache.stats import KVCacheStats
    from capkv_local.chat import DocumentChat
    from capkv_local.errors import (
        BudgetError,
        CapKVError,
        ContextOverflow,
        ContextWarning,
        DocumentError,
        ModelFileError,
        NativeBuildMissing,
        NativeError,
        OutOfMemory,
        PolicyError,
        ServerError,
        StateError,
        UnsupportedModel,
    )
    from capkv_local.llama import Llama
    from capkv_local.policies import BasePolicy, KVStats, Policy, register

# Loaded on first use: `capkv --help` and error classes need no model library.
_HOMES = {
    "KVCacheStats": "cache.stats",
    "DocumentChat": "chat",
    "Llama": "llama",
    **dict.fromkeys(("BasePolicy", "KVStats", "Policy", "register"), "policies"),
    **dict.fromkeys(
        (
            "BudgetError",
            "CapKVError",
            "ContextOverflow",
            "ContextWarning",
            "DocumentError",
            "ModelFileError",
            "NativeBuildMissing",
            "NativeError",
            "OutOfMemory",
            "PolicyError",
            "ServerError",
            "StateError",
            "UnsupportedModel",
        ),
        "errors",
    ),
}

__all__ = [
    "BasePolicy",
    "BudgetError",
    "CapKVError",
    "ContextOverflow",
    "ContextWarning",
    "DocumentChat",
    "DocumentError",
    "KVCacheStats",
    "KVStats",
    "Llama",
    "ModelFileError",
    "NativeBuildMissing",
    "NativeError",
    "OutOfMemory",
    "Policy",
    "PolicyError",
    "ServerError",
    "StateError",
    "UnsupportedModel",
    "__version__",
    "register",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
