"""Citations: the passages of the documents that an answer looked at most.

Evidence is one number per token of the documents: what the answer's queries gave to its cells (see
:mod:`capkv_local.citations.evidence`). Here it becomes passages, and it is decided whether any
stands out. Nothing here knows a model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from capkv_local.documents.sources import Place, Source, SourceMap

Evidence = npt.NDArray[np.float64]

# Tokens that are looked at together: about a sentence. What an answer is taken from is that short,
# whether the passage is a line or a chapter, so long passages win nothing by their length.
WINDOW = 16
# A passage stands out if its best window has this share of all evidence: so there are at most three
# that do (docs/citations.md).
STANDS_OUT = 0.3
# Of a longer text the rest has more: there the first passage also stands out with a smaller share,
# if it is so many times that of the next.
STANDS_ALONE, TIMES_NEXT = 0.2, 3.5

_QUOTE_TOKENS = 48  # before and after the window, to find the ends of its sentence
_QUOTE_WORDS = 16
_SENTENCE_END = re.compile(r"""(?<=[.!?])["')\]]*\s+|\n\s*\n""")


@dataclass(frozen=True)
class Passage:
    """A passage and its best window, as tokens of the conversation.

    Attributes
    ----------
    source
        Document and place.
    tokens
        All of the passage.
    window
        Those of it that were looked at most, at most :data:`WINDOW`.
    share
        Evidence of the window, as a share of that of all documents.
    """

    source: Source
    tokens: range
    window: range
    share: float


@dataclass(frozen=True)
class Citation:
    """A passage that an answer was probably taken from.

    Attributes
    ----------
    document
        Its name.
    place
        Page, lines, chapter, section or paragraph.
    share
        Of the evidence in all documents, from 0 to 1: how much the passage stands out, not how
        likely it is.
    quote
        The words that were looked at most, on one line.

    Examples
    --------
    >>> print(Citation("harbour.pdf", Place("page", 1, 1), 0.4, "The harbour office keeps ..."))
    harbour.pdf, p. 1: "The harbour office keeps ..."
    """

    document: str
    place: Place
    share: float
    quote: str

    def __str__(self) -> str:
        return f'{self.document}, {self.place}: "{self.quote}"'

    def to_json(self) -> dict[str, Any]:
        """JSON's types: ``document``, ``UNIT: [first, last]``, ``title``, ``share``, ``quote``."""
        place = self.place
        title = {"title": place.title} if place.title else {}
        return {
            "document": self.document,
            place.unit: [place.first, place.last],
            **title,
            "share": round(self.share, 4),
            "quote": self.quote,
        }


def rank(evidence: Evidence, sources: SourceMap, *, n_window: int = WINDOW) -> list[Passage]:
    """All passages with any evidence, the one whose best window has most of it first.

    Parameters
    ----------
    evidence
        Of every token, ``[n_tokens]``, 0 or more. What has no source counts for nothing.
    sources
        Where tokens come from.
    n_window
        Tokens of a window, at most; a window lies within one passage.
    """
    passages: list[Passage] = []
    total = 0.0
    for tokens, source in sources.ranges(len(evidence)):
        inside = evidence[tokens.start : tokens.stop]
        total += inside.sum()
        n = min(n_window, len(inside))
        before = np.concatenate(([0.0], np.cumsum(inside)))
        sums = before[n:] - before[:-n]
        best = int(sums.argmax())
        start = tokens.start + best
        passages.append(Passage(source, tokens, range(start, start + n), float(sums[best])))
    found = [
        Passage(p.source, p.tokens, p.window, min(1.0, p.share / total))
        for p in passages
        if p.share > 0
    ]
    return sorted(found, key=lambda passage: -passage.share)


def cite_passages(
    evidence: Evidence, sources: SourceMap, text: Callable[[range], str]
) -> list[Citation]:
    """The passages that stand out, the strongest first; none if the answer looked everywhere.

    Parameters
    ----------
    evidence, sources
        As :func:`rank`.
    text
        Text of tokens.
    """
    passages = rank(evidence, sources)
    return [
        Citation(p.source.document, p.source.place, p.share, quote(p, evidence, text))
        for p in passages[: _n_standing_out([p.share for p in passages])]
    ]


def _n_standing_out(shares: Sequence[float]) -> int:
    """How many of the shares, in descending order, stand out.

    Examples
    --------
    >>> [_n_standing_out(s) for s in ([0.4, 0.35, 0.1], [0.25, 0.05], [0.25, 0.2])]
    [2, 1, 0]
    """
    n = sum(share >= STANDS_OUT for share in shares)
    if n == 0 and shares and shares[0] >= STANDS_ALONE:
        n = int(shares[0] >= TIMES_NEXT * max(shares[1:], default=0.0))
    return n


def quote(passage: Passage, evidence: Evidence, text: Callable[[range], str]) -> str:
    """The sentence with the token that was looked at most; of a long one, the words around it."""
    window, tokens = passage.window, passage.tokens
    peak = window.start + int(evidence[window.start : window.stop].argmax())
    start = max(tokens.start, window.start - _QUOTE_TOKENS)
    stop = min(tokens.stop, window.stop + _QUOTE_TOKENS)
    before = text(range(start, peak))
    whole = before + text(range(peak, stop))
    at = min(len(before), max(0, len(whole.rstrip()) - 1))
    at += len(whole[at:]) - len(whole[at:].lstrip())  # a token begins with the space before it
    first, last = 0, len(whole)
    for end in _SENTENCE_END.finditer(whole):
        if end.end() <= at:
            first = end.end()
        elif end.start() > at:
            last = end.start()
            break
    return _shorten(whole[first:at], whole[at:last])


def _shorten(before: str, after: str) -> str:
    """Words on one line, of both parts together at most ``_QUOTE_WORDS``."""
    joined = bool(before) and not before[-1].isspace()  # in the middle of a word
    head, tail = before.split(), after.split()
    if joined and head and tail:
        tail[0] = head.pop() + tail[0]
    n_head = min(len(head), max(_QUOTE_WORDS // 2, _QUOTE_WORDS - len(tail)))
    n_tail = _QUOTE_WORDS - n_head
    cut = ["..."] if len(head) > n_head else []
    end = ["..."] if len(tail) > n_tail else []
    return " ".join([*cut, *head[len(head) - n_head :], *tail[:n_tail], *end])
