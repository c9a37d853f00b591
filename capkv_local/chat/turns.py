"""The turns of a conversation: kept, dropped, or read again as far as there is room."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from capkv_local.llama import Llama
from capkv_local.llama.template import ChatTemplate
from capkv_local.snapshot.saved_chat import Place


class TurnsChat:
    """A chat whose turns can be dropped, all of them or the oldest."""

    llama: Llama
    _template: ChatTemplate
    _place: Place
    _pending: list[int]
    _keep_turns: bool

    @property
    def keep_turns(self) -> bool:
        """Whether questions and answers stay in the conversation."""
        return self._keep_turns

    def set_keep_turns(self, keep: bool) -> None:
        """Keep questions and answers from now on, or drop them, those so far included.

        Raises
        ------
        StateError
            As :meth:`forget`; nothing changes.
        """
        if not keep:
            self.forget()
        self._keep_turns = keep

    def forget(self) -> None:
        """Drop all turns: the next question meets the cells that reading has left.

        Raises
        ------
        StateError
            See :meth:`capkv_local.Llama.forget`.
        """
        self.llama.forget()
        self._place, self._pending = ("user" if self.llama.n_protected else "start"), []

    @contextlib.contextmanager
    def _turns_aside(self, n_next: int = 0) -> Iterator[None]:
        """Inside, there is the document alone; then the newest turns are read again.

        As many as leave ``n_next`` of their cells, and half of the context behind the document.
        """
        llama = self.llama
        place, pending = self._place, self._pending
        said = llama.input_ids[llama.n_protected : llama.n_tokens].tolist()
        if not said or not llama.n_protected:
            yield
            return
        turns = split_turns(said, self._template.between)
        self.forget()
        try:
            yield
        finally:
            half = (llama.n_ctx() - llama.n_protected) // 2
            kept = newest(turns, min(llama.n_turn_max, half) - n_next)
            if kept:
                try:
                    llama.prefill(kept)
                except BaseException:
                    self.forget()  # half a turn is none
                    raise
                self._place, self._pending = place, pending


def split_turns(tokens: Sequence[int], between: Sequence[int]) -> list[list[int]]:
    """Cut a conversation behind every ``between``, the tokens from an answer to a question.

    Each turn but the last ends with them, so that turns one behind the other are a conversation.

    Examples
    --------
    >>> split_turns([5, 6, 0, 1, 7, 8, 0, 1, 9], [0, 1])
    [[5, 6, 0, 1], [7, 8, 0, 1], [9]]
    """
    mark, n = list(between), len(between)
    turns: list[list[int]] = []
    start = i = 0
    while n and i + n <= len(tokens):
        if list(tokens[i : i + n]) == mark:
            i += n
            turns.append(list(tokens[start:i]))
            start = i
        else:
            i += 1
    return [*turns, list(tokens[start:])]


def newest(turns: Sequence[Sequence[int]], n_tokens: int) -> list[int]:
    """Tokens of the last turns, as many turns as have at most ``n_tokens`` together.

    Examples
    --------
    >>> newest([[5, 6, 0, 1], [7, 8, 0, 1], [9]], 6)
    [7, 8, 0, 1, 9]
    """
    kept: list[int] = []
    for turn in reversed(turns):
        if len(turn) + len(kept) > n_tokens:
            break
        kept = [*turn, *kept]
    return kept
