"""The CUDA kernel of ``ggml_leverage_score``, compiled for the CPU (see ``simt/simt.h``)."""

from __future__ import annotations

import ctypes as ct
import functools
import hashlib
import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType as GGMLType
from lib import sdist
from lib.config import cache_root
from lib.patchset import Tree, apply_series
from lib.series import load_series
from lib.tools import cxx_compiler

from .ggml import F32, U8

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
    *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-unused-function"),
    "-Wno-unused-variable",  # the tables of ggml-common.h
)
_SHARED = re.compile(r"__shared__\s+(\w+)\s+(\w+)\s*((?:\[[^\]]+\])+);")


class KernelError(Exception):
    """The kernel did what would be undefined on a GPU."""


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
    """Text of every file that is compiled, by name.

    They are those of the tree that ``CAPKV_LLAMA_DIR`` names, or of the pinned base with our
    series applied (nothing is written).
    """
    if named := os.environ.get("CAPKV_LLAMA_DIR"):
        tree = Tree(Path(named))
    else:
        series = load_series()
        base = sdist.base_path(cache_root(), series) / "vendor" / "llama.cpp"
        tree, _ = apply_series(base, series.patches)
    texts = {}
    for name in _TREE_FILES:
        text = tree.read(name)
        if text is None:
            raise FileNotFoundError(f"{tree.root} with our patches has no {name}")
        texts[Path(name).name] = text
    return texts | {path.name: path.read_text() for path in _SHIM.iterdir() if path.is_file()}


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
    work = folder / hashlib.sha256(content.encode()).hexdigest()[:16]
    library = work / "simt.so"
    if library.is_file():
        return library
    work.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        if name == KERNEL:
            text = _SHARED.sub(r"\1 (&\2)\3 = simt::shared<\1\3, __LINE__>();", text)
        (work / name).write_text(text)
    stage = work / f"{os.getpid()}.so"
    command = [compiler, *_FLAGS, optimise, "-I.", "harness.cpp", "-o", stage.name]
    done = subprocess.run(command, cwd=work, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} in {work}:\n{done.stderr[-4000:]}")
    stage.replace(library)
    return library


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
        first = (cells.indices(len(cache))[0] * cache.shape[1] + heads.indices(cache.shape[1])[0]) * row
        stride = row * cache.shape[1]
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
