"""Do our policies say what kvpress says? Their scores on the same tokens and weights, compared.

Needs the ``kvpress`` extra. What remains between two equal policies is the forward pass:
llama.cpp's flash attention reads keys and values as float16, kvpress runs transformers in float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from rich.console import Console, JustifyMethod
from rich.table import Table
from rich.text import Text

from capkv_local.errors import EvaluationError
from capkv_local.evaluate.crosscheck_kvpress import Kvpress, require
from capkv_local.evaluate.crosscheck_native import Reading, read_texts
from capkv_local.models import check_model_file
from capkv_local.policies import get_policy
from capkv_local.policies.base import F32

__all__ = ["PAIRS", "Agreement", "Pair", "crosscheck", "markdown", "print_agreements"]

Setting = Literal["same", "default"]

# Share of the contested cells that is kept to see whether both would keep the same ones.
KEPT = 0.25

MIN_TOKENS = 256


@dataclass(frozen=True)
class Pair:
    """A policy and the press of kvpress that it is compared with.

    Attributes
    ----------
    policy
        Name of our policy, as it is by default.
    press
        Name of the class in kvpress.
    setting
        ``"same"``: the press is set as our policy is, and should rank the cells alike;
        ``"default"``: the press as kvpress has it, to show what a documented departure amounts to.
    note
        What is different, and why.
    """

    policy: str
    press: str
    setting: Setting
    note: str


# Measured with kvpress 0.5.5 on two texts of 1024 tokens each, SmolLM2-135M and Gemma 3 270M: where
# the settings are the same, every head of every layer ranks the cells alike (rho above 0.99).
PAIRS = (
    Pair("capkv-paper", "CapPress", "same", "all settings are equal"),
    Pair("expected-attention", "ExpectedAttentionPress", "same", "mean query only"),
    Pair("keydiff", "KeyDiffPress", "same", "no settings"),
    Pair("knorm", "KnormPress", "same", "no settings"),
    Pair("snapkv", "SnapKVPress", "same", "average pool of 7"),
    Pair("tova", "TOVAPress", "same", "no settings"),
    # Its formulas with our repetition: the tokens of capkv_local.cache.probe, of which only those
    # that are repeated ask, and a softmax over all cells and the piece.
    Pair("kvzip", "KVzipPress", "same", "repeats the pieces of capkv_local.cache.probe"),
    # The term k' cov(q) k / 2d is all that differs. Its spread along the cells is about a third
    # of the mean term's in the median head of SmolLM2, twice it in the head that agrees least.
    Pair(
        "expected-attention",
        "ExpectedAttentionPress",
        "default",
        "the covariance of the queries, which is not observed here; in heads where it outweighs "
        "their mean, other cells are chosen",
    ),
    # The pool is all that differs: with 7 in both, rho is 1.
    Pair("snapkv", "SnapKVPress", "default", "average pool of 5 instead of 7"),
    # One change after another, SmolLM2, 700 tokens, rho of the median head between one and the
    # next: pieces of 256 to one piece 0.78; system prompt not repeated 0.84; those who ask for
    # the repetition count 0.97; softmax over the chunk 1.00; the words of the request 1.00.
    Pair(
        "kvzip",
        "KVzipPress",
        "default",
        "repeats up to 2048 tokens at once instead of 256, without what opens the message, and "
        "counts what those tokens look at that ask for the repetition",
    ),
)
# StreamingLLMPress marks what it keeps with 1 and the rest with 0: there is no order to compare.


@dataclass(frozen=True)
class Agreement:
    """How alike a policy and a press score the contested cells of one text.

    Attributes
    ----------
    model
        File name of the GGUF, without .gguf.
    text
        Index of the text.
    n_tokens
        Tokens of it.
    pair
        What is compared.
    rho_median, rho_min
        Spearman's rank correlation along the cells: median and minimum over all heads.
    kept_min
        Of the quarter of the contested cells that scores highest, the share that both name;
        minimum over all heads.
    difference
        Largest difference of two scores, as a share of the head's largest score.
    """

    model: str
    text: int
    n_tokens: int
    pair: Pair
    rho_median: float
    rho_min: float
    kept_min: float
    difference: float


def crosscheck(
    model: Path, texts: Sequence[str], *, n_tokens: int = 1024, threads: int = 2
) -> list[Agreement]:
    """Compare every policy that kvpress has, too, on every text.

    Parameters
    ----------
    model
        GGUF file that llama.cpp and transformers read. Both get its weights in float32.
    texts
        What is read, each up to ``n_tokens``.
    n_tokens
        At least 256, so that enough cells are contested.
    threads
        CPU threads of our side.

    Returns
    -------
    list of Agreement
        By text, then in the order of :data:`PAIRS`. Pairs that kvpress has no scores for are
        left out (KVzip as it is, with sliding windows).

    Raises
    ------
    EvaluationError
        The extra is missing, a text is too short, or transformers cannot read the model.
    ModelFileError, UnsupportedModel
        llama.cpp, or our cache, cannot take it.
    """
    require()
    if n_tokens < MIN_TOKENS:
        raise EvaluationError(f"n_tokens={n_tokens} must be {MIN_TOKENS} or more")
    model = Path(model)
    check_model_file(model)
    policies = dict.fromkeys(pair.policy for pair in PAIRS)
    readings = read_texts(model, texts, policies, n_tokens=n_tokens, threads=threads)
    for i, reading in enumerate(readings):
        if len(reading.tokens) < MIN_TOKENS:
            raise EvaluationError(
                f"text {i} has only {len(reading.tokens)} tokens: a cross-check needs {MIN_TOKENS}"
            )
    press = Kvpress(model)
    return [
        agreement
        for i, reading in enumerate(readings)
        for agreement in _compare(model.stem, i, reading, press)
    ]


def _compare(model: str, text: int, reading: Reading, press: Kvpress) -> list[Agreement]:
    theirs = press.scores(reading)
    out = []
    for pair in PAIRS:
        if (pair.policy, pair.setting) not in theirs:
            continue
        cells = _contested(pair, reading)
        a = reading.scores[pair.policy]
        b = theirs[pair.policy, pair.setting]
        if a.shape != b.shape:
            raise EvaluationError(
                f"{pair.press} has scores of shape {b.shape} for {model}, our cache {a.shape}: "
                "the two do not see the same layers or heads"
            )
        out.append(Agreement(model, text, len(reading.tokens), pair, *agreement(a, b, cells)))
    return out


def _contested(pair: Pair, reading: Reading) -> slice:
    """Cells that neither side keeps whatever their score."""
    policy = get_policy(pair.policy)
    n_first, n_last = policy.n_sinks, policy.n_recent
    if pair.policy == "snapkv":
        n_last = max(n_last, policy.n_window)
    if (pair.policy, pair.setting) == ("kvzip", "default"):
        n_first = max(n_first, reading.n_opening)  # the press does not have it repeated
    return slice(n_first, -n_last)


def agreement(ours: F32, theirs: F32, cells: slice) -> tuple[float, float, float, float]:
    """Median and minimum of Spearman's rho, minimum of what both keep, largest difference.

    Parameters
    ----------
    ours, theirs
        Scores, [n_layer, n_head_kv, n_cells].
    cells
        Those that are compared.
    """
    a = ours.astype(np.float64)[..., cells].reshape(-1, ours[0, 0, cells].size)
    b = theirs.astype(np.float64)[..., cells].reshape(a.shape)
    rho = np.array([spearman(x, y) for x, y in zip(a, b, strict=True)])
    n_kept = max(1, round(KEPT * a.shape[-1]))
    top = [np.argsort(-x, axis=-1, kind="stable")[:, :n_kept] for x in (a, b)]
    both = [np.intersect1d(x, y).size / n_kept for x, y in zip(*top, strict=True)]
    difference = np.abs(a - b) / np.abs(b).max(axis=-1, keepdims=True)
    return float(np.median(rho)), float(rho.min()), min(both), float(difference.max())


def spearman(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Rank correlation of two vectors; equal values share the mean of their ranks."""
    return float(np.corrcoef(_ranks(a), _ranks(b))[0, 1])


