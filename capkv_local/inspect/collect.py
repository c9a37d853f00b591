"""What the cache still holds of a text, token by token and head by head, as arrays."""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from capkv_local import native
from capkv_local.documents.sources import Source
from capkv_local.errors import StateError
from capkv_local.native import F32, I32, Mask

if TYPE_CHECKING:
    from capkv_local.chat import DocumentChat

# Shares of the heads where a level begins: 0 is no head, the last one all of them. Most of a text
# is held by few heads, so the low levels are narrow.
EDGES = (0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0)
N_LEVELS = len(EDGES) + 2

# Tokens of a passage: it ends with a line or a sentence after the first, at the latest after the
# second.
_SHORT, _LONG = 24, 64
_END = re.compile(r"[.!?][\"')\]]*\s*$|\n\s*$")


@dataclass(frozen=True)
class Survival:
    """What is held of a text.

    Parameters
    ----------
    model, policy, allocation
        Names; the allocation is None if nothing is ever evicted.
    budget
        Cells per head that an eviction leaves, on average.
    kv_bytes, kv_bytes_full
        Memory of the cells, and what it would be without eviction.
    pieces
        Text of every token. A character of several tokens is in the last of them.
    sources
        Where every token is from; None for what is of no document.
    held
        bool [n_layer, n_head_kv, n_tokens]; layers are those that see all of the text.
    relevance
        What the policy carries for every held token, float32 [n_layer, n_head_kv, n_tokens],
        0 elsewhere; None if it carries nothing.
    n_sinks
        First tokens that all heads always keep.
    """

    model: str
    policy: str
    allocation: str | None
    budget: int
    kv_bytes: int
    kv_bytes_full: int
    pieces: Sequence[str]
    sources: Sequence[Source | None]
    held: Mask
    relevance: F32 | None
    n_sinks: int

    @property
    def n_tokens(self) -> int:
        """Tokens of the text."""
        return len(self.pieces)

    @property
    def n_heads(self) -> int:
        """KV heads of all layers together."""
        return int(self.held.shape[0] * self.held.shape[1])

    @cached_property
    def n_held(self) -> I32:
        """Heads that hold each token, [n_tokens]."""
        n: I32 = self.held.sum(axis=(0, 1), dtype=np.int32)
        return n

    @property
    def n_gone(self) -> int:
        """Tokens that no head holds."""
        return int((self.n_held == 0).sum())

    @cached_property
    def share(self) -> npt.NDArray[np.float64]:
        """Share of the heads that hold each token, [n_tokens]."""
        return self.n_held / self.n_heads

    @cached_property
    def cells(self) -> I32:
        """Cells that each head holds, [n_layer, n_head_kv]."""
        n: I32 = self.held.sum(axis=-1, dtype=np.int32)
        return n


@dataclass(frozen=True)
class Passage:
    """A stretch of tokens, ``first`` to ``last`` (included), all of one source."""

    first: int
    last: int
    source: Source | None

    @property
    def tokens(self) -> slice:
        """Where it is in arrays of tokens."""
        return slice(self.first, self.last + 1)

    def text(self, survival: Survival, n_max: int = 0) -> str:
        """Its text on one line, of ``n_max`` characters at most (0: any number)."""
        text = " ".join("".join(survival.pieces[self.tokens]).split())
        return text if not 0 < n_max < len(text) else f"{text[: max(0, n_max - 3)].rstrip()}..."

    def share(self, survival: Survival) -> float:
        """Share of its cells that are held, over all heads."""
        return float(survival.share[self.tokens].mean())


def collect(chat: DocumentChat) -> Survival:
    """Look at the cache of a chat, which stays as it is.

    Raises
    ------
    StateError
        Nothing has been read.
    """
    llama = chat.llama
    n_tokens = llama.n_tokens
    if n_tokens == 0:
        raise StateError("nothing has been read: there is nothing to inspect; name a document")
    cache, stats = llama._require_cache(), llama.kv_stats()
    positions = llama.kv_positions()
    relevance = None
    carried = cache.carried_by_cell(positions.shape[-1])
    if carried is not None:
        relevance = by_token(carried, positions, n_tokens)
    return Survival(
        model=Path(str(llama.model_path)).stem,
        policy=cache.policy.name,
        allocation=stats.allocation,
        budget=stats.budget,
        kv_bytes=stats.kv_bytes,
        kv_bytes_full=stats.kv_bytes_full,
        pieces=_pieces(llama, llama.input_ids[:n_tokens].tolist()),
        sources=[chat._sources.at(token) for token in range(n_tokens)],
        held=by_token(np.ones(positions.shape, bool), positions, n_tokens),
        relevance=relevance,
        n_sinks=min(cache.policy.n_sinks, n_tokens),
    )


def by_token(values: npt.NDArray[Any], positions: I32, n_tokens: int) -> npt.NDArray[Any]:
    """Values of cells, put where their tokens are: [n_layer, n_head_kv, n_tokens], else 0.

    Parameters
    ----------
    values, positions
        [n_layer, n_head_kv, n_cells]; positions that are negative or beyond are left out.
    """
    out = np.zeros((*positions.shape[:2], n_tokens), values.dtype)
    layer, head, cell = np.nonzero((positions >= 0) & (positions < n_tokens))
    out[layer, head, positions[layer, head, cell]] = values[layer, head, cell]
    return out


def levels(share: npt.NDArray[np.float64]) -> I32:
    """Level of each share, from 0 (no head) to ``N_LEVELS - 1`` (all), of any shape.

    Examples
    --------
    >>> levels(np.array([0, 0.01, 0.14, 0.99, 1.0])).tolist()
    [0, 1, 3, 7, 8]
    """
    # Half a thousandth: the mean of ones may be a little less than one.
    found: I32 = np.where(share > 0, 1 + np.searchsorted(EDGES, share + 5e-7, "right"), 0)
    return found.astype(np.int32)


def passages(survival: Survival) -> list[Passage]:
    """Cut the text into passages: at line and sentence ends, and where the source changes."""
    found: list[Passage] = []
    first = 0
    for token in range(survival.n_tokens):
        n, last = token + 1 - first, token + 1 == survival.n_tokens
        source = survival.sources[token]
        ends = n >= _LONG or (n >= _SHORT and _END.search(survival.pieces[token]))
        if last or ends or survival.sources[token + 1] != source:
            found.append(Passage(first, token, source))
            first = token + 1
    return found


def ranked(survival: Survival) -> list[Passage]:
    """Passages by how much is held of them, most first; without the very short.

    Those of documents, if sources are known.
    """
    parts = [p for p in passages(survival) if p.text(survival)]
    parts = [p for p in parts if p.source] or parts
    long = [p for p in parts if p.last - p.first >= _SHORT // 2]
    return sorted(long or parts, key=lambda p: -p.share(survival))


def _pieces(llama: Any, tokens: Sequence[int]) -> list[str]:
    known = {token: native.token_piece(llama._model.vocab, token) for token in set(tokens)}
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    return [decoder.decode(known[token]) for token in tokens]
