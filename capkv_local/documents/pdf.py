"""PDF: page by page; encrypted, damaged and scanned ones say so."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, BinaryIO

from capkv_local.documents.base import MIB, Part, clean, separated, short
from capkv_local.documents.files import Input
from capkv_local.errors import DocumentError
from capkv_local.sources import Place

if TYPE_CHECKING:
    from pypdf import PdfReader

# A reader keeps every object it has met, images too, until it is told to forget them.
_PAGES_KEPT = 50


def pdf_parts(file: Input, notes: list[str]) -> Iterator[Part]:
    """Read a PDF.

    Parameters
    ----------
    notes
        Gets a sentence when pages have an image and no text.
    """
    yield from separated(_pages(file, notes))


def _pages(file: Input, notes: list[str]) -> Iterator[Part]:
    source = file.source
    with file.open() as opened:
        _refuse_cut(source, opened)
        n_bytes = opened.seek(0, io.SEEK_END)
        with _library(source, "damaged"):
            reader = _reader(source, opened)
            n_pages = len(reader.pages)
        empty, images = [], []
        for number in range(1, n_pages + 1):
            if number % _PAGES_KEPT == 0:
                reader.resolved_objects.clear()
            with _library(source, f"damaged on page {number}"):
                page = reader.pages[number - 1]
                text = clean(page.extract_text()).strip()
                if not text:
                    empty.append(number)
                    if _has_image(page):
                        images.append(number)
            yield Part(text, Place("page", number, number), n_bytes * number // n_pages)
    if n_pages == 0:
        raise DocumentError(f"'{source}' has no pages; download or export the PDF again")
    if len(empty) == n_pages:
        where = "its only page" if n_pages == 1 else f"any of its {n_pages} pages"
        raise DocumentError(
            f"'{source}' has no text on {where} (a scan, perhaps); "
            "run text recognition first, e.g. ocrmypdf in.pdf out.pdf"
        )
    if images:
        notes.append(
            f"{source}: no text on {_listed(images)}, which {'have' if len(images) > 1 else 'has'} "
            "an image (a scan, perhaps): run text recognition first to have it read, too"
        )


def _refuse_cut(source: str, file: BinaryIO) -> None:
    # pypdf rebuilds cut files as far as they go; half a document must not pass for a whole one.
    end = b""
    position = file.seek(0, io.SEEK_END)
    while position and not end:  # some are padded
        start = max(0, position - MIB)
        file.seek(start)
        end = file.read(position - start).rstrip(b"\0 \t\r\n")
        position = start
    if b"%%EOF" not in end[-2048:]:
        raise DocumentError(
            f"'{source}' is cut short (it has no end mark); download or export the PDF again"
        )


@contextlib.contextmanager
def _library(source: str, what: str) -> Iterator[None]:
    """pypdf's warnings are silenced, and its errors become ours."""
    logger = logging.getLogger("pypdf")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)  # what it warns of, it mends; the rest is raised
    try:
        yield
    except DocumentError:
        raise
    except Exception as error:  # pypdf lets many kinds through on damaged files
        raise DocumentError(
            f"'{source}' is {what} ({short(error)}); download or export the PDF again"
        ) from error
    finally:
        logger.setLevel(level)


def _reader(source: str, file: BinaryIO) -> PdfReader:
    from pypdf import PasswordType, PdfReader
    from pypdf.errors import DependencyError

    try:
        reader = PdfReader(file, strict=False)
        # Many PDFs only restrict printing: their user password is the empty one.
        locked = reader.is_encrypted and reader.decrypt("") == PasswordType.NOT_DECRYPTED
    except DependencyError:  # AES, and no library for it: cannot be opened here either
        locked = True
    if locked:
        raise DocumentError(
            f"'{source}' is encrypted; remove its password first, "
            "e.g. qpdf --password=... --decrypt in.pdf out.pdf"
        )
    return reader


def _has_image(page: Any) -> bool:
    resources = page.get("/Resources")
    objects = resources.get_object().get("/XObject") if resources is not None else None
    return bool(objects is not None and objects.get_object())


def _listed(pages: list[int]) -> str:
    shown = ", ".join(map(str, pages[:5]))
    more = f" and {len(pages) - 5} more" if len(pages) > 5 else ""
    return f"{'pages' if len(pages) > 1 else 'page'} {shown}{more}"
