"""What a task makes: cases with questions about a context.

All choices come from a generator that is seeded with text (:func:`rng`), so a case depends on the
split, the number of tokens and the seed, and on no other state.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from capkv_local.errors import EvaluationError

Split = Literal["tuning", "report"]
"""Settings are chosen on ``tuning``, numbers are published from ``report``; they share no text."""

SPLITS: tuple[Split, ...] = ("tuning", "report")

Tokenizer = Callable[[str], list[int]]
"""Text to token ids, without special tokens at the start or the end."""


@dataclass(frozen=True)
class Text:
    """One document of the corpus.

    Attributes
    ----------
    name : str
        Stable and unique in its split, e.g. ``"django/ref/settings"``.
    kind : str
        ``"technical"``, ``"reference"``, ``"prose"``, ``"drama"`` or ``"own"``.
    text : str
        Lines end in ``\\n``; paragraphs stand on one line each where the source allows it.
    """

    name: str
    kind: str
    text: str


@dataclass(frozen=True)
class Question:
    """One question about a context, and the answer that must follow its lead.

    Attributes
    ----------
    id : str
        Unique in its case.
    kind : str
        ``"single"``, ``"confusable"``, ``"multi-hop"``, ``"absent"``, ``"quote"``, ``"lookup"`` or
        ``"qa"``.
    prompt : str
        What the user asks.
    lead : str
        How the answer begins, given to the model.
    answer : str
        What must follow the lead, its leading space included.
    depth : float or None
        Where the evidence begins, as a share of the context's characters in [0, 1]; None if it
        stands nowhere.
    """

    id: str
    kind: str
    prompt: str
    lead: str
    answer: str
    depth: float | None


@dataclass(frozen=True)
class Case:
    """One context and what is asked about it.

    Attributes
    ----------
    task : str
        Name of the task.
    name : str
        Stable, and unique in its task, split, number of tokens and seed.
    context : str
        What is read: about `n_tokens` tokens and never more.
    questions : tuple of Question
    continuation : str
        What really follows the context: ``context + continuation`` is an exact piece of the text.
    """

    task: str
    name: str
    context: str
    questions: tuple[Question, ...] = ()
    continuation: str = ""


class Task(Protocol):
    """Makes the cases of one task.

    Parameters
    ----------
    split
        ``"tuning"`` or ``"report"``; also decides which invented names and numbers are used.
    texts
        The corpus of this split.
    tokenizer
        That of the model that will read the cases.
    n_tokens
        Upper bound of the tokens of a context.
    n_cases
        Cases wanted; fewer are returned where the texts do not hold as many.
    seed
        Chooses the pieces of text, the facts and where they stand.

    Returns
    -------
    list of Case

    Raises
    ------
    EvaluationError
        Not one case can be made: the texts are too short for `n_tokens`, or have nothing to ask.
    """

    def __call__(
        self,
        split: Split,
        texts: Sequence[Text],
        tokenizer: Tokenizer,
        n_tokens: int,
        n_cases: int,
        seed: int,
    ) -> list[Case]: ...


def rng(task: str, split: Split, n_tokens: int, seed: int) -> random.Random:
    """Return the generator of all choices; seeded with text, it is the same in every process."""
    return random.Random(f"{task}/{split}/{n_tokens}/{seed}")


def at_least_one(cases: list[Case], task: str, n_tokens: int, cause: str) -> list[Case]:
    """Return the cases.

    Raises
    ------
    EvaluationError
        There are none.
    """
    if not cases:
        raise EvaluationError(
            f"no case of '{task}' with {n_tokens} tokens can be made: {cause}; "
            "read fewer tokens or give longer texts"
        )
    return cases
