"""What an answer looks at: attention of its queries on the cells of what was read.

The statistics of the observed queries are read between two tokens of the answer. Nothing is
decoded for it and nothing is changed, so the answer is the same with and without.
"""

from __future__ import annotations

import numpy as np

from capkv_local.cache.compact import CompactCache
from capkv_local.citations.passages import Evidence
from capkv_local.errors import PolicyError
from capkv_local.llama import Llama
from capkv_local.native import Stat
from capkv_local.policies.base import F32

# Queries that are evaluated together at most, and how many are observed where a policy needs none.
_QUERIES = 64
# The first tokens are sinks: heads that look for nothing look there.
_SINKS = 4


class Attended:
    """Adds up what the queries of an answer give to every token that is protected.

    Parameters
    ----------
    llama
        Its protected tokens are the documents.
    n_prompt
        Tokens up to the end of the question.
    n_between
        The last of these, which the template puts between question and answer.

    Attributes
    ----------
    evidence
        Of every protected token, ``[n_protected]``: the square of the most attention that it got
        from any query of the answer beyond what it got from those before the answer, summed over
        all layers and heads (and over every 64 queries of a longer answer). A head that looks
        something up gives most of its attention to a few cells for one or two queries; what all
        queries give to cells that are always looked at, a sum over them would favour. Tokens
        between question and answer ask for nothing: what they look at is looked at always.
        Layers with sliding windows are not among them.

    Raises
    ------
    PolicyError
        See :func:`check_observed`.
    """

    def __init__(self, llama: Llama, n_prompt: int, n_between: int) -> None:
        check_observed(llama)
        self._llama = llama
        self._n_seen = n_prompt
        self._n_between = n_between
        self._always: F32 | None = None
        self.evidence: Evidence = np.zeros(llama.n_protected)
        cache = llama._require_cache()
        self._observes = not cache.n_observed  # only now, and only for this
        if self._observes:
            cache.observe(_QUERIES)

    def close(self) -> None:
        """Nothing is observed any more that was not before."""
        if self._observes:
            self._llama._require_cache().observe()

    def look(self, *, last: bool = False) -> None:
        """To be called before each token is decoded, and when none follows, with ``last``."""
        cache = self._llama._require_cache()
        most = cache.n_observed or _QUERIES
        n_new = self._llama.n_tokens - self._n_seen
        if not self.evidence.size:
            return
        if self._always is None:  # the question has been decoded, and nothing behind it
            self._always = self._attention(cache, min(self._n_between, most))
        if n_new > 0 and (last or n_new >= min(_QUERIES, most)):
            more = self._attention(cache, n_new) - self._always
            self.evidence += (np.maximum(more, 0) ** 2).sum(axis=(0, 1))
            self._n_seen = self._llama.n_tokens

    def _attention(self, cache: CompactCache, n_queries: int) -> F32:
        """The most that any of the last queries gives, ``[n_layer, n_head_kv, n_protected]``."""
        positions = cache.kv.positions()  # [n_layer, n_head_kv, n_cells]
        most = cache.kv.score(Stat.ATTN_MAX, n_cells=positions.shape[-1], n_queries=n_queries)
        out = np.zeros((*positions.shape[:2], self.evidence.size), np.float32)
        held = np.nonzero((positions >= _SINKS) & (positions < self.evidence.size))
        out[held[0], held[1], positions[held]] = most[held]
        return out


def check_observed(llama: Llama) -> None:
    """See that what an answer looks at can be told.

    Raises
    ------
    PolicyError
        The policy evicts without any look at queries, and there is no probe.
    """
    cache = llama._require_cache()
    if not cache.n_observed and cache.evicts:
        raise PolicyError(
            f"policy '{cache.policy.name}' observes no queries, so what an answer looks at is not "
            "known: cite with --observe probe (kv_observe='probe') or another policy"
        )
