"""Opening one document, whatever its format."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from capkv_local.documents.base import Document, DocumentStream, Part
from capkv_local.documents.docx import docx_parts
from capkv_local.documents.epub import epub_parts
from capkv_local.documents.files import Input, kind_of, open_input
from capkv_local.documents.html import html_parts
from capkv_local.documents.pdf import pdf_parts
from capkv_local.documents.text import text_parts

_READERS: dict[str, Callable[[Input, list[str]], Iterator[Part]]] = {
    "text": lambda file, notes: text_parts(file),
    "markdown": lambda file, notes: text_parts(file),
    "html": lambda file, notes: html_parts(file),
    "docx": lambda file, notes: docx_parts(file),
    "epub": lambda file, notes: epub_parts(file),
    "pdf": pdf_parts,
}


def open_document(path: str | Path) -> DocumentStream:
    """Open one file to be read part by part; its beginning is read at once, to see that it can be.

    The content decides what the file is; the ending of its name is used only for what the content
    does not show (Markdown, HTML fragments). Text is UTF-8 (or what its byte order mark says)
    when it decodes as such; for anything else the encoding is detected.

    Parameters
    ----------
    path : str or Path
        The file; ``"-"`` is standard input.

    Returns
    -------
    DocumentStream

    Raises
    ------
    DocumentError
        The file is missing, a folder, empty, binary, encrypted, damaged or has no text. The
        message is one sentence with the cause and what to do. Damage further on is raised while
        the parts are read.
    """
    return _open(open_input(path), check=True)


def read_document(path: str | Path) -> Document:
    """Read one file as text, all of it.

    Parameters
    ----------
    path : str or Path
        As :func:`open_document`.

    Returns
    -------
    Document

    Raises
    ------
    DocumentError
        As :func:`open_document`.
    """
    return _open(open_input(path), check=False).read()


def _open(file: Input, *, check: bool) -> DocumentStream:
    kind = kind_of(file)
    notes: list[str] = []
    reader = _READERS[kind]
    stream = DocumentStream(
        name=file.name,
        kind=kind,
        source=file.source,
        n_bytes=file.n_bytes,
        make_parts=lambda: reader(file, notes),
        notes=notes,
    )
    if check:
        stream.check()
        # What cannot be read as it comes (a PDF in a pipe) has been put into a file by now.
        stream.n_bytes = file.n_bytes
        notes.clear()
    return stream
