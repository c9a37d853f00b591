"""What a question looks at, in the small cache and in one that holds everything."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from capkv_local import native
from capkv_local.cache.compact import CompactCache
from capkv_local.errors import BudgetError, ContextOverflow, StateError
from capkv_local.inspect.collect import Passage, Survival, by_token, passages
from capkv_local.llama import Llama
from capkv_local.llama.interrupt import deferred_interrupt
from capkv_local.native import F32, Stat
from capkv_local.plan.memory import SHARE, available_memory

if TYPE_CHECKING:
    from capkv_local.chat import DocumentChat


@dataclass(frozen=True)
class Attention:
    """Attention of a question on the text, mean of its tokens, per layer and KV head.

    Sinks take most of the attention of most heads and are never lost, so ``n_sinks`` first tokens
    are left out of all sums.

    Parameters
    ----------
    question
        Its text.
    survival
        What the small cache holds.
    kept
        With the small cache, float32 [n_layer, n_head_kv, n_tokens]; 0 where a head holds nothing.
    full
        With all cells; None if that was not looked at.
    why_not
        Why there is no ``full``.
    """

    question: str
    survival: Survival
    kept: F32
    full: F32 | None
    why_not: str = ""

    @cached_property
    def attended(self) -> F32:
        """Attention on each token, mean over the heads, [n_tokens]: of all cells if looked at."""
        attention = self.kept if self.full is None else self.full
        return self._mean(attention)

    @cached_property
    def lost(self) -> F32:
        """The part of ``attended`` that goes to cells which their heads hold no more, [n_tokens].

        Zeros if there is no ``full``.
        """
        if self.full is None:
            return np.zeros(self.survival.n_tokens, np.float32)
        return self._mean(np.where(self.survival.held, np.float32(0), self.full))

    @property
    def at_stake(self) -> F32:
        """What is shown of each token, [n_tokens]: ``lost``, or ``attended`` without ``full``."""
        return self.attended if self.full is None else self.lost

    @cached_property
    def lost_by_head(self) -> F32 | None:
        """Share of each head's attention on the text that is lost, [n_layer, n_head_kv]."""
        if self.full is None:
            return None
        text = self.full[..., self.survival.n_sinks :]
        gone = np.where(self.survival.held[..., self.survival.n_sinks :], np.float32(0), text)
        total = text.sum(axis=-1)
        share: F32 = gone.sum(axis=-1) / np.where(total > 0, total, np.float32(1))
        return share

    @property
    def lost_share(self) -> float | None:
        """Share of the attention on the text that is lost, over all heads."""
        if self.full is None:
            return None
        total = float(self.attended.sum())
        return float(self.lost.sum()) / total if total else 0.0

    def worst_tokens(self, n: int = 10) -> list[int]:
        """Tokens that lose most, or without ``full`` those that are attended most."""
        order = np.argsort(-self.at_stake, kind="stable")[:n]
        return [int(token) for token in order if self.at_stake[token] > 0]

    def worst_passages(self, n: int = 10) -> list[Passage]:
        """As :meth:`worst_tokens`, by passages."""
        sums = {p: float(self.at_stake[p.tokens].sum()) for p in passages(self.survival)}
        best = sorted(sums, key=lambda p: -sums[p])[:n]
        return [p for p in best if sums[p] > 0]

    def _mean(self, attention: F32) -> F32:
        mean: F32 = attention.mean(axis=(0, 1), dtype=np.float32)
        mean[: self.survival.n_sinks] = 0
        return mean


def question_attention(
    chat: DocumentChat,
    survival: Survival,
    question: str,
    progress: Callable[[int, int], None] | None = None,
) -> Attention:
    """Let a question look at the text: as it is held, and as it was before any eviction.

    The second takes reading the text once more with the full cache, if its memory is there. The
    chat goes on as if nothing had been asked.

    Parameters
    ----------
    progress
        Called with (tokens done, tokens in all) while the text is read again.

    Raises
    ------
    ContextOverflow, BudgetError
        Context or cells have no room for the question.
    """
    llama = chat.llama
    asked = chat._user_tokens() + chat._question_tokens(question)
    kept = _attention(llama, asked)
    if survival.held.all():
        return Attention(question, survival, kept, kept)
    n_bytes = llama._require_cache().kv.info().n_bytes_cell * (llama.n_tokens + len(asked) + 1)
    if n_bytes > SHARE * available_memory():
        return Attention(
            question,
            survival,
            kept,
            None,
            f"the full cache would take {n_bytes / 2**20:,.0f} MiB, which is not available",
        )
    return Attention(question, survival, kept, _full_attention(llama, asked, progress))


def _full_attention(
    llama: Llama, asked: Sequence[int], progress: Callable[[int, int], None] | None
) -> F32:
    """Attention of ``asked`` behind the same tokens in a cache without eviction."""
    params = llama.context_params
    full = Llama(
        llama.model_path,
        n_ctx=llama.n_tokens + len(asked) + 1,
        n_batch=llama.n_batch,
        kv_policy="full",
        n_threads=llama.n_threads,
        n_threads_batch=llama.n_threads_batch,
        n_gpu_layers=llama.model_params.n_gpu_layers,
        rpc_servers=llama.rpc_servers,
        type_k=params.type_k,
        type_v=params.type_v,
        verbose=llama.verbose,
    )
    try:
        full.prefill(llama.input_ids[: llama.n_tokens].tolist(), progress=progress)
        return _attention(full, asked, restore=False)
    finally:
        full.close()


def _attention(llama: Llama, asked: Sequence[int], *, restore: bool = True) -> F32:
    """Mean attention of tokens that are decoded behind the text, [n_layer, n_head_kv, n_tokens]."""
    cache, n_tokens = llama._require_cache(), llama.n_tokens
    if n_tokens + len(asked) > llama.n_ctx():
        raise ContextOverflow(
            f"a question of {len(asked)} tokens does not fit into the context of {llama.n_ctx()} "
            f"behind {n_tokens} that were read: use a larger --n-ctx or a shorter question"
        )
    # With sliding windows, what is decoded in one piece can be taken back.
    n_most = min(cache.kv.info().n_free, llama.context_params.n_ubatch)
    if len(asked) > n_most:
        raise BudgetError(
            f"a question of {len(asked)} tokens does not fit into the {n_most} cells that it can "
            "have: ask a shorter one, or read with a larger --room"
        )
    with deferred_interrupt():
        before = native.get_state(llama._ctx.ctx) if restore else None
        try:
            cache.observe(len(asked))  # may be more than the policy needs
            llama._decode_scratch(cache, list(asked))
            attention = cache.kv.score(
                Stat.ATTN_MEAN, n_cells=cache.kv.info().n_cells, n_queries=len(asked)
            )
            return by_token(attention, cache.kv.positions(), n_tokens)
        finally:
            llama._ctx.kv_cache_seq_rm(-1, n_tokens, -1)
            if before is not None:
                _go_back(llama, cache, before)


def _go_back(llama: Llama, cache: CompactCache, before: bytes) -> None:
    """To what was observed before, too."""
    cache.observe()
    if not native.set_state(llama._ctx.ctx, before):
        raise StateError("the cells as they were before the question do not fit: read again")
    llama._requires_eval = True
