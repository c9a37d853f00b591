"""Protecting what was read: evictions then choose among what comes after it.

The part of :class:`~capkv_local.Llama` that a conversation about a document needs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from capkv_local import native
from capkv_local.cache.compact import CompactCache
from capkv_local.cache.protection import Protection
from capkv_local.errors import BudgetError, StateError
from capkv_local.llama.interrupt import deferred_interrupt
from capkv_local.llama.streaming import StreamingLlama


class ConversationLlama(StreamingLlama):
    """:class:`StreamingLlama` that can go back to the end of a document."""

    @property
    def n_protected(self) -> int:
        """Tokens at the start whose cells no eviction takes; see :meth:`protect`."""
        return 0 if self._cache is None else self._cache.protection.n_tokens

    @property
    def n_turn_max(self) -> int:
        """Most tokens of a question behind what is protected, or of turns that are read again."""
        cache = self._require_cache()
        if self._never_full(cache):
            return self._n_ctx
        return cache.n_left - cache.protection.n_held - cache.policy.n_recent - 1

    def protect(self) -> None:
        """Leave what is held now alone: later evictions choose among later tokens.

        These have all cells that are allocated beside the protected ones, which is what reading
        needed for its batches and its room. Ends with :meth:`reset`, or when the sequence goes
        back to before its end.
        """
        cache = self._require_cache()
        with deferred_interrupt():
            self._rewind(cache, 0)
            cache.protection = Protection()
            if self.n_tokens == 0:
                return
            self._settle(cache, self._observers(None, None))  # Ctrl-C can have come before it did
            cache.protect(self.n_tokens)
            self._copy_now(cache)

    @contextlib.contextmanager
    def unprotected(self) -> Iterator[None]:
        """Inside, evictions choose among all cells; then all that is held is protected again."""
        cache = self._require_cache()
        before, n_tokens = cache.protection, self.n_tokens
        if before.n_tokens == 0:
            yield
            return
        n_evictions = cache.counters.evictions
        cache.protection = Protection()
        try:
            yield
        finally:
            if (self.n_tokens, cache.counters.evictions) == (n_tokens, n_evictions):
                cache.protection = before
            else:
                self.protect()

    def begin_turn(self, n_tokens: int) -> None:
        """Protect the next ``n_tokens`` as well, a question, until the next turn begins.

        Raises
        ------
        BudgetError
            The cells beside the protected ones do not hold so many; nothing has changed.
        """
        cache = self._require_cache()
        if cache.protection.n_tokens == 0:
            return
        if n_tokens > self.n_turn_max:
            raise BudgetError(
                f"a question of {n_tokens} tokens is too long: the conversation has "
                f"{cache.n_conversation} cells beside the document, and at most "
                f"{self.n_turn_max} of them are for a question; ask a shorter one, or start with "
                "a larger kv_room (--room)"
            )
        cache.protection.question = range(self.n_tokens, self.n_tokens + n_tokens)

    def forget(self) -> None:
        """Go back to the end of what is protected, whose cells are all as they were.

        Models with sliding windows and policies that need the mean query have a copy of the cells
        in host memory for this (``kv_stats().copy_bytes``).

        Raises
        ------
        StateError
            There is no such copy: the session was changed or loaded since. Nothing has changed.
        """
        cache = self._require_cache()
        with deferred_interrupt():
            self._rewind(cache, 0)
            protection = cache.protection
            if protection.n_tokens == 0:
                self.reset()  # type: ignore[no-untyped-call]
                self._rewind(cache, 0)
                return
            protection.question = range(0)
            if self.n_tokens == protection.n_tokens:
                return
            if self._copies(cache):
                self._restore(cache, protection)
            else:
                self._drop(cache, protection.n_tokens)
            self.n_tokens = protection.n_tokens
            self._requires_eval = True

    def _back(self, n_tokens: int) -> bool:
        return bool(self._ctx.kv_cache_seq_rm(-1, n_tokens, -1))

    def _drop(self, cache: CompactCache, n_tokens: int) -> None:
        """Drop all behind ``n_tokens``, whose cells no eviction has taken since."""
        before = cache.carried, cache.n_repeated
        cache.forget_behind(n_tokens)
        if not self._back(n_tokens):
            cache.carried, cache.n_repeated = before
            raise StateError(
                f"cannot go back to token {n_tokens}: cells before it were evicted since; read "
                "the document again"
            )
        # The heads go back by different numbers of cells: what is free is shared out anew.
        cache.kv.evict(cache.kv.positions() >= 0)

    def _restore(self, cache: CompactCache, protection: Protection) -> None:
        if protection.copy is None:
            raise StateError(
                "the conversation cannot be dropped: there is no copy of what was read as it was "
                "before (kv_policy or kv_budget were changed since); read the document again"
            )
        cache.forget_behind(protection.n_tokens)
        if not (native.set_state(self._ctx.ctx, protection.copy) and self._back(self.n_protected)):
            self.reset()  # type: ignore[no-untyped-call]
            raise StateError("the copy of the document's cells does not fit: read it again")

    def _copies(self, cache: CompactCache) -> bool:
        """Whether more is lost on the way than cells: windows slide, means move."""
        return self._window_cells() > 0 or "mean_query" in cache.policy.needs

    def _copy_now(self, cache: CompactCache) -> None:
        """Copy what would be lost, and go on from the copy at once.

        So the cells lie in the same order whenever a question is asked.
        """
        if self._copies(cache):
            cache.protection.copy = native.get_state(self._ctx.ctx)
            native.set_state(self._ctx.ctx, cache.protection.copy)
            self._requires_eval = True

    def _copy_again(self, cache: CompactCache) -> None:
        """Sizes or observation have changed, and with them what a copy has to look like."""
        cache.protection.copy = None
        if self.n_tokens == self.n_protected > 0:
            self._copy_now(cache)
