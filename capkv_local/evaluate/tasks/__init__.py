"""The tasks by name, and the one function that makes their cases."""

from __future__ import annotations

from collections.abc import Sequence

from capkv_local.errors import EvaluationError, unknown_name
from capkv_local.evaluate.tasks.base import (
    SPLITS,
    Case,
    Question,
    Split,
    Task,
    Text,
    Tokenizer,
)
from capkv_local.evaluate.tasks.continuation import continuation
from capkv_local.evaluate.tasks.facts import facts
from capkv_local.evaluate.tasks.lookup import lookup
from capkv_local.evaluate.tasks.qa import qa
from capkv_local.evaluate.tasks.quote import quote

__all__ = [
    "SPLITS",
    "TASKS",
    "Case",
    "Question",
    "Split",
    "Task",
    "Text",
    "Tokenizer",
    "build_cases",
    "get_task",
]

TASKS: dict[str, Task] = {
    "continuation": continuation,
    "facts": facts,
    "quote": quote,
    "lookup": lookup,
    "qa": qa,
}
"""Tasks by the name that a user gives."""


def get_task(name: str) -> Task:
    """Find a task by its name in :data:`TASKS`.

    Raises
    ------
    EvaluationError
        (a ValueError) Unknown name.

    Examples
    --------
    >>> get_task("facts").__name__
    'facts'
    """
    if name in TASKS:
        return TASKS[name]
    raise EvaluationError(unknown_name("task", name, TASKS))


def build_cases(
    task: str,
    split: Split,
    texts: Sequence[Text],
    tokenizer: Tokenizer,
    n_tokens: int,
    n_cases: int,
    seed: int,
) -> list[Case]:
    """Make cases of a task; the same arguments always give the same cases.

    The cases for a smaller `n_cases` are the first of those for a larger one.

    Parameters
    ----------
    task : str
        A name in :data:`TASKS`.
    split : str
        ``"tuning"`` or ``"report"``; `texts` must be of this split.
    texts : sequence of Text
        See :func:`capkv_local.evaluate.corpus.load_corpus`.
    tokenizer : Tokenizer
        Text to token ids, without special tokens.
    n_tokens : int
        Upper bound of the tokens of a context.
    n_cases : int
        Cases wanted; fewer are returned where the texts do not hold as many.
    seed : int

    Returns
    -------
    list of Case
        At least one.

    Raises
    ------
    EvaluationError
        Unknown task or split, a size below 1, or not one case can be made of these texts.
    """
    make = get_task(task)
    if split not in SPLITS:
        raise EvaluationError(unknown_name("split", split, SPLITS))
    if n_tokens < 1 or n_cases < 1:
        raise EvaluationError(f"n_tokens={n_tokens} and n_cases={n_cases} must be 1 or more.")
    return make(split, texts, tokenizer, n_tokens, n_cases, seed)
