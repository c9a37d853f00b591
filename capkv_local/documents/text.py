"""Plain text, Markdown and source code: passages of whole lines."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from capkv_local.documents.base import Part
from capkv_local.documents.encoding import decoded
from capkv_local.documents.files import Input
from capkv_local.documents.sources import Place

# A passage ends at a blank line, but not before it has so many characters ...
_SHORTEST = 256
# ... and at any line once it has so many: few ranges, and lines that are found again at a glance.
_LONGEST = 800
# A line may be longer than any memory: it is passed on in pieces.
_PIECE = 1 << 16


def text_parts(file: Input) -> Iterator[Part]:
    """Read text in blocks; a file may be larger than memory."""
    yield from line_parts(decoded(file.source, file.blocks()))


def line_parts(blocks: Iterable[tuple[str, int]]) -> Iterator[Part]:
    """Cut text at line ends into passages.

    Parameters
    ----------
    blocks
        Text, cut anywhere, and the bytes that are done behind it.
    """
    lines: list[str] = []
    n_chars, first, line = 0, 1, 1  # of the passage; its first line, and the one that follows
    n_done = 0
    for piece, n_bytes in _pieces(blocks):
        whole = piece.endswith("\n")
        ended = not piece.strip() and n_chars >= _SHORTEST
        lines.append(piece)
        n_chars += len(piece)
        line += whole
        if ended or n_chars >= _LONGEST:
            yield Part("".join(lines), Place("line", first, line - whole), n_bytes)
            lines, n_chars, first = [], 0, line
        n_done = n_bytes
    if lines:
        last = line - lines[-1].endswith("\n")
        yield Part("".join(lines), Place("line", first, last), n_done)


def _pieces(blocks: Iterable[tuple[str, int]]) -> Iterator[tuple[str, int]]:
    """Lines with their ends, and pieces of very long ones."""
    rest, n_done = "", 0
    for text, n_bytes in blocks:
        *lines, rest = (rest + text).split("\n")
        for line in lines:
            yield f"{line}\n", n_bytes
        if len(rest) >= _PIECE:
            yield rest, n_bytes
            rest = ""
        n_done = n_bytes
    if rest:
        yield rest, n_done
