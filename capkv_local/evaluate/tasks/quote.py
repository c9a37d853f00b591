"""Quote: repeat a sentence of the text word for word, given how it begins."""

from __future__ import annotations

import re
from collections.abc import Sequence

from capkv_local.evaluate.tasks.base import (
    Case,
    Question,
    Split,
    Text,
    Tokenizer,
    at_least_one,
    rng,
)
from capkv_local.evaluate.tasks.cutting import OFF_BY, nearest, windows

DEPTHS = (0.1, 0.35, 0.6, 0.85)
JITTER = 0.05
LEAD_WORDS = 6
ANSWER_WORDS = (8, 25)

# Plain words with commas, from one end of a sentence to the next: what a person could dictate.
_SENTENCE = re.compile(
    r"(?:^|(?<=[a-z]{3}[.!?] ))[A-Z][A-Za-z]*(?:[,;]? [A-Za-z0-9'’-]+)+\.(?=\s)", re.M
)


def quote(
    split: Split,
    texts: Sequence[Text],
    tokenizer: Tokenizer,
    n_tokens: int,
    n_cases: int,
    seed: int,
) -> list[Case]:
    """Make cases of a real text, and four questions to repeat one of its sentences.

    No other place of the text has the six words that the lead gives.

    Parameters, returns and errors: see :class:`~capkv_local.evaluate.tasks.base.Task`.
    """
    random_ = rng("quote", split, n_tokens, seed)
    cases: list[Case] = []
    for window in windows(texts, tokenizer, n_tokens, random_):
        if len(cases) == n_cases:
            break
        shares = [depth + random_.uniform(-JITTER, JITTER) for depth in DEPTHS]
        sentences = _sentences(window.text)
        if len(sentences) < len(shares):
            continue
        questions = []
        for i, share in enumerate(shares, 1):
            begin = nearest(list(sentences), share, len(window.text))
            depth = begin / len(window.text)
            if abs(depth - share) > OFF_BY:
                break
            lead, answer = sentences.pop(begin)
            questions.append(
                Question(
                    id=f"quote-{i}",
                    kind="quote",
                    prompt=f'Repeat, word for word, the sentence that begins with: "{lead}"',
                    lead=lead,
                    answer=answer,
                    depth=depth,
                )
            )
        else:
            cases.append(Case("quote", window.name, window.text, tuple(questions)))
    cause = "the texts are shorter, or have no four sentences of plain words"
    return at_least_one(cases, "quote", n_tokens, cause)


def _sentences(text: str) -> dict[int, tuple[str, str]]:
    """Find sentences that can be asked for: where each begins, its first words and its rest."""
    found = {}
    for match in _SENTENCE.finditer(text):
        words = match.group().split(" ")
        lead = " ".join(words[:LEAD_WORDS])
        if (
            ANSWER_WORDS[0] <= len(words) - LEAD_WORDS <= ANSWER_WORDS[1]
            and text.count(lead) == 1
            and lead[-1].isalnum()
        ):
            found[match.start()] = (lead, match.group()[len(lead) :])
    return found
