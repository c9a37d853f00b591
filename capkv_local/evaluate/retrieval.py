"""The rival that needs no cache to be compressed: find the passages first, and read only those."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from capkv_local.errors import EvaluationError

# Tokens of a passage, at most: about three sentences, so that a fact is found without a page
# around it.
N_PASSAGE = 64

_SENTENCE = re.compile(r"[^\n.!?]*(?:[.!?]+[\s\"')]*|\n+|$)")
_WORD = re.compile(r"\w+")

Tokenizer = Callable[[str], Sequence[int]]


def retrieve(text: str, query: str, tokenizer: Tokenizer, n_tokens: int) -> str:
    """The passages of a text that answer a query best, in the order of the text.

    Source: Okapi BM25 of the library rank_bm25, with its default constants.

    Parameters
    ----------
    text, query
        What is searched, and for what.
    tokenizer
        Counts tokens.
    n_tokens
        Tokens of all passages together, at most.

    Raises
    ------
    EvaluationError
        The library is missing.
    """
    try:
        from rank_bm25 import BM25Okapi
    except ImportError as error:
        raise EvaluationError(
            "retrieval needs the library rank_bm25: pip install 'capkv-local[eval]'"
        ) from error
    passages = split_passages(text, tokenizer)
    if not passages:
        return ""
    index = BM25Okapi([_words(passage) or [""] for passage, _ in passages])
    scores = index.get_scores(_words(query))
    chosen: list[int] = []
    room = n_tokens
    # Of equal scores the earlier passage comes first.
    for i in sorted(range(len(passages)), key=lambda i: (-scores[i], i)):
        if passages[i][1] <= room:
            chosen.append(i)
            room -= passages[i][1]
    return "".join(passages[i][0] for i in sorted(chosen))


def split_passages(text: str, tokenizer: Tokenizer) -> list[tuple[str, int]]:
    """Cut a text into passages of whole sentences or lines, with the tokens of each.

    A sentence that is longer than a passage is one of its own.
    """
    passages: list[tuple[str, int]] = []
    current, n_current = "", 0
    for sentence in _SENTENCE.findall(text):
        n = len(tokenizer(sentence)) if sentence else 0
        if current and n_current + n > N_PASSAGE:
            passages.append((current, n_current))
            current, n_current = "", 0
        current += sentence
        n_current += n
    if current:
        passages.append((current, n_current))
    return passages


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())
