"""What fits into a given memory: cells and context, before anything of a model is loaded.

    memory = weights + program + KV cells + sliding windows + observed queries + graphs + deciding

All but the last two are exact: llama.cpp says them for a model whose weights it does not read (see
:mod:`capkv_local.header`), and the cells are those that :class:`~capkv_local.Llama` allocates. The
last two are upper bounds, see :meth:`Planner._compute`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import llama_cpp
import psutil

from capkv_local.cache import evicts
from capkv_local.errors import BudgetError
from capkv_local.header import ContextSizes, ModelHeader
from capkv_local.memory import SHARE, available_memory
from capkv_local.native import Info
from capkv_local.policies import Policy
from capkv_local.probe import Probe

# Planned budgets and contexts are multiples of this.
STEP = 256
# Cells for the reply, so that generation does not evict at every token.
DEFAULT_ROOM = 256

# Cells of the longest head over those that are allocated per head on average; 1.2 was seen.
_LONGEST = 1.5
# Bytes of numpy arrays per cell and head while a policy decides: 44 from 2,048 to 8,024 cells of
# SmolLM2-135M with a probe (tracemalloc), 30 without.
_BYTES_DECIDING = 50
# Nodes of the graphs, work memory of threads, the text as tokens: 10 to 20 MiB there.
_BOOKKEEPING = 24 << 20


@dataclass(frozen=True)
class Settings:
    """What of a session decides its memory; defaults are a chat's.

    Parameters
    ----------
    n_ctx
        Logical context in tokens.
    type_k, type_v
        Cache types by ggml name.
    n_batch, n_ubatch, kv_room, swa_full, logits_all
        As :class:`~capkv_local.Llama`.
    evicts
        False for policies that never give a cell up: they hold all ``n_ctx``.
    minimum
        Fewest cells that the policy works with.
    n_window, mean_query
        Queries that the policy has observed, and whether their mean, too.
    n_scratch
        Cells of the probe, 0 without one.
    """

    n_ctx: int
    type_k: str = "f16"
    type_v: str = "f16"
    n_batch: int = 512
    n_ubatch: int = 512
    kv_room: int = DEFAULT_ROOM
    swa_full: bool | None = None
    logits_all: bool = False
    evicts: bool = False
    minimum: int = 1
    n_window: int = 0
    mean_query: bool = False
    n_scratch: int = 0

    def with_policy(self, policy: Policy, *, probe: bool) -> Settings:
        """The same with what this policy needs."""
        if not evicts(policy):
            return replace(self, evicts=False, minimum=1, n_window=0, mean_query=False, n_scratch=0)
        return replace(
            self,
            evicts=True,
            minimum=policy.n_sinks + policy.n_recent + 1,
            n_window=policy.n_window if "queries" in policy.needs else 0,
            mean_query="mean_query" in policy.needs,
            n_scratch=Probe.n_scratch if probe else 0,
        )

    @property
    def batch(self) -> int:
        """Tokens of a batch, as llama-cpp-python limits them."""
        return min(self.n_batch, self.n_ctx)

    @property
    def ubatch(self) -> int:
        """Tokens of a physical batch, which sizes the graphs."""
        return min(self.batch, self.n_ubatch)

    def n_cells(self, budget: int) -> int:
        """Cells per head, on average, that are allocated for a budget."""
        if not self.evicts:
            return self.n_ctx
        # The room is there even where the whole context fits: a question is read in it.
        n_text = min(self.n_ctx, budget + self.batch)
        return n_text + self.kv_room + self.n_scratch


@dataclass(frozen=True)
class Need:
    """Bytes that a session takes, by what they are for."""

    weights: int
    program: int
    kv: int
    windows: int
    observation: int
    compute: int
    deciding: int

    @property
    def kv_bytes(self) -> int:
        """As :attr:`~capkv_local.KVCacheStats.kv_bytes`."""
        return self.kv + self.windows

    @property
    def total(self) -> int:
        return sum(getattr(self, part.name) for part in fields(self))


class Planner:
    """Answers what fits, for one model and one kind of session.

    Parameters
    ----------
    header
        The model.
    settings
        The session.
    program
        Bytes that the process takes beside all that; by default what this one takes now, with the
        vocabulary of the model read.

    Raises
    ------
    UnsupportedModel
        The model, or a cache type, cannot be evicted per head.
    """

    def __init__(
        self, header: ModelHeader, settings: Settings, *, program: int | None = None
    ) -> None:
        self.header = header
        self.settings = settings
        self.program = psutil.Process().memory_info().rss if program is None else program
        # A session begins with a context of this size, which bounds its sliding windows.
        n_first = settings.batch
        if header.n_swa:
            n_first = max(n_first, header.n_swa + settings.ubatch)
        self._first = self._context(n_first)

    def using(self, **changes: Any) -> Planner:
        """The same model with other settings."""
        return Planner(self.header, replace(self.settings, **changes), program=self.program)

    @property
    def cache(self) -> Info:
        """The part of the cache that can be evicted."""
        return self._first.cache

    def whole(self, n_ctx: int) -> Planner:
        """A session that keeps all cells of a context (policy ``full``)."""
        none = {"minimum": 1, "n_window": 0, "mean_query": False, "n_scratch": 0}
        return self.using(n_ctx=n_ctx, evicts=False, **none)

    @property
    def bytes_per_cell(self) -> int:
        """K and V of one cell, of all heads that can be evicted together."""
        return self.cache.n_bytes_cell

    def need(self, budget: int) -> Need:
        """What a session with this budget takes; policies that do not evict ignore it."""
        n_cells = self.settings.n_cells(budget)
        cache = self.cache
        return Need(
            weights=self.header.n_bytes,
            program=self.program,
            kv=self.bytes_per_cell * n_cells,
            windows=cache.n_bytes_other,
            observation=self._observation(),
            compute=self._compute(n_cells),
            deciding=self._deciding(n_cells),
        )

    def largest_budget(self, memory: int) -> int | None:
        """Most cells that fit into ``memory`` bytes, at most the context; None: not even a few."""
        n_ctx = self.settings.n_ctx
        budgets = [*range(self.least_budget, n_ctx, STEP), n_ctx]
        return _last_that_fits(budgets, lambda n: self.need(n).total, memory)

    @property
    def least_budget(self) -> int:
        """The smallest budget that is planned with."""
        return min(self.settings.n_ctx, -(-self.settings.minimum // STEP) * STEP)

    def largest_context(self, memory: int) -> int | None:
        """Most tokens, at most the context, of which all cells fit."""
        n_ctx = self.settings.n_ctx
        return _last_that_fits(
            [*range(STEP, n_ctx, STEP), n_ctx],
            lambda n: self.whole(n).need(n).total,
            memory,
        )

    # -- what it takes -------------------------------------------------------------------------

    def _context(self, n_cells: int) -> ContextSizes:
        s = self.settings
        return self.header.context(
            n_cells,
            type_k=s.type_k,
            type_v=s.type_v,
            n_batch=s.batch,
            n_ubatch=s.ubatch,
            swa_full=s.swa_full,
            n_outputs=0 if s.logits_all else 1,
        )

    def _observation(self) -> int:
        s, cache = self.settings, self.cache
        n_queries = s.n_window + s.n_scratch + s.mean_query
        return 4 * cache.n_layer * cache.n_head * cache.n_embd_head_k * n_queries

    def _compute(self, n_cells: int) -> int:
        """Buffers of the graphs: of decoding and of scoring, which take turns in the same memory.

        Decoding is what llama.cpp reports for such a context with one row of logits. For a session
        it reports up to ``n_ubatch`` rows more, which it reserves and which reading never touches:
        98 to 103 MiB for the default model with n_ctx 512 to 16384 and n_ubatch 512, where 14 to
        30 are counted here. With all rows it is the reported figure (tests/model/test_planner.py).

        Scoring is counted from its graph: the attention of the observed queries, once as it is and
        once half summed, and its mask.

        What SmolLM2-135M took beside weights and vocabulary (private memory, peak) against all that
        is planned for it, in MiB: 1,024 cells with a probe 115 of 134, without 76 of 96; 7,000
        cells with a probe 346 of 400.
        """
        s, cache = self.settings, self.cache
        rest = _BOOKKEEPING + (4 * self.header.n_vocab * s.n_ctx if s.logits_all else 0)
        if not s.evicts:
            return self._context(n_cells).n_bytes_compute + rest
        n_longest = int(_LONGEST * n_cells)
        # heads of unequal length take the mask in parts
        decode = self._context(n_longest).n_bytes_compute + 2 * n_longest * s.ubatch

        n_queries = max(s.n_window, s.n_scratch)
        # Heads of one length are scored together, others one by one.
        n_rows = max(cache.n_head * n_cells, cache.n_head // cache.n_head_kv * n_longest)
        attention = 6 * n_rows * n_queries + 2 * 4 * n_longest * n_queries
        vectors = 2 * 4 * n_cells * cache.n_head_kv * max(cache.n_embd_head_k, cache.n_embd_head_v)
        return max(decode, attention, vectors) + rest

    def _deciding(self, n_cells: int) -> int:
        """Arrays of the policy; they are as long as the longest head."""
        if not self.settings.evicts:
            return 0
        return int(_LONGEST * n_cells) * self.cache.n_heads * _BYTES_DECIDING


def auto_budget(model: str | Path, settings: Settings, *, n_gpu_layers: int) -> int:
    """The budget that ``kv_budget="auto"`` stands for.

    The largest multiple of :data:`STEP` cells with which the session takes no more than
    :data:`~capkv_local.memory.SHARE` of the memory that is available before the model is loaded;
    the context itself if all of it fits.

    Parameters
    ----------
    model, settings
        As they will be loaded; an ``n_ctx`` of 0 is the trained context.
    n_gpu_layers
        Layers on other devices, whose memory is not known here.
    Raises
    ------
    BudgetError
        Not even the smallest budget fits, or layers go to a device.
    ModelFileError, UnsupportedModel
        As :class:`~capkv_local.header.ModelHeader` and :class:`Planner`.
    """
    if n_gpu_layers != 0 and llama_cpp.llama_supports_gpu_offload():
        raise BudgetError(
            "kv_budget='auto' knows the main memory only, and layers go to a GPU: name a number of "
            "cells (2048) or an amount of memory ('512MiB')"
        )
    with ModelHeader(model) as header:
        if settings.n_ctx == 0:
            settings = replace(settings, n_ctx=header.n_ctx_train)
        # What this program takes is not available any more.
        planner = Planner(header, settings, program=0)
        memory = int(SHARE * available_memory())
        budget = planner.largest_budget(memory)
        if budget is None:
            least = planner.need(planner.least_budget)
            raise BudgetError(
                f"kv_budget='auto': {planner.least_budget} cells need "
                f"{least.total / 2**20:,.0f} MiB ({least.weights / 2**20:,.0f} for the weights), "
                f"and {memory / 2**20:,.0f} MiB can be used ({SHARE:.0%} of what is available): "
                "close other programs, or use a smaller model or cache type (type_k, type_v)"
            )
        return budget


def _last_that_fits(
    values: Iterable[int], n_bytes: Callable[[int], int], memory: int
) -> int | None:
    """The largest of ascending values whose bytes, which rise with them, fit."""
    values = list(values)
    n = bisect_left(values, True, key=lambda value: n_bytes(value) > memory)
    return values[n - 1] if n else None
