"""ggml's Metal backend with our kernel, compiled for the CPU (see ``metal/device.cpp``).

The backend is the real one but for its Objective-C part: the graph is allocated, encoded and
synchronised by the code that runs on a Mac, and the kernels are those of its ``.metal`` file.
"""

from __future__ import annotations

import ctypes as ct
import functools
import hashlib
import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType as GGMLType

from lib import sdist
from lib.config import cache_root
from lib.patchset import Tree, apply_series
from lib.series import load_series
from lib.tools import cxx_compiler

from . import ggml
from .ggml import F32, U8
from .msl import translate

KERNEL = "leverage_score.metal"
_SHIM = Path(__file__).parent / "metal"
_METAL = "ggml/src/ggml-metal"
_FOLDERS = ("ggml/include", "ggml/src", _METAL, f"{_METAL}/kernels")
_UNITS = ("", "-common", "-device", "-fusion", "-ops", "-tuning")

_CXX = ("-std=c++17", "-fPIC", "-fno-gnu-unique", "-I.", "-DGGML_METAL_HAS_BF16")
# Theirs: as it stands in a build of a loadable backend; <memory> comes with other headers on a Mac.
_HOST = (*_CXX, "-O0", "-w", "-include", "memory", "-DGGML_BACKEND_DL", "-DGGML_BACKEND_BUILD")
_OURS = (*_CXX, "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unused-function")
# Kernels: Metal's default is fast math, so that NaN must not be relied on.
_WARNINGS = ("-Wno-unused-variable", "-Wno-unused-parameter", "-Wno-unknown-pragmas")
_FAST = (*_OURS, *_WARNINGS, "-Wno-literal-suffix", "-ffast-math", "-march=native")


class KernelError(Exception):
    """The kernel or its host code did what would be undefined on a GPU."""


@functools.cache
def sources() -> dict[str, str]:
    """Text of every file that may be compiled, by name.

    They are those of the tree that ``CAPKV_LLAMA_DIR`` names, or of the pinned base with our
    series applied (nothing is written).
    """
    if named := os.environ.get("CAPKV_LLAMA_DIR"):
        tree = Tree(Path(named))
    else:
        series = load_series()
        base = sdist.base_path(cache_root(), series) / "vendor" / "llama.cpp"
        tree, _ = apply_series(base, series.patches)
    paths = {f"{folder}/{p.name}" for folder in _FOLDERS for p in (tree.root / folder).iterdir()}
    paths |= {path for path in tree.changes if path.rpartition("/")[0] in _FOLDERS}
    texts = {}
    for path in sorted(paths):
        name = Path(path).name
        host = path.startswith(_METAL) and name.endswith((".cpp", ".m", ".txt"))
        if (host or name.endswith((".h", ".metal"))) and (text := tree.read(path)) is not None:
            texts[name] = text
    if KERNEL not in texts:
        raise FileNotFoundError(f"{tree.root} with our patches has no {_METAL}/kernels/{KERNEL}")
    return texts | {path.name: path.read_text() for path in _SHIM.iterdir() if path.is_file()}


def build(
    texts: Mapping[str, str],
    kernels: Mapping[str, str] | None = None,
    *,
    folder: Path | None = None,
    optimise: str = "-O2",
) -> Path:
    """Compile the backend, but for what was compiled before.

    Parameters
    ----------
    texts
        As ``sources`` returns them, or with mistakes.
    kernels
        Files of kernels, by name, if not only and all of ours.
    folder
        Where what differs from ``sources`` goes, if it is not to be kept.
    optimise
        Of the kernels.

    Raises
    ------
    RuntimeError
        There is no compiler, or it fails.
    """
    compiler = cxx_compiler()
    if compiler is None:
        raise RuntimeError("no C++ compiler found; install g++")
    kernels = {KERNEL: texts[KERNEL]} if kernels is None else kernels
    headers = {name: text for name, text in texts.items() if name.endswith(".h")}
    headers["metal_stdlib"] = texts["metal_stdlib"]
    headers["supports_op.h"] = _supports_op(texts["ggml-metal-device.m"])
    units: dict[str, Sequence[str]] = {f"ggml-metal{unit}.cpp": _HOST for unit in _UNITS} | {
        "device.cpp": _OURS
    }
    cache = cache_root() / "shim" / "metal"
    folder = folder or cache
    objects = []
    for name, flags in units.items():
        where = cache if texts[name] == sources()[name] else folder
        objects.append(_compile(compiler, flags, headers, name, texts[name], where))
    for name, text in kernels.items():
        source = translate(text, name)
        fast = (*_FAST, optimise)
        objects.append(_compile(compiler, fast, headers, f"{name}.cpp", source, folder))
    libraries = ggml.library_folder()
    assert libraries is not None
    key = hashlib.sha256(repr((objects, libraries)).encode()).hexdigest()[:16]
    library = folder / f"{key}.so"
    if not library.is_file():
        stage = library.with_suffix(f".{os.getpid()}")
        link = ["-shared", "-Wl,-Bsymbolic", "-Wl,-z,defs", *map(str, objects)]
        _run([compiler, *link, f"-L{libraries}", "-lggml-base", "-o", str(stage)], folder)
        stage.replace(library)
    return library


