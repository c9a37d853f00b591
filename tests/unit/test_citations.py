"""Evidence to passages: what stands out is named first, and its quote is of its own text."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from capkv_local.citations.passages import (
    STANDS_ALONE,
    STANDS_OUT,
    WINDOW,
    Citation,
    Evidence,
    cite_passages,
    rank,
)
from capkv_local.documents.sources import Place, Source, SourceMap

# Text as tokens of four characters.
TEXT = (
    "The office keeps the tide tables. High water was at four. "
    "The code of the old lighthouse is 48213. Nobody knows who wrote it down. " * 3
)
PIECES = [TEXT[i : i + 4] for i in range(0, len(TEXT), 4)]


def text(tokens: range) -> str:
    return "".join(PIECES[i % len(PIECES)] for i in tokens)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Evidence, SourceMap]:
    """Evidence of passages and of tokens between them that have no source."""
    sources, n = SourceMap(), 0
    for page, (length, known) in enumerate(
        draw(st.lists(st.tuples(st.integers(1, 40), st.booleans()), max_size=8)), 1
    ):
        sources.mark(n, Source("a.pdf", Place("page", page, page)) if known else None)
        n += length
    values = st.floats(0, 100, width=32) | st.just(0.0)
    evidence = draw(st.lists(values, min_size=n, max_size=n))
    return np.array(evidence, dtype=np.float64), sources


@given(cases())
def test_passages_are_ranked_by_what_they_got(case: tuple[Evidence, SourceMap]) -> None:
    evidence, sources = case
    passages = rank(evidence, sources)
    shares = [passage.share for passage in passages]
    assert shares == sorted(shares, reverse=True) and all(0 < share <= 1 for share in shares)
    assert len({passage.source for passage in passages}) == len(passages)
    for passage in passages:
        assert {sources.at(i) for i in passage.tokens} == {passage.source}
        assert set(passage.window) <= set(passage.tokens)
        assert len(passage.window) == min(WINDOW, len(passage.tokens))
    named = {passage.source for passage in passages}
    for i in np.flatnonzero(evidence):
        source = sources.at(int(i))
        assert source is None or source in named


@given(cases())
def test_no_more_is_cited_than_stands_out(case: tuple[Evidence, SourceMap]) -> None:
    evidence, sources = case
    citations = cite_passages(evidence, sources, text)
    assert len(citations) <= 1 / STANDS_OUT
    for citation in citations:
        assert citation.share >= (STANDS_OUT if len(citations) > 1 else STANDS_ALONE)
        assert citation.quote and "\n" not in citation.quote


@given(cases(), st.data())
def test_what_alone_was_looked_at_is_the_only_citation(
    case: tuple[Evidence, SourceMap], data: st.DataObject
) -> None:
    evidence, sources = case
    known = [i for i in range(len(evidence)) if sources.at(i) is not None]
    if not known:
        assert cite_passages(evidence, sources, text) == []
        return
    evidence[:] = 0
    token = data.draw(st.sampled_from(known))
    evidence[token] = 1
    (citation,) = cite_passages(evidence, sources, text)
    source = sources.at(token)
    assert source is not None and (citation.document, citation.place) == (
        source.document,
        source.place,
    )
    assert citation.share == 1


def test_evidence_that_is_spread_evenly_cites_nothing() -> None:
    sources = SourceMap()
    sources.mark(0, Source("a.txt", Place("line", 1, 9)))
    evidence = np.ones(int(2 * WINDOW / STANDS_ALONE), np.float64)
    assert len(rank(evidence, sources)) == 1
    assert cite_passages(evidence, sources, text) == []
    assert cite_passages(np.zeros_like(evidence), sources, text) == []
    assert cite_passages(evidence[:0], SourceMap(), text) == []


def test_a_long_passage_does_not_win_by_its_length() -> None:
    sources = SourceMap()
    sources.mark(0, Source("a.txt", Place("line", 1, 90)))
    sources.mark(900, Source("a.txt", Place("line", 91, 92)))
    evidence = np.full(920, 0.1, np.float64)
    evidence[905:908] = 4
    assert rank(evidence, sources)[0].source.place.first == 91


@pytest.mark.parametrize(
    ("at", "expected"),
    [
        ("tide", "The office keeps the tide tables."),
        ("48213", "The code of the old lighthouse is 48213."),
        ("Nobody", "Nobody knows who wrote it down."),
    ],
)
def test_the_quote_is_the_sentence_around_the_peak(at: str, expected: str) -> None:
    sources = SourceMap()
    sources.mark(0, Source("a.txt", Place("line", 1, 9)))
    evidence = np.zeros(len(PIECES), np.float64)
    evidence[-(-TEXT.index(at) // 4)] = 1
    (citation,) = cite_passages(evidence, sources, text)
    assert citation.quote == expected


def test_a_long_sentence_is_quoted_around_the_peak() -> None:
    words = [f"w{i:02d} " for i in range(60)]
    sources = SourceMap()
    sources.mark(0, Source("a.txt", Place("chapter", 2, 2, "Ships")))
    evidence = np.zeros(60, np.float64)
    evidence[30] = 1
    (citation,) = cite_passages(evidence, sources, lambda tokens: "".join(words[i] for i in tokens))
    quote = citation.quote.split()
    assert quote[0] == quote[-1] == "..." and "w30" in quote and len(quote) == 18
    assert str(citation) == f'a.txt, ch. 2 "Ships": "{citation.quote}"'
    assert citation.to_json() == {
        "document": "a.txt",
        "chapter": [2, 2],
        "title": "Ships",
        "share": 1.0,
        "quote": citation.quote,
    }


def test_a_citation_without_a_title_has_none_in_json() -> None:
    citation = Citation("a.pdf", Place("page", 3, 3), 0.25, "x")
    assert citation.to_json() == {"document": "a.pdf", "page": [3, 3], "share": 0.25, "quote": "x"}
