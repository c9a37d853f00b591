"""``Llama``: llama-cpp-python's class with a KV cache that stays as small as its budget.

Tokens stream through ``budget + n_batch + room`` cells. When the cells run out, the policy scores
them, every head keeps its best ``budget`` and decoding goes on at the next position. Everything
else is :class:`llama_cpp.Llama`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import llama_cpp
import llama_cpp._internals as internals
import numpy as np

from capkv_local import native
from capkv_local.budget import parse_budget
from capkv_local.cache import CompactCache, KVCacheStats
from capkv_local.errors import (
    BudgetError,
    CapKVError,
    ContextOverflow,
    NativeError,
    StateError,
    UnsupportedModel,
)
from capkv_local.interrupt import deferred_interrupt
from capkv_local.models import check_model_file, load_errors
from capkv_local.policies import Policy, get_policy

Budget = int | float | str
Observe = Literal["tail", "question"]
Progress = Callable[[int, int], None]

DEFAULT_BUDGET = 2048
# Cells for the reply, so that generation does not evict at every token.
DEFAULT_ROOM = 256
# llama.cpp pads the number of cells it attends over, and its contexts, to this.
_PAD = 256


def _pad(n: int) -> int:
    return -(-n // _PAD) * _PAD


class CompactedState(llama_cpp.LlamaState):
    """A saved state together with what the policy carried for its cells."""

    carried: Any = None
    policy: str | None = None


class Llama(llama_cpp.Llama):
    """A drop-in for :class:`llama_cpp.Llama` with per-head eviction of KV cells.

    Parameters
    ----------
    model_path
        A GGUF file.
    n_ctx
        Logical context in tokens (0: as trained). No memory is allocated for it.
    kv_policy
        Name of a policy, a :class:`~capkv_local.policies.Policy`, or None for the stock cache.
    kv_budget
        What is left after an eviction, per layer and head: cells (int), a fraction of ``n_ctx``
        (float in (0, 1]) or memory (``"512MiB"``). Default: 2048 cells, or ``n_ctx`` if smaller.
    kv_room
        Cells beyond ``kv_budget + n_batch``: how many tokens are generated between evictions.
    **kwargs
        As :class:`llama_cpp.Llama`. Flash attention is on unless the cache is the stock one.

    Raises
    ------
    ModelFileError
        ``model_path`` is missing or not a GGUF that llama.cpp loads.
    BudgetError, PolicyError, UnsupportedModel, NativeBuildMissing
        The cache cannot be compacted as asked.

    Examples
    --------
    >>> llm = Llama("model.gguf", n_ctx=32768, kv_budget=2048)  # doctest: +SKIP
    >>> llm("A very long prompt ...", max_tokens=64)            # doctest: +SKIP
    """

    def __init__(
        self,
        model_path: str | Path,
        *,
        n_ctx: int = 512,
        n_batch: int = 512,
        kv_policy: str | Policy | None = "capkv",
        kv_budget: Budget | None = None,
        kv_room: int = DEFAULT_ROOM,
        flash_attn: bool | None = None,
        **kwargs: Any,
    ) -> None:
        # Set first: __del__ of the parent runs also when this raises.
        self._stack = contextlib.ExitStack()
        self._cache: CompactCache | None = None
        self._t_decode_s = 0.0
        self._room = kv_room
        check_model_file(model_path)
        if kv_policy is None:
            with load_errors(model_path):
                super().__init__(
                    str(model_path),
                    n_ctx=n_ctx,
                    n_batch=n_batch,
                    flash_attn=bool(flash_attn),
                    **kwargs,
                )
            return

        native.require()
        policy = get_policy(kv_policy)
        _check_settings(flash_attn, kwargs, kv_room)
        # What is not known before the model is loaded (its context, its bytes per cell) is read
        # off a context of the smallest size.
        known = n_ctx > 0 and not isinstance(kv_budget, str)
        if known:
            budget = _parse(kv_budget, n_ctx, 0, policy)
            n_cells = self._cells(policy, budget, n_ctx, n_batch)
        else:
            budget, n_cells = 0, _pad(min(n_batch, n_ctx or n_batch))
        with load_errors(model_path):
            super().__init__(
                str(model_path), n_ctx=n_cells, n_batch=n_batch, flash_attn=True, **kwargs
            )
        kv = native.KVCache(self._ctx.ctx)
        if not known:
            n_ctx = n_ctx or self._model.n_ctx_train()
            budget = _parse(kv_budget, n_ctx, kv.info().n_bytes_cell, policy)
        n_cells = self._cells(policy, budget, n_ctx, n_batch)
        if n_cells != kv.info().n_cells_max:
            self._new_context(n_cells)
            kv = native.KVCache(self._ctx.ctx)
        self._set_n_ctx(kv, n_ctx)
        self._cache = CompactCache(kv, policy, budget)

    # -- sizes ---------------------------------------------------------------------------------

    def _cells(self, policy: Policy, budget: int, n_ctx: int, n_batch: int) -> int:
        """Cells to allocate."""
        if not getattr(policy, "evicts", True):
            return _pad(n_ctx)
        n_cells = _pad(budget + min(n_batch, n_ctx) + self._room)
        return min(_pad(n_ctx), max(n_cells, self._window_cells()))

    def _window_cells(self) -> int:
        """Cells that sliding windows need: llama.cpp makes their cache no larger than the other.

        0 before the model is loaded and for models without them.
        """
        if getattr(self, "_model", None) is None:
            return 0
        n_window = llama_cpp.llama_model_n_swa(self._model.model)
        return _pad(n_window + self.context_params.n_ubatch) if n_window > 0 else 0

    def _set_n_ctx(self, kv: native.KVCache, n_ctx: int) -> None:
        n_ctx = max(n_ctx, kv.info().n_cells_max)
        kv.set_n_ctx(n_ctx)
        self._n_ctx = n_ctx
        self.input_ids = np.zeros((n_ctx,), dtype=np.intc)
        if self._logits_all:
            self.scores = np.ndarray((n_ctx, self._n_vocab), dtype=np.single)

    def _new_context(self, n_cells: int) -> None:
        """Replace the context by an empty one of ``n_cells`` cells."""
        self.context_params.n_ctx = n_cells
        # The old context is freed first: two may not fit.
        self._ctx.close()
        self._ctx = self._stack.enter_context(
            contextlib.closing(
                internals.LlamaContext(
                    model=self._model, params=self.context_params, verbose=self.verbose
                )
            )
        )
        if self._lora_adapter is not None:
            native.set_lora(self._ctx.ctx, self._lora_adapter, self.lora_scale)

    # -- decoding ------------------------------------------------------------------------------

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
        observe: Observe = "tail",
        question: Sequence[int] | None = None,
        progress: Progress | None = None,
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
        question
            Tokens of the question, needed with ``observe="question"``.
        progress
            Called after each chunk with (tokens done, tokens in all).

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
        question = list(question or []) if observe == "question" else []
        if observe == "question" and not question:
            raise ValueError('observe="question" needs the tokens of a question')
        self._rewind(cache, len(tokens))

        n_chunk = self._chunk_size(cache, len(question))
        done = 0
        while done < len(tokens):
            chunk = list(tokens[done : done + n_chunk])
            with deferred_interrupt():
                self._make_room(cache, len(chunk), question)
                self._decode_chunk(chunk)
            done += len(chunk)
            if progress is not None:
                progress(done, len(tokens))
        # One token at a time is generation: it fills the room first.
        if len(tokens) > 1:
            with deferred_interrupt():
                self._settle(cache, question)

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

    def _chunk_size(self, cache: CompactCache, n_question: int) -> int:
        """Tokens to decode between evictions that leave cells for the question."""
        free = cache.kv.info().n_cells_max - (cache.budget if cache.evicts else 0)
        longest = free - 1
        if self._window_cells():
            # In one piece, a question takes only cells that no window needs any more.
            longest = min(longest, self.context_params.n_ubatch)
        if n_question > longest:
            raise BudgetError(
                f"a question of {n_question} tokens does not fit into the {longest} cells that it "
                "can have: use a larger kv_room (with sliding windows: n_ubatch) or a shorter "
                "question"
            )
        return min(self.n_batch, free - n_question)

    def _make_room(self, cache: CompactCache, n_new: int, question: list[int]) -> None:
        info = cache.kv.info()
        if info.n_cells + n_new + len(question) > info.n_cells_max:
            self._evict(cache, question)

    def _settle(self, cache: CompactCache, question: list[int]) -> None:
        """After a prompt: back to the budget, unless only a little is over."""
        n_over = cache.kv.info().n_cells - cache.budget
        if cache.evicts and n_over > self._room // 2:
            self._evict(cache, question)

    def _evict(self, cache: CompactCache, question: list[int]) -> None:
        n_cells = cache.kv.info().n_cells
        if not question:
            cache.evict(n_tokens=self.n_tokens, n_cells=n_cells)
            return
        self._observe_question(cache, question)
        try:
            # The question counts as seen: the observation window lies behind the text.
            keep, carry = cache.choose(
                n_tokens=self.n_tokens + len(question),
                n_cells=n_cells,
                n_queries=min(len(question), cache.policy.n_window),
            )
        finally:
            self._rewind(cache, 0)
        cache.apply(keep, carry)

    def _observe_question(self, cache: CompactCache, question: list[int]) -> None:
        """Decode the question in scratch cells behind the text, for its queries only."""
        cache.pause_mean(True)
        try:
            for i in range(0, len(question), self.n_batch):
                self._batch.set_batch(
                    batch=question[i : i + self.n_batch],
                    n_past=self.n_tokens + i,
                    logits_all=False,
                )
                # No logits are wanted, and the output matrix is a good part of a small model.
                self._batch.batch.logits[self._batch.n_tokens() - 1] = False
                self._decode_batch()
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

    def _create_completion(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        try:
            yield from super()._create_completion(*args, **kwargs)
        except ValueError as error:
            if "exceed context window" in str(error):
                raise ContextOverflow(f"{error}: use a larger n_ctx or a shorter prompt") from error
            raise

    # -- what the cache holds ------------------------------------------------------------------

    def kv_stats(self) -> KVCacheStats:
        """Cells kept, memory, evictions and time spent; see :class:`KVCacheStats`."""
        if self._cache is not None:
            return self._cache.stats(
                n_tokens=self.n_tokens, n_ctx=self._n_ctx, t_decode_s=self._t_decode_s
            )
        n_cells = llama_cpp.llama_n_ctx(self._ctx.ctx)
        try:
            info = native.KVCache(self._ctx.ctx).info()
            n_bytes = info.n_bytes_kv + info.n_bytes_other
        except CapKVError:  # a stock library, or a cache that only stock can have
            n_bytes = 0
        return KVCacheStats(
            policy=None,
            budget=n_cells,
            n_tokens=self.n_tokens,
            n_cells=self.n_tokens,
            n_cells_max=n_cells,
            kv_bytes=n_bytes,
            kv_bytes_full=n_bytes,
            observe_bytes=0,
            evictions=0,
            cells_evicted=0,
            t_score_s=0.0,
            t_select_s=0.0,
            t_evict_s=0.0,
            t_decode_s=self._t_decode_s,
        )

    def kv_positions(self) -> native.I32:
        """Token position in every used cell, ``[n_layer, n_head_kv, n_cells]``."""
        return self._require_cache().kv.positions()

    def set_kv_budget(self, kv_budget: Budget) -> None:
        """Change the budget; a smaller one evicts at once, a larger one allocates.

        Raises
        ------
        BudgetError
            As in the constructor; nothing changes.
        """
        cache = self._require_cache()
        info = cache.kv.info()
        budget = _parse(kv_budget, self._n_ctx, info.n_bytes_cell, cache.policy)
        n_cells = self._cells(cache.policy, budget, self._n_ctx, self.n_batch)
        with deferred_interrupt():
            if budget < cache.budget and cache.evicts and info.n_cells > budget:
                before, cache.budget = cache.budget, budget
                try:
                    cache.evict(n_tokens=self.n_tokens, n_cells=info.n_cells)
                except BaseException:
                    cache.budget = before
                    raise
            if n_cells != info.n_cells_max:
                self._resize(cache, n_cells)
            cache.budget = budget

    def set_kv_policy(self, kv_policy: str | Policy) -> None:
        """Change the policy; the cells that are kept now stay, what was observed is forgotten.

        Raises
        ------
        PolicyError, BudgetError
            Unknown policy, or one whose sinks and window the budget does not hold.
        """
        cache = self._require_cache()
        policy = get_policy(kv_policy)
        info = cache.kv.info()
        _parse(cache.budget, self._n_ctx, info.n_bytes_cell, policy)
        with deferred_interrupt():
            cache.policy = policy
            cache.forget()
            n_cells = self._cells(policy, cache.budget, self._n_ctx, self.n_batch)
            if n_cells > info.n_cells_max:
                self._resize(cache, n_cells)
            cache.observe()

    def _resize(self, cache: CompactCache, n_cells: int) -> None:
        """Move the sequence to a context of another size."""
        state = native.get_state(self._ctx.ctx)
        self._new_context(n_cells)
        cache.kv = native.KVCache(self._ctx.ctx)
        cache.kv.set_n_ctx(self._n_ctx)
        cache.observe()
        if not native.set_state(self._ctx.ctx, state):
            self.n_tokens = 0
            raise NativeError(f"the cells could not be moved to a cache of {n_cells} cells")
        self._requires_eval = True

    # -- state ---------------------------------------------------------------------------------

    def save_state(self) -> llama_cpp.LlamaState:
        """The sequence, its compacted cells and what was observed; see :meth:`load_state`."""
        if self._cache is None:
            return super().save_state()
        data = native.get_state(self._ctx.ctx)
        state = CompactedState(
            input_ids=self.input_ids[: self.n_tokens].copy(),
            # Without logits_all nothing is ever written there.
            scores=self._scores.copy()
            if self._logits_all
            else np.empty((0, self._n_vocab), np.single),
            n_tokens=self.n_tokens,
            llama_state=data,
            llama_state_size=len(data),
            seed=self._seed,
        )
        state.policy = self._cache.policy.name
        state.carried = None if self._cache.carried is None else self._cache.carried.copy()
        return state

    def load_state(self, state: llama_cpp.LlamaState) -> None:
        """Continue from a saved state.

        Raises
        ------
        StateError
            The state does not fit this model, cache type, size or policy; the session is as it
            was.
        """
        cache = self._cache
        if cache is None:
            if isinstance(state, CompactedState):
                raise StateError("the state is of a compacted cache: load it with a kv_policy")
            super().load_state(state)
            return
        if state.n_tokens > self._n_ctx:
            raise StateError(
                f"the state holds {state.n_tokens} tokens, the context {self._n_ctx}: "
                "use a larger n_ctx"
            )
        name = getattr(state, "policy", None)
        if name is not None and name != cache.policy.name:
            raise StateError(
                f"the state is of policy '{name}', this cache uses '{cache.policy.name}'"
            )
        with deferred_interrupt():
            before = native.get_state(self._ctx.ctx)
            if not native.set_state(self._ctx.ctx, state.llama_state):
                native.set_state(self._ctx.ctx, before)
                raise StateError(
                    "the state does not fit: it is of another model, cache type or n_window, "
                    f"holds more than {cache.kv.info().n_cells_max} cells, or is damaged"
                )
            self.n_tokens = state.n_tokens
            self.input_ids[: state.n_tokens] = state.input_ids[: state.n_tokens]
            if self._logits_all and len(state.scores):
                self.scores[: state.n_tokens, :] = state.scores
            self._seed = state.seed
            self._requires_eval = True
            carried = getattr(state, "carried", None)
            cache.carried = None if carried is None else carried.copy()


def _parse(value: Budget | None, n_ctx: int, bytes_per_cell: int, policy: Policy) -> int:
    if not getattr(policy, "evicts", True):
        return n_ctx
    return parse_budget(
        min(DEFAULT_BUDGET, n_ctx) if value is None else value,
        n_ctx=n_ctx,
        bytes_per_cell=bytes_per_cell,
        minimum=policy.n_sinks + policy.n_recent + 1,
    )


def _check_settings(flash_attn: bool | None, kwargs: dict[str, Any], kv_room: int) -> None:
    if flash_attn is False:
        raise UnsupportedModel(
            "flash_attn=False stores values transposed, which cannot be evicted per head: "
            "leave flash_attn out, or use kv_policy=None"
        )
    if kwargs.get("embedding"):
        raise UnsupportedModel("embedding=True needs the stock cache: use kv_policy=None")
    if kv_room < 0:
        raise BudgetError(f"kv_room={kv_room} must be 0 or more cells")
