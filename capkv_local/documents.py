"""Files to text: plain text, Markdown, source code, HTML and PDF, with errors that say what to do.

A wrong guess here is worse than a refusal, because the reader of an answer never sees the text the
model saw: binary data, scans and damaged files are refused instead of being read in part.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import stat
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from capkv_local.errors import DocumentError

if TYPE_CHECKING:
    from bs4 import BeautifulSoup
    from bs4.element import Tag

__all__ = ["Document", "read_document"]


@dataclass(frozen=True)
class Document:
    """One document, ready for :meth:`DocumentChat.ingest`.

    Attributes
    ----------
    name : str
        File name without its folder, ``"stdin"`` for standard input.
    text : str
        The text: lines end in ``\\n``; no NULs, no byte order mark and no lone surrogates, so it
        always encodes as UTF-8.
    kind : str
        ``"text"``, ``"markdown"``, ``"html"`` or ``"pdf"``.
    """

    name: str
    text: str
    kind: str


def read_document(path: str | Path) -> Document:
    """Read one file as text.

    The content decides what the file is; the ending of its name is used only for what the content
    does not show (Markdown, HTML fragments). Text is UTF-8 (or what its byte order mark says)
    when it decodes as such; for anything else the encoding is detected.

    Parameters
    ----------
    path : str or Path
        The file; ``"-"`` reads standard input.

    Returns
    -------
    Document

    Raises
    ------
    DocumentError
        The file is missing, a folder, empty, binary, or a PDF that is encrypted, damaged or has no
        text. The message is one sentence with the cause and what to do.
    """
    if str(path) == "-":
        source, name, suffix, data = "stdin", "stdin", "", sys.stdin.buffer.read()
    else:
        path = Path(path)
        source, name, suffix, data = str(path), path.name, path.suffix.lower(), _read_bytes(path)
    if not data.strip():
        raise DocumentError(f"'{source}' is empty; give a file that has text in it")
    kind = _kind(source, suffix, data)
    if kind == "pdf":
        text = _pdf_text(source, data)
    elif kind == "html":
        text = _html_text(source, data)
    else:
        text = _decode(source, data)
    return Document(name=name, text=_clean(source, text), kind=kind)


# ---- bytes -------------------------------------------------------------------------------------


def _read_bytes(path: Path) -> bytes:
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise DocumentError(f"'{path}' is a folder; give the files in it, e.g. {path}/*.txt")
        # A device such as /dev/zero never ends; pipes are fine: <(command) in a shell is one.
        if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode)):
            raise DocumentError(f"'{path}' is not a regular file; copy its text to a file first")
        return path.read_bytes()
    except FileNotFoundError:
        raise DocumentError(f"there is no file '{path}'; check the name and the folder") from None
    except OSError as error:
        reason = error.strerror or str(error)
        raise DocumentError(f"'{path}' cannot be read ({reason}); check its rights") from error
    except ValueError as error:  # a NUL in the name
        raise DocumentError(f"{str(path)!r} is not a file name ({error}); check it") from error


_MARKDOWN = {".md", ".markdown", ".mdown", ".mkd"}
_HTML = {".html", ".htm", ".xhtml", ".shtml"}
_HTML_START = re.compile(
    rb"^(?:\xef\xbb\xbf)?\s*(?:<\?xml[^>]*>\s*)?<(?:!doctype\s+html|html)\b", re.I
)

# Files people try that are not text inside: how they begin, what they are, what to do instead.
_SAVE_AS = "save it as .pdf, .html or .txt and give that file"
_OCR = "run text recognition (OCR) on it first"
_NOT_TEXT: tuple[tuple[bytes, str, str], ...] = (
    (b"PK\x03\x04", "a zip file (as .docx, .xlsx, .odt and .epub are)", _SAVE_AS),
    (b"\xd0\xcf\x11\xe0", "an old Office document", _SAVE_AS),
    (b"{\\rtf", "an RTF document", _SAVE_AS),
    (b"%!PS", "a PostScript file", "convert it to .pdf, e.g. with ps2pdf, and give that file"),
    (b"CAPKV\0", "a snapshot of capkv", "let its name end in .capkv"),
    (b"GGUF", "a model file", "give the model with --model and a document here"),
    (b"\x1f\x8b", "a gzip file", "unpack it first"),
    (b"\x89PNG", "an image", _OCR),
    (b"\xff\xd8\xff", "an image", _OCR),
)


def _kind(source: str, suffix: str, data: bytes) -> str:
    for magic, what, remedy in _NOT_TEXT:
        # RTF and PostScript are readable as text but would be mostly markup, so they are here too.
        if data.startswith(magic):
            raise DocumentError(f"'{source}' is {what}; {remedy}")
    if data[:1024].lstrip(b"\xef\xbb\xbf \t\r\n\f\0").startswith(b"%PDF-"):
        return "pdf"
    if suffix == ".pdf":
        raise DocumentError(
            f"'{source}' does not begin like a PDF; download or export it again, "
            "or rename it if it is plain text"
        )
    if suffix in _HTML or _HTML_START.match(data[:1024]):
        return "html"
    return "markdown" if suffix in _MARKDOWN else "text"


# ---- text --------------------------------------------------------------------------------------

# Longest first: the UTF-32 mark begins with the UTF-16 one.
_BYTE_ORDER_MARKS = (
    (b"\xff\xfe\0\0", "utf-32"),
    (b"\0\0\xfe\xff", "utf-32"),
    (b"\xef\xbb\xbf", "utf-8-sig"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
)
_CONTROLS = bytes([*range(1, 9), *range(14, 27), *range(28, 32), 127])
_SAMPLE = 1 << 18  # bytes looked at to detect an encoding: enough, and no wait for big files
# What Western European text has beyond ASCII; ¹, ž, ð, þ and ý would be bytes of other alphabets.
_WESTERN = frozenset(
    "àáâãäåæçèéêëìíîïñòóôõöøùúûüÿßœÀÁÂÃÄÅÆÇÈÉÊËÌÍÎÏÑÒÓÔÕÖØÙÚÛÜŒ"
    "\u00a0\u00ad«»\u2018\u2019“”„\u201a…\u2013—•€£§©®™°±µ·½¼¾²³ºª¿¡\u00b4"
)


def _decode(source: str, data: bytes) -> str:
    for mark, encoding in _BYTE_ORDER_MARKS:
        if data.startswith(mark):
            try:
                return data.decode(encoding)
            except UnicodeDecodeError as error:
                raise DocumentError(
                    f"'{source}' says it is {encoding} but is not (byte {error.start}); "
                    "save it again as UTF-8 text"
                ) from None
    _refuse_binary(source, data)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return _decode_unknown(source, data)


def _refuse_binary(source: str, data: bytes) -> None:
    if b"\0" in data:
        raise DocumentError(f"'{source}' is binary (it has NUL bytes); save it as UTF-8 text")
    # Compressed or encrypted data without a NUL still has about 10% control bytes; text has none.
    controls = len(data) - len(data.translate(None, _CONTROLS))
    if controls > 0.02 * len(data):
        raise DocumentError(
            f"'{source}' is binary ({controls / len(data):.0%} control bytes); "
            "save it as UTF-8 text"
        )


def _decode_unknown(source: str, data: bytes) -> str:
    text = data.decode("utf-8", errors="replace")
    bad, good = text.count("\ufffd"), len(text) - sum(map(str.isascii, text))
    if 10 * bad < good:  # UTF-8 with a few broken bytes: any other reading breaks all the rest
        return text
    # Detectors take short Western text for Arabic or Chinese, so it is recognised here.
    with contextlib.suppress(UnicodeDecodeError):
        text = data.decode("cp1252")
        other = [c for c in text if c > "\x7f"]
        if len(other) < 0.4 * len(text) and _WESTERN.issuperset(other):
            return text
    from charset_normalizer import from_bytes

    # Cut at a line end, so that no character of several bytes is cut in two.
    sample = data if len(data) <= _SAMPLE else data[:_SAMPLE].rpartition(b"\n")[0] + b"\n"
    best = from_bytes(sample, cp_exclusion=["utf_16", "utf_16_be", "utf_16_le", "utf_7"]).best()
    if best is None:
        raise DocumentError(
            f"'{source}' is in no text encoding that can be recognised; save it as UTF-8 text"
        )
    return data.decode(best.encoding, errors="replace")


def _clean(source: str, text: str) -> str:
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\0", "")
    # PDFs can yield surrogates: pairs are joined, lone ones replaced, or the tokenizer would fail.
    text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    text = text.removeprefix("\ufeff")
    if not text.strip():
        raise DocumentError(f"'{source}' has no text in it; give a file that has")
    return text


# ---- HTML --------------------------------------------------------------------------------------

_DROPPED = re.compile("script|style|template|noscript|svg|canvas|iframe|object|audio|video")
_PARAGRAPHS = re.compile(
    "p|h[1-6]|ul|ol|dl|table|pre|blockquote|figure|section|article|header|footer|nav|aside|main"
    "|title|hr|form|fieldset|details"
)
_LINES = re.compile("div|li|tr|dt|dd|caption|figcaption|address|summary|option|legend|br")


def _html_text(source: str, data: bytes) -> str:
    if not data.startswith(tuple(mark for mark, _ in _BYTE_ORDER_MARKS)):
        _refuse_binary(source, data)
    from bs4 import BeautifulSoup

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # XHTML read as HTML: what we want
        try:
            # Bytes, not text: the page itself may declare its encoding.
            soup = BeautifulSoup(data, "html.parser")
        except Exception as error:
            raise DocumentError(
                f"'{source}' cannot be parsed as HTML ({_short(error)}); save it again, or as .txt"
            ) from error
    text = _walk(soup)
    if not text:
        raise DocumentError(
            f"'{source}' is a page without text (filled in by scripts, perhaps); "
            "open it in a browser and save it as .txt or .pdf"
        )
    return text


def _walk(soup: BeautifulSoup) -> str:
    """Text of a page with its block structure as lines, headings and list items marked.

    A stack instead of recursion: pages nest deeper than Python recurses.
    """
    from bs4.element import CData, NavigableString, Tag

    out = _Lines()
    stack: list[object] = [soup]
    while stack:
        node = stack.pop()
        if isinstance(node, bool):  # the end of a block
            out.newline(blank=node)
            out.marker = ""
        elif isinstance(node, Tag):
            if _DROPPED.fullmatch(node.name):
                continue
            blank = _PARAGRAPHS.fullmatch(node.name) is not None
            if (blank or _LINES.fullmatch(node.name)) and not _only_block_of_cell(node):
                out.newline(blank=blank)
                out.marker = _marker(node.name) or out.marker
                stack.append(blank)
            if node.name == "pre":
                out.verbatim(node.get_text())
                continue
            if node.name in ("td", "th"):
                out.cell()
            stack.extend(reversed(node.contents))
        # Only these two are text: comments, doctypes and the like are other subclasses.
        elif type(node) in (NavigableString, CData):
            out.text(str(node))
    return out.finish()


def _only_block_of_cell(tag: Tag) -> bool:
    """Return whether a tag only wraps the text of a table cell, which stays on its row's line."""
    cell = tag.parent
    if cell is None or cell.name not in ("td", "th"):
        return False
    return len(cell.find_all(True, recursive=False)) == 1


