"""What fits into a given memory: cells and context, before anything of a model is loaded.

    memory = weights + program + KV cells + sliding windows + observed queries + graphs + deciding

All but the last two are exact: llama.cpp says them for a model whose weights it does not read (see
:mod:`capkv_local.models.header`), and the cells are those that :class:`~capkv_local.Llama`
allocates. The last two are upper bounds, see :meth:`Planner._compute`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import psutil

from capkv_local.budget.allocate import most_cells
from capkv_local.cache.compact import evicts, fewest_cells
from capkv_local.cache.probe import Probe
from capkv_local.models.header import ContextSizes, ModelHeader
from capkv_local.native import Info
from capkv_local.policies import Policy

# Planned budgets and contexts are multiples of this.
STEP = 256
# Cells for the reply, so that generation does not evict at every token.
DEFAULT_ROOM = 256
# With layers on other devices, which read a batch faster than they score it: with a batch of 512,
# scorings are as rare as with one of 2,048 (docs/gpu/cuda.md, Roofline).
DEVICE_ROOM = 1792

# Most cells that llama.cpp is asked about: it keeps a record of every one.
_ASKED = 1 << 16
# Queries whose attention is scored at once, as in llama-kv-score.cpp.
_BLOCK = 64
# Weights of attention that a repetition has at once, as in llama-kv-attn.cpp.
_WEIGHTS = 1 << 23
# Bytes of numpy arrays while a policy decides, per cell of the longest head: for every head, for
# the heads of the layer that is being worked on, and for query heads if their mean is observed.
# tests/unit/test_layerwise.py measures them.
_BYTES_DECIDING = 32
_BYTES_LAYER = 50
_BYTES_QUERY_HEAD = 34
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
    uniform
        Whether all heads keep the same number of cells.
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
    uniform: bool = True

    def with_policy(
        self, policy: Policy, *, probe: bool, allocation: str | None = None
    ) -> Settings:
        """The same with what this policy needs; by default with the allocation that suits it."""
        if not evicts(policy):
            return self.keeping_all()
        return replace(
            self,
            evicts=True,
            minimum=fewest_cells(policy),
            n_window=policy.n_window if "queries" in policy.needs else 0,
            mean_query="mean_query" in policy.needs,
            n_scratch=Probe.n_scratch if probe else 0,
            uniform=(allocation or getattr(policy, "allocation", "uniform")) == "uniform",
        )

    def keeping_all(self) -> Settings:
        """The same without eviction, for which nothing is observed."""
        return replace(self, evicts=False, minimum=1, n_window=0, mean_query=False, n_scratch=0)

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
        settings = replace(self.settings.keeping_all(), n_ctx=n_ctx)
        return Planner(self.header, settings, program=self.program)

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
        return _last_that_fits(self.least_budget, n_ctx, lambda n: self.need(n).total, memory)

    @property
    def least_budget(self) -> int:
        """The smallest budget that is planned with."""
        return min(self.settings.n_ctx, -(-self.settings.minimum // STEP) * STEP)

    def largest_context(self, memory: int) -> int | None:
        """Most tokens, at most the context, of which all cells fit."""
        n_ctx = self.settings.n_ctx
        return _last_that_fits(STEP, n_ctx, lambda n: self.whole(n).need(n).total, memory)

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
        n_queries = s.n_window + s.mean_query
        return 4 * cache.n_layer * cache.n_head * cache.n_embd_head_k * n_queries

    def _compute(self, n_cells: int) -> int:
        """Buffers of the graphs: of decoding and of scoring, which take turns in the same memory.

        Decoding is what llama.cpp reports for such a context with one row of logits. For a session
        it reports up to ``n_ubatch`` rows more, which it reserves and which reading never touches:
        98 to 103 MiB for the default model with n_ctx 512 to 16384 and n_ubatch 512, where 14 to
        30 are counted here. With all rows it is the reported figure (tests/model/test_planner.py).

        Scoring is counted from its graph: the attention of a block of the observed queries, once
        as it is and once half summed, and the mask of all of them. Or the leverage of all heads
        at once: weights on both sides, and the scores while they are put together. A repetition
        has the weights of its attention, their squares and half of these summed, values and mask
        in float32, and the sum of every cell.

        What SmolLM2-135M took at its peak with a probe, beside what it has when it is loaded, of
        what is planned for graphs and deciding, in MiB: with n_ctx 8192 and a budget of 1,024,
        after 2,500 tokens 62 of 142 (the plan is for all 8,192); with a budget of 7,000, after
        7,800 tokens 143 of 160.
        """
        s, cache = self.settings, self.cache
        rest = _BOOKKEEPING + (4 * self.header.n_vocab * s.n_ctx if s.logits_all else 0)
        if not s.evicts:
            return self._graph(n_cells) + rest
        n_longest = self._longest(n_cells)
        # heads of unequal length take the mask in parts
        decode = self._graph(n_longest) + 2 * n_longest * s.ubatch

        # Heads of one length are scored together, others one by one.
        n_rows = max(cache.n_head * n_cells, cache.n_head // cache.n_head_kv * n_longest)
        attention = 6 * n_rows * min(s.n_window, _BLOCK) + 2 * 4 * n_longest * s.n_window
        vectors = 2 * 4 * n_cells * cache.n_head_kv * max(cache.n_embd_head_k, cache.n_embd_head_v)
        leverage = 5 * 4 * n_cells * cache.n_heads
        repetition = self._repetition(n_cells, n_rows, n_longest) if s.n_scratch else 0
        return max(decode, attention, vectors, leverage, repetition) + rest

    def _repetition(self, n_cells: int, n_rows: int, n_longest: int) -> int:
        s, cache = self.settings, self.cache
        n_tokens = min(s.ubatch, s.n_scratch)
        weights = 10 * min(_WEIGHTS, n_rows * n_tokens)
        values = 2 * 4 * max(n_cells * cache.n_head_kv, n_longest) * cache.n_embd_head_v
        mask = 2 * 4 * n_longest * n_tokens
        return weights + values + mask + 4 * cache.n_heads * n_longest

    def _graph(self, n_cells: int) -> int:
        """The decode graph alone; of many cells, only its mask is longer (f16)."""
        n_asked = min(n_cells, _ASKED)
        mask = 2 * self.settings.ubatch * (n_cells - n_asked)
        return self._context(n_asked).n_bytes_compute + mask

    def _deciding(self, n_cells: int) -> int:
        """Arrays of the policy; all are as long as the longest head."""
        if not self.settings.evicts:
            return 0
        cache = self.cache
        n_bytes = cache.n_heads * _BYTES_DECIDING + cache.n_head_kv * _BYTES_LAYER
        if self.settings.mean_query:
            n_bytes += cache.n_layer * cache.n_head * _BYTES_QUERY_HEAD
        return self._longest(n_cells) * n_bytes

    def _longest(self, n_cells: int) -> int:
        """Most cells that one head can come to hold while all together hold ``n_cells`` each."""
        if self.settings.uniform:
            return n_cells
        n_all = self.settings.n_ctx + self.settings.n_scratch
        total = self.cache.n_heads * n_cells
        return max(n_cells, min(n_all, total, most_cells(total, self.cache.n_heads)))


def _last_that_fits(
    first: int, last: int, n_bytes: Callable[[int], int], memory: int
) -> int | None:
    """The largest of ``first``, every :data:`STEP` and ``last`` whose bytes fit; they rise."""
    values = range(first, last, STEP)
    n = bisect_left(values, True, key=lambda value: n_bytes(value) > memory)
    if n == len(values) and n_bytes(last) <= memory:
        return last
    return values[n - 1] if n else None
