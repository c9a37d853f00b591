"""Eviction policies, one per file; importing this package registers them all.

>>> from capkv_local.policies import policy_names
>>> "capkv" in policy_names()
True
"""

from __future__ import annotations

import importlib
import pkgutil

from capkv_local.policies.base import (
    F32,
    BasePolicy,
    KVStats,
    Policy,
    get_policy,
    policy_names,
    register,
)

__all__ = [
    "F32",
    "BasePolicy",
    "KVStats",
    "Policy",
    "get_policy",
    "policy_names",
    "register",
]

# A policy is added by adding a file: whatever lies in this folder registers itself here.
for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
