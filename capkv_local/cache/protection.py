"""What an eviction must not touch: a document, and the question that is being answered.

A conversation has its own share of the cells: all that reading needed beside the document, for its
batches and its room. So asking takes no more memory than reading did.
"""

from __future__ import annotations

from dataclasses import dataclass

from capkv_local.native import I32, Mask

# Share of the conversation's cells that an eviction frees: the rest stays, so that the newest
# turns are whole, and what is freed is enough for a hundred tokens and more.
FREED = 0.25


@dataclass
class Protection:
    """Tokens whose cells every eviction leaves alone; by default none.

    Parameters
    ----------
    n_tokens
        Tokens at the start of the sequence: the document, with all that stands before it.
    n_held
        Cells per head that hold them, on average, rounded up.
    question
        Positions of the question that is being answered.
    copy
        State of the context behind these tokens, where going back takes more than dropping cells.
    """

    n_tokens: int = 0
    n_held: int = 0
    question: range = range(0)
    copy: bytes | None = None

    def mask(self, positions: I32) -> Mask | None:
        """Protected cells by the token positions in them, both [n_layer, n_head_kv, n_cells]."""
        if self.n_tokens == 0:
            return None
        asked = (positions >= self.question.start) & (positions < self.question.stop)
        mask: Mask = ((positions >= 0) & (positions < self.n_tokens)) | asked
        return mask
