"""Applying a patch series to a tree with nothing but Python.

A fresh machine has neither ``patch`` nor always ``git``, and the base is pinned, so hunks must
match exactly; they may only have moved. Everything is worked out in memory first: a series that
fails half-way changes no file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from .errors import SetupError
from .series import Patch

_HUNK = re.compile(r"@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@")
_REFUSED = ("rename from", "copy from", "GIT binary patch", "Binary files")


@dataclass
class Hunk:
    """Lines ``old`` at line ``start`` (from 0) become ``new``; newlines are kept."""

    start: int
    old: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)


@dataclass
class FileChange:
    """What one patch does to one file."""

    path: str
    creates: bool = False
    deletes: bool = False
    hunks: list[Hunk] = field(default_factory=list)

    def reversed(self) -> FileChange:
        hunks = [Hunk(hunk.start, hunk.new, hunk.old) for hunk in self.hunks]
        return FileChange(self.path, self.deletes, self.creates, hunks)


class Tree:
    """Files under a root, with changes held back in memory (None: the file is deleted)."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.changes: dict[str, str | None] = {}

    def read(self, path: str) -> str | None:
        if path in self.changes:
            return self.changes[path]
        try:
            return (self.root / path).read_bytes().decode("utf-8", "surrogateescape")
        except (FileNotFoundError, NotADirectoryError):
            return None

    def write(self) -> None:
        """Write the changes to disk."""
        for path, text in self.changes.items():
            target = self.root / path
            if text is None:
                target.unlink(missing_ok=True)
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(encode(text))


def encode(text: str) -> bytes:
    """Return the bytes of a file's text as read from a tree or a patch."""
    return text.encode("utf-8", "surrogateescape")


def apply_series(root: Path, patches: Sequence[Patch]) -> tuple[Tree, int]:
    """Apply what is not yet applied to ``root``; nothing is written until ``Tree.write``.

    Returns
    -------
    tree : the changes.
    already : how many patches, counted from the first, the tree already holds.

    Raises
    ------
    SetupError
        When a patch fits neither forwards nor backwards; it names the patch and the file.
    """
    parsed = [(patch.name, parse_patch(patch.text(), patch.name)) for patch in patches]
    already = next(n for n in range(len(parsed), -1, -1) if _holds(root, parsed[:n]))
    tree = Tree(root)
    for name, changes in parsed[already:]:
        for change in changes:
            _apply(tree, change, name)
    return tree, already


def parse_patch(text: str, name: str) -> list[FileChange]:
    """Parse a patch in git's format.

    Raises
    ------
    SetupError
        On renames, binary changes, unsafe paths or a damaged hunk.
    """
    changes: list[FileChange] = []
    lines = _split(text)
    i = 0
    while i < len(lines):
        line = lines[i].rstrip("\n")
        i += 1
        if line.startswith("diff --git "):
            changes.append(FileChange(_path(line, name)))
        elif not changes:
            continue  # the mail header and the message
        elif line.startswith("new file mode"):
            changes[-1].creates = True
        elif line.startswith("deleted file mode"):
            changes[-1].deletes = True
        elif line.startswith(_REFUSED):
            raise SetupError(f"{name}: {line!r} is not supported; use format-patch --no-renames")
        elif match := _HUNK.match(line):
            hunk, i = _parse_hunk(lines, i, match, name)
            changes[-1].hunks.append(hunk)
    return changes


def _path(line: str, name: str) -> str:
    match = re.fullmatch(r"diff --git a/(\S+) b/(\S+)", line)
    if not match or match[1] != match[2] or ".." in PurePosixPath(match[1]).parts:
        raise SetupError(f"{name}: unusable line {line!r}")
    return match[1]


def _parse_hunk(lines: list[str], i: int, header: re.Match[str], name: str) -> tuple[Hunk, int]:
    n_old, n_new = int(header[2] or 1), int(header[4] or 1)
    hunk = Hunk(start=int(header[1]) - (1 if n_old else 0))
    mark = " "
    while n_old > 0 or n_new > 0 or (i < len(lines) and lines[i].startswith("\\")):
        line = lines[i] if i < len(lines) else "(end of file)"
        if line.startswith("\\"):  # "No newline at end of file", of the line before
            for side, marks in ((hunk.old, " -"), (hunk.new, " +")):
                if mark in marks:
                    side[-1] = side[-1].removesuffix("\n")
            i += 1
            continue
        mark, body = (" ", line) if line == "\n" else (line[0], line[1:])
        if mark not in " -+":
            raise SetupError(f"{name}: damaged hunk {header[0]!r}: {line!r}")
        if mark in " -":
            hunk.old.append(body)
            n_old -= 1
        if mark in " +":
            hunk.new.append(body)
            n_new -= 1
        i += 1
    return hunk, i


def _holds(root: Path, parsed: Iterable[tuple[str, list[FileChange]]]) -> bool:
    """Tell whether the tree holds these patches: they come off again, last first."""
    tree = Tree(root)
    try:
        for name, changes in reversed(list(parsed)):
            for change in reversed(changes):
                _apply(tree, change.reversed(), name)
    except SetupError:
        return False
    return True


def _apply(tree: Tree, change: FileChange, name: str) -> None:
    text = tree.read(change.path)
    failed = (
        f"{name} does not apply to {change.path}{{}}; this is not the pinned base (see "
        f"patches/series): regenerate against the pinned version with scripts/patches refresh"
    )
    if change.creates != (text is None):
        raise SetupError(failed.format(", which is there" if change.creates else ", not there"))
    lines = [] if text is None else _split(text)
    offset = 0
    for hunk in change.hunks:
        at = _find(lines, hunk.old, hunk.start + offset)
        if at is None:
            raise SetupError(failed.format(f" at line {hunk.start + 1}"))
        lines[at : at + len(hunk.old)] = hunk.new
        offset = at - hunk.start + len(hunk.new) - len(hunk.old)
    if change.deletes and lines:
        raise SetupError(failed.format(", which has other content than it deletes"))
    tree.changes[change.path] = None if change.deletes else "".join(lines)


def _find(lines: list[str], old: list[str], expected: int) -> int | None:
    """Return where ``old`` stands in ``lines``, nearest to ``expected``."""
    last = len(lines) - len(old)
    if not old:
        return max(0, min(expected, len(lines)))
    if lines[max(expected, 0) : expected + len(old)] == old:
        return expected
    fits = (at for at in range(last + 1) if lines[at : at + len(old)] == old)
    return min(fits, key=lambda at: abs(at - expected), default=None)


def _split(text: str) -> list[str]:
    lines = [line + "\n" for line in text.split("\n")]
    lines[-1] = lines[-1][:-1]
    return lines if lines[-1] else lines[:-1]
