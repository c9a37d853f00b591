"""Compiling the patched llama.cpp, and packing it as a wheel.

Two directories in the cache: ``native/<tree key>`` holds sources and objects of one set of
compiler options and lives through changes of the patches, so that those recompile only what they
touch and a killed build goes on where it stopped; ``builds/<build key>`` holds what came out.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .config import NATIVE
from .patchset import apply_series, encode
from .progress import Tick
from .run import run_logged
from .series import Series
from .wheel import pack, wheel_name

# Of llama.cpp, what the build reads; the rest (models, docs, tools) is not copied.
_SOURCES = ("CMakeLists.txt", "LICENSE", "cmake", "ggml", "include", "src", "vendor")
_OP_TESTS = "tests/test-backend-ops.cpp"


@dataclass(frozen=True)
class NativeBuild:
    """One build: where its parts are."""

    root: Path  # the cache
    series: Series
    tree: str  # tree key
    key: str  # build key

    @property
    def source_dir(self) -> Path:
        return self.root / "native" / self.tree / "src"

    @property
    def build_dir(self) -> Path:
        return self.root / "native" / self.tree / "build"

    @property
    def wheel(self) -> Path:
        return self.root / "builds" / self.key / wheel_name(self.series.version)

    @property
    def op_tests(self) -> Path:
        return self.root / "builds" / self.key / "test-backend-ops"

    @property
    def log(self) -> Path:
        return self.root / "logs" / f"build-{self.tree}.log"


def patched_sources(build: NativeBuild, sdist: Path) -> None:
    """Make ``source_dir`` equal base plus series, touching only files whose content differs.

    Ninja goes by modification times, so an untouched file is what keeps its objects.
    """
    pristine = sdist / "vendor" / "llama.cpp"
    tree, _ = apply_series(pristine, build.series.patches)
    deleted = {name for name, text in tree.changes.items() if text is None}
    wanted = (_pristine_files(pristine) | set(tree.changes)) - deleted
    for name in sorted(wanted):
        text = tree.changes.get(name)
        data = (pristine / name).read_bytes() if text is None else encode(text)
        _update(build.source_dir / name, data)
    for path in [p for p in build.source_dir.rglob("*") if p.is_file()]:
        if path.relative_to(build.source_dir).as_posix() not in wanted:
            path.unlink()


def configure(
    build: NativeBuild,
    args: Sequence[str],
    ninja: str,
    *,
    tick: Tick,
    keep_fd: int | None = None,
) -> None:
    """Run CMake, unless it ran to its end before with the same arguments."""
    command = configure_command(build.source_dir, build.build_dir, args, ninja, build.series)
    stamp = build.build_dir / "configured.json"
    if stamp.is_file() and stamp.read_text() == json.dumps(command):
        return
    # What an interrupted CMake left may be half an answer.
    stamp.unlink(missing_ok=True)
    (build.build_dir / "CMakeCache.txt").unlink(missing_ok=True)
    run_logged(
        command,
        log=build.log,
        tick=tick,
        env=compile_env(build.source_dir, build.root),
        keep_fd=keep_fd,
    )
    stamp.write_text(json.dumps(command))


def configure_command(
    source: Path, build_dir: Path, args: Sequence[str], ninja: str, series: Series
) -> list[str]:
    """Return the CMake command; the user's arguments come last, so they win."""
    command = ["cmake", "-S", str(NATIVE), "-B", str(build_dir), "-G", "Ninja"]
    command += [f"-DCMAKE_MAKE_PROGRAM={ninja}", f"-DCAPKV_LLAMA_DIR={source}"]
    command += [f"-DLLAMA_BUILD_COMMIT={series.upstream[:9]}", "-DLLAMA_BUILD_NUMBER=0"]
    command += ["-DCMAKE_BUILD_TYPE=Release", "-DGGML_CCACHE=OFF"]
    if ccache := shutil.which("ccache"):
        languages = ["C", "CXX"] + ["CUDA"] * any("CUDA" in arg for arg in args)
        command += [f"-DCMAKE_{name}_COMPILER_LAUNCHER={ccache}" for name in languages]
    return [*command, *args]


def compile_targets(
    build: NativeBuild,
    targets: Sequence[str],
    ninja: str,
    jobs: int,
    *,
    tick: Tick,
    keep_fd: int | None = None,
) -> None:
    """Compile; progress is ninja's own count of steps."""
    run_logged(
        [ninja, "-C", build.build_dir, "-j", str(jobs), *targets],
        log=build.log,
        tick=tick,
        parse=ninja_progress,
        env=compile_env(build.source_dir, build.root),
        keep_fd=keep_fd,
    )


def compile_env(source: Path, root: Path) -> dict[str, str]:
    """Return the environment of compilers: ccache may share objects between trees."""
    return {
        **os.environ,
        "NINJA_STATUS": "[%f/%t] ",
        "CCACHE_BASEDIR": str(source.parent),
        "CCACHE_NOHASHDIR": "1",
        # A cache inside somebody's git checkout must not put their commit into our build.
        "GIT_CEILING_DIRECTORIES": str(root),
    }


def pack_wheel(build: NativeBuild, sdist: Path, inputs: Mapping[str, object]) -> None:
    """Put the wheel into the cache."""
    build.wheel.parent.mkdir(parents=True, exist_ok=True)
    about = {
        "key": build.key,
        "version": build.series.version,
        "upstream": build.series.upstream,
        "patches": [patch.name for patch in build.series.patches],
        "inputs": inputs,
    }
    pack(sdist, build.build_dir / "bin", build.series.version, about, build.wheel)


def keep_op_tests(build: NativeBuild) -> None:
    """Put the operator tests into the cache, out of the way of the next build."""
    build.op_tests.parent.mkdir(parents=True, exist_ok=True)
    stage = build.op_tests.with_suffix(".part")
    shutil.copy2(build.build_dir / "bin" / build.op_tests.name, stage)
    stage.replace(build.op_tests)


def ninja_progress(line: str) -> tuple[float, str] | None:
    """Read ``[12/80] Building ...``."""
    match = re.match(r"\[(\d+)/(\d+)\] ", line)
    if not match or match[2] == "0":
        return None
    return int(match[1]) / int(match[2]), f"{match[1]} of {match[2]}"


def _pristine_files(pristine: Path) -> set[str]:
    names = {_OP_TESTS}
    for source in _SOURCES:
        path = pristine / source
        files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
        names.update(file.relative_to(pristine).as_posix() for file in files)
    return names


def _update(path: Path, data: bytes) -> None:
    if path.is_file() and path.stat().st_size == len(data) and path.read_bytes() == data:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    stage = path.with_name(path.name + ".part~")
    stage.write_bytes(data)
    stage.replace(path)
