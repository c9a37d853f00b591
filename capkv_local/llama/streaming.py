"""Decoding through a small cache: chunks in, and an eviction whenever the cells run out.

The part of :class:`~capkv_local.Llama` between llama-cpp-python's ``eval`` and the cache.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import llama_cpp
import numpy as np

from capkv_local.cache.compact import CompactCache
from capkv_local.cache.native_stats import ATTENTION
from capkv_local.cache.probe import Probe
from capkv_local.cache.protection import Protection
from capkv_local.devices.placed import PlacedLlama
from capkv_local.errors import (
    BudgetError,
    ContextOverflow,
    NativeError,
    StateError,
    UnsupportedModel,
)
from capkv_local.llama.interrupt import deferred_interrupt
from capkv_local.native import F32
from capkv_local.policies.base import Reduce

Observe = Literal["tail", "question", "probe"]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class _Observers:
    """What is decoded in scratch cells before an eviction, for its queries only."""

    question: list[int]
    probe: Probe | None
    n_scratch: int  # cells that are kept free for them


class StreamingLlama(PlacedLlama):
    """:class:`llama_cpp.Llama` whose tokens stream through ``self._cache``, if there is one."""

    _cache: CompactCache | None
    _probe: Probe | None
    _room: int
    _t_decode_s: float
    _stack: contextlib.ExitStack

    def eval(self, tokens: Sequence[int]) -> None:
        """Evaluate tokens behind those that were evaluated before; evicts when cells run out.

        Raises
        ------
        ContextOverflow
            More tokens than ``n_ctx``.
        """
        if self._cache is None:
            super().eval(tokens)
        else:
            self.prefill(tokens)

    def prefill(
        self,
        tokens: Sequence[int],
        *,
        observe: Observe | None = None,
        question: Sequence[int] | None = None,
        progress: Progress | None = None,
        more: bool = False,
    ) -> None:
        """As :meth:`eval`, with a say in what the policy looks at.

        Parameters
        ----------
        tokens
            Tokens to append.
        observe
            ``"tail"``: the last queries of the text itself. ``"question"``: before every
            eviction the tokens of ``question`` are decoded in scratch cells behind the text and
            their queries decide; the question does not become part of the sequence.
            ``"probe"``: before every eviction the new tokens are repeated in scratch cells, for
            questions that nobody knows yet; needs ``kv_observe="probe"``, which also makes it
            the default.
        question
            Tokens of the question, needed with ``observe="question"`` and only with it.
        progress
            Called after each chunk with (tokens done, tokens in all).
        more
            The text goes on in another call: the cache is not brought back to its budget yet.

        Raises
        ------
        ContextOverflow
            More tokens than ``n_ctx``; nothing is evaluated.
        BudgetError
            The cells beside the budget do not hold the question.
        KeyboardInterrupt
            Ctrl-C takes effect between chunks; the tokens so far stay.
        """
        cache = self._require_cache()
        observers = self._observers(observe, question)
        self._rewind(cache, len(tokens))

        n_chunk = self._chunk_size(cache, observers)
        done = 0
        while done < len(tokens):
            with deferred_interrupt():
                n_free = self._make_room(cache, min(n_chunk, len(tokens) - done), observers)
                chunk = list(tokens[done : done + min(n_chunk, n_free)])
                self._decode_chunk(chunk)
            done += len(chunk)
            if progress is not None:
                progress(done, len(tokens))
        # One token at a time is generation: it fills the room first.
        if len(tokens) > 1 and not more:
            with deferred_interrupt():
                self._settle(cache, observers)

    def _observers(self, observe: Observe | None, question: Sequence[int] | None) -> _Observers:
        if observe is None:
            observe = "probe" if self._probes() else "tail"
        if (observe == "question") != bool(question):
            raise ValueError('observe="question" needs the tokens of a question, nothing else does')
        if observe == "probe" and self._probe is None:
            raise ValueError('observe="probe" needs a Llama that was made with kv_observe="probe"')
        asked = list(question or [])
        # The probe's cells stay free even if it does not look now: the next time it may.
        n_probe = 0 if self._probe is None else self._probe.n_scratch
        probe = self._probe if observe == "probe" else None
        return _Observers(asked, probe, len(asked) + n_probe)

    def _probes(self) -> bool:
        """Whether an eviction repeats what is new, unless told otherwise."""
        if self._probe is None or self._cache is None:
            return False
        # In a conversation the question is known: its own queries tell what it needs.
        return not self._cache.protection.n_tokens or "probe" in self._cache.policy.needs

    def _require_cache(self) -> CompactCache:
        if self._cache is None:
            raise UnsupportedModel("this Llama has the stock cache: give it a kv_policy")
        return self._cache

    def _rewind(self, cache: CompactCache, n_new: int) -> None:
        """Drop cells behind ``n_tokens`` and see that ``n_new`` tokens fit the context."""
        if self.n_tokens + n_new > self._n_ctx:
            raise ContextOverflow(
                f"{self.n_tokens + n_new} tokens exceed the context of {self._n_ctx}: "
                "use a larger n_ctx or a shorter text"
            )
        if not self._ctx.kv_cache_seq_rm(-1, self.n_tokens, -1):
            raise StateError(
                f"cannot go back to token {self.n_tokens}: cells around it were evicted; "
                "call reset() and evaluate the prompt again"
            )
        if self.n_tokens == 0:
            cache.forget()
        if self.n_tokens < cache.protection.n_tokens:
            cache.protection = Protection()  # a part of what it was for is gone
        cache.n_repeated = min(cache.n_repeated, self.n_tokens)

    def _chunk_size(self, cache: CompactCache, observers: _Observers) -> int:
        """Tokens to decode between evictions that leave cells for the observers."""
        n_left = 0 if self._never_full(cache) else cache.n_left
        free = cache.kv.info().n_allocated - n_left
        longest = free - 1
        if self._window_cells():
            # In one piece, observers take only cells that no window needs any more.
            longest = min(longest, self.context_params.n_ubatch)
        n_scratch = observers.n_scratch
        if n_scratch > longest:
            n_question = len(observers.question)
            what = f"a question of {n_question} tokens" if n_question else "the probe"
            also = f", {n_scratch - n_question} of them for the probe" if self._probe else ""
            raise BudgetError(
                f"{what} does not fit into the {longest} cells that it can have{also}: use a "
                "larger kv_room (with sliding windows: n_ubatch) or a shorter question"
            )
        return min(self.n_batch, free - n_scratch)

    def _never_full(self, cache: CompactCache) -> bool:
        return not cache.evicts or cache.budget >= self._n_ctx

    def _make_room(self, cache: CompactCache, n_new: int, observers: _Observers) -> int:
        """Free cells for new tokens, ``n_new`` if that can be.

        Evicts only when a good part of ``n_new`` does not fit: the fuller the cache, the more a
        policy sees at once, and the less often it has to look.
        """
        n_free = cache.kv.info().n_free - observers.n_scratch
        if n_free < n_new and n_free < self.n_batch // 4:
            self._evict(cache, observers)
            n_free = cache.kv.info().n_free - observers.n_scratch
        return n_free

    def _settle(self, cache: CompactCache, observers: _Observers) -> None:
        """After a prompt: back to the budget, unless only a little is over."""
        if cache.protection.n_tokens:
            return  # a conversation keeps what it has until its cells run out
        n_over = cache.kv.info().n_held - cache.budget
        if not cache.evicts or n_over <= self._room // 2:
            return
        self._evict(cache, observers)
        # The last token is decoded again, so that its logits are those of the cells that
        # generation goes on with: the same prompt again then gives the same answer. Only a policy
        # that keeps nothing but the last token in all heads leaves no way back.
        if self._ctx.kv_cache_seq_rm(-1, self.n_tokens - 1, -1):
            self.n_tokens -= 1
            self._decode_chunk([int(self.input_ids[self.n_tokens])])

    def _evict(
        self,
        cache: CompactCache,
        observers: _Observers,
        remember: dict[Reduce, F32] | None = None,
    ) -> None:
        """Look, choose, evict; ``remember`` spares repetitions of a text that is evicted anew."""
        n_question = len(observers.question)
        probe = observers.probe
        if observers.question:
            self._decode_scratch(cache, observers.question)
        n_cells = cache.kv.info().n_cells - n_question

        def repeat(reduce: Reduce) -> F32:
            assert probe is not None
            if remember is None:
                return self._repeat(cache, probe, n_cells, reduce)
            if reduce not in remember:
                remember[reduce] = self._repeat(cache, probe, n_cells, reduce)
            return remember[reduce].copy()

        self._wait()
        t_decode_s = self._t_decode_s
        try:
            # The question counts as seen: the observation window lies behind the text.
            keep, carry = cache.choose(
                n_tokens=self.n_tokens + n_question,
                n_cells=n_cells,
                n_queries=min(n_question, cache.policy.n_window),
                repeat=None if probe is None else repeat,
                look=lambda reduce, per_head: self._look(cache, n_cells, reduce, per_head),
            )
        finally:
            if n_question:
                self._ctx.kv_cache_seq_rm(-1, self.n_tokens, -1)
        # Repeating is decoding, not scoring.
        cache.counters.t_score_s -= self._t_decode_s - t_decode_s
        cache.apply(keep, carry)
        if probe is not None:
            cache.n_repeated = self.n_tokens

    def _look(self, cache: CompactCache, n_cells: int, reduce: Reduce, per_head: bool) -> F32:
        """Attention of the last tokens, decoded once more: their queries are not there any more."""
        n = min(cache.policy.n_window, self.n_tokens, cache.kv.info().n_free)
        try:
            self._decode_scratch(cache, self.input_ids[self.n_tokens - n : self.n_tokens].tolist())
            return cache.kv.score(
                ATTENTION[reduce], n_cells=n_cells, n_queries=n, per_head=per_head
            )
        finally:
            self._ctx.kv_cache_seq_rm(-1, self.n_tokens, -1)

    def _repeat(self, cache: CompactCache, probe: Probe, n_cells: int, reduce: Reduce) -> F32:
        """Attention on the first ``n_cells`` cells while what is new in them is repeated."""
        new = self.input_ids[: self.n_tokens].tolist()
        # Every piece stands behind the same prompt, whose cells stay from one to the next. Not with
        # sliding windows: a second batch behind the text takes cells that they still need.
        n_prompt = 0 if self._window_cells() else len(probe.prompt)
        n_there = 0
        stat = ATTENTION[reduce]
        try:
            cache.kv.add_attention(stat, self.n_tokens)  # 0 if nothing is new
            for piece, n_queries in probe.pieces(new, cache.n_repeated):
                self._ctx.kv_cache_seq_rm(-1, self.n_tokens + n_there, -1)
                # The attention goes over the piece, too: what it finds in itself, it does not need
                # the text for.
                p0 = self.n_tokens + len(piece) - n_queries
                cache.kv.add_attention(stat, p0)
                self._decode_scratch(cache, piece[n_there:], n_there)
                n_there = n_prompt
            out = cache.kv.attention(n_cells)
        finally:
            cache.kv.stop_attention()
            self._ctx.kv_cache_seq_rm(-1, self.n_tokens, -1)
        if probe.stride > 1:
            probe.spread(out, cache.kv.positions()[..., :n_cells], cache.n_repeated)
        return out

    def _decode_scratch(self, cache: CompactCache, tokens: list[int], n_before: int = 0) -> None:
        """Decode tokens for their queries only, behind the text and ``n_before`` such tokens.

        The caller takes them back.
        """
        cache.pause_mean(True)
        try:
            for i in range(0, len(tokens), self.n_batch):
                self._batch.set_batch(
                    batch=tokens[i : i + self.n_batch],
                    n_past=self.n_tokens + n_before + i,
                    logits_all=False,
                )
                # No logits are wanted, and the output matrix is a good part of a small model.
                self._batch.batch.logits[self._batch.n_tokens() - 1] = False
                self._decode_batch()
            self._wait()  # scores are next
        finally:
            cache.pause_mean(False)

    def _decode_chunk(self, chunk: list[int]) -> None:
        n_past, n = self.n_tokens, len(chunk)
        self._batch.set_batch(batch=chunk, n_past=n_past, logits_all=self._logits_all)
        self._decode_batch()
        self.input_ids[n_past : n_past + n] = chunk
        if self._logits_all:
            logits = np.ctypeslib.as_array(self._ctx.get_logits(), shape=(n * self._n_vocab,))
            self.scores[n_past : n_past + n, :].reshape(-1)[:] = logits
        self.n_tokens += n
        self._requires_eval = False

    def _decode_batch(self) -> None:
        t0 = time.perf_counter()
        try:
            self._ctx.decode(self._batch)
        except RuntimeError as error:
            raise NativeError(
                f"decoding {self._batch.n_tokens()} tokens at position {self.n_tokens} failed: "
                f"{error}"
            ) from error
        finally:
            self._t_decode_s += time.perf_counter() - t0

    def _wait(self) -> None:
        """See a device finish what it decodes, so that the time counts as decoding."""
        t0 = time.perf_counter()
        llama_cpp.llama_synchronize(self._ctx.ctx)
        self._t_decode_s += time.perf_counter() - t0

    def _create_completion(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        try:
            yield from super()._create_completion(*args, **kwargs)
        except ValueError as error:
            if "exceed context window" in str(error):
                raise ContextOverflow(f"{error}: use a larger n_ctx or a shorter prompt") from error
            raise

    def _window_cells(self) -> int:
        """Cells that sliding windows need; 0 for models without them.

        llama.cpp makes their cache no larger than the context that it is created with.
        """
        n_window = llama_cpp.llama_model_n_swa(self._model.model)
        return n_window + self.context_params.n_ubatch if n_window > 0 else 0
