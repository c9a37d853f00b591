"""The CUDA kernel of ``ggml_leverage_score``, compiled for the CPU (see ``simt/simt.h``)."""

from __future__ import annotations

import ctypes as ct
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType as GGMLType

from lib.patchedtree import patched_tree, read_files
from lib.tools import cxx_compiler

from .ggml import F32, U8
from .leverage import KernelError

KERNEL = "leverage-score.cu"
_SHIM = Path(__file__).parent / "simt"
_CUDA = "ggml/src/ggml-cuda"
_TREE_FILES = (
    *(f"{_CUDA}/{name}" for name in (KERNEL, "leverage-score.cuh", "dequantize.cuh")),
    *(f"{_CUDA}/convert.cuh", "ggml/src/ggml-common.h", "ggml/src/ggml-impl.h"),
    *(f"ggml/include/{name}" for name in ("ggml.h", "gguf.h")),
)
_FLAGS = (
    *("-std=c++17", "-x", "c++", "-shared", "-fPIC", "-fno-strict-aliasing"),
    *("-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"),
    "-w",  # scripts/check-cuda asks the compiler that matters
)
_SHARED = re.compile(
    r"__shared__\s+(?:__align__\((?P<align>\d+)\)\s+)?"
    r"(?P<type>\w+)\s+(?P<name>\w+)\s*(?P<size>(?:\[[^\]]+\])+);"
)


@dataclass(frozen=True)
class Order:
    """How the threads of a block take turns, and on which side of a buffer the guard page is."""

    order: int = 0  # 0: ascending, 1: descending, 2: shuffled at every barrier
    seed: int = 0
    warp: int = 32
    align_end: bool = True


ORDERS = (
    Order(),
    Order(order=1, align_end=False),
    Order(order=2, seed=1),
    Order(order=2, seed=2, warp=64, align_end=False),
)


@functools.cache
def sources() -> dict[str, str]:
    """Text of every file that is compiled, by name: of the patched tree, and of the shim."""
    texts = read_files(patched_tree(), _TREE_FILES)
    ours = {path.name: path.read_text() for path in _SHIM.iterdir() if path.is_file()}
    return {Path(name).name: text for name, text in texts.items()} | ours


def build(folder: Path, texts: Mapping[str, str], optimise: str = "-O2") -> Path:
    """Compile into ``folder``, unless the same was compiled there before.

    Raises
    ------
    RuntimeError
        There is no compiler, or it fails.
    """
    compiler = cxx_compiler()
    if compiler is None:
        raise RuntimeError("no C++ compiler found; install g++")
    content = repr((sorted(texts.items()), _FLAGS, optimise, compiler))
    library = folder / f"{hashlib.sha256(content.encode()).hexdigest()[:16]}.so"
    if library.is_file():
        return library
    with tempfile.TemporaryDirectory() as work:
        for name, text in texts.items():
            if name == KERNEL:
                text = _SHARED.sub(_reference, text)
            Path(work, name).write_text(text)
        command = [compiler, *_FLAGS, optimise, "-I.", "harness.cpp", "-o", library.name]
        done = subprocess.run(command, cwd=work, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}:\n{done.stderr[-4000:]}")
        stage = folder / f"{library.stem}-{os.getpid()}.part"
        shutil.copy(Path(work, library.name), stage)
        stage.replace(library)
    return library


def _reference(array: re.Match[str]) -> str:
    """A shared array as a reference into the memory that the shim fills with NaN."""
    kind, size = array["type"], array["size"]
    align = array["align"] or f"alignof({kind})"
    return f"{kind} (&{array['name']}){size} = simt::shared<{kind}{size}, {align}, __LINE__>();"


class _Call(ct.Structure):
    _fields_ = (
        *((name, ct.c_int32) for name in ("type", "d", "n_head_kv", "n_kv", "n_head")),
        *((name, ct.c_int64) for name in ("nb1", "nb2")),
        *((name, ct.c_float) for name in ("scale", "lambda_")),
        *((name, ct.c_int32) for name in ("order", "warp", "align_end")),
        ("seed", ct.c_uint64),
    )


class Kernel:
    """A compiled kernel; ``leverage_score`` is that of :mod:`ggml` on this kernel."""

    def __init__(self, library: Path) -> None:
        self._function = ct.CDLL(str(library)).simt_leverage_score
        self._function.restype = ct.c_char_p
        self._function.argtypes = [
            ct.POINTER(_Call),
            *(ct.c_void_p, ct.c_size_t, ct.c_size_t, ct.c_void_p, ct.c_void_p),
        ]

    def leverage_score(
        self,
        cache: U8,
        kind: str,
        d: int,
        *,
        weights: F32 | None = None,
        scale: float = 1.0,
        noise: float = 1.0,
        cells: slice = slice(None),
        heads: slice = slice(None),
        order: Order = ORDERS[0],
    ) -> F32:
        """Run the kernel on ``cache[cells, heads]``; see :func:`ggml.leverage_score`.

        The device sees the bytes from the first of the view to the last, and no more.

        Raises
        ------
        KernelError
            An access outside of a buffer, or a barrier that not all threads reach.
        """
        view = cache[cells, heads]
        n_kv, n_head_kv, row = view.shape
        stride = row * cache.shape[1]
        first = cells.indices(len(cache))[0] * stride + heads.indices(cache.shape[1])[0] * row
        n_bytes = (n_kv - 1) * stride + n_head_kv * row
        data = np.ascontiguousarray(cache).reshape(-1)[first : first + n_bytes]
        w = None if weights is None else np.ascontiguousarray(weights, np.float32)
        out = np.empty((n_head_kv, n_kv), np.float32)
        call = _Call(
            *(GGMLType[kind].value, d, n_head_kv, n_kv, 0 if w is None else len(w)),
            *(row, stride, scale, noise),
            *(order.order, order.warp, int(order.align_end), order.seed),
        )
        error = self._function(
            ct.byref(call),
            *(data.ctypes.data, n_bytes, 0),
            *(None if w is None else w.ctypes.data, out.ctypes.data),
        )
        if error is not None:
            raise KernelError(error.decode())
        return out