def _supports_op(device: str) -> str:
    """Return what the Objective-C part says about ops, in plain C."""
    functions = ("static bool ggml_metal_supports_mul_mat_op", "bool ggml_metal_device_supports_op")
    texts = []
    for function in functions:
        found = re.search(rf"^{function}\(.*?^}}$", device, re.M | re.S)
        assert found is not None, function
        texts.append(found[0])
    return "\n\n".join(texts)


def _compile(
    compiler: str,
    flags: Sequence[str],
    headers: Mapping[str, str],
    name: str,
    text: str,
    folder: Path,
) -> Path:
    """Return the object; what is compiled, and how, is in its name."""
    included = repr(sorted(headers.items()))
    content = repr((compiler, flags, included, name, text))
    work = folder / hashlib.sha256(included.encode()).hexdigest()[:16]
    target = work / f"{hashlib.sha256(content.encode()).hexdigest()[:16]}.o"
    if target.is_file():
        return target
    work.mkdir(parents=True, exist_ok=True)
    for header, header_text in headers.items():
        if not (work / header).is_file():
            (work / header).write_text(header_text)
    source = target.with_suffix(f".{os.getpid()}.cpp")
    source.write_text(text)
    stage = target.with_suffix(f".{os.getpid()}")
    _run([compiler, *flags, "-c", source.name, "-o", stage.name], work)
    source.unlink()
    stage.replace(target)
    return target


