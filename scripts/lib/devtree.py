"""A git work tree of the patched llama.cpp that is built step by step."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from . import gitseries, keys, native, tools
from .config import cache_root
from .errors import SetupError
from .lock import Lock
from .progress import Progress
from .run import run_logged
from .series import Series, load_series


@dataclass(frozen=True)
class DevTree:
    """Where the work tree is, and where its libraries are built."""

    source: Path
    build: Path

    @property
    def bin_dir(self) -> Path:
        return self.build / "bin"


def build_dev(
    tree: Path | None, jobs: int | None, *, variant: str = "", args: Sequence[str] = ()
) -> DevTree:
    """Make the work tree if there is none, and compile what changed in it.

    A ``variant`` has a build of its own, with CMake's ``args`` after all others.
    """
    root, series = cache_root(), load_series()
    tools.require_compiler_and_cmake()
    with Lock(root / "lock") as lock:
        if tree is not None:
            if not (tree / "src" / "llama.cpp").is_file():
                raise SetupError(f"{tree} is not a llama.cpp tree")
            build = root / "dev" / f"build-{keys.path_key(tree.resolve())}"
        else:
            # Beside each other as in native/: ccache then shares objects between the two.
            tree, build = root / "dev" / "src", root / "dev" / "build"
            if not (tree / ".git").exists():
                _make_tree(root, series, tree, lock.fd)
        if variant:
            build = build.with_name(f"{build.name}-{variant}")
        dev = DevTree(tree.resolve(), build)
        jobs = tools.build_jobs() if jobs is None else jobs
        _compile(root, series, dev, [*keys.cmake_args(), *args], jobs, lock.fd)
    return dev


def _make_tree(root: Path, series: Series, tree: Path, lock_fd: int) -> None:
    base = gitseries.require_base(root, series, lock_fd)
    repository = gitseries.base_repository(root, series, base)
    stage = root / "tmp" / "dev"
    shutil.rmtree(stage, ignore_errors=True)
    for directory in (stage.parent, tree.parent):
        directory.mkdir(parents=True, exist_ok=True)
    gitseries.clone_base(repository, stage)
    gitseries.am(stage, series.patches)
    stage.replace(tree)


def _compile(
    root: Path, series: Series, dev: DevTree, args: Sequence[str], jobs: int, lock_fd: int
) -> None:
    ninja = tools.find_ninja(Path(sys.executable).parent)
    if ninja is None:
        raise SetupError("ninja not found: install the package ninja-build")
    log = root / "logs" / f"{dev.build.name}.log"
    env = native.compile_env(dev.source, root)
    configure = native.configure_command(dev.source, dev.build, args, ninja, series)
    build = [ninja, "-C", str(dev.build), "-j", str(jobs), "llama", "test-backend-ops"]
    progress = Progress([("Configuring", 5), ("Compiling", 60)], sys.stderr)
    with progress.step("Configuring") as tick:
        run_logged(configure, log=log, tick=tick, env=env, keep_fd=lock_fd)
    with progress.step("Compiling") as tick:
        parse = native.ninja_progress
        run_logged(build, log=log, tick=tick, parse=parse, env=env, keep_fd=lock_fd)
