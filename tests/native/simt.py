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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType as GGMLType

from lib.patchedtree import patched_tree, read_files
from lib.tools import cxx_compiler

from .ggml import CACHE_TYPES, F32, U8
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


def defined(texts: Mapping[str, str], name: str, value: str) -> dict[str, str]:
    """Return the sources with another value of a constant."""
    text, n = re.subn(rf"(#define {name}\s+).*", rf"\g<1>{value}", texts[KERNEL])
    assert n == 1
    return {**texts, KERNEL: text}


def only_types(texts: Mapping[str, str], *kinds: str) -> dict[str, str]:
    """Return the sources for a few cache types, which compile in a part of the time."""
    pattern = (
        rf"        case GGML_TYPE_(?!(?:{'|'.join(kinds)}):)\w+:\n"
        r"            leverage_score_cuda.*\n +break;\n"
    )
    text, n = re.subn(pattern, "", texts[KERNEL])
    assert n == len(CACHE_TYPES) - len(kinds)
    return {**texts, KERNEL: text}


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


@dataclass(frozen=True)
class Score:
    """An op of a graph, on ``cache[cells, heads]``; see :func:`ggml.leverage_score`.

    The device sees the bytes from the first of the view to the last, and no more.
    """

    cache: U8
    kind: str
    d: int
    weights: F32 | None = None
    scale: float = 1.0
    noise: float = 1.0
    cells: slice = field(default_factory=lambda: slice(None))
    heads: slice = field(default_factory=lambda: slice(None))
    weights_of: int | None = None  # node whose result are the weights, [n_head_kv, n_kv]
    over: int | None = None  # node whose weights lie where the result goes
    op: str = "leverage_score"  # another one does nothing
    is_computed: bool = True


class _Options(ct.Structure):
    _fields_ = (
        *((name, ct.c_int32) for name in ("order", "warp", "align_end", "fused")),
        ("seed", ct.c_uint64),
    )


class _Node(ct.Structure):
    _fields_ = (
        ("op", ct.c_char_p),
        *((name, ct.c_int32) for name in ("is_computed", "type", "d", "n_head_kv", "n_kv")),
        *((name, ct.c_int32) for name in ("n_head", "w_of", "over")),
        *((name, ct.c_float) for name in ("scale", "lambda_")),
        *((name, ct.c_int64) for name in ("nb1", "nb2")),
        *(("u", ct.c_void_p), ("n_u", ct.c_size_t), ("w", ct.c_void_p), ("dst", ct.c_void_p)),
    )


class Kernel:
    """A compiled kernel; ``leverage_score`` is that of :mod:`ggml` on this kernel."""

    def __init__(self, library: Path) -> None:
        self._function = ct.CDLL(str(library)).simt_graph
        self._function.restype = ct.c_char_p
        self._function.argtypes = [
            *(ct.POINTER(_Options), ct.POINTER(_Node), ct.c_int, ct.POINTER(ct.c_int))
        ]

    def leverage_score(
        self, cache: U8, kind: str, d: int, *, order: Order = ORDERS[0], **how: Any
    ) -> F32:
        """Run one op; ``how`` is the rest of a :class:`Score`.

        Raises
        ------
        KernelError
            An access outside of a buffer, or a barrier that not all threads reach.
        """
        results, _ = self.graph([Score(cache, kind, d, **how)], order=order)
        return results[0]

    def graph(
        self, nodes: Sequence[Score], *, fused: bool = True, order: Order = ORDERS[0]
    ) -> tuple[list[F32], int]:
        """Run nodes as the backend does: their results, and how many kernels were launched.

        Raises
        ------
        KernelError
            As for :meth:`leverage_score`.
        """
        held: list[object] = []  # what the nodes point to
        results = []
        calls = (_Node * len(nodes))()
        for i, node in enumerate(nodes):
            n_kv, n_head_kv, row = node.cache[node.cells, node.heads].shape
            n, n_heads = node.cache.shape[:2]
            first = node.cells.indices(n)[0] * n_heads + node.heads.indices(n_heads)[0]
            n_bytes = max(0, (n_kv - 1) * n_heads * row + n_head_kv * row)
            data = np.ascontiguousarray(node.cache).reshape(-1)[first * row :][:n_bytes]
            w = None if node.weights is None else np.ascontiguousarray(node.weights, np.float32)
            out = np.empty((n_head_kv, n_kv), np.float32)
            n_head = n_head_kv if w is None else len(w)
            calls[i] = _Node(
                *(node.op.encode(), int(node.is_computed), GGMLType[node.kind].value, node.d),
                *(n_head_kv, n_kv, 0 if w is None and node.weights_of is None else n_head),
                *(-1 if index is None else index for index in (node.weights_of, node.over)),
                *(node.scale, node.noise, row, n_heads * row, data.ctypes.data, n_bytes),
                *(None if w is None else w.ctypes.data, out.ctypes.data),
            )
            held += [data, w]
            results.append(out)
        options = _Options(order.order, order.warp, int(order.align_end), int(fused), order.seed)
        n_launches = ct.c_int()
        error = self._function(ct.byref(options), calls, len(nodes), ct.byref(n_launches))
        if error is not None:
            raise KernelError(error.decode())
        return results, n_launches.value
