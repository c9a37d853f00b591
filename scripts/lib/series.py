"""``patches/series``: the pinned base and the ordered patches on top of it."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path

from .config import PATCHES
from .errors import SetupError

_HEADER = ("sdist", "sha256", "upstream", "version")
_PATCH_NAME = re.compile(r"\d{4}-[A-Za-z0-9._+-]+\.patch")


@dataclass(frozen=True)
class Patch:
    """One patch file of the series."""

    path: Path
    why: str

    @property
    def name(self) -> str:
        return self.path.name

    def text(self) -> str:
        """Return the patch; bytes that are not UTF-8 survive as surrogates."""
        try:
            return self.path.read_bytes().decode("utf-8", "surrogateescape")
        except OSError as error:
            raise SetupError(f"{self.name} is in the series but cannot be read: {error}") from error

    def sha256(self) -> str:
        return hashlib.sha256(self.text().encode("utf-8", "surrogateescape")).hexdigest()


@dataclass(frozen=True)
class Series:
    """The parsed series file.

    Attributes
    ----------
    sdist, sha256 : name and checksum of the llama-cpp-python source archive.
    upstream : the llama.cpp commit inside that archive.
    version : the version of our wheel, with a local part that keeps it apart from the stock one.
    test_ops : operators that test-backend-ops must know and pass, once there is any patch.
    patches : in the order in which they apply.
    """

    sdist: str
    sha256: str
    upstream: str
    version: str
    test_ops: tuple[str, ...] = ()
    patches: tuple[Patch, ...] = field(default=())

    @property
    def requirement(self) -> str:
        """Return the stock package as a requirement, e.g. ``llama-cpp-python==0.3.36``."""
        return f"llama-cpp-python=={self.version.partition('+')[0]}"

    @property
    def base_id(self) -> str:
        return self.sha256[:12]


def load_series(directory: Path = PATCHES) -> Series:
    """Read ``directory/series``.

    Raises
    ------
    SetupError
        When a line is unreadable, a header is missing, or a patch is missing or not listed.
    """
    path = directory / "series"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise SetupError(f"cannot read {path}: {error.strerror}") from error
    header: dict[str, str] = {}
    ops: list[str] = []
    patches: list[Patch] = []
    for number, line in enumerate(lines, start=1):
        word, _, rest = line.strip().partition(" ")
        rest = rest.strip()
        if not word or word.startswith("#"):
            continue
        if _PATCH_NAME.fullmatch(word):
            patches.append(Patch(directory / word, rest))
        elif word == "test-op" and rest:
            ops.append(rest)
        elif word in _HEADER and rest and word not in header:
            header[word] = rest
        else:
            raise SetupError(
                f"{path}, line {number}: expected 'NNNN-name.patch why' or one of "
                f"{', '.join((*_HEADER, 'test-op'))} with a value, not {line.strip()!r}"
            )
    missing = [word for word in _HEADER if word not in header]
    if missing:
        raise SetupError(f"{path} lacks: {', '.join(missing)}")
    series = Series(**header, test_ops=tuple(ops), patches=tuple(patches))
    _check_files(directory, series)
    return series


def _check_files(directory: Path, series: Series) -> None:
    listed = [patch.name for patch in series.patches]
    present = {path.name for path in directory.glob("*.patch")}
    for problem, names in (
        ("lists twice", {name for name in listed if listed.count(name) > 1}),
        ("lists but there is no", set(listed) - present),
        ("does not list", present - set(listed)),
    ):
        if names:
            raise SetupError(f"{directory / 'series'} {problem} {', '.join(sorted(names))}")
