"""What a document is to its readers: parts of text in order, each with its place.

A part is about a paragraph, a page or a chapter; :attr:`DocumentStream.parts` makes one after the
other, so that no more of a document is in memory than what is being read.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from capkv_local.documents.sources import Place, Source
from capkv_local.errors import DocumentError

MIB = 1 << 20
# What to do with a format that is not read.
SAVE_AS = "save it as .pdf, .html or .txt and give that file"


@dataclass(frozen=True)
class Part:
    """A piece of a text.

    Attributes
    ----------
    text
        With the line ends or blank lines that separate it from the next part: the texts of all
        parts, one after the other, are the text of the document.
    place
        Where it stands.
    n_bytes
        Bytes of the file that are done behind this part, for progress.
    """

    text: str
    place: Place
    n_bytes: int


@dataclass(frozen=True)
class Passage:
    """A place in a document, and the offset in its text (in characters) where it starts."""

    start: int
    place: Place

    @property
    def label(self) -> str:
        """The place in words: ``"p. 12"``."""
        return str(self.place)


@dataclass(frozen=True)
class Document:
    """One document in memory, ready for :meth:`DocumentChat.ingest`.

    Attributes
    ----------
    name : str
        File name without its folder, ``"stdin"`` for standard input; in a folder that was read
        as a whole, the path from there.
    text : str
        The text: lines end in ``\\n``; no NULs, no byte order mark and no lone surrogates, so it
        always encodes as UTF-8.
    kind : str
        ``"text"``, ``"markdown"``, ``"html"``, ``"pdf"``, ``"docx"`` or ``"epub"``.
    passages : tuple of Passage
        In order; the first starts at 0. Made from the lines of the text if left out.
    heading : str
        Line that announces the document to a model, which does not see names; empty for none.
    """

    name: str
    text: str
    kind: str
    passages: tuple[Passage, ...] = ()
    heading: str = ""

    def __post_init__(self) -> None:
        if not self.passages:
            from capkv_local.documents.text import line_parts

            object.__setattr__(self, "passages", _passages(line_parts([(self.text, 0)])))

    @property
    def n_bytes(self) -> int:
        """Size for progress."""
        return len(self.text)

    def parts(self) -> Iterator[Part]:
        """The text in its passages."""
        ends = [*(passage.start for passage in self.passages[1:]), len(self.text)]
        for passage, end in zip(self.passages, ends, strict=False):  # an empty text has none
            yield Part(self.text[passage.start : end], passage.place, end)

    def source(self, offset: int) -> Source:
        """Source of the character at an offset.

        Raises
        ------
        IndexError
            The text is not that long.
        """
        if not 0 <= offset < len(self.text):
            raise IndexError(f"offset {offset} is outside the {len(self.text)} characters")
        i = bisect.bisect_right(self.passages, offset, key=lambda passage: passage.start) - 1
        return Source(self.name, self.passages[i].place)


@dataclass
class DocumentStream:
    """One document that is read part by part; :meth:`read` makes it a :class:`Document`.

    Attributes
    ----------
    name, kind, heading
        As :class:`Document`.
    source
        How messages call it.
    n_bytes
        Size of the file; None for a pipe, which gives its text only once.
    notes
        Sentences for the user about what was found while reading, such as scanned pages.
    """

    name: str
    kind: str
    source: str
    n_bytes: int | None
    make_parts: Callable[[], Iterator[Part]]  # at its first part all checks are done
    heading: str = ""
    notes: list[str] = field(default_factory=list)
    _first: Iterator[Part] | None = field(default=None, repr=False)
    _given: bool = field(default=False, repr=False)

    def parts(self) -> Iterator[Part]:
        """Read the text from the start; a pipe only once.

        Raises
        ------
        DocumentError
            The file cannot be read on, or has no text.
        """
        first, self._first = self._first, None
        if first is not None:
            return first
        if self.n_bytes is None:
            if self._given:
                raise DocumentError(f"'{self.source}' was read already; a pipe gives it only once")
            self._given = True
        return self._checked()

    def check(self) -> None:
        """Read as far as the first part, so that what is wrong is told at once.

        Raises
        ------
        DocumentError
            As :meth:`parts`.
        """
        parts = self.parts()
        first = next(parts)
        if self._given:  # what a pipe gave it does not give again
            self._first = itertools.chain([first], parts)

    def read(self) -> Document:
        """Read all of it.

        Raises
        ------
        DocumentError
            As :meth:`parts`.
        """
        parts = list(self.parts())
        text = "".join(part.text for part in parts)
        return Document(self.name, text, self.kind, _passages(parts), self.heading)

    def _checked(self) -> Iterator[Part]:
        empty = True
        for part in self.make_parts():
            if empty and not part.text.strip():
                continue
            empty = False
            yield part
        if empty:
            raise DocumentError(f"'{self.source}' has no text in it; give a file that has")


def separated(parts: Iterable[Part], blank: str = "\n\n") -> Iterator[Part]:
    """Parts that have text, with ``blank`` between them."""
    before: Part | None = None
    for part in parts:
        if not part.text:
            continue
        if before is not None:
            yield Part(before.text + blank, before.place, before.n_bytes)
        before = part
    if before is not None:
        yield before


def clean(text: str) -> str:
    """Text without NULs and surrogates: a tokenizer takes only what encodes as UTF-8."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\0", "")
    # PDFs can yield surrogates: pairs are joined, lone ones replaced.
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def short(text: object) -> str:
    """First words of a title, or of an error of a library, on one line."""
    text = " ".join(str(text).split()) or (type(text).__name__ if text else "")
    return text if len(text) <= 80 else text[:79] + "…"


def _passages(parts: Iterable[Part]) -> tuple[Passage, ...]:
    out: list[Passage] = []
    start = 0
    for part in parts:
        if not out or out[-1].place != part.place:
            out.append(Passage(start, part.place))
        start += len(part.text)
    return tuple(out)
