"""Compiles ggml's Metal backend with our kernel for the CPU (see ``metal/device.cpp``).

The backend is the real one but for its Objective-C part: the graph is allocated, encoded and
synchronised by the code that runs on a Mac, and the kernels are those of its ``.metal`` file.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from lib.config import cache_root
from lib.errors import SetupError
from lib.patchedtree import patched_tree
from lib.tools import cxx_compiler

from . import ggml
from .msl import translate

KERNEL = "leverage_score.metal"
_SHIM = Path(__file__).parent / "metal"
_METAL = "ggml/src/ggml-metal"
_FOLDERS = ("ggml/include", "ggml/src", _METAL, f"{_METAL}/kernels")
_UNITS = ("", "-common", "-device", "-fusion", "-ops", "-tuning")

_CXX = (
    "-std=c++17",
    "-fPIC",
    "-fno-strict-aliasing",
    "-fno-gnu-unique",
    "-I.",
    "-DGGML_METAL_HAS_BF16",
)
# Theirs: as it stands in a build of a loadable backend; <memory> comes with other headers on a Mac.
_HOST = (*_CXX, "-O0", "-w", "-include", "memory", "-DGGML_BACKEND_DL", "-DGGML_BACKEND_BUILD")
_OURS = (*_CXX, "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unused-function")
# Kernels: Metal's default is fast math, so that NaN must not be relied on.
_WARNINGS = ("-Wno-unused-variable", "-Wno-unused-parameter", "-Wno-unknown-pragmas")
_FAST = (*_OURS, *_WARNINGS, "-Wno-literal-suffix", "-ffast-math", "-march=native")


@functools.cache
def sources() -> dict[str, str]:
    """Text of every file that may be compiled, by name.

    They are those of the tree that ``CAPKV_LLAMA_DIR`` names, or of the pinned base with our
    series applied (nothing is written).
    """
    if sys.platform != "linux":
        raise FileNotFoundError("the Metal backend is compiled for the CPU on Linux only")
    tree = patched_tree()
    paths = {f"{folder}/{p.name}" for folder in _FOLDERS for p in (tree.root / folder).iterdir()}
    paths |= {path for path in tree.changes if path.rpartition("/")[0] in _FOLDERS}
    texts = {}
    for path in sorted(paths):
        name = Path(path).name
        host = path.startswith(_METAL) and name.endswith((".cpp", ".m", ".txt"))
        if (host or name.endswith((".h", ".metal"))) and (text := tree.read(path)) is not None:
            texts[name] = text
    if KERNEL not in texts:
        raise SetupError(f"{tree.root} with our patches has no {_METAL}/kernels/{KERNEL}")
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


if __name__ == "__main__":
    print(build(sources()))  # a backend to load: GGML_BACKEND_PATH