def _run(command: Sequence[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} in {folder}:\n{done.stderr[-4000:]}")


@dataclass(frozen=True)
class Order:
    """How threads, threadgroups and dispatches that no barrier separates take turns."""

    order: int = 0  # 0: ascending, 1: descending, 2: shuffled at every barrier
    seed: int = 0


ORDERS = (Order(), Order(1), Order(2, 1), Order(2, 2))


@dataclass(frozen=True)
class Job:
    """One op of a graph; see :func:`ggml.leverage_score`.

    The weights may be the result of an earlier job, by its number.
    """

    cache: U8
    kind: str
    d: int
    weights: F32 | int | None = None
    scale: float = 1.0
    noise: float = 1.0
    cells: slice = field(default_factory=lambda: slice(None))
    heads: slice = field(default_factory=lambda: slice(None))


_P, _I64, _SIZE, _INT = ct.c_void_p, ct.c_int64, ct.c_size_t, ct.c_int
_BACKEND: dict[str, tuple[Any, list[Any]]] = {
    "ggml_new_tensor_3d": (_P, [_P, _INT, *[_I64] * 3]),
    "ggml_lightning_indexer": (_P, [_P] * 5),
    "ggml_backend_reg_dev_get": (_P, [_P, _SIZE]),
    "ggml_backend_dev_init": (_P, [_P, _P]),
    "ggml_backend_free": (None, [_P]),
    "ggml_backend_supports_op": (ct.c_bool, [_P, _P]),
    "ggml_backend_alloc_ctx_tensors": (_P, [_P, _P]),
    "ggml_backend_buffer_free": (None, [_P]),
    "ggml_backend_tensor_set": (None, [_P, _P, _SIZE, _SIZE]),
    "ggml_backend_tensor_get": (None, [_P, _P, _SIZE, _SIZE]),
    "ggml_backend_graph_compute": (_INT, [_P, _P]),
}


class Metal:
    """The backend in a compiled library."""

    def __init__(self, library: Path) -> None:
        folder = ggml.library_folder()
        assert folder is not None
        ggml.load()
        base = ct.CDLL(str(folder / "libggml-base.so"))
        self.c = dict(ggml.load())
        for name, (result, arguments) in _BACKEND.items():
            function = getattr(base, name)
            function.restype, function.argtypes = result, arguments
            self.c[name] = function
        self._lib = ct.CDLL(str(library))
        self._lib.ggml_backend_init.restype = _P
        self._lib.metal_options.argtypes = [_INT, ct.c_uint64]
        self._lib.metal_error.restype = ct.c_char_p
        self._lib.metal_set_has_bfloat.argtypes = [ct.c_bool]
        device = self.c["ggml_backend_reg_dev_get"](self._lib.ggml_backend_init(), 0)
        self._backend = self.c["ggml_backend_dev_init"](device, None)

    @property
    def counters(self) -> dict[str, int]:
        """What the last graph took: dispatches, barriers and the most threadgroup memory."""
        names = ("n_dispatch", "n_barrier", "max_shmem")
        return {name: getattr(self._lib, f"metal_{name}")() for name in names}

    def leverage_score(
        self, cache: U8, kind: str, d: int, *, order: Order = ORDERS[0], **options: Any
    ) -> F32:
        """Run one op; the options are those of :class:`Job`."""
        return self.run([Job(cache, kind, d, **options)], order)[0]

    def supports(self, job: Job, *, has_bfloat: bool = True) -> bool:
        """Whether the backend takes the op, on a GPU that knows bfloat or not."""
        self._lib.metal_set_has_bfloat(has_bfloat)
        ctx = self.context()
        try:
            out, _ = self._build(ctx, job, [])
            return bool(self.c["ggml_backend_supports_op"](self._backend, out))
        finally:
            self._lib.metal_set_has_bfloat(True)
            self.c["ggml_free"](ctx)

    def run(self, jobs: Sequence[Job], order: Order = ORDERS[0]) -> list[F32]:
        """Run a graph and return the scores of every job, [n_head_kv, n_kv]."""
        ctx = self.context()
        outs: list[tuple[int, tuple[int, ...]]] = []
        inputs: list[tuple[int, Any]] = []
        for job in jobs:
            out, new = self._build(ctx, job, [tensor for tensor, _ in outs])
            n_kv, n_head_kv, _ = job.cache[job.cells, job.heads].shape
            outs.append((out, (n_head_kv, n_kv)))
            inputs += new
        return self.compute(ctx, inputs, outs, order)

    def compute(
        self,
        ctx: int,
        inputs: Sequence[tuple[int, Any]],
        outs: Sequence[tuple[int, tuple[int, ...]]],
        order: Order = ORDERS[0],
    ) -> list[F32]:
        """Compute tensors of a context, which is freed.

        Raises
        ------
        KernelError
            A write behind a buffer, a barrier that not all threads reach, and the like.
        """
        c, buffer = self.c, None
        try:
            graph = c["ggml_new_graph"](ctx)
            for out, _ in outs:
                assert c["ggml_backend_supports_op"](self._backend, out)
                c["ggml_build_forward_expand"](graph, out)
            buffer = c["ggml_backend_alloc_ctx_tensors"](ctx, self._backend)
            for tensor, array in inputs:
                array = np.ascontiguousarray(array)
                c["ggml_backend_tensor_set"](tensor, array.ctypes.data, 0, array.nbytes)
            self._lib.metal_options(order.order, order.seed)
            status = c["ggml_backend_graph_compute"](self._backend, graph)
            results = [np.empty(shape, np.float32) for _, shape in outs]
            for (out, _), result in zip(outs, results, strict=True):
                c["ggml_backend_tensor_get"](out, result.ctypes.data, 0, result.nbytes)
        finally:
            if buffer:
                c["ggml_backend_buffer_free"](buffer)
            c["ggml_free"](ctx)
        if error := self._lib.metal_error().decode():
            raise KernelError(error)
        assert status == 0
        return results

    def context(self) -> int:
        """Room for tensors whose data are on the backend."""
        init = self.c["ggml_init"]
        (parameters,) = init.argtypes
        return int(init(parameters(1 << 20, None, True)))

    def _build(self, ctx: int, job: Job, outs: Sequence[int]) -> tuple[int, list[tuple[int, Any]]]:
        """Return the op, and the tensors that need data."""
        c, value = self.c, GGMLType[job.kind].value
        n_ctx, n_head, row = job.cache.shape
        first_cell, last_cell, _ = job.cells.indices(n_ctx)
        first_head, last_head, _ = job.heads.indices(n_head)
        n_kv, stride = last_cell - first_cell, row * n_head
        base = c["ggml_new_tensor_2d"](ctx, value, job.d * n_head, n_ctx)
        offset = first_cell * stride + first_head * row
        shape = (job.d, last_head - first_head, n_kv)
        u = c["ggml_view_3d"](ctx, base, *shape, row, stride, offset)
        inputs: list[tuple[int, Any]] = [(base, job.cache)]
        w: int | None = None
        if isinstance(job.weights, int):
            w = outs[job.weights]
        elif job.weights is not None:
            w = c["ggml_new_tensor_2d"](ctx, GGMLType.F32.value, n_kv, len(job.weights))
            assert w is not None
            inputs.append((w, job.weights.astype(np.float32)))
        return c["ggml_leverage_score"](ctx, u, w, job.scale, job.noise), inputs
