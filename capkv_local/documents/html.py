"""HTML: text with its block structure as lines, in passages of paragraphs under their headings."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from capkv_local.documents.base import MIB, Part, clean, short
from capkv_local.documents.encoding import marked, refuse_binary
from capkv_local.documents.files import Input
from capkv_local.documents.sources import Place
from capkv_local.errors import DocumentError

if TYPE_CHECKING:
    from bs4 import BeautifulSoup
    from bs4.element import Tag

# A page is parsed as a whole, which takes about twenty times its size.
_LARGEST = 32 * MIB
# Paragraphs are put together into passages of at least so many characters.
_SHORTEST = 256


def html_parts(file: Input) -> Iterator[Part]:
    """Read a page."""
    if file.n_bytes is not None and file.n_bytes > _LARGEST:
        raise DocumentError(
            f"'{file.source}' is a page of {file.n_bytes // MIB} MiB, no more than "
            f"{_LARGEST // MIB} are parsed; save it as .txt, which may be of any size"
        )
    with file.open() as opened:
        data = opened.read(_LARGEST)
    page = parse(file.source, data)
    if not page.text:
        raise DocumentError(
            f"'{file.source}' is a page without text (filled in by scripts, perhaps); "
            "open it in a browser and save it as .txt or .pdf"
        )
    yield from page.parts(len(data))


@dataclass(frozen=True)
class Page:
    """What a page shows.

    Attributes
    ----------
    lines
        Its text; paragraphs are separated by empty lines.
    headings
        Titles by the number of their line.
    title
        What the page calls itself; empty if it does not.
    """

    lines: list[str]
    headings: dict[int, str]
    title: str

    @property
    def text(self) -> str:
        """All lines."""
        return clean("\n".join(self.lines).strip("\n"))

    def parts(self, n_bytes: int) -> Iterator[Part]:
        """Paragraphs, counted from 1; those below one heading are put together until they count.

        Parameters
        ----------
        n_bytes
            Bytes of the whole page.
        """
        filled = [i for i, line in enumerate(self.lines) if line.strip()]
        out: list[str] = []
        n_chars, first, number, title = 0, 1, 0, ""
        for i in range(filled[0], filled[-1] + 1):
            line = self.lines[i]
            if line and not (i > filled[0] and self.lines[i - 1]):
                if out and (i in self.headings or n_chars >= _SHORTEST):
                    done = n_bytes * i // len(self.lines)
                    yield Part(clean("".join(out)), Place("paragraph", first, number, title), done)
                    out, n_chars, first = [], 0, number + 1
                number += 1
                title = short(self.headings.get(i, title))
            out.append(line if i == filled[-1] else f"{line}\n")
            n_chars += len(line)
        yield Part(clean("".join(out)), Place("paragraph", first, number, title), n_bytes)


def parse(source: str, data: bytes | str) -> Page:
    """Parse a page; bytes may declare their encoding.

    Raises
    ------
    DocumentError
        Binary, or nothing that can be parsed.
    """
    if isinstance(data, bytes) and marked(data) is None:
        refuse_binary(source, data)
    from bs4 import BeautifulSoup

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # XHTML read as HTML: what we want
        try:
            soup = BeautifulSoup(data, "html.parser")
        except Exception as error:
            raise DocumentError(
                f"'{source}' cannot be parsed as HTML ({short(error)}); save it again, or as .txt"
            ) from error
    lines = _walk(soup)
    return Page(lines.lines, lines.headings, clean(soup.title.get_text() if soup.title else ""))


_DROPPED = re.compile("script|style|template|noscript|svg|canvas|iframe|object|audio|video")
_PARAGRAPHS = re.compile(
    "p|h[1-6]|ul|ol|dl|table|pre|blockquote|figure|section|article|header|footer|nav|aside|main"
    "|title|hr|form|fieldset|details"
)
_LINES = re.compile("div|li|tr|dt|dd|caption|figcaption|address|summary|option|legend|br")


def _walk(soup: BeautifulSoup) -> _Lines:
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
    out.newline(blank=True)
    return out


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
        self.lines: list[str] = []
        self.headings: dict[int, str] = {}  # line: title
        self._line: list[str] = []
        self._heading = False
        self.marker = ""  # goes before the next text: an item may open blocks before its text

    def text(self, piece: str) -> None:
        piece = re.sub(r"\s+", " ", piece)
        if self._at_space():
            piece = piece.lstrip()
        if piece:
            self._line.append(self.marker + piece)
            self._heading = self._heading or self.marker.startswith("#")
            self.marker = ""

    def cell(self) -> None:
        if self._line:
            self._line.append("| " if self._at_space() else " | ")

    def verbatim(self, block: str) -> None:
        self.lines.extend(line.rstrip() for line in block.strip("\n").splitlines())

    def _at_space(self) -> bool:
        return not self._line or self._line[-1].endswith(" ")

    def newline(self, *, blank: bool) -> None:
        if self._line:
            line = "".join(self._line).rstrip()
            if self._heading:
                self.headings[len(self.lines)] = line.lstrip("# ")
            self.lines.append(line)
            self._line.clear()
            self._heading = False
        if blank and self.lines and self.lines[-1]:
            self.lines.append("")
