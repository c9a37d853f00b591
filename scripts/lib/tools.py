"""The programs a build needs, found or asked for by the name of the package that brings them."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from .errors import SetupError

MIN_CMAKE = (3, 18)


def c_compiler(env: Mapping[str, str] = os.environ) -> str | None:
    """Return the C compiler that CMake will pick, or None."""
    return _first(env, "CC", ("cc", "gcc", "clang"))


def cxx_compiler(env: Mapping[str, str] = os.environ) -> str | None:
    """Return the C++ compiler that CMake will pick, or None."""
    return _first(env, "CXX", ("c++", "g++", "clang++"))


def first_line(*argv: str) -> str:
    """Return the first line a command prints, "" when it fails: a version to put in a key."""
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return next(iter(done.stdout.splitlines()), "")


def require_compiler_and_cmake(env: Mapping[str, str] = os.environ) -> None:
    """Check that llama.cpp can be compiled here.

    Raises
    ------
    SetupError
        One sentence that names what to install.
    """
    # macOS has a stub `c++` that only tells to install the real one: ask it to run.
    for what, variable, package, compiler in (
        ("C++", "CXX", "g++", cxx_compiler(env)),
        ("C", "CC", "gcc", c_compiler(env)),
    ):
        if compiler is None or not first_line(compiler, "--version"):
            asked = f" at {variable}={env[variable]}" if env.get(variable) else ""
            raise SetupError(
                f"no {what} compiler found{asked}; {_install(package, 'xcode-select')}"
            )
    cmake = shutil.which("cmake", path=env.get("PATH"))
    if cmake is None:
        raise SetupError(f"CMake not found; {_install('cmake', 'cmake')}")
    version = re.search(r"(\d+)\.(\d+)", first_line(cmake, "--version"))
    if version is None or (int(version[1]), int(version[2])) < MIN_CMAKE:
        found = version[0] if version else "unusable"
        need = ".".join(map(str, MIN_CMAKE))
        raise SetupError(
            f"CMake {found} is too old, {need} is needed; {_install('cmake', 'cmake')}"
        )


def require_venv() -> None:
    """Check that this Python can make virtual environments with pip in them."""
    # Debian ships `venv` with Python but splits off the pip that it installs.
    if any(importlib.util.find_spec(module) is None for module in ("venv", "ensurepip")):
        raise SetupError(
            f"this Python ({sys.executable}) cannot make virtual environments; "
            f"{_install('python3-venv', 'python')}"
        )


def find_ninja(venv_bin: Path, env: Mapping[str, str] = os.environ) -> str | None:
    """Return the system's ninja, or the one installed into the virtual environment, or None."""
    for name in ("ninja", "ninja-build"):
        if found := shutil.which(name, path=env.get("PATH")):
            return found
    return shutil.which("ninja", path=str(venv_bin))


def build_jobs(env: Mapping[str, str] = os.environ) -> int:
    """Return how many compilers to run: all cores, unless memory is short (1 GiB each)."""
    if env.get("CMAKE_BUILD_PARALLEL_LEVEL", "").isdigit():
        return max(1, int(env["CMAKE_BUILD_PARALLEL_LEVEL"]))
    has_affinity = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    try:
        meminfo = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return cores
    available = re.search(r"MemAvailable:\s+(\d+) kB", meminfo)
    return max(1, min(cores, int(available[1]) // 2**20)) if available else cores


def _first(env: Mapping[str, str], variable: str, names: tuple[str, ...]) -> str | None:
    chosen = env.get(variable, "").split()
    for name in chosen[:1] or names:
        if found := shutil.which(name, path=env.get("PATH")):
            return found
    return None


def _install(debian: str, brew: str) -> str:
    if sys.platform == "darwin":
        is_xcode = brew == "xcode-select"
        return (
            f"install it with: {'xcode-select --install' if is_xcode else f'brew install {brew}'}"
        )
    return f"install the package {debian} (Debian, Ubuntu: sudo apt-get install {debian})"
