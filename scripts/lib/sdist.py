"""The pinned source archive of llama-cpp-python: downloaded with pip, verified, unpacked once."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

from .config import SDIST_BYTES
from .errors import SetupError
from .progress import Tick
from .run import run_logged
from .series import Series

# pip wants the metadata of an sdist and would install and run its build backend for it, only to
# throw the answer away. This stand-in answers at once, and nothing of the archive is executed.
_STAND_IN_BACKEND = """\
from pathlib import Path


def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    info = Path(metadata_directory, "{name}.dist-info")
    info.mkdir()
    text = "Metadata-Version: 2.1\\nName: {project}\\nVersion: {version}\\n"
    (info / "METADATA").write_text(text)
    return info.name


def build_wheel(*args, **kwargs):
    raise NotImplementedError("only the metadata is wanted")
"""


def sdist_path(root: Path, series: Series) -> Path:
    """Return where the archive is kept; a copy put there by hand is used (and verified)."""
    return root / "sdist" / series.sdist


def base_path(root: Path, series: Series) -> Path:
    """Return where the archive is unpacked."""
    return root / "base" / series.base_id


def download(root: Path, series: Series, python: Path, *, tick: Tick, keep_fd: int) -> None:
    """Fetch the archive into the cache with the pip of ``python`` and verify it."""
    stage = root / "tmp" / "sdist"
    shutil.rmtree(stage, ignore_errors=True)
    (stage / "pip").mkdir(parents=True)
    stub = stage / "stub" / "scikit_build_core"
    stub.mkdir(parents=True)
    name = series.sdist.removesuffix(".tar.gz")
    project, _, version = name.rpartition("-")
    (stub / "__init__.py").write_text("")
    (stub / "build.py").write_text(
        _STAND_IN_BACKEND.format(name=name, project=project, version=version)
    )
    wanted = stage / "requirements.txt"
    wanted.write_text(f"{series.requirement} --hash=sha256:{series.sha256}\n")
    pip = [str(python), "-m", "pip", "download", "--no-deps", "--no-build-isolation"]
    run_logged(
        [*pip, "--no-binary", "llama-cpp-python", "-r", wanted, "-d", stage],
        log=root / "logs" / "download.log",
        tick=tick,
        measure=downloaded(stage / "pip", SDIST_BYTES),
        env={**os.environ, "PYTHONPATH": str(stub.parent), "TMPDIR": str(stage / "pip")},
        keep_fd=keep_fd,
    )
    verify(stage / series.sdist, series)
    target = sdist_path(root, series)
    target.parent.mkdir(parents=True, exist_ok=True)
    (stage / series.sdist).replace(target)
    shutil.rmtree(stage, ignore_errors=True)


def downloaded(directory: Path, expected: int) -> Callable[[], tuple[float, str] | None]:
    """Return a measure of a pip download: the bytes it has put into its temporary directory."""

    def measure() -> tuple[float, str] | None:
        sizes = []
        for folder, _, names in os.walk(directory):
            for name in names:
                try:
                    sizes.append(os.stat(os.path.join(folder, name)).st_size)
                except OSError:  # moved on meanwhile
                    continue
        size = min(max(sizes, default=0), expected)
        if not size:
            return None
        return size / expected, f"{size / 1e6:.0f} of {expected / 1e6:.0f} MB"

    return measure


def verify(archive: Path, series: Series) -> None:
    """Check the archive against the series.

    Raises
    ------
    SetupError
        When it is another file; nothing of it has been used.
    """
    digest = hashlib.sha256()
    try:
        with archive.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except FileNotFoundError as error:
        raise SetupError(f"pip did not leave {archive.name}: {error}") from error
    if digest.hexdigest() != series.sha256:
        raise SetupError(
            f"{archive} has the sha256 {digest.hexdigest()}, the series pins {series.sha256}; "
            "delete the file and try again"
        )


def unpack(root: Path, series: Series) -> Path:
    """Unpack the verified archive, once; returns its top directory.

    The caller holds the lock. A half-unpacked tree never gets the final name.
    """
    target = base_path(root, series)
    if target.is_dir():
        return target
    archive = sdist_path(root, series)
    verify(archive, series)
    stage = root / "tmp" / "unpack"
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir(parents=True)
    with tarfile.open(archive) as tar:
        if sys.version_info >= (3, 12) or hasattr(tarfile, "data_filter"):
            tar.extractall(stage, filter="data")
        else:
            tar.extractall(stage)
    target.parent.mkdir(parents=True, exist_ok=True)
    (stage / series.sdist.removesuffix(".tar.gz")).replace(target)
    return target
