"""Continuation: real text, and the text that follows it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from capkv_local.evaluate.tasks.base import (
    Case,
    Split,
    Text,
    Tokenizer,
    at_least_one,
    rng,
)
from capkv_local.evaluate.tasks.cutting import fit, windows

CONTINUATION_TOKENS = 128


def continuation(
    split: Split,
    texts: Sequence[Text],
    tokenizer: Tokenizer,
    n_tokens: int,
    n_cases: int,
    seed: int,
) -> list[Case]:
    """Make cases whose context is a piece of a text and whose continuation is what follows it.

    Parameters, returns and errors: see :class:`~capkv_local.evaluate.tasks.base.Task`. Both are cut
    at the ends of words, so the context may be less than a word shorter than `n_tokens`, and the
    continuation begins with the white space before its first word.
    """
    random_ = rng("continuation", split, n_tokens, seed)
    cases = []
    pieces = windows(texts, tokenizer, n_tokens + CONTINUATION_TOKENS, random_)
    for piece in itertools.islice(pieces, n_cases):
        context = fit(piece.text, tokenizer, n_tokens)
        cases.append(
            Case(
                task="continuation",
                name=piece.name,
                context=context,
                continuation=piece.text[len(context) :],
            )
        )
    return at_least_one(cases, "continuation", n_tokens, "all texts are shorter")
