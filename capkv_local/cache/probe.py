"""The probe: what does the model look at while it repeats what it has just read?

Whatever a later question needs, the model has to find it again. Repeating the text is the task that
looks for everything once, so its attention says for every cell how much a question *could* need it.
Source: KVzip (arXiv 2505.23416); here the text is repeated as it streams, in every round what came
since the one before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from capkv_local.errors import BudgetError
from capkv_local.native import F32

REQUEST = "\n\nRepeat the previous text exactly."


@dataclass(frozen=True)
class Probe:
    """How the text is repeated.

    Parameters
    ----------
    prompt
        Tokens that ask for the repetition, up to where the answer begins.
    stride
        Repeat every n-th token only, at an n-th of the cost: see :meth:`spread`.
    n_scratch
        Cells that are kept free for the prompt and the tokens that are repeated at once.
    n_lead
        Tokens before a piece that are repeated again, so that its first token is found by what
        stands before it.

    Raises
    ------
    BudgetError
        A stride out of range, or a prompt that leaves no cells for the text.
    """

    prompt: tuple[int, ...]
    stride: int = 1
    n_scratch: int = 256
    n_lead: int = 8

    def __post_init__(self) -> None:
        if not 1 <= self.stride <= 16:
            raise BudgetError(f"probe_stride={self.stride} must be from 1 to 16")
        if self.n_piece < 1:
            raise BudgetError(
                f"the model's chat template takes {len(self.prompt)} tokens around a request, the "
                f"probe has {self.n_scratch} for all it repeats: use kv_observe='tail'"
            )

    @property
    def n_piece(self) -> int:
        """Tokens that are repeated at once."""
        return self.n_scratch - len(self.prompt) - self.n_lead

    def pieces(self, tokens: Sequence[int], n_done: int) -> Iterator[tuple[list[int], int]]:
        """Cut ``tokens[n_done::stride]``: what to decode, and how many of the last ones observe."""
        n_text = self.n_piece * self.stride  # tokens of the text that a piece stands for
        for start in range(n_done, len(tokens), n_text):
            piece = list(tokens[start : start + n_text : self.stride])
            lead = list(tokens[max(0, start - self.n_lead) : start])
            yield [*self.prompt, *lead, *piece], len(piece)

    def spread(self, attention: F32, positions: NDArray[np.int32], n_done: int) -> None:
        """Give cells that nobody looked for what the cell before them has, if that is more.

        A repeated token looks for the one that comes next. With a stride, nothing looks for those
        that come behind a token that is left out; they are taken for as relevant as the last one
        before them that was looked for: numbers and names are needed whole.

        Parameters
        ----------
        attention
            Of the pieces of ``tokens[n_done:]``, [n_layer, n_head_kv, n_cells]; changed in place.
        positions
            Token in each cell, the same shape; -1: not held.
        """
        before, after = positions[..., :-1], positions[..., 1:]
        left_out = (before >= n_done) & ((before - n_done) % self.stride != 0)
        to_fill = left_out & (after == before + 1)
        for _ in range(self.stride - 1):  # one cell further each time
            np.maximum(
                attention[..., 1:], attention[..., :-1], out=attention[..., 1:], where=to_fill
            )
