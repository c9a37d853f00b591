"""Random eviction, the floor that every policy has to beat (the name spares stdlib's module)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from capkv_local.policies.base import F32, BasePolicy, KVStats, register

U64 = NDArray[np.uint64]


@register
@dataclass(frozen=True)
class Random(BasePolicy):
    """Keep a uniform random subset of all tokens seen so far, its own in every head.

    Each (layer, head, position) has one fixed random priority::

        s_i = hash(seed, layer, head, position_i) in [0, 1)

    so the survivors of many rounds are still a uniform sample of the whole text; fresh draws
    every round would forget old tokens exponentially.

    Parameters
    ----------
    n_sinks, n_recent, n_window
        See :class:`~capkv_local.policies.base.BasePolicy`; nothing is observed.
    seed
        Same seed, same priorities, on every machine.

    Notes
    -----
    No paper. Departure from kvpress' ``RandomPress``: that one draws anew in every call.
    """

    name: ClassVar[str] = "random"

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("seed", 0 <= self.seed < 2**63, "0 or more and below 2^63")

    def score(self, stats: KVStats) -> F32:
        """Priorities in [0, 1), float32 [n_layer, n_head_kv, n_cells]."""
        heads = np.arange(stats.n_layer * stats.n_head_kv, dtype=np.uint64)
        stream = _mix(_mix(np.array([self.seed], np.uint64)) + heads)  # [n_layer * n_head_kv]
        stream = stream.reshape(stats.n_layer, stats.n_head_kv, 1)
        bits = _mix(stream ^ _mix(stats.positions.astype(np.uint64)))
        # 24 bits are what float32 holds exactly: no rounding up to 1.
        return (bits >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)


def _mix(x: U64) -> U64:
    """SplitMix64: a bijection of 64-bit words whose outputs look independent."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
