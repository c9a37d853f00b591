"""What a build depends on, as a key: when any of it changes, another build is made beside it."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from .config import NATIVE
from .errors import SetupError
from .series import Series
from .tools import c_compiler, cxx_compiler, first_line

# Raise when the way of building changes in a manner that no file below shows.
RECIPE = 1

# Environment variables that CMake or the compilers read by themselves.
_FLAG_VARIABLES = (
    *("CFLAGS", "CXXFLAGS", "CPPFLAGS", "LDFLAGS", "CUDAFLAGS", "CUDAARCHS", "CUDACXX", "HIPCXX"),
    *("CMAKE_PREFIX_PATH", "MACOSX_DEPLOYMENT_TARGET", "VULKAN_SDK", "CUDA_PATH", "ROCM_PATH"),
)
# What -march=native may use. The whole list of flags would change with every kernel update.
_SIMD = re.compile(
    r"(sse|ssse|avx|fma|f16c|bmi|amx|popcnt|gfni|vaes|aes|adx|abm|asimd|sve|sme|i8mm|bf16|fphp|rv)"
)


def cmake_args(env: Mapping[str, str] = os.environ) -> list[str]:
    """Return ``$CMAKE_ARGS`` as a list of arguments."""
    try:
        return shlex.split(env.get("CMAKE_ARGS", ""))
    except ValueError as error:
        raise SetupError(f"CMAKE_ARGS={env['CMAKE_ARGS']!r} cannot be split: {error}") from error


def compile_inputs(env: Mapping[str, str] = os.environ) -> dict[str, object]:
    """Return everything but the sources that decides what the compiler makes."""
    args = cmake_args(env)
    compilers = [path for path in (c_compiler(env), cxx_compiler(env)) if path]
    if any("CUDA" in arg for arg in args) and (nvcc := shutil.which("nvcc", path=env.get("PATH"))):
        compilers.append(nvcc)
    if any("VULKAN" in arg for arg in args) and (glslc := shutil.which("glslc")):
        compilers.append(glslc)
    return {
        "recipe": RECIPE,
        "cmake_lists": _sha256(NATIVE / "CMakeLists.txt"),
        "cmake_args": args,
        "flags": {name: env[name] for name in _FLAG_VARIABLES if env.get(name)},
        "compilers": [[path, _compiler_version(path)] for path in compilers],
        "machine": [platform.system(), platform.machine(), cpu_features()],
    }


def tree_key(series: Series, inputs: Mapping[str, object]) -> str:
    """Return the key of the build tree: a changed patch recompiles in it only what it touches."""
    return _digest({"sdist": series.sha256, "inputs": inputs})


def build_key(series: Series, inputs: Mapping[str, object]) -> str:
    """Return the key of the wheel: base, patches in their order, and ``compile_inputs``."""
    patches = [[patch.name, patch.sha256()] for patch in series.patches]
    base = {"sdist": series.sha256, "version": series.version, "patches": patches}
    return _digest({"base": base, "inputs": inputs})


def venv_key(build: str, runtime: tuple[str, ...], model: str) -> str:
    """Return the key of the virtual environment: this Python, the wheel, the dependencies."""
    python = [sys.version, sys.base_prefix, platform.machine()]
    return _digest({"python": python, "build": build, "runtime": runtime, "model": model})


def path_key(path: Path) -> str:
    """Return a short name for a directory, to keep what is built from it apart."""
    return hashlib.sha256(str(path).encode()).hexdigest()[:12]


def cpu_features() -> str:
    """Return what GGML_NATIVE tunes for, so that a cache carried elsewhere is not used there."""
    if sys.platform == "darwin":
        return first_line("sysctl", "-n", "machdep.cpu.brand_string")
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor()
    flags = re.search(r"^(?:flags|Features|isa)\s*:\s*(.*)$", cpuinfo, re.MULTILINE)
    return " ".join(sorted(f for f in flags[1].split() if _SIMD.match(f))) if flags else ""


def _compiler_version(path: str) -> str:
    if Path(path).name == "nvcc":  # its first line is its name; its file changes with it
        stat = Path(path).resolve().stat()
        return f"{stat.st_size} {stat.st_mtime_ns}"
    return first_line(path, "--version")


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