def _marker(tag: str) -> str:
    if tag == "li":
        return "- "
    return "#" * int(tag[1]) + " " if re.fullmatch("h[1-6]", tag) else ""


class _Lines:
    """Text put together line by line, with white space collapsed as a browser does."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._line: list[str] = []
        self.marker = ""  # goes before the next text: an item may open blocks before its text

    def text(self, piece: str) -> None:
        piece = re.sub(r"\s+", " ", piece)
        if self._at_space():
            piece = piece.lstrip()
        if piece:
            self._line.append(self.marker + piece)
            self.marker = ""

    def cell(self) -> None:
        if self._line:
            self._line.append("| " if self._at_space() else " | ")

    def verbatim(self, block: str) -> None:
        self._lines.extend(line.rstrip() for line in block.strip("\n").splitlines())

    def finish(self) -> str:
        self.newline(blank=True)
        return "\n".join(self._lines).strip("\n")

    def _at_space(self) -> bool:
        return not self._line or self._line[-1].endswith(" ")

    def newline(self, *, blank: bool) -> None:
        if self._line:
            self._lines.append("".join(self._line).rstrip())
            self._line.clear()
        if blank and self._lines and self._lines[-1]:
            self._lines.append("")


# ---- PDF ---------------------------------------------------------------------------------------


def _pdf_text(source: str, data: bytes) -> str:
    # pypdf rebuilds cut files as far as they go; half a document must not pass for a whole one.
    if b"%%EOF" not in data.rstrip(b"\0 \t\r\n")[-2048:]:
        raise DocumentError(
            f"'{source}' is cut short (it has no end mark); download or export the PDF again"
        )
    logger = logging.getLogger("pypdf")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)  # what it warns of, it mends; the rest is raised
    try:
        pages = _pdf_pages(source, data)
    except DocumentError:
        raise
    except Exception as error:  # pypdf lets many kinds through on damaged files
        raise DocumentError(
            f"'{source}' is damaged ({_short(error)}); download or export the PDF again"
        ) from error
    finally:
        logger.setLevel(level)
    text = "\n\n".join(page for page in pages if page)
    if not text:
        where = "its only page" if len(pages) == 1 else f"any of its {len(pages)} pages"
        raise DocumentError(
            f"'{source}' has no text on {where} (a scan, perhaps); "
            "run text recognition first, e.g. ocrmypdf in.pdf out.pdf"
        )
    return text


def _pdf_pages(source: str, data: bytes) -> list[str]:
    from pypdf import PasswordType, PdfReader
    from pypdf.errors import DependencyError

    try:
        reader = PdfReader(io.BytesIO(data), strict=False)
        # Many PDFs only restrict printing: their user password is the empty one.
        locked = reader.is_encrypted and reader.decrypt("") == PasswordType.NOT_DECRYPTED
    except DependencyError:  # AES, and no library for it: cannot be opened here either
        locked = True
    if locked:
        raise DocumentError(
            f"'{source}' is encrypted; remove its password first, "
            "e.g. qpdf --password=... --decrypt in.pdf out.pdf"
        )
    return [page.extract_text().strip() for page in reader.pages]


def _short(error: Exception) -> str:
    """Return the first words of an error of a library, on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 80 else text[:79] + "…"
