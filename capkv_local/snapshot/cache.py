"""Readings kept for the next time: one snapshot per model, documents and settings.

Off unless asked for: a snapshot holds the text of its documents. The files are the user's alone,
and those used longest ago go first when all are larger than ``$CAPKV_CACHE_SIZE``.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capkv_local import __version__
from capkv_local.budget.parse import parse_size
from capkv_local.errors import CapKVError, StateError, unknown_name
from capkv_local.home import home
from capkv_local.snapshot.file import VERSION, read_header

if TYPE_CHECKING:
    from capkv_local.documents import Document, DocumentStream
    from capkv_local.snapshot.saved_chat import SavedChat

SIZE_VARIABLE = "CAPKV_CACHE_SIZE"
_DEFAULT_SIZE = "5GiB"
_SUFFIX = ".capkv"
_LEFTOVER_S = 3600  # a file that was being written for so long belongs to a run that died


@dataclass(frozen=True)
class Entry:
    """One kept reading; ``header`` is None when the file cannot be read."""

    name: str
    path: Path
    n_bytes: int
    last_used: float  # seconds since the epoch
    header: dict[str, Any] | None


class SnapshotCache:
    """The kept readings in one folder.

    Parameters
    ----------
    env
        Where folder (``CAPKV_HOME``) and limit (``CAPKV_CACHE_SIZE``) are named.

    Raises
    ------
    CapKVError
        The limit is no size.
    """

    def __init__(self, env: Mapping[str, str] = os.environ) -> None:
        self.folder = home(env) / "snapshots"
        limit = parse_size(env.get(SIZE_VARIABLE) or _DEFAULT_SIZE)
        if limit is None:
            raise CapKVError(
                f"{SIZE_VARIABLE}={env[SIZE_VARIABLE]!r} is no size: give bytes or e.g. 5GiB"
            )
        self.limit = limit  # bytes

    def path(
        self,
        model: str,
        documents: Iterable[Document | DocumentStream],
        settings: Mapping[str, Any],
    ) -> Path:
        """Where the reading of these documents belongs, whether or not it is there.

        Parameters
        ----------
        model
            Its fingerprint.
        documents
            What is read, in this order.
        settings
            What was asked for and changes what is kept of a text.
        """
        what = {
            "format": VERSION,
            "capkv": __version__,
            "model": model,
            "documents": [_digest(document) for document in documents],
            "settings": dict(settings),
        }
        text = json.dumps(what, sort_keys=True, default=str)
        return self.folder / (hashlib.sha256(text.encode()).hexdigest()[:16] + _SUFFIX)

    def store(self, path: Path, chat: SavedChat) -> None:
        """Keep a reading at ``path``, and make room for it.

        Raises
        ------
        StateError
            It cannot be written, or is larger than all of the cache may be.
        """
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise StateError(
                f"cannot make the folder {self.folder}: {error.strerror}; name another with "
                "CAPKV_HOME"
            ) from error
        n_bytes = chat.save(path, private=True)
        if n_bytes > self.limit:
            path.unlink(missing_ok=True)
            raise StateError(
                f"it takes {n_bytes / 2**20:.0f} MiB, more than the {self.limit / 2**20:.0f} MiB "
                f"of {SIZE_VARIABLE}"
            )
        self._make_room(path)

    def used(self, path: Path) -> None:
        """Count a kept reading as used now."""
        with contextlib.suppress(OSError):
            os.utime(path)

    def entries(self) -> list[Entry]:
        """All kept readings, those used last first."""
        found = []
        for path, stat in self._files():
            try:
                header: dict[str, Any] | None = read_header(path)
            except StateError:
                header = None
            found.append(Entry(path.stem, path, stat.st_size, stat.st_mtime, header))
        return sorted(found, key=lambda entry: -entry.last_used)

    def remove(self, names: Sequence[str]) -> list[Entry]:
        """Delete readings by name, or by the beginning of a name.

        Raises
        ------
        CapKVError
            A name that none or several have, or a file that cannot be deleted.
        """
        entries = {entry.name: entry for entry in self.entries()}
        chosen = {}
        for name in names:
            matches = [known for known in entries if known.startswith(name.removesuffix(_SUFFIX))]
            if len(matches) != 1 or not name:
                if not entries:
                    raise CapKVError(f"there is no '{name}': nothing is kept")
                raise CapKVError(unknown_name("snapshot", name, entries))
            chosen[matches[0]] = entries[matches[0]]
        for entry in chosen.values():
            _delete(entry.path)
        return list(chosen.values())

    def clear(self) -> list[Entry]:
        """Delete everything that is kept."""
        entries = self.entries()
        for path in [*(entry.path for entry in entries), *self.folder.glob(".*.tmp")]:
            _delete(path)
        return entries

    def _files(self) -> list[tuple[Path, os.stat_result]]:
        files = []
        for path in self.folder.glob("*" + _SUFFIX):
            with contextlib.suppress(OSError):  # another run may just have deleted it
                files.append((path, path.stat()))
        return files

    def _make_room(self, newest: Path) -> None:
        files = self._files()
        n_bytes = sum(stat.st_size for _, stat in files)
        for path, stat in sorted(files, key=lambda file: file[1].st_mtime):
            if n_bytes <= self.limit:
                break
            if path != newest:
                _delete(path)
                n_bytes -= stat.st_size
        for path in self.folder.glob(".*.tmp"):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > _LEFTOVER_S:
                    path.unlink()


def _delete(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise CapKVError(f"cannot delete {path}: {error.strerror}; check its rights") from error


def _digest(document: Document | DocumentStream) -> str:
    """Hash of all that of a document reaches the model or a source, read part by part."""
    digest = hashlib.sha256()
    for text in (document.name, document.heading, *_parts(document)):
        digest.update(f"{len(text)}:".encode() + text.encode())
    return digest.hexdigest()


def _parts(document: Document | DocumentStream) -> Iterator[str]:
    for part in document.parts():
        yield str(part.place)
        yield part.text
