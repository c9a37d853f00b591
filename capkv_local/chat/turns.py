"""The turns of a conversation, as tokens."""

from __future__ import annotations

from collections.abc import Sequence


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
