"""The llama library that is loaded, and the functions that ``patches/`` adds to it."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp

from capkv_local.errors import NativeBuildMissing, NativeError, UnsupportedModel
from capkv_local.native.structs import ABI, ERR_FLASH_ATTN, OK, SIGNATURES, UNSUPPORTED


def library_path() -> str:
    """Path of the loaded llama library."""
    return str(llama_cpp.llama_cpp._lib._name)


def library(name: str) -> ctypes.CDLL:
    """Another library of the build that is loaded."""
    suffix = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
    prefix = "" if os.name == "nt" else "lib"
    return ctypes.CDLL(str(Path(library_path()).parent / f"{prefix}{name}{suffix}"))


@functools.cache
def functions() -> dict[str, Callable[..., Any]]:
    """The added functions by name.

    Raises
    ------
    NativeBuildMissing
        The library is a stock one, or of another version.
    """
    lib = llama_cpp.llama_cpp._lib
    found: dict[str, Callable[..., Any]] = {}
    for name, (restype, argtypes) in SIGNATURES.items():
        try:
            function = getattr(lib, name)
        except AttributeError:
            raise NativeBuildMissing(
                f"{library_path()} is a stock llama.cpp without {name}(): "
                "build the patched one with scripts/build, or use kv_policy=None"
            ) from None
        function.restype = restype
        function.argtypes = argtypes
        found[name] = function
    version = found["llama_memory_evict_abi"]()
    if version != ABI:
        raise NativeBuildMissing(
            f"{library_path()} has version {version} of the eviction functions, this package needs "
            f"{ABI}: rebuild with scripts/build"
        )
    return found


def require() -> None:
    """Raise :class:`NativeBuildMissing` unless the loaded library is the patched one."""
    functions()


def abi() -> int:
    """Version of the added functions in the loaded library; raises as :func:`functions`."""
    return int(functions()["llama_memory_evict_abi"]())


def check(status: int, what: str) -> None:
    """Raise for a status below 0: :class:`UnsupportedModel` or :class:`NativeError`."""
    if status == OK:
        return
    reason = _status_text(status)
    if status == ERR_FLASH_ATTN:
        reason += " (flash_attn=True where the model has it)"
    if status in UNSUPPORTED:
        raise UnsupportedModel(f"cannot {what} because {reason}; use kv_policy=None")
    raise NativeError(f"cannot {what}: {reason} (status {status})")


def _status_text(status: int) -> str:
    text: bytes = functions()["llama_memory_evict_status_str"](status)
    return text.decode()
