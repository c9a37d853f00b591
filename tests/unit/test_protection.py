"""What evictions leave of a document and of the conversation about it, whatever the scores are."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from capkv_local.budget.allocate import ALLOCATORS
from capkv_local.budget.select import contested
from capkv_local.cache.compact import CompactCache
from capkv_local.cache.protection import Protection
from capkv_local.policies import BasePolicy

N_LAYER, N_HEAD, N_ALLOCATED = 2, 2, 40


class Scoring(BasePolicy):
    """Scores that the test draws."""

    name = "scoring"

    def __init__(self, random: np.random.Generator) -> None:
        super().__init__(n_sinks=1, n_recent=2)
        object.__setattr__(self, "random", random)

    def score(self, stats: Any) -> np.ndarray[Any, Any]:
        shape = stats.positions.shape
        stats.carry(np.full(shape, 2, np.float32))
        few = self.random.integers(0, 3, shape)  # type: ignore[attr-defined]  # many ties
        return np.asarray(few, np.float32)


class Cells:
    """Cells of every head as positions, in the place of the native cache."""

    def __init__(self) -> None:
        self.heads: list[list[int]] = [[] for _ in range(N_LAYER * N_HEAD)]

    def info(self) -> SimpleNamespace:
        n_rows = sum(map(len, self.heads))
        return SimpleNamespace(
            n_layer=N_LAYER,
            n_head_kv=N_HEAD,
            n_head=N_HEAD,
            n_heads=N_LAYER * N_HEAD,
            n_allocated=N_ALLOCATED,
            n_queries=0,
            n_rows=n_rows,
        )

    def observe(self, n_window: int, **what: Any) -> None:
        pass

    def pools(self) -> np.ndarray[Any, Any]:
        return np.zeros(N_LAYER, np.int32)

    def positions(self) -> np.ndarray[Any, Any]:
        n = max(map(len, self.heads))
        rows = [[-1] * (n - len(head)) + head for head in self.heads]
        return np.array(rows, np.int32).reshape(N_LAYER, N_HEAD, n)

    def append(self, first: int, n: int) -> None:
        for head in self.heads:
            head += range(first, first + n)

    def evict(self, keep: np.ndarray[Any, Any]) -> None:
        rows = zip(
            self.positions().reshape(-1, keep.shape[-1]),
            keep.reshape(-1, keep.shape[-1]),
            strict=True,
        )
        self.heads = [positions[kept].tolist() for positions, kept in rows]


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(sorted(ALLOCATORS)),
    st.integers(4, 25),
    st.lists(st.integers(1, 4), min_size=1, max_size=12),
)
def test_the_document_stays_and_the_conversation_keeps_to_its_share(
    seed: int, allocation: str, n_document: int, turns: list[int]
) -> None:
    cells = Cells()
    cache = CompactCache(cells, Scoring(np.random.default_rng(seed)), 12, allocation)  # type: ignore[arg-type]
    cells.append(0, n_document)
    n_tokens = n_document
    if n_document > 12:
        cache.apply(*cache.choose(n_tokens=n_tokens, n_cells=n_document))
        assert cells.info().n_rows == 12 * N_LAYER * N_HEAD
    cache.protect(n_tokens)
    document = [list(head) for head in cells.heads]
    carried = None if cache.carried is None else cache.carried.copy()

    for n_question in turns:
        cache.protection.question = range(n_tokens, n_tokens + n_question)
        for n in (n_question, 5):
            if cells.info().n_rows + n * N_LAYER * N_HEAD > N_ALLOCATED * N_LAYER * N_HEAD:
                n_cells = cells.positions().shape[-1]
                cache.apply(*cache.choose(n_tokens=n_tokens, n_cells=n_cells))
                assert cells.info().n_rows == cache.n_left * N_LAYER * N_HEAD
            cells.append(n_tokens, n)
            n_tokens += n
            for head, kept in zip(cells.heads, document, strict=True):
                assert [p for p in head if p < n_document] == kept
                assert head[-1] == n_tokens - 1
                assert set(range(n_tokens)[cache.protection.question.start :][:n]) <= set(head)
            assert cells.info().n_rows <= N_ALLOCATED * N_LAYER * N_HEAD

    cache.forget_behind(n_document)
    if carried is None:
        assert cache.carried is None or not cache.carried.any()  # nothing is known of it
    else:
        assert cache.carried is not None
        assert np.array_equal(cache.carried, carried[..., -cache.carried.shape[-1] :])


def test_nothing_is_protected_by_default() -> None:
    positions = np.arange(6, dtype=np.int32).reshape(1, 1, 6)
    assert Protection().mask(positions) is None
    mask = Protection(n_tokens=2, question=range(4, 5)).mask(positions)
    assert mask is not None and mask.tolist() == [[[True, True, False, False, True, False]]]
    held = np.ones((1, 1, 6), bool)
    middle = contested(held, n_sinks=1, n_recent=1, protected=mask)
    assert np.flatnonzero(middle).tolist() == [2, 3]
    assert not Protection(n_tokens=2).mask(np.full((1, 1, 3), -1, np.int32)).any()  # type: ignore[union-attr]
