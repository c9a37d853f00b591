"""``Llama``: llama-cpp-python's class with a KV cache that stays as small as its budget.

Tokens stream through ``budget + n_batch + room`` cells per head. When the cells run out, the policy
scores them, the heads keep their best, ``budget`` on average, and decoding goes on at the next
position. Everything else is :class:`llama_cpp.Llama`.
"""

from __future__ import annotations

import contextlib
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import llama_cpp
import llama_cpp._internals as internals
import numpy as np

from capkv_local import native
from capkv_local.budget.parse import is_auto
from capkv_local.cache.compact import CompactCache, evicts
from capkv_local.cache.probe import REQUEST, Probe
from capkv_local.cache.stats import KVCacheStats
from capkv_local.devices.placed import offloads
from capkv_local.errors import (
    CapKVError,
    ContextWarning,
)
from capkv_local.llama.arguments import (
    Budget,
    Observe,
    allocation_name,
    budget_cells,
    check_observe,
    check_settings,
    session_settings,
)
from capkv_local.llama.interrupt import deferred_interrupt
from capkv_local.llama.state import StatefulLlama
from capkv_local.llama.template import ChatTemplate
from capkv_local.models import check_model_file, load_errors
from capkv_local.plan.auto import auto_budget
from capkv_local.plan.planner import DEFAULT_ROOM, DEVICE_ROOM
from capkv_local.policies import Policy, get_policy

# Arguments by which a user says that a model reaches further than its file says.
_STRETCHED = frozenset({"rope_freq_base", "rope_freq_scale", "rope_scaling_type", "yarn_orig_ctx"})


