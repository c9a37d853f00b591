"""E-books (epub): chapter by chapter, in the order in which they are read.

An epub is a zip of XHTML pages and a list of them, for which the standard library and the HTML
reader are enough; the library that is made for it, ebooklib, is under the AGPL.
"""

from __future__ import annotations

import io
import posixpath
import zipfile
from collections.abc import Iterator
from urllib.parse import unquote
from xml.etree import ElementTree

from capkv_local.documents.base import Part, separated, short
from capkv_local.documents.files import Input
from capkv_local.documents.html import parse
from capkv_local.documents.sources import Place
from capkv_local.documents.zips import check_member, opened_zip
from capkv_local.errors import DocumentError

_CONTAINER = "META-INF/container.xml"
_ENCRYPTION = "META-INF/encryption.xml"
_PAGES = {"application/xhtml+xml", "text/html", "application/x-dtbook+xml"}


def epub_parts(file: Input) -> Iterator[Part]:
    """Read an e-book; a chapter is a page of it that has text."""
    yield from separated(_chapters(file))


def _chapters(file: Input) -> Iterator[Part]:
    source = file.source
    with file.open() as opened, opened_zip(source, opened) as archive:
        n_bytes = opened.seek(0, io.SEEK_END)
        pages = _reading_order(source, archive)
        if locked := _encrypted(source, archive).intersection(pages):
            raise DocumentError(
                f"'{source}' is protected against copying ({len(locked)} of {len(pages)} pages "
                "are encrypted); use a copy without protection"
            )
        number = 0
        for i, name in enumerate(pages):
            page = parse(source, _member(source, archive, name))
            if page.text:
                number += 1
                title = short(next(iter(page.headings.values()), page.title))
                place = Place("chapter", number, number, title)
                yield Part(page.text, place, n_bytes * (i + 1) // len(pages))


def _reading_order(source: str, archive: zipfile.ZipFile) -> list[str]:
    """Names of the pages in the archive."""
    container = _xml(source, archive, _CONTAINER)
    root = container.find(".//{*}rootfile")
    path = None if root is None else root.get("full-path")
    if not path:
        raise DocumentError(f"'{source}' does not name its list of pages; download it again")
    package = _xml(source, archive, path)
    items = {item.get("id"): item for item in package.iterfind(".//{*}manifest/{*}item")}
    names = []
    for entry in package.iterfind(".//{*}spine/{*}itemref"):
        item = items.get(entry.get("idref"))
        if item is not None and item.get("media-type") in _PAGES:
            href = unquote(item.get("href", "").partition("#")[0])
            names.append(posixpath.normpath(posixpath.join(posixpath.dirname(path), href)))
    return names


def _encrypted(source: str, archive: zipfile.ZipFile) -> set[str]:
    """Members that are encrypted: fonts often are, which does not matter."""
    if _ENCRYPTION not in archive.namelist():
        return set()
    references = _xml(source, archive, _ENCRYPTION).iterfind(".//{*}CipherReference")
    return {unquote(reference.get("URI", "")) for reference in references}


def _xml(source: str, archive: zipfile.ZipFile, name: str) -> ElementTree.Element:
    try:
        return ElementTree.fromstring(_member(source, archive, name))
    except ElementTree.ParseError as error:
        raise DocumentError(
            f"'{source}' is damaged ({name}: {short(error)}); download it again"
        ) from error


def _member(source: str, archive: zipfile.ZipFile, name: str) -> bytes:
    try:
        info = archive.getinfo(name)
    except KeyError:
        raise DocumentError(
            f"'{source}' is damaged (it lists '{name}', which is not in it); download it again"
        ) from None
    check_member(source, info)
    return archive.read(info)
