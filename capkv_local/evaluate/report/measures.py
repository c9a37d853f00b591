"""The numbers that tables and figures show, and which records they are made of."""

from __future__ import annotations

from dataclasses import dataclass

from capkv_local.evaluate import statistics
from capkv_local.evaluate.records import Record
from capkv_local.evaluate.statistics import ANSWERABLE, LOWER_IS_BETTER, Estimate

__all__ = ["HEADLINE", "KL", "LOGPROB", "RECALL", "RECALL_OF_FULL", "TOP1", "Measure"]


@dataclass(frozen=True)
class Measure:
    """One number of a method in a setting.

    Attributes
    ----------
    id : str
        For file names.
    title : str
        With its unit.
    task, metric : str
        Of the records that count.
    kinds : frozenset of str or None
        Kinds of questions that count, None: all.
    of_full : bool
        Divided by what the full cache reaches.
    percent : bool
        Shown as a percentage.
    """

    id: str
    title: str
    task: str
    metric: str
    kinds: frozenset[str] | None = None
    of_full: bool = False
    percent: bool = False

    @property
    def lower_is_better(self) -> bool:
        """Whether small values are the good ones."""
        return self.metric in LOWER_IS_BETTER

    @property
    def heading(self) -> str:
        """Title with an arrow to where it gets better."""
        return f"{self.title} {'↓' if self.lower_is_better else '↑'}"

    def estimate(self, records: list[Record]) -> Estimate:
        """Mean (or ratio to full) with its interval."""
        return (statistics.relative if self.of_full else statistics.mean)(records)


KL = Measure("kl", "KL, nats", "continuation", "kl")
TOP1 = Measure("top1", "top-1, %", "continuation", "top1", percent=True)
RECALL = Measure("recall", "recall, %", "facts", "exact", ANSWERABLE, percent=True)
RECALL_OF_FULL = Measure(
    "recall-of-full",
    "recall, % of full",
    "facts",
    "exact",
    ANSWERABLE,
    of_full=True,
    percent=True,
)
LOGPROB = Measure("logprob", "log p, nats", "facts", "logprob", ANSWERABLE)
HEADLINE = (KL, TOP1, RECALL, RECALL_OF_FULL, LOGPROB)
