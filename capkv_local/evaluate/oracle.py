"""The bound that no policy can know: keep what the real continuation or answer looks at."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from capkv_local.budget.select import contested
from capkv_local.policies import KVStats
from capkv_local.policies.base import F32, BasePolicy, above_all

__all__ = ["Oracle"]


@dataclass(frozen=True)
class Oracle(BasePolicy):
    """Ranks cells by the attention that the tokens to come pay to them.

    No policy can do this: it says how much better any could be. It is not the best choice of cells
    there is, which nobody can compute, but the best that attention tells.

    Parameters
    ----------
    attention
        Sum of the squared attention of what comes, float32 [n_layer, n_head_kv, n_cells]; empty
        until that is known.
    """

    name: ClassVar[str] = "oracle"
    allocation: ClassVar[str] = "global"
    n_recent: int = 16
    attention: F32 = field(default_factory=lambda: np.empty((0, 0, 0), np.float32), repr=False)

    def score(self, stats: KVStats) -> F32:
        """The attention to come, sinks and recent cells above all."""
        held = stats.positions >= 0
        open_ = contested(held, n_sinks=self.n_sinks, n_recent=self.n_recent)
        return above_all(self.attention, held & ~open_)
