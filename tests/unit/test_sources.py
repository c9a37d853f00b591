"""Token to source: ranges that say what was marked last, and survive being written."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capkv_local.documents.sources import Place, Source, SourceMap
from capkv_local.errors import StateError

PLACES = st.builds(
    lambda unit, first, more, title: Place(unit, first, first + more, title),
    st.sampled_from(["page", "line", "chapter", "paragraph"]),
    st.integers(1, 9999),
    st.integers(0, 20),
    st.sampled_from(["", 'A "title", with, commas', "Überschrift"]),
)
SOURCES = st.none() | st.builds(Source, st.sampled_from(["a.txt", "dir/b.pdf"]), PLACES)
RANGES = st.lists(st.tuples(st.integers(0, 30), SOURCES), max_size=20)  # (length, source)


def filled(ranges: list[tuple[int, Source | None]]) -> tuple[SourceMap, list[Source | None]]:
    sources = SourceMap()
    expected: list[Source | None] = []
    for length, source in ranges:
        sources.mark(len(expected), source)
        expected += [source] * length
    sources.mark(len(expected), None)
    return sources, expected


@given(RANGES)
def test_every_token_has_the_source_that_was_marked(
    ranges: list[tuple[int, Source | None]],
) -> None:
    sources, expected = filled(ranges)
    assert [sources.at(i) for i in range(len(expected) + 2)] == [*expected, None, None]
    assert len(sources) <= len(ranges) + 1


@given(RANGES, st.integers(0, 200))
def test_json_and_cut(ranges: list[tuple[int, Source | None]], n_tokens: int) -> None:
    sources, expected = filled(ranges)
    sources.cut(n_tokens)
    again = SourceMap.from_json(json.loads(json.dumps(sources.to_json())))
    assert again == sources
    kept = expected[:n_tokens]
    assert [again.at(i) for i in range(len(kept))] == kept


def test_what_follows_a_document_has_no_source() -> None:
    sources = SourceMap()
    assert sources.at(0) is None
    sources.mark(5, Source("a.txt", Place("line", 1, 3)))
    sources.mark(9, None)
    assert [sources.at(i) is None for i in (4, 5, 8, 9, 10**9)] == [True, False, False, True, True]


@pytest.mark.parametrize(
    ("place", "words"),
    [
        (Place("page", 12, 12), "p. 12"),
        (Place("line", 120, 120), "line 120"),
        (Place("line", 120, 134), "lines 120-134"),
        (Place("chapter", 3, 3, "The Whale"), 'ch. 3 "The Whale"'),
        (Place("paragraph", 2, 5, "Safety"), 'par. 2-5 "Safety"'),
    ],
)
def test_words(place: Place, words: str) -> None:
    assert str(Source("report.pdf", place)) == f"report.pdf, {words}"


GOOD = {"documents": ["a"], "ranges": [[0, 0, "line", 1, 2]]}


@pytest.mark.parametrize(
    "damage",
    [
        {"documents": []},
        {"ranges": [[0, 0, "verse", 1, 2]]},
        {"ranges": [[0, 0, "line", 1]]},
        {"ranges": [[0, -1, "line", 1, 2]]},
        {"ranges": [[5], [5]]},
        {"ranges": [["x"], ["y"]]},
        {"ranges": None},
    ],
)
def test_damaged_json(damage: dict[str, object]) -> None:
    assert len(SourceMap.from_json(GOOD)) == 1
    with pytest.raises(StateError, match="sources of a session are damaged"):
        SourceMap.from_json({**GOOD, **damage})


@given(RANGES, st.integers(0, 40))
def test_ranges_are_the_tokens_with_a_source(
    ranges: list[tuple[int, Source | None]], n_tokens: int
) -> None:
    sources, expected = filled(ranges)
    found = {i: source for tokens, source in sources.ranges(n_tokens) for i in tokens}
    known = enumerate(expected[:n_tokens])
    assert found == {i: source for i, source in known if source is not None}
