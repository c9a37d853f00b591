"""Saving and loading a sequence with its compacted cells.

The part of :class:`~capkv_local.Llama` that states are about.
"""

from __future__ import annotations

from typing import Any

import llama_cpp
import numpy as np

from capkv_local import native
from capkv_local.errors import NativeError, StateError
from capkv_local.llama.conversation import ConversationLlama
from capkv_local.llama.interrupt import deferred_interrupt


class CompactedState(llama_cpp.LlamaState):
    """A saved state together with what the policy carried for its cells."""

    carried: Any = None
    n_repeated: int = 0
    n_protected: int = 0
    copy: bytes | None = None  # see Protection
    policy: str | None = None


class StatefulLlama(ConversationLlama):
    """:class:`ConversationLlama` whose state can be saved and loaded."""

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
        state.n_repeated = self._cache.n_repeated
        state.n_protected, state.copy = self.n_protected, self._cache.protection.copy
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
            # An empty session need not be copied, which takes as long as loading.
            before = native.get_state(self._ctx.ctx) if self.n_tokens else None
            fits = native.set_state(self._ctx.ctx, state.llama_state)
            if not (fits and _in_order(cache.kv, state.n_tokens)):
                if before is None:
                    self._ctx.kv_cache_clear()
                    cache.observe()
                else:
                    native.set_state(self._ctx.ctx, before)
                n_cells = cache.kv.info().n_allocated
                raise StateError(
                    "the state does not fit: it is of another model, cache type or n_window, "
                    f"holds more than {n_cells} cells per head, or is damaged"
                )
            self.n_tokens = state.n_tokens
            self.input_ids[: state.n_tokens] = state.input_ids[: state.n_tokens]
            if self._logits_all and len(state.scores):
                self.scores[: state.n_tokens, :] = state.scores
            self._seed = state.seed
            self._requires_eval = True
            carried = getattr(state, "carried", None)
            cache.carried = None if carried is None else carried.copy()
            cache.n_repeated = getattr(state, "n_repeated", 0)
            cache.protect(getattr(state, "n_protected", 0), getattr(state, "copy", None))


def _in_order(kv: native.KVCache, n_tokens: int) -> bool:
    """Whether the cells of every head hold tokens of a sequence of ``n_tokens``, in order."""
    try:
        positions = kv.positions()
    except NativeError:
        return False
    if positions.shape[-1] == 0:
        return n_tokens == 0
    held = positions >= 0
    # The cells that a head holds are the last ones, in order, the newest token among them.
    last = bool((held[..., -1] & (positions[..., -1] == n_tokens - 1)).all())
    suffix = bool((held[..., 1:] >= held[..., :-1]).all())
    ascending = bool(((np.diff(positions, axis=-1) > 0) | ~held[..., :-1]).all())
    return last and suffix and ascending
