"""PDF: page by page; encrypted, damaged and scanned ones say so."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, BinaryIO

from capkv_local.documents.base import MIB, Part, clean, separated, short
from capkv_local.documents.files import Input
from capkv_local.documents.sources import Place
from capkv_local.errors import DocumentError

if TYPE_CHECKING:
    from pypdfium2 import PdfDocument, PdfPage

# Where the library has taken a word apart at the end of a line.
_BROKEN_WORD = "\ufffe"

# The dots of a table of contents: each would be a token.
_LEADER = re.compile(r"(?:[ \t]*\.){5,}")


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
        opened.seek(0)
        with _library(source, "damaged"), contextlib.closing(_document(source, opened)) as pdf:
            n_pages = len(pdf)
            empty, images = [], []
            for number in range(1, n_pages + 1):
                with (
                    _library(source, f"damaged on page {number}"),
                    contextlib.closing(pdf[number - 1]) as page,
                ):
                    text = _text(page)
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
    # The library mends cut files as far as they go; a half must not pass for the whole.
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
    """Errors of the library become ours."""
    try:
        yield
    except (DocumentError, GeneratorExit):
        raise
    except Exception as error:
        raise DocumentError(
            f"'{source}' is {what} ({short(error)}); download or export the PDF again"
        ) from error


def _document(source: str, file: BinaryIO) -> PdfDocument:
    from pypdfium2 import PdfDocument, PdfiumError
    from pypdfium2.raw import FPDF_ERR_PASSWORD

    try:
        return PdfDocument(file)  # many only restrict printing: their password is the empty one
    except PdfiumError as error:
        if error.err_code != FPDF_ERR_PASSWORD:
            raise
        raise DocumentError(
            f"'{source}' is encrypted; remove its password first, "
            "e.g. qpdf --password=... --decrypt in.pdf out.pdf"
        ) from None


def _text(page: PdfPage) -> str:
    with contextlib.closing(page.get_textpage()) as content:
        text = content.get_text_range().replace("\r\n", "\n").replace(_BROKEN_WORD, "")
    return clean(_LEADER.sub(" ...", text)).strip()


def _has_image(page: PdfPage) -> bool:
    from pypdfium2.raw import FPDF_PAGEOBJ_IMAGE

    return any(page.get_objects(filter=(FPDF_PAGEOBJ_IMAGE,)))


def _listed(pages: list[int]) -> str:
    shown = ", ".join(map(str, pages[:5]))
    more = f" and {len(pages) - 5} more" if len(pages) > 5 else ""
    return f"{'pages' if len(pages) > 1 else 'page'} {shown}{more}"
