"""The compacted KV cache: when it is full, score the cells, choose, evict, account for it.

Knows budgets, policies and the native cache; knows nothing about tokens, prompts or text.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np

from capkv_local.budget.allocate import share_out
from capkv_local.budget.select import contested, keep_mask
from capkv_local.cache.native_stats import Look, NativeStats, Repeat
from capkv_local.cache.protection import FREED, Protection
from capkv_local.cache.stats import Counters, KVCacheStats
from capkv_local.errors import BudgetError, PolicyError
from capkv_local.native import F32, KVCache, Mask
from capkv_local.policies import Policy

# Share of a uniform budget that every head keeps whatever its scores say: heads that look idle
# while a document is read may be the ones that a later question needs.
FLOOR = 0.2


def evicts(policy: Policy) -> bool:
    """Whether a policy ever gives cells up; a policy that does not say so does."""
    return bool(getattr(policy, "evicts", True))


def n_recent(policy: Policy, *, probed: bool) -> int:
    """Last cells that an eviction leaves in any case: fewer after a repetition, if it says so."""
    return int(getattr(policy, "n_recent_probed", policy.n_recent) if probed else policy.n_recent)


def fewest_cells(policy: Policy) -> int:
    """Smallest budget: sinks, recent window, and one cell that is chosen."""
    return policy.n_sinks + policy.n_recent + 1


@dataclass
class CompactCache:
    """Applies one policy under one budget to the KV cache of a context.

    Parameters
    ----------
    kv
        The native cache.
    policy
        What to keep.
    budget
        Cells per head that are left after an eviction, on average over the heads of all layers.
    allocation
        How the heads share them, a name of :data:`capkv_local.budget.allocate.ALLOCATORS`.
    n_probe
        Cells that stay free for a repetition; 0: none.
    """

    kv: KVCache
    policy: Policy
    budget: int
    allocation: str
    n_probe: int = 0
    counters: Counters = field(default_factory=Counters)
    # [n_layer, n_head_kv, most cells kept by the last eviction], from the first cell that a head
    # holds on: heads that go back keep their first cells, whatever number these then have.
    carried: F32 | None = None
    n_repeated: int = 0  # tokens that were repeated for the policy
    protection: Protection = field(default_factory=Protection)

    def __post_init__(self) -> None:
        self.observe()

    @property
    def evicts(self) -> bool:
        return evicts(self.policy)

    @property
    def n_conversation(self) -> int:
        """Cells per head for what comes after the protected tokens; the probe's stay free."""
        return self.kv.info().n_allocated - self.n_probe - self.protection.n_held

    @property
    def n_left(self) -> int:
        """Cells per head that an eviction leaves, on average."""
        if self.protection.n_tokens == 0:
            return self.budget
        n = self.n_conversation
        return self.protection.n_held + n - int(n * FREED)

    def protect(self, n_tokens: int, copy: bytes | None = None) -> None:
        """Leave the cells of the first ``n_tokens`` tokens alone from now on."""
        positions = self.kv.positions()
        n_rows = int(((positions >= 0) & (positions < n_tokens)).sum())
        n_held = -(-n_rows // self.kv.info().n_heads)
        self.protection = Protection(n_tokens, n_held, copy=copy)

    def observe(self, n_queries: int | None = None) -> None:
        """Have the queries observed that the policy needs, or so many; forgets those so far."""
        self.kv.observe(
            self.n_observed if n_queries is None else n_queries,
            mean_query="mean_query" in self.policy.needs,
            n_skip=self.policy.n_sinks,
        )

    @property
    def n_observed(self) -> int:
        """Queries that are kept, the last ones."""
        return self.policy.n_window if "queries" in self.policy.needs else 0

    def pause_mean(self, paused: bool) -> None:
        """Keep tokens that are decoded only for their queries out of the mean query."""
        if "mean_query" in self.policy.needs:
            self.kv.set_mean(not paused)

    def forget(self) -> None:
        """The sequence, or the policy, starts anew."""
        self.carried = None
        self.n_repeated = 0

    def choose(
        self,
        *,
        n_tokens: int,
        n_cells: int,
        n_queries: int = 0,
        repeat: Repeat | None = None,
        look: Look | None = None,
    ) -> tuple[Mask, F32 | None]:
        """Cells to keep, ``[n_layer, n_head_kv, n_cells]``, and the relevance to carry with them.

        They are ``n_left`` of the first ``n_cells`` cells per head, on average; protected cells
        are always among them, and what is known of these stays as it is.

        Parameters
        ----------
        n_tokens
            Logical tokens of the sequence in these cells.
        n_cells
            Cells that take part; all used cells if the result is to be applied.
        n_queries
            So many of the last queries observe, 0 for the policy's window.
        repeat
            Where the policy finds the attention of a repetition.
        look
            Where it finds that of its window if no query has been observed.

        Raises
        ------
        BudgetError
            The policy never evicts.
        PolicyError
            The policy returned unusable scores; the cache is as it was.
        """
        if not self.evicts:
            raise BudgetError(
                f"policy '{self.policy.name}' never evicts and all {n_cells} cells are used: "
                "choose another policy, or a larger n_ctx"
            )
        t0 = time.perf_counter()
        stats = NativeStats(
            self.kv,
            n_cells=n_cells,
            n_tokens=n_tokens,
            n_queries=n_queries or min(self.policy.n_window, self.kv.info().n_queries),
            carried=self.carried_by_cell(n_cells),
            repeat=repeat,
            look=look,
        )
        scores = self.policy.score(stats)
        if scores.shape != (stats.n_layer, stats.n_head_kv, n_cells):
            raise PolicyError(
                f"policy '{self.policy.name}' returned scores of shape {scores.shape} instead of "
                f"{(stats.n_layer, stats.n_head_kv, n_cells)}"
            )
        t1 = time.perf_counter()
        protected = self.protection.mask(stats.positions)
        n_last = n_recent(self.policy, probed=repeat is not None)
        keep = self._select(scores, stats.positions >= 0, protected, n_last)
        carry = stats.carry_next
        if carry is not None and protected is not None:
            before = np.float32(0) if stats.carried is None else stats.carried
            carry = np.where(protected, before, carry)
        t2 = time.perf_counter()
        self.counters.t_score_s += t1 - t0
        self.counters.t_select_s += t2 - t1
        return keep, carry

    def _select(self, scores: F32, held: Mask, protected: Mask | None, n_last: int) -> Mask:
        n_first = self.policy.n_sinks
        open_ = contested(held, n_sinks=n_first, n_recent=n_last, protected=protected)
        # Sinks, recent and protected cells, [n_layer, n_head_kv]
        n_always = (held & ~open_).sum(axis=-1)
        pools = self.kv.pools()
        counts = share_out(self.allocation, scores, open_, n_always, pools, self.n_left, FLOOR)
        return keep_mask(
            scores, held, counts, n_sinks=n_first, n_recent=n_last, protected=protected
        )

    def apply(self, keep: Mask, carry: F32 | None) -> None:
        """Evict all cells but ``keep``; ``carry`` moves with them."""
        n_rows = self.kv.info().n_rows
        t0 = time.perf_counter()
        self.kv.evict(keep)
        self.carried = None if carry is None else _move(carry, keep)
        self.counters.t_evict_s += time.perf_counter() - t0
        self.counters.evictions += 1
        self.counters.cells_evicted += n_rows - int(keep.sum())

    def forget_behind(self, n_tokens: int) -> None:
        """Keep what is carried for the first ``n_tokens`` tokens, as if no others had come."""
        positions = self.kv.positions()
        carried = self.carried_by_cell(positions.shape[-1])
        if carried is not None:
            self.carried = _move(carried, (positions >= 0) & (positions < n_tokens))
        self.n_repeated = min(self.n_repeated, n_tokens)

    def carried_by_cell(self, n_cells: int) -> F32 | None:
        """Carried relevance of the first ``n_cells`` cells, 0 for those that are new."""
        if self.carried is None:
            return None
        held = self.kv.positions()[..., :n_cells] >= 0
        out = np.zeros(held.shape, np.float32)
        for layer, values, by_cell in zip(held, self.carried, out, strict=True):
            number = layer.cumsum(axis=-1) - 1  # of a cell in its head
            known = layer & (number < values.shape[-1])
            heads, _ = np.nonzero(known)
            by_cell[known] = values[heads, number[known]]
        return out

    def stats(self, *, n_tokens: int, n_ctx: int, t_decode_s: float) -> KVCacheStats:
        info = self.kv.info()
        c = self.counters
        return KVCacheStats(
            policy=self.policy.name,
            allocation=self.allocation if self.evicts else None,
            budget=self.budget,
            n_tokens=n_tokens,
            n_cells=info.n_held,
            n_cells_max=info.n_allocated,
            n_cells_range=self.kv.held_range(),
            kv_bytes=info.n_bytes_kv + info.n_bytes_other,
            kv_bytes_full=info.n_bytes_cell * n_ctx + info.n_bytes_other,
            observe_bytes=info.n_bytes_observe,
            evictions=c.evictions,
            cells_evicted=c.cells_evicted,
            t_score_s=c.t_score_s,
            t_select_s=c.t_select_s,
            t_evict_s=c.t_evict_s,
            t_decode_s=t_decode_s,
            n_protected=self.protection.n_tokens,
            n_cells_protected=self.protection.n_held,
            n_cells_conversation=self.n_conversation if self.protection.n_tokens else 0,
            copy_bytes=len(self.protection.copy or b""),
        )


def _move(values: F32, keep: Mask) -> F32:
    """Values of the kept cells, from the first one of each head on; 0 behind them."""
    counts = keep.sum(axis=-1, keepdims=True)  # [n_layer, n_head_kv, 1]
    n_cells = int(counts.max())
    moved = np.zeros((*keep.shape[:2], n_cells), dtype=np.float32)
    for layer, mask in enumerate(keep):
        moved[layer][np.arange(n_cells) < counts[layer]] = values[layer][mask]
    return moved