class Llama(StatefulLlama):
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
        What is left after an eviction: cells per head, on average (int), a fraction of ``n_ctx``
        (float in (0, 1]) or memory (``"512MiB"``). Default: 2048 cells, or ``n_ctx`` if smaller.
        ``"auto"``: as many cells as four fifths of the available memory hold beside the weights,
        at most ``n_ctx`` (see :func:`capkv_local.plan.auto.auto_budget`).
    kv_allocation
        How heads share the budget: ``"uniform"``, ``"pyramid"``, ``"adaptive-layer"`` or
        ``"global"`` (see :mod:`capkv_local.budget.allocate`); by default what suits the policy. The
        memory is the same for all.
    kv_observe
        What tells a policy which cells matter: ``"tail"``, the last tokens of what is read;
        ``"probe"``, a repetition of all of it, for documents that are read before the question
        is known (two to three times the work; see :mod:`capkv_local.cache.probe`).
    probe_stride
        Repeat every n-th token only: an n-th of the work, at a loss (docs/evaluation.md).
    kv_room
        Cells beyond ``kv_budget + n_batch``: how many tokens are read or generated between
        evictions. Default: 256, with layers on other devices than the CPU 1792.
    **kwargs
        As :class:`llama_cpp.Llama`, and ``rpc_servers`` of
        :class:`~capkv_local.devices.placed.PlacedLlama`. Flash attention is on unless the cache is
        the stock one.

    Raises
    ------
    ModelFileError
        ``model_path`` is missing or not a GGUF that llama.cpp loads.
    BudgetError, PolicyError, UnsupportedModel, NativeBuildMissing
        The cache cannot be compacted as asked.
    ServerError
        An RPC server is out of reach, busy, or of another build.

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
        kv_allocation: str | None = None,
        kv_observe: Observe = "tail",
        probe_stride: int = 1,
        kv_room: int | None = None,
        flash_attn: bool | None = None,
        **kwargs: Any,
    ) -> None:
        # Set first: __del__ of the parent runs also when this raises.
        self._stack = contextlib.ExitStack()
        self._cache: CompactCache | None = None
        self._t_decode_s = 0.0
        self._room = DEFAULT_ROOM if kv_room is None else kv_room
        self._probe: Probe | None = None
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
        allocation = allocation_name(kv_allocation, policy)
        on_devices = offloads(kwargs)
        if kv_room is None and on_devices:
            self._room = DEVICE_ROOM
        check_settings(flash_attn, kwargs, self._room)
        check_observe(kv_observe, policy)
        settings = session_settings(n_ctx, n_batch, self._room, kwargs)
        settings = settings.with_policy(policy, probe=kv_observe == "probe", allocation=allocation)
        if is_auto(kv_budget) and settings.evicts:
            kv_budget = auto_budget(model_path, settings, offloads=on_devices)
        if n_ctx > 0 and not isinstance(kv_budget, str):
            # Wrong settings are told before a model is loaded.
            budget_cells(kv_budget, n_ctx, 0, policy)
        # The cells come later, when the context and the bytes per cell are known.
        n_first = min(n_batch, n_ctx or n_batch)
        with load_errors(model_path):
            super().__init__(
                str(model_path), n_ctx=n_first, n_batch=n_batch, flash_attn=True, **kwargs
            )
        if self._window_cells() > n_first:
            self._new_context(self._window_cells())
        kv = native.KVCache(self._ctx.ctx)
        self._n_ctx = n_ctx or self._model.n_ctx_train()
        if self._n_ctx > self._model.n_ctx_train() and not _STRETCHED & kwargs.keys():
            warnings.warn(
                f"the model was trained with {self._model.n_ctx_train():,} tokens: beyond them its "
                f"answers get worse, however many of the {self._n_ctx:,} fit",
                ContextWarning,
                stacklevel=2,
            )
        budget = budget_cells(kv_budget, self._n_ctx, kv.info().n_bytes_cell, policy)
        if kv_observe == "probe" and evicts(policy):
            self._probe = self._make_probe(probe_stride)
        self._settings = replace(settings, n_ctx=self._n_ctx)
        kv.resize(self._cells(policy, budget))
        self._set_n_ctx(kv, self._n_ctx)
        n_probe = 0 if self._probe is None else self._probe.n_scratch
        self._cache = CompactCache(kv, policy, budget, allocation, n_probe)

    # -- sizes ---------------------------------------------------------------------------------

    def _cells(self, policy: Policy, budget: int) -> int:
        """Cells per head to allocate."""
        settings = self._settings.with_policy(policy, probe=self._probe is not None)
        return settings.n_cells(budget)

    def _make_probe(self, stride: int) -> Probe:
        request = self.tokenize(REQUEST.encode(), add_bos=False)
        return Probe((*request, *ChatTemplate.of(self).after), stride=stride)

    def _set_n_ctx(self, kv: native.KVCache, n_ctx: int) -> None:
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
            allocation=None,
            budget=n_cells,
            n_tokens=self.n_tokens,
            n_cells=self.n_tokens,
            n_cells_max=n_cells,
            n_cells_range=(self.n_tokens, self.n_tokens),
            kv_bytes=n_bytes,
            kv_bytes_full=n_bytes,
            t_decode_s=self._t_decode_s,
        )

    @property
    def kv_observe(self) -> Observe:
        """What tells the policy which cells matter; see the constructor."""
        return "tail" if self._probe is None else "probe"

    @property
    def probe_stride(self) -> int:
        """The probe observes with every n-th token; see the constructor."""
        return 1 if self._probe is None else self._probe.stride

    @property
    def kv_room(self) -> int:
        """Cells beyond ``kv_budget + n_batch``, as they are here; see the constructor."""
        return self._room

    def kv_positions(self) -> native.I32:
        """Token position in every used cell, ``[n_layer, n_head_kv, n_cells]``; -1: not held."""
        return self._require_cache().kv.positions()

    def kv_cells(self, kv_budget: Budget) -> int:
        """Cells per head that a budget means here.

        Raises
        ------
        BudgetError
            As in the constructor.
        """
        cache = self._require_cache()
        return budget_cells(kv_budget, self._n_ctx, cache.kv.info().n_bytes_cell, cache.policy)

    def set_kv_budget(self, kv_budget: Budget) -> None:
        """Change the budget; a smaller one evicts at once, a larger one allocates.

        Raises
        ------
        BudgetError
            As in the constructor; nothing changes.
        """
        cache = self._require_cache()
        self._rewind(cache, 0)  # what reset() gave up is not evicted, it is gone
        info = cache.kv.info()
        budget = self.kv_cells(kv_budget)
        n_cells = self._cells(cache.policy, budget)
        with deferred_interrupt():
            if budget > cache.budget:
                self._resize(cache, n_cells)
            before, cache.budget = cache.budget, budget
            if cache.evicts and budget < before and info.n_held > budget:
                try:
                    with self.unprotected():
                        self._evict(cache, self._observers(None, None))
                except BaseException:
                    cache.budget = before
                    raise
            self._resize(cache, n_cells)
            if budget < before:
                self._copy_again(cache)

    def set_kv_policy(self, kv_policy: str | Policy, kv_allocation: str | None = None) -> None:
        """Change the policy; the cells that are kept now stay, what was observed is forgotten.

        Raises
        ------
        PolicyError, BudgetError
            Unknown policy or allocation, or one whose sinks and window the budget does not hold.
        """
        cache = self._require_cache()
        policy = get_policy(kv_policy)
        allocation = allocation_name(kv_allocation, policy)
        check_observe(self.kv_observe, policy)
        budget_cells(cache.budget, self._n_ctx, cache.kv.info().n_bytes_cell, policy)
        with deferred_interrupt():
            n_cells = self._cells(policy, cache.budget)
            if n_cells > cache.kv.info().n_allocated:
                self._resize(cache, n_cells)
            cache.policy, cache.allocation = policy, allocation
            cache.forget()
            cache.observe()
            self._copy_again(cache)

    def set_kv_allocation(self, kv_allocation: str) -> None:
        """Share the budget in another way, from the next eviction on.

        Raises
        ------
        BudgetError
            There is no such allocation.
        """
        cache = self._require_cache()
        cache.allocation = allocation_name(kv_allocation, cache.policy)

    def _resize(self, cache: CompactCache, n_cells: int) -> None:
        if n_cells != cache.kv.info().n_allocated:
            cache.kv.resize(n_cells)
