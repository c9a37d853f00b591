"""Folders: every document in them, in a stable order, and what was left out and why."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from capkv_local.documents.base import MIB, DocumentStream, short
from capkv_local.documents.files import reading
from capkv_local.documents.opening import open_document
from capkv_local.errors import DocumentError

if TYPE_CHECKING:
    from pathspec import GitIgnoreSpec

# Larger text files in a folder are data, not something to read. Formats with pictures may be.
_LARGEST_TEXT = 4 * MIB
_MOST_FILES = 10_000
# What package managers and builds put among the sources of a project.
_VENDOR = {"node_modules", "bower_components", "vendor", "third_party", "site-packages"}
_VENDOR |= {"__pycache__", "venv", "virtualenv"}
_N_NAMES = 3  # shown for each reason


@dataclass
class Folder:
    """The documents of a folder.

    Attributes
    ----------
    path
        The folder, without links in it.
    documents
        Files of a folder before its subfolders, both by name; a document's name is its path from
        the folder's parent.
    skipped
        Names of files and subfolders that are left out, by reason.
    """

    path: Path
    documents: list[DocumentStream] = field(default_factory=list)
    skipped: dict[str, list[str]] = field(default_factory=dict)

    @property
    def summary(self) -> str:
        """What was left out, as one line; empty if nothing was."""
        reasons = []
        for reason, names in self.skipped.items():
            shown = ", ".join(names[:_N_NAMES])
            few = len(names) <= _N_NAMES
            reasons.append(f"{reason}: {shown if few else f'{len(names):,} ({shown}, ...)'}")
        return f"skipped in {self.path.name}: {'; '.join(reasons)}" if reasons else ""

    def _skip(self, reason: str, name: str) -> None:
        self.skipped.setdefault(reason, []).append(name)


def read_documents(path: str | Path) -> Folder:
    """Open the documents of a folder and its subfolders, to be read one after the other.

    Left out are hidden files, what ``.gitignore`` files say, folders of dependencies
    (``node_modules``, ...), links to folders (so that a loop of them does not matter), text files
    over 4 MiB, and whatever cannot be read as text.

    Raises
    ------
    DocumentError
        No such folder, more than 10,000 files, or none that can be read.
    """
    with reading(Path(path)):
        os.scandir(path).close()
        root = Path(path).resolve()
    folder = Folder(root)
    for n_files, (file, relative) in enumerate(_walk(folder, root, _rules_above(root))):
        if n_files == _MOST_FILES:
            raise DocumentError(
                f"'{path}' has more than {_MOST_FILES:,} files; give the subfolders that matter"
            )
        try:
            with reading(file):
                size = file.stat().st_size
            if size == 0:  # not even opened: what the system shows in /proc can block
                folder._skip("empty", relative)
                continue
            document = open_document(file)
        except DocumentError as error:
            folder._skip(_reason(error), relative)
            continue
        if document.kind in ("text", "markdown") and size > _LARGEST_TEXT:
            folder._skip(f"over {_LARGEST_TEXT // MIB} MiB", relative)
            continue
        document.name = f"{root.name}/{relative}"
        document.heading = f"File: {document.name}"
        folder.documents.append(document)
    if not folder.documents:
        what = f" ({folder.summary})" if folder.skipped else ""
        raise DocumentError(f"'{path}' has no documents in it{what}; give the files themselves")
    return folder


def _reason(error: DocumentError) -> str:
    """Kind of a refusal, so that many are told in few words."""
    words = ("binary", "empty", "encrypted", "damaged", "cut short", "a scan", "an image")
    found = next((word for word in words if word in str(error)), None)
    named = {"a scan": "without text (scans, perhaps)", "an image": "images"}
    return "not readable as text" if found is None else named.get(found, found)


# A file of rules, and the folder that its patterns start from.
_Rules = tuple[tuple[Path, "GitIgnoreSpec"], ...]


def _walk(folder: Folder, directory: Path, rules: _Rules) -> Iterator[tuple[Path, str]]:
    """Files that may be documents, with their names as shown."""
    try:
        with os.scandir(directory) as scanned:
            entries = sorted(scanned, key=lambda entry: (_is_folder(entry), entry.name))
    except OSError as error:
        folder._skip(f"not readable ({short(error)})", _shown(folder, directory))
        return
    rules += _rules_of(directory)
    for entry in entries:
        path = directory / entry.name
        try:
            reason = _left_out(folder, entry, path, rules)
        except OSError:  # a link through a folder that may not be looked into
            reason = "not readable"
        if reason is not None:
            folder._skip(reason, _shown(folder, path))
        elif _is_folder(entry):
            yield from _walk(folder, path, rules)
        else:
            yield path, _shown(folder, path)


def _left_out(folder: Folder, entry: os.DirEntry[str], path: Path, rules: _Rules) -> str | None:
    """Why a file or folder is not looked into; None if it is."""
    is_folder = _is_folder(entry)
    if entry.name.startswith("."):
        return "hidden"
    if is_folder and entry.is_symlink():
        return "links to folders"
    if is_folder and (entry.name in _VENDOR or (path / "pyvenv.cfg").exists()):
        return "folders of dependencies"
    if _ignored(path, is_folder, rules):
        return "ignored by .gitignore"
    if is_folder:
        return None
    if not path.is_file():
        return "not regular files"
    if entry.is_symlink() and path.resolve().is_relative_to(folder.path):
        return "links to files in it"
    return None


def _is_folder(entry: os.DirEntry[str]) -> bool:
    with contextlib.suppress(OSError):  # a link to itself
        return entry.is_dir()
    return False


def _shown(folder: Folder, path: Path) -> str:
    # A name that is not UTF-8 must not break the line that shows it, nor the model's tokenizer.
    return path.relative_to(folder.path).as_posix().encode("utf-8", "replace").decode()


# ---- .gitignore --------------------------------------------------------------------------------


def _rules_of(directory: Path) -> _Rules:
    file = directory / ".gitignore"
    if not file.is_file():
        return ()
    from pathspec import GitIgnoreSpec

    with contextlib.suppress(OSError):
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
        return ((directory, GitIgnoreSpec.from_lines(lines)),)
    return ()


def _rules_above(root: Path) -> _Rules:
    """Rules of the repository that a folder is in, unless they would leave out the folder itself.

    Who names a folder wants it read, ignored or not.
    """
    above: _Rules = ()
    if (root / ".git").exists():
        return above
    for n, directory in enumerate(root.parents):
        above = _rules_of(directory) + above
        if (directory / ".git").exists():
            inside = [root, *list(root.parents)[:n]]
            return () if any(_ignored(path, True, above) for path in inside) else above
    return ()


def _ignored(path: Path, is_folder: bool, rules: _Rules) -> bool:
    """Whether the rules leave a file out: the deepest file of rules that says anything decides."""
    for directory, spec in reversed(rules):
        relative = path.relative_to(directory).as_posix()
        verdict = spec.check_file(f"{relative}/" if is_folder else relative).include
        if verdict is not None:
            return verdict
    return False
