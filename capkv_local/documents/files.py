"""Files, pipes and standard input as bytes, and what kind of document they are.

The content decides what a file is; the ending of its name is used only for what the content does
not show (Markdown, HTML fragments).
"""

from __future__ import annotations

import contextlib
import io
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from capkv_local.documents.base import MIB, SAVE_AS
from capkv_local.documents.zips import zip_kind
from capkv_local.errors import DocumentError

_HEAD = 4 * MIB  # of a file, to decide its encoding by
_BLOCK = 1 << 18  # after that, and of a pipe, which may give its text slowly


@dataclass
class Input:
    """Bytes of one document.

    Attributes
    ----------
    source
        How messages call it.
    name
        File name without its folder.
    path
        None for standard input.
    n_bytes
        None for a pipe that goes on behind the head: how much will come is not known.
    head
        The first bytes.
    """

    source: str
    name: str
    path: Path | None
    n_bytes: int | None
    head: bytes
    _file: BinaryIO | None = field(default=None, repr=False)

    @property
    def suffix(self) -> str:
        """Ending of the name, in lower case."""
        return Path(self.name).suffix.lower()

    @contextlib.contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """The bytes from the start, as a file that can go back and forth.

        Raises
        ------
        DocumentError
            The file is not there any more, or cannot be read.
        """
        if self._file is not None:
            if self.n_bytes is None:
                self._spool(self._file)
            self._file.seek(0)
            yield self._file
            return
        assert self.path is not None
        with reading(self.path):
            file = self.path.open("rb")
        with file:
            yield file

    def blocks(self) -> Iterator[tuple[bytes, bool]]:
        """The bytes in blocks, and whether a block is the last; a pipe gives them once.

        Raises
        ------
        DocumentError
            As :meth:`open`.
        """
        if self.n_bytes is None:
            assert self._file is not None
            yield from self._blocks(self._file, self.head, _BLOCK)
            return
        with self.open() as file:
            yield from self._blocks(file, self._read(file, _HEAD), _HEAD)

    def _blocks(self, file: BinaryIO, data: bytes, asked: int) -> Iterator[tuple[bytes, bool]]:
        while len(data) == asked:  # less than was asked for is the end
            yield data, False
            data, asked = self._read(file, _BLOCK), _BLOCK
        yield data, True

    def _read(self, file: BinaryIO, n_bytes: int) -> bytes:
        with reading(Path(self.source)):
            return file.read(n_bytes)

    def _spool(self, pipe: BinaryIO) -> None:
        """Put what a pipe gives into a file that deletes itself."""
        file = tempfile.TemporaryFile()  # noqa: SIM115
        file.write(self.head)
        shutil.copyfileobj(pipe, file)
        self._file, self.n_bytes = file, file.tell()


def open_input(path: str | Path) -> Input:
    """Look at a file, a pipe, or standard input (``"-"``).

    Raises
    ------
    DocumentError
        Missing, a folder, a device, empty, or not readable.
    """
    if str(path) == "-":
        return _not_empty(_from_pipe("stdin", "stdin", sys.stdin.buffer))
    path = Path(path)
    with reading(path):
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise DocumentError(f"'{path}' is a folder; give the files in it, e.g. {path}/*.txt")
        if stat.S_ISFIFO(status.st_mode):  # <(command) in a shell is one
            found = _from_pipe(str(path), path.name, path.open("rb"))
        elif stat.S_ISREG(status.st_mode):
            with path.open("rb") as file:
                found = Input(str(path), path.name, path, status.st_size, file.read(1 << 16))
        else:  # a device such as /dev/zero never ends
            raise DocumentError(f"'{path}' is not a regular file; copy its text to a file first")
    return _not_empty(found)


def _from_pipe(source: str, name: str, pipe: BinaryIO) -> Input:
    head = pipe.read(_BLOCK)
    if len(head) < _BLOCK:  # all of it, which is as good as a file
        return Input(source, name, None, len(head), head, io.BytesIO(head))
    return Input(source, name, None, None, head, pipe)