def _ranks(x: NDArray[Any]) -> NDArray[np.float64]:
    _, which, counts = np.unique(x, return_inverse=True, return_counts=True)
    mean_rank = np.cumsum(counts) - (counts - 1) / 2
    return np.asarray(mean_rank[which], np.float64)


# ---- tables -------------------------------------------------------------------------------------

_COLUMNS = ("policy", "set as", "median rho", "least rho", "same kept", "difference", "note")


def print_agreements(agreements: Iterable[Agreement], console: Console | None = None) -> None:
    """Print one table per model, all texts together, and what there is to say about rows below."""
    console = console or Console()
    for title, rows in _tables(agreements):
        table = Table(title=title, title_justify="left", box=None, header_style="dim")
        for column in _COLUMNS[:-1]:
            justify: JustifyMethod = "right" if column in _COLUMNS[2:] else "left"
            table.add_column(column, justify=justify, no_wrap=True)
        for row in rows:
            table.add_row(*row[:-1])
        console.print(table)
        for policy, setting, *_, note in rows:
            console.print(Text(f"{policy}, set as {setting}: {note}", style="dim"))
        console.print()


def markdown(agreements: Iterable[Agreement]) -> str:
    """Return the same tables as GitHub Markdown."""
    lines = []
    for title, rows in _tables(agreements):
        lines += [f"### {title}", ""]
        lines += [_line(_COLUMNS), _line(["---"] * 2 + ["---:"] * 4 + ["---"])]
        lines += [*map(_line, rows), ""]
    return "\n".join(lines)


def _tables(agreements: Iterable[Agreement]) -> list[tuple[str, list[list[str]]]]:
    """Title and rows for every model."""
    groups: dict[str, dict[Pair, list[Agreement]]] = {}
    for each in agreements:
        groups.setdefault(each.model, {}).setdefault(each.pair, []).append(each)
    return [
        (
            f"{model}, {len({x.text for xs in pairs.values() for x in xs})} texts, "
            f"up to {max(x.n_tokens for xs in pairs.values() for x in xs)} tokens",
            [_row(pair, xs) for pair, xs in pairs.items()],
        )
        for model, pairs in groups.items()
    ]


def _row(pair: Pair, xs: list[Agreement]) -> list[str]:
    return [
        pair.policy,
        "here" if pair.setting == "same" else "kvpress",
        f"{np.median([x.rho_median for x in xs]):.4f}",
        f"{min(x.rho_min for x in xs):.4f}",
        f"{min(x.kept_min for x in xs):.1%}",
        f"{max(x.difference for x in xs):.1g}",
        pair.note,
    ]


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
