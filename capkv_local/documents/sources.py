"""Where text comes from: which document, and which page, lines, chapter or paragraph of it."""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from capkv_local.errors import StateError

Unit = Literal["page", "line", "chapter", "section", "paragraph"]


@dataclass(frozen=True)
class Place:
    """A place in a document.

    Attributes
    ----------
    unit
        What the numbers count, from 1.
    first, last
        Both belong to the place.
    title
        Heading of the chapter, section or paragraph; empty if there is none.

    Examples
    --------
    >>> print(Place("page", 12, 12), Place("line", 3, 9), sep="; ")
    p. 12; lines 3-9
    >>> print(Place("chapter", 2, 2, "The Harbour"))
    ch. 2 "The Harbour"
    """

    unit: Unit
    first: int
    last: int
    title: str = ""

    def __str__(self) -> str:
        one, many = _WORDS[self.unit]
        numbers = f"{self.first}" if self.first == self.last else f"{self.first}-{self.last}"
        label = f"{one if self.first == self.last else many} {numbers}"
        return f'{label} "{self.title}"' if self.title else label


_WORDS: dict[Unit, tuple[str, str]] = {
    "page": ("p.", "pp."),
    "line": ("line", "lines"),
    "chapter": ("ch.", "ch."),
    "section": ("sec.", "sec."),
    "paragraph": ("par.", "par."),
}


@dataclass(frozen=True)
class Source:
    """A place in a document that has a name.

    Examples
    --------
    >>> print(Source("report.pdf", Place("page", 12, 12)))
    report.pdf, p. 12
    """

    document: str
    place: Place

    def __str__(self) -> str:
        return f"{self.document}, {self.place}"


@dataclass
class SourceMap:
    """Source of every token of a conversation, kept as ranges.

    Tokens are counted from the start of the conversation, as in ``llama.input_ids``. Questions,
    answers and what the chat template adds have no source.
    """

    _starts: list[int] = field(default_factory=list)  # first token of each range, ascending
    _sources: list[Source | None] = field(default_factory=list)  # None: not from a document

    def __len__(self) -> int:
        """Number of ranges."""
        return len(self._starts)

    def mark(self, token: int, source: Source | None) -> None:
        """Say that tokens from this one on are of ``source``; what was said of them is forgotten.

        A range that covers no token disappears: of two marks at one token the last one holds.
        """
        self.cut(token)
        if source != (self._sources[-1] if self._sources else None):
            self._starts.append(token)
            self._sources.append(source)

    def cut(self, n_tokens: int) -> None:
        """Forget what is known of tokens from ``n_tokens`` on."""
        n = bisect.bisect_left(self._starts, n_tokens)
        del self._starts[n:], self._sources[n:]

    def at(self, token: int) -> Source | None:
        """Source of a token; None for what comes from no document."""
        i = bisect.bisect_right(self._starts, token) - 1
        return self._sources[i] if i >= 0 else None

    def ranges(self, n_tokens: int) -> Iterator[tuple[range, Source]]:
        """Ranges of the first ``n_tokens`` tokens that have a source, in order."""
        for start, stop, source in zip(
            self._starts, [*self._starts[1:], n_tokens], self._sources, strict=False
        ):
            tokens = range(start, min(stop, n_tokens))
            if source is not None and tokens:
                yield tokens, source

    def to_json(self) -> dict[str, Any]:
        """What :meth:`from_json` reads, of JSON's types only; each name is written once."""
        names: dict[str, int] = {}
        ranges: list[list[Any]] = []
        for start, source in zip(self._starts, self._sources, strict=True):
            row: list[Any] = [start]
            if source is not None:
                place = source.place
                row += [names.setdefault(source.document, len(names)), place.unit]
                row += [place.first, place.last, *([place.title] if place.title else [])]
            ranges.append(row)
        return {"documents": list(names), "ranges": ranges}

    @classmethod
    def from_json(cls, data: Any) -> SourceMap:
        """Read what :meth:`to_json` made.

        Raises
        ------
        StateError
            It is something else.
        """
        out = cls()
        try:
            for start, *row in data["ranges"]:
                source = None
                if row:
                    document, unit, first, last, *title = row
                    if unit not in get_args(Unit) or document < 0:
                        raise ValueError(row)
                    place = Place(unit, int(first), int(last), *map(str, title))
                    source = Source(str(data["documents"][document]), place)
                if out._starts and start <= out._starts[-1]:
                    raise ValueError(start)
                out._starts.append(int(start))
                out._sources.append(source)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise StateError(f"the sources of a session are damaged ({error!r})") from error
        return out
