"""What is measured, and what that comes to on one text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from capkv_local.cache.compact import fewest_cells
from capkv_local.errors import EvaluationError
from capkv_local.evaluate.corpus import load_corpus, read_folder
from capkv_local.evaluate.methods import Method
from capkv_local.evaluate.tasks.base import Case, Split, Text

__all__ = ["F16", "Plan", "Unit", "check_shares", "units_of"]

F16 = "f16"


@dataclass(frozen=True)
class Plan:
    """What is measured. Every combination of the lists is.

    Parameters
    ----------
    models
        GGUF files.
    methods
        See :func:`~capkv_local.evaluate.methods.parse_method`.
    shares
        Shares of the cells that are kept, in (0, 1).
    tasks, n_tokens
        Names of tasks, and how long their texts are.
    readings
        ``"one-shot"``: read everything, then evict once. ``"streamed"``: read through a cache of
        the budget and one batch.
    questions
        ``"unseen"``: what is kept is decided before any question. ``"seen"``: for each question
        anew, with its tokens observed.
    kv_types
        Types of the cached rows.
    n_cases
        Texts per task and length.
    split, seed
        Which texts, and the seed of what is planted and cut.
    n_seen
        Questions of a text that are asked with the question seen: each costs an eviction of its
        own, and a reading of its own if streamed.
    threads
        CPU threads.
    texts
        Folder of own texts; None for the pinned ones.
    """

    models: tuple[Path, ...]
    methods: tuple[Method, ...]
    shares: tuple[float, ...] = (0.5, 0.25, 0.125)
    tasks: tuple[str, ...] = ("continuation", "facts")
    n_tokens: tuple[int, ...] = (2048,)
    readings: tuple[str, ...] = ("one-shot",)
    questions: tuple[str, ...] = ("unseen",)
    kv_types: tuple[str, ...] = (F16,)
    n_cases: int = 8
    split: Split = "report"
    seed: int = 0
    n_seen: int = 8
    threads: int = 2
    texts: Path | None = None

    def read_texts(self) -> list[Text]:
        """The texts of the split.

        Raises
        ------
        CorpusError
            They cannot be had.
        """
        if self.texts is None:
            return load_corpus(self.split)
        return read_folder(self.split, self.texts)


@dataclass(frozen=True)
class Unit:
    """One compression of one text, and the items that are measured on it."""

    method: Method
    share: float
    reading: str
    question: str
    kv_type: str
    items: tuple[int, ...]  # indices of questions, -1 for the continuation


def check_shares(plan: Plan) -> None:
    """See at once, not after hours, that every method can work with every budget."""
    n_tokens, share = min(plan.n_tokens), min(plan.shares)
    for method in plan.methods:
        fewest = 1 if method.policy is None else fewest_cells(method.policy)
        if not method.is_full and share * n_tokens < fewest:
            raise EvaluationError(
                f"a share of {share:g} of {n_tokens} tokens is {int(share * n_tokens)} cells, but "
                f"'{method.label}' needs {fewest}: longer texts (--tokens) or a larger --share"
            )


def units_of(plan: Plan, case: Case) -> list[Unit]:
    n = len(case.questions)
    unseen = ((-1,) if case.continuation else ()) + tuple(range(n))
    # Spread over the text, the same ones for all methods.
    seen = sorted({round(i) for i in np.linspace(0, n - 1, min(n, plan.n_seen))}) if n else []
    found: list[Unit] = []
    for kv_type in plan.kv_types:
        for method in plan.methods:
            if method.is_full:
                if kv_type != F16:  # that of f16 is what the others are compared with
                    found.append(Unit(method, 1.0, "one-shot", "unseen", kv_type, unseen))
                continue
            if method.is_oracle:  # decides for every item anew, when all is there
                for question, of in (("unseen", unseen), ("seen", seen)):
                    if question in plan.questions and "one-shot" in plan.readings:
                        found += [
                            Unit(method, share, "one-shot", question, kv_type, (i,))
                            for share in plan.shares
                            for i in of
                        ]
                continue
            for reading in plan.readings:
                for share in plan.shares:
                    if "unseen" in plan.questions and not method.is_retrieval:
                        found.append(Unit(method, share, reading, "unseen", kv_type, unseen))
                    if "seen" in plan.questions:
                        # A probe does not hear questions; retrieval reads only what it found.
                        if method.observe == "probe" or (
                            method.is_retrieval and reading != "one-shot"
                        ):
                            continue
                        for i in seen:
                            found.append(Unit(method, share, reading, "seen", kv_type, (i,)))
    return found
