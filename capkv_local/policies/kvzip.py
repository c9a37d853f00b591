"""KVzip: what the model looks at when it repeats the text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from capkv_local.errors import PolicyError
from capkv_local.policies.base import F32, BasePolicy, KVStats, register


@register
@dataclass(frozen=True)
class KVzip(BasePolicy):
    """Largest attention that a cell ever got from a repetition of the text.

    Source: KVzip (arXiv 2505.23416).

    Parameters
    ----------
    n_sinks, n_recent, n_window
        See :class:`~capkv_local.policies.base.BasePolicy`; no window is observed.

    Notes
    -----
    Departures: the text is repeated as it streams, in pieces of a few hundred tokens instead of
    chunks of 2,048, and with what opens the user's message left out; survivors keep the largest
    they ever had; the softmax goes over all cells instead of those of one chunk. The size of the
    pieces is what changes ranks most (capkv_local/evaluate/crosscheck.py has the numbers).
    """

    name: ClassVar[str] = "kvzip"
    needs: ClassVar[frozenset[str]] = frozenset({"probe"})
    allocation: ClassVar[str] = "global"

    def score(self, stats: KVStats) -> F32:
        """Maximum over the repeated tokens, the query heads of a KV head and all rounds."""
        attention = stats.probe_attention(reduce="max")
        if attention is None:
            raise PolicyError("policy 'kvzip' needs a repetition of the text: kv_observe='probe'")
        if stats.carried is not None:
            attention = np.maximum(attention, stats.carried)
        stats.carry(attention)
        return attention