def _not_empty(found: Input) -> Input:
    if not found.head.strip() and found.n_bytes == len(found.head):
        raise DocumentError(f"'{found.source}' is empty; give a file that has text in it")
    return found


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Errors of the system as errors that say what to do."""
    try:
        yield
    except FileNotFoundError:
        raise DocumentError(f"there is no file '{path}'; check the name and the folder") from None
    except OSError as error:
        reason = error.strerror or str(error)
        raise DocumentError(f"'{path}' cannot be read ({reason}); check its rights") from error
    except ValueError as error:
        if isinstance(error, DocumentError):
            raise
        # a NUL in the name
        raise DocumentError(f"{str(path)!r} is not a file name ({error}); check it") from error


# ---- kinds -------------------------------------------------------------------------------------

_MARKDOWN = {".md", ".markdown", ".mdown", ".mkd"}
_HTML = {".html", ".htm", ".xhtml", ".shtml"}
_HTML_START = re.compile(
    rb"^(?:\xef\xbb\xbf)?\s*(?:<\?xml[^>]*>\s*)?<(?:!doctype\s+html|html)\b", re.I
)

# Files people try that are not text inside: how they begin, what they are, what to do instead.
_OCR = "run text recognition (OCR) on it first"
_OLD_OFFICE = b"\xd0\xcf\x11\xe0"
_NOT_TEXT: tuple[tuple[bytes, str, str], ...] = (
    (_OLD_OFFICE, "an old Office document", SAVE_AS),
    (b"{\\rtf", "an RTF document", SAVE_AS),
    (b"%!PS", "a PostScript file", "convert it to .pdf, e.g. with ps2pdf, and give that file"),
    (b"CAPKV\0", "a snapshot of capkv", "let its name end in .capkv"),
    (b"GGUF", "a model file", "give the model with --model and a document here"),
    (b"\x1f\x8b", "a gzip file", "unpack it first"),
    (b"\x89PNG", "an image", _OCR),
    (b"\xff\xd8\xff", "an image", _OCR),
)


def kind_of(found: Input) -> str:
    """Kind of a document: ``text``, ``markdown``, ``html``, ``pdf``, ``docx`` or ``epub``.

    Raises
    ------
    DocumentError
        A file that people take for text and that is none.
    """
    source, head = found.source, found.head
    if head.startswith(b"PK\x03\x04"):
        with found.open() as file:
            return zip_kind(source, file)
    if head.startswith(_OLD_OFFICE):
        _refuse_encrypted(found)
    for magic, what, remedy in _NOT_TEXT:
        # RTF and PostScript are readable as text but would be mostly markup, so they are here too.
        if head.startswith(magic):
            raise DocumentError(f"'{source}' is {what}; {remedy}")
    if head[:1024].lstrip(b"\xef\xbb\xbf \t\r\n\f\0").startswith(b"%PDF-"):
        return "pdf"
    if found.suffix == ".pdf":
        raise DocumentError(
            f"'{source}' does not begin like a PDF; download or export it again, "
            "or rename it if it is plain text"
        )
    if found.suffix in _HTML or _HTML_START.match(head[:1024]):
        return "html"
    return "markdown" if found.suffix in _MARKDOWN else "text"


def _refuse_encrypted(found: Input) -> None:
    """Encrypted Office documents are packed into what old ones are."""
    with found.open() as file:
        size = file.seek(0, io.SEEK_END)
        for start in {0, max(0, size - 8 * MIB)}:  # the list of contents is at either end
            file.seek(start)
            if "EncryptedPackage".encode("utf-16-le") in file.read(8 * MIB):
                raise DocumentError(
                    f"'{found.source}' is encrypted; open it in the program that made it and "
                    "save it without a password"
                )
