"""What was measured at a share of the cells; no promise for another model or text.

Source: docs/evaluation.md, Report. Policy ``capkv``; SmolLM2-135M on 1,024 tokens and Gemma 3 270M
on 2,048 tokens, in this order. Recall is in percent of what the full cache answers.
"""

from __future__ import annotations

from dataclasses import dataclass

SOURCE = "docs/evaluation.md"

Pair = tuple[float, float]


@dataclass(frozen=True)
class Measured:
    """Losses at a share of the cells, None where nothing was measured.

    ``chat``: recall when the question comes later (with a probe) and the text is evicted once,
    ``streamed``: the same when it streams through a smaller cache, ``ask``: recall when the
    question is known, ``kl``: KL divergence over the text that follows, evicted once, in nats.
    """

    share: float
    chat: Pair
    kl: Pair
    streamed: Pair | None = None
    ask: Pair | None = None


MEASURED = (
    Measured(0.5, chat=(100, 94), kl=(0.006, 0.028), streamed=(100, 93)),
    Measured(0.25, chat=(96, 72), kl=(0.025, 0.112), streamed=(89, 56)),
    Measured(0.125, chat=(75, 53), kl=(0.065, 0.159), streamed=(84, 48), ask=(91, 108)),
)
