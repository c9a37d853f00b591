"""Tokens of text in parts are those of the whole text, whatever the parts; and know their part."""

from __future__ import annotations

import re

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from capkv_local.chat.tokenise import Tokeniser

# As GPT-2 splits: a line break before a word is not what it is at the end of a text.
PATTERN = re.compile(r" ?[^\W\d_]+| ?\d+| ?[^\s\w]+|_+|\s+(?!\S)|\s+")


class Toy:
    """A vocabulary of two kinds, whose tokens are pieces of up to three bytes."""

    def __init__(self, sentencepiece: bool) -> None:
        self.ids: dict[bytes, int] = {}
        self.sentencepiece = sentencepiece

    def tokenize(self, text: bytes) -> list[int]:
        words = text.decode()
        if self.sentencepiece:  # a space before all, words with their space, single line breaks
            words = f" {words}"
            split = re.findall(r" ?[^\s]+|\s", words)
        else:
            split = PATTERN.findall(words)
        assert "".join(split) == words
        pieces = [w.encode()[i : i + 3] for w in split for i in range(0, len(w.encode()), 3)]
        return [self.ids.setdefault(piece, len(self.ids)) for piece in pieces]

    def sizes(self, tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        known = np.array([len(piece) for piece in self.ids], np.int64)
        return known[tokens] if len(tokens) else tokens


TEXT = st.text(alphabet="aB1é漢_ .,'-\n\t\u00a0", min_size=1, max_size=400)
LINES = st.lists(st.sampled_from(["one two", "x = 1", "", "  y", "'quoted'", "漢字。"]), min_size=1)


@pytest.mark.parametrize("sentencepiece", [False, True])
@given(
    text=TEXT | LINES.map(lambda lines: "\n".join(["start", *lines])),
    cuts=st.lists(st.integers(1, 50)),
    block=st.integers(4, 90),
)
def test_tokens_are_those_of_the_whole_text(
    sentencepiece: bool, text: str, cuts: list[int], block: int
) -> None:
    toy, parts, start = Toy(sentencepiece), [], 0
    for length in [*cuts, len(text)]:
        if start < len(text):
            parts.append((text[start : start + length], start))
        start += length
    tokens: list[int] = []
    marks: list[tuple[int, int]] = []
    for made in Tokeniser[int](toy.tokenize, toy.sizes, block).blocks(parts):
        marks += [(len(tokens) + i, mark) for i, mark in made.marks]
        tokens += made.tokens
    if len(text) <= 64 * block:  # else it may be cut elsewhere than at lines
        assert tokens == toy.tokenize(text.encode())
    # Every mark is at the token that has the first byte of its part.
    assert [mark for _, mark in marks] == [mark for _, mark in parts]
    ends = np.cumsum(toy.sizes(np.array(tokens, np.int64))) - sentencepiece
    for index, mark in marks:
        first_byte = len(text[:mark].encode())
        assert (ends[index - 1] if index else -1) <= first_byte < ends[index]


def test_text_without_lines_is_cut_before_words_and_keeps_its_tokens() -> None:
    toy, text = Toy(False), "word " * 2000
    blocks = list(Tokeniser[int](toy.tokenize, toy.sizes, 10).blocks([(text, 0)]))
    assert len(blocks) > 1
    assert [token for block in blocks for token in block.tokens] == toy.tokenize(text.encode())


def test_text_without_any_break_is_still_read_whole() -> None:
    toy, text = Toy(False), "漢字" * 3000
    blocks = list(Tokeniser[int](toy.tokenize, toy.sizes, 10).blocks([(text, 0)]))
    assert len(blocks) > 1
    pieces = {number: piece for piece, number in toy.ids.items()}
    assert b"".join(pieces[t] for block in blocks for t in block.tokens).decode() == text


def test_a_vocabulary_that_drops_bytes_loses_no_block() -> None:
    toy = Toy(False)

    def tokenize(text: bytes) -> list[int]:
        return toy.tokenize(text.replace("漢".encode(), b""))

    lines = [f"line {i} 漢漢\n" for i in range(100)]
    text = "".join(lines)
    parts = [(line, i) for i, line in enumerate(lines)]
    blocks = list(Tokeniser[int](tokenize, toy.sizes, 50).blocks(parts))
    assert len(blocks) > 5
    pieces = {number: piece for piece, number in toy.ids.items()}
    joined = b"".join(pieces[t] for block in blocks for t in block.tokens).decode()
    assert joined == text.replace("漢", "")
