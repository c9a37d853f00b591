"""What every script starts with: make sure that all it needs is there, in seconds when it is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from . import keys, native, sdist, tools
from .config import MODEL_REQUIREMENT, ROOT, Requirements, cache_root, requirements
from .errors import SetupError
from .lock import Lock
from .progress import Progress, Tick
from .series import Series, load_series
from .venv import Venv, dev_set, mark_used, remove_unused


@dataclass(frozen=True)
class Environment:
    """What a script may use once it is set up."""

    series: Series
    venv: Venv
    build: native.NativeBuild

    def process_env(self) -> dict[str, str]:
        """Return the environment in which ``capkv_local`` is found in this checkout."""
        rest = os.environ.get("PYTHONPATH")
        path = f"{ROOT}{os.pathsep}{rest}" if rest else str(ROOT)
        # Without it `-m` would import from the directory the user happens to stand in.
        return {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}

    def output_of(self, *args: str) -> str:
        """Return what Python prints with these arguments, on one line."""
        command = [str(self.venv.python), *args]
        return subprocess.run(
            command, env=self.process_env(), check=True, capture_output=True, text=True
        ).stdout.strip()

    def exec_python(self, *args: str) -> NoReturn:
        """Become Python with these arguments, so that signals and exit codes are its own."""
        sys.stdout.flush()
        sys.stderr.flush()
        os.execve(self.venv.python, [str(self.venv.python), *args], self.process_env())

    def exec_script(self, name: str, *args: str) -> NoReturn:
        """Become a script below ``scripts/``, such as ``benchmarks/decode.py``."""
        self.exec_python(str(ROOT / "scripts" / name), *args)


def ensure(*, dev: bool = False, op_tests: bool = False, jobs: int | None = None) -> Environment:
    """Set up what is missing and return it.

    Parameters
    ----------
    dev : also the test and lint tools.
    op_tests : also ggml's operator tests.
    jobs : compilers to run at once; None for all cores.
    """
    if sys.version_info < (3, 10):  # noqa: UP036  (nothing has checked it before us)
        raise SetupError(f"Python 3.10 or newer is needed, this is {sys.version.split()[0]}")
    root = cache_root()
    setup = _Setup(root, load_series(), requirements(), keys.compile_inputs(), dev, op_tests)
    if not setup.is_done():
        with Lock(root / "lock") as lock:
            if not setup.is_done():  # another set-up may have made it while we waited
                setup.make(lock.fd, tools.build_jobs() if jobs is None else jobs)
                remove_unused(root)
    mark_used(setup.venv.path, setup.build.wheel.parent)
    return Environment(setup.series, setup.venv, setup.build)


class _Setup:
    """The steps from nothing to a ready environment, each skipped when its result is there."""

    def __init__(
        self,
        root: Path,
        series: Series,
        wanted: Requirements,
        inputs: Mapping[str, object],
        dev: bool,
        op_tests: bool,
    ) -> None:
        self.root, self.series, self.inputs = root, series, inputs
        key = keys.build_key(series, inputs)
        self.build = native.NativeBuild(root, series, keys.tree_key(series, inputs), key)
        self.venv = Venv(root, keys.venv_key(key, wanted.runtime, MODEL_REQUIREMENT))
        self.runtime = wanted.runtime
        self.dev = wanted.dev if dev else ()
        self.sets = ("runtime", *([dev_set(wanted.dev)] if dev else []))
        self.wants_op_tests = op_tests

    def is_done(self) -> bool:
        has_op_tests = self.build.op_tests.is_file() or not self.wants_op_tests
        return self.venv.holds(*self.sets) and has_op_tests

    def make(self, lock_fd: int, jobs: int) -> None:
        """Run the missing steps; the caller holds the lock."""
        self.lock_fd, self.jobs = lock_fd, jobs
        steps = self._plan()
        shutil.rmtree(self.root / "tmp", ignore_errors=True)
        for log in (self.build.log, self.venv.log):  # a log tells of one set-up
            log.unlink(missing_ok=True)
        print(f"Setting up capkv-local in {self.root} (once)", file=sys.stderr)
        progress = Progress([(title, seconds) for title, seconds, _ in steps])
        for title, _, action in steps:
            with progress.step(title) as tick:
                action(tick)
        shutil.rmtree(self.root / "tmp", ignore_errors=True)
        progress.finish("Ready")

    def _plan(self) -> Sequence[tuple[str, float, Callable[[Tick], None]]]:
        """Return the missing steps with their usual seconds."""
        new_venv = not self.venv.holds("runtime")
        new_wheel = not self.build.wheel.is_file()
        new_op_tests = self.wants_op_tests and not self.build.op_tests.is_file()
        compiles = new_wheel or new_op_tests
        if new_venv:
            tools.require_venv()
        if compiles:
            tools.require_compiler_and_cmake()
        has_base = sdist.base_path(self.root, self.series).is_dir()
        has_sdist = has_base or sdist.sdist_path(self.root, self.series).is_file()
        name = self.series.sdist.removesuffix(".tar.gz")
        needs_dev = not self.venv.holds(*self.sets) and bool(self.dev)
        candidates: list[tuple[bool, str, float, Callable[[Tick], None]]] = [
            (new_venv, "Making a virtual environment", 5, self._make_venv),
            (compiles and not has_sdist, f"Downloading {name}", 10, self._download),
            (compiles and not has_base, f"Unpacking {name}", 3, self._unpack),
            (compiles, "Patching llama.cpp", 1, self._patch),
            (compiles, "Configuring", 7, self._configure),
            (new_wheel, "Compiling llama.cpp", 130, self._compile),
            (new_wheel, "Packing the wheel", 1, self._pack),
            (new_op_tests, "Compiling the operator tests", 35, self._compile_op_tests),
            (new_venv, "Installing Python packages", 12, self._install),
            (new_venv, "Installing the default model", 10, self._install_model),
            (needs_dev, "Installing the test tools", 8, self._install_dev),
        ]
        return [(title, seconds, action) for needed, title, seconds, action in candidates if needed]

    def _make_venv(self, tick: Tick) -> None:
        self.venv.create(tick=tick, keep_fd=self.lock_fd)

    def _download(self, tick: Tick) -> None:
        python = self.venv.python
        sdist.download(self.root, self.series, python, tick=tick, keep_fd=self.lock_fd)

    def _unpack(self, tick: Tick) -> None:
        sdist.unpack(self.root, self.series)

    def _patch(self, tick: Tick) -> None:
        native.patched_sources(self.build, sdist.base_path(self.root, self.series))

    def _configure(self, tick: Tick) -> None:
        self.ninja = self._find_ninja(tick)
        args = keys.cmake_args()
        native.configure(self.build, args, self.ninja, tick=tick, keep_fd=self.lock_fd)
        mark_used(self.build.build_dir.parent)

    def _find_ninja(self, tick: Tick) -> str:
        if found := tools.find_ninja(self.venv.python.parent):
            return found
        self.venv.install("ninja", tick=tick, keep_fd=self.lock_fd)
        if found := tools.find_ninja(self.venv.python.parent):
            return found
        raise SetupError("ninja was installed but cannot be found; install the package ninja-build")

    def _compile(self, tick: Tick) -> None:
        self._compile_target("llama", tick)

    def _compile_target(self, target: str, tick: Tick) -> None:
        native.compile_targets(
            self.build, [target], self.ninja, self.jobs, tick=tick, keep_fd=self.lock_fd
        )

    def _pack(self, tick: Tick) -> None:
        base = sdist.base_path(self.root, self.series)
        native.pack_wheel(self.build, base, self.inputs)

    def _compile_op_tests(self, tick: Tick) -> None:
        self._compile_target("test-backend-ops", tick)
        native.keep_op_tests(self.build)

    def _install(self, tick: Tick) -> None:
        wheel = self.build.wheel
        self.venv.install(wheel, *self.runtime, tick=tick, keep_fd=self.lock_fd)

    def _install_model(self, tick: Tick) -> None:
        self.venv.install_model(tick=tick, keep_fd=self.lock_fd)
        self.venv.commit("runtime")

    def _install_dev(self, tick: Tick) -> None:
        self.venv.begin()
        self.venv.install(*self.dev, tick=tick, keep_fd=self.lock_fd)
        self.venv.commit(*self.sets)
