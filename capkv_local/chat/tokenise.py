"""Text that comes in parts to the tokens that the whole text has, with the source of each token.

A tokenizer looks at its text as a whole, so a text cannot be cut anywhere. Here it is cut only
where a line begins with a letter or digit. No vocabulary that llama.cpp knows has a token that
goes over such a place: BPE vocabularies split a text by a pattern before they merge, and all
patterns split there; SentencePiece ones do not split, but learnt no pieces with a line break in
front of a word. What comes behind a cut still matters to the tokens before it (a pattern looks
ahead: a line break before a word is another token than one at the end), and what comes before it
to the tokens behind it (SentencePiece puts a space before a text). So each block is tokenised
with the character before it and with some text behind it, and the tokens of these are dropped;
the sizes of the tokens tell where they end. Text without such a place for 64 times the size of a
block is cut before a word, and if there is none, after any token: there, tokens can differ.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

import llama_cpp
import numpy as np
import numpy.typing as npt

from capkv_local import native

Mark = TypeVar("Mark")
Ends = npt.NDArray[np.int64]

_BLOCK = 1 << 14  # characters: about a batch of tokens
_LONGEST = 64  # blocks of text without a place for a cut
_N_TRIED = 64  # places that are looked at before more text is waited for
_LINE = re.compile(r"(?<=\n)(?=[^\W_])")
_WORD = re.compile(r"(?<=\w)(?= [^\W_])")
_ANY = re.compile(r"(?<=.)", re.DOTALL)


class Vocabulary:
    """The tokenizer of a model, and how many bytes of text each token is."""

    def __init__(self, model: llama_cpp.Llama) -> None:
        self._model = model
        self._sizes = np.full(model.n_vocab(), -1, np.int64)

    def tokenize(self, text: bytes) -> list[int]:
        """Tokens of a text, in which nothing is special."""
        return self._model.tokenize(text, add_bos=False, special=False)

    def sizes(self, tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Bytes of each token."""
        for token in np.unique(tokens[self._sizes[tokens] < 0]).tolist():
            piece = native.token_piece(self._model._model.vocab, token, special=False)
            self._sizes[token] = len(piece)
        return self._sizes[tokens]


@dataclass(frozen=True)
class Block(Generic[Mark]):
    """Some tokens, and which of them (by index) are the first of a part that has this mark."""

    tokens: list[int]
    marks: list[tuple[int, Mark]]


class Tokeniser(Generic[Mark]):
    """Tokens of a text that comes in parts.

    Parameters
    ----------
    tokenize
        Tokens of a text in UTF-8.
    sizes
        Bytes of text that each token stands for.
    block
        Characters to tokenise at once.
    """

    def __init__(
        self,
        tokenize: Callable[[bytes], list[int]],
        sizes: Callable[[npt.NDArray[np.int64]], npt.NDArray[np.int64]],
        block: int | None = None,
    ) -> None:
        self._tokenize, self._sizes = tokenize, sizes
        self._block = block = block or _BLOCK
        self._try_at = block  # length of the text at which a cut is looked for
        self._text = ""  # not tokenised yet
        self._before = ""  # the character before it
        self._marks: list[tuple[int, Mark]] = []  # where they begin in it, in characters

    def blocks(self, parts: Iterable[tuple[str, Mark]]) -> Iterator[Block[Mark]]:
        """Tokens of parts, one after the other; together those of the whole text."""
        for text, mark in parts:
            self._marks.append((len(self._text), mark))
            self._text += text
            while len(self._text) > self._try_at and (block := self._cut()) is not None:
                yield block
        if self._text:
            measured = self._measured() or self._estimated(self._text)
            yield self._take(len(self._text), *measured)

    def _cut(self) -> Block[Mark] | None:
        """A block from the front of the text; None if there is no place for a cut yet."""
        measured = self._measured()
        known = None if measured is None else set(measured[1].tolist())
        for place in self._places():
            if measured is None or known is None:
                found = self._estimated(self._text[:place])
            elif len(self._text[:place].encode()) in known:
                found = measured
            else:
                continue
            self._try_at = self._block
            return self._take(place, *found)
        self._try_at = 2 * len(self._text)  # looking in vain costs as much as a block
        return None

    def _places(self) -> Iterator[int]:
        """Where the text may be cut, the best place first."""
        too_long = len(self._text) > _LONGEST * self._block
        for pattern in (_LINE, _WORD, _ANY) if too_long else (_LINE,):
            # With text behind it: what follows decides about the last tokens.
            found = [m.start() for m in pattern.finditer(self._text, 1, len(self._text) - 1)]
            yield from reversed(found[-_N_TRIED:])

    def _measured(self) -> tuple[list[int], Ends] | None:
        """Tokens of the text, and the byte behind each; None if their sizes do not add up."""
        text, before = self._text.encode(), self._before.encode()
        tokens = self._tokenize(before + text)
        ends = np.cumsum(self._sizes(np.asarray(tokens, np.int64)))
        extra = (int(ends[-1]) if tokens else 0) - len(text)
        if extra not in (len(before), len(before) + 1):  # 1 is the space of SentencePiece
            return None
        if not before:  # a space before the whole text belongs to it
            return tokens, ends - extra
        n_before = int(np.searchsorted(ends, extra, side="right"))
        if n_before == 0 or ends[n_before - 1] != extra:
            return None
        return tokens[n_before:], ends[n_before:] - extra

    def _estimated(self, text: str) -> tuple[list[int], Ends]:
        """Tokens of a text on its own, as if they were of equal size.

        For vocabularies that drop what they do not know.
        """
        tokens = self._tokenize(text.encode())
        return tokens, np.linspace(0, len(text.encode()), len(tokens) + 1)[1:].astype(np.int64)

    def _take(self, place: int, tokens: list[int], ends: Ends) -> Block[Mark]:
        """Take the tokens of the first ``place`` characters."""
        text = self._text[:place]
        n_tokens = int(np.searchsorted(ends, len(text.encode()), side="right"))
        marks = []
        n_bytes = n_chars = 0
        for start, mark in self._marks:
            if start < place:
                n_bytes, n_chars = n_bytes + len(text[n_chars:start].encode()), start
                # The token that has the first byte of the part.
                marks.append((int(np.searchsorted(ends, n_bytes, side="right")), mark))
        self._marks = [(start - place, mark) for start, mark in self._marks if start >= place]
        self._before, self._text = text[-1], self._text[place:]
        return Block(tokens[:n_tokens], marks)
