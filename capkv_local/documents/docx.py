"""Word documents, through mammoth, which makes HTML of them.

It reads what the plainer libraries leave out without a word: content controls, tracked insertions,
text boxes, footnotes. Headers and footers are left out: they are repeated on every page.
"""

from __future__ import annotations

import io
from collections.abc import Iterator

from capkv_local.documents.base import Part, short
from capkv_local.documents.files import Input
from capkv_local.documents.html import parse
from capkv_local.documents.zips import check_member, opened_zip
from capkv_local.errors import DocumentError

_STYLES = "p[style-name='Title'] => h1:fresh\np[style-name='Subtitle'] => h2:fresh"


def docx_parts(file: Input) -> Iterator[Part]:
    """Read a Word document: paragraphs below their headings."""
    with file.open() as opened, opened_zip(file.source, opened) as archive:
        for info in archive.infolist():
            if info.filename.startswith("word/") and info.filename.endswith(".xml"):
                check_member(file.source, info)
        opened.seek(0)
        html = _html(file.source, opened.read())
    page = parse(file.source, html)
    if page.text:
        yield from page.parts(file.n_bytes or len(html))


def _html(source: str, data: bytes) -> str:
    import mammoth

    try:
        # Images are not looked at: they would be unpacked only to be dropped.
        return str(
            mammoth.convert_to_html(
                io.BytesIO(data), style_map=_STYLES, convert_image=lambda image: []
            ).value
        )
    except Exception as error:  # whatever a damaged file makes of the parsers
        raise DocumentError(
            f"'{source}' is damaged ({short(error)}); open it in the program that made it and save "
            "it again, or as .pdf"
        ) from error
