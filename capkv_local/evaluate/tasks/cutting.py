"""Pieces of texts that have a given number of tokens."""

from __future__ import annotations

import bisect
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from capkv_local.evaluate.tasks.base import Text, Tokenizer

_WORD_END = re.compile(r"(?<=\S)(?=\s)|(?<=\S)\Z")
_CHARS_PER_TOKEN = 4  # only a first guess of how much text can fit


def fit(text: str, tokenizer: Tokenizer, n_tokens: int) -> str:
    """Cut a text at the end of a word so that at most `n_tokens` tokens are left.

    Parameters
    ----------
    text : str
    tokenizer : Tokenizer
    n_tokens : int

    Returns
    -------
    str
        A prefix of `text`; one word more would not fit, up to a token or two where a tokenizer
        counts two pieces otherwise than the whole. All of it if it fits, empty if no word does.
    """
    size = max(64, n_tokens * _CHARS_PER_TOKEN)
    while (count := len(tokenizer(text[:size]))) <= n_tokens:
        if size >= len(text):
            return text
        size *= 2
    ends = [match.start() for match in _WORD_END.finditer(text, 0, min(size, len(text)))]
    # Most of the text is counted once; the search is in the rest of it.
    base = bisect.bisect(ends, 0.9 * min(size, len(text)) * n_tokens / count) - 1
    start = ends[base] if base >= 0 else 0
    counted = len(tokenizer(text[:start]))
    if counted > n_tokens:
        base, start, counted = -1, 0, 0

    def tokens_to(end: int) -> int:
        return counted + len(tokenizer(text[start:end]))

    index = bisect.bisect(ends, n_tokens, lo=base + 1, key=tokens_to) - 1
    while index >= 0 and len(tokenizer(text[: ends[index]])) > n_tokens:
        index -= 1
    return text[: ends[index]] if index >= 0 else ""


@dataclass(frozen=True)
class Window:
    """A piece of a text.

    Attributes
    ----------
    name : str
        The text's name and where the piece begins, e.g. ``"celery/faq@1200"``.
    text : str
    """

    name: str
    text: str


def windows(
    texts: Sequence[Text], tokenizer: Tokenizer, n_tokens: int, random_: random.Random
) -> Iterator[Window]:
    """Yield pieces of texts of `n_tokens` tokens (less than a word fewer), none overlapping.

    Kinds take turns, and every text gives its first piece before any gives a second. Pieces begin
    anywhere in their texts, where a paragraph does.

    Parameters
    ----------
    texts : sequence of Text
    tokenizer : Tokenizer
    n_tokens : int
    random_ : random.Random
        Chooses the order of the texts, and which pieces of them come first.

    Yields
    ------
    Window
    """
    pieces = [_windows_of(text, tokenizer, n_tokens, random_) for text in _in_turn(texts, random_)]
    while pieces:
        left = []
        for windows_of_text in pieces:
            window = next(windows_of_text, None)
            if window is not None:
                left.append(windows_of_text)
                yield window
        pieces = left


def _in_turn(texts: Sequence[Text], random_: random.Random) -> list[Text]:
    """Shuffle, and let the kinds take turns as far as each has texts."""
    kinds: dict[str, list[Text]] = {}
    for text in random_.sample(list(texts), len(texts)):
        kinds.setdefault(text.kind, []).append(text)
    ranked = [(rank, text) for group in kinds.values() for rank, text in enumerate(group)]
    return [text for _, text in sorted(ranked, key=lambda pair: pair[0])]


_SLOT = 1.15  # of the size of a piece: density varies, and a piece waits for a paragraph


def _windows_of(
    text: Text, tokenizer: Tokenizer, n_tokens: int, random_: random.Random
) -> Iterator[Window]:
    total = len(tokenizer(text.text))
    if total <= n_tokens:
        return
    length = len(text.text.rstrip())
    slot = _SLOT * n_tokens * length / total
    n_slots = max(1, int(length / slot))
    shift = random_.random() * max(0.0, length - n_slots * slot)
    starts = [int(shift + i * slot) for i in random_.sample(range(n_slots), n_slots)]
    taken: list[tuple[int, int]] = []
    for start in [*starts, 0]:  # the text's start, for a text that is hardly long enough
        begin = paragraph_start(text.text, start)
        piece = fit(text.text[begin:], tokenizer, n_tokens)
        end = begin + len(piece)
        free = all(end <= other or begin >= other_end for other, other_end in taken)
        if piece and end < length and free:
            taken.append((begin, end))
            yield Window(f"{text.name}@{begin}", piece)


_PARAGRAPH = re.compile(r"\n\n+(?=\S)")
_PARAGRAPH_WITHIN = 1000  # characters; some texts have no empty lines


def paragraph_start(text: str, position: int) -> int:
    """Return where a paragraph begins at or behind a position, or a line if none is near."""
    while text[position : position + 1] == "\n":
        position += 1
    if position == 0 or text[position - 1] == "\n":
        return position
    match = _PARAGRAPH.search(text, position, position + _PARAGRAPH_WITHIN)
    if match is not None:
        return match.end()
    end = text.find("\n", position)
    return len(text) if end < 0 else paragraph_start(text, end + 1)


OFF_BY = 0.15
"""Depths that a text offers may differ this much from those wanted; else another text is used."""


def nearest(places: Sequence[int], share: float, length: int) -> int:
    """Return the place that is nearest to a share of a length; the first of equal ones."""
    return min(places, key=lambda place: abs(place - share * length))
