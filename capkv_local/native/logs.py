"""What llama.cpp logs: collected, shown or kept off the screen."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

import llama_cpp
import llama_cpp._logger

_LOG_LEVEL_INFO = 2  # GGML_LOG_LEVEL_INFO
_LOG_LEVEL_WARN = 3
_LOG_LEVEL_ERROR = 4


@dataclass
class Log:
    """What llama.cpp logged, one line each."""

    errors: list[str] = field(default_factory=list)
    infos: list[str] = field(default_factory=list)


@contextlib.contextmanager
def log(*, quiet: bool = False) -> Iterator[Log]:
    """Collect what llama.cpp logs inside the block; ``quiet`` keeps it off the screen."""
    collected = Log()
    lines = {_LOG_LEVEL_ERROR: collected.errors, _LOG_LEVEL_INFO: collected.infos}

    @llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
    def collect(level: int, text: bytes, user_data: ctypes.c_void_p) -> None:
        if level in lines:
            lines[level].append(text.decode(errors="replace").strip())
        if not quiet:
            _show_log(level, text, user_data)

    llama_cpp.llama_log_set(collect, ctypes.c_void_p(0))
    try:
        yield collected
    finally:
        llama_cpp.llama_log_set(_show_log, ctypes.c_void_p(0))


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def _show_log(level: int, text: bytes, user_data: ctypes.c_void_p) -> None:
    """Show llama.cpp's log if ``verbose``, else nothing.

    llama-cpp-python's own callback is off by one in the levels: it takes warnings for errors, and
    shows them whatever is asked for.
    """
    if 0 < llama_cpp._logger.logger.level <= logging.DEBUG and sys.stderr is not None:
        print(text.decode(errors="replace"), end="", flush=True, file=sys.stderr)


llama_cpp.llama_log_set(_show_log, ctypes.c_void_p(0))


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def _show_problems(level: int, text: bytes, user_data: ctypes.c_void_p) -> None:
    if level in (_LOG_LEVEL_WARN, _LOG_LEVEL_ERROR) or "GGML_RPC_DEBUG" in os.environ:
        print(text.decode(errors="replace"), end="", flush=True, file=sys.stderr)


def show_problems() -> None:
    """Show llama.cpp's warnings and errors from now on: for a server, which has nobody to raise."""
    llama_cpp.llama_log_set(_show_problems, ctypes.c_void_p(0))
