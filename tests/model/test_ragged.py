"""A cache whose heads hold different numbers of cells, against a llama that only masks them.

Every check ends with a probe: :data:`~tests.model.float64.N_TILE` tokens at once, for which the
kernel sums up in f32, and the logits of all of them. Each of its queries looks at the cells in its
own way, so that one row too many, too few or in the wrong place shows (see ``test_float64.py``).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from capkv_local import Llama, NativeError, StateError
from capkv_local.native import cache_type as cache_type_number
from capkv_local.policies import get_policy
from tests.model import oracle, tiny
from tests.model.conftest import decode
from tests.model.float64 import F64, N_TILE, TOLERANCE, Float64Llama, Mask, relative_error

Paths = Callable[..., Path]

TOKENS: list[int] = np.random.default_rng(5).integers(0, tiny.N_VOCAB, 4000).tolist()
BUDGET = 64
# Budget, room and a batch: 192 cells. The policy holds on to next to nothing.
OPTIONS: dict[str, Any] = {
    "n_ctx": 4096,
    "n_batch": N_TILE,
    "kv_budget": BUDGET,
    "kv_room": 64,
    "kv_policy": get_policy("random", n_sinks=1, n_recent=2),
    "verbose": False,
    "n_threads": 1,
    "n_threads_batch": 1,
}
KINDS = ("f16", "f32", "q8_0", "q4_0")
BYTES = {"f16": 2.0, "f32": 4.0, "q8_0": 34 / 32, "q4_0": 18 / 32}  # of one value in the cache


class Pair:
    """llama.cpp and the oracle, which do everything alike."""

    def __init__(self, path: Path, kind: str = "f16", **options: Any) -> None:
        number = cache_type_number(kind)
        self.llama: Any = Llama(path, **{**OPTIONS, "type_k": number, "type_v": number, **options})
        self.oracle = Float64Llama(path, kind)
        self.kind = kind
        # Tokens do not repeat: a row of an earlier sequence is never the right one by chance.
        self._tokens = itertools.cycle(TOKENS)
        self._empty = self.oracle.copy()
        # What was held when so many tokens had been decoded and no more: [n_layer, n_head_kv, n].
        self._marks: dict[int, Mask] = {}

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *error: object) -> None:
        self.llama.close()

    @property
    def kv(self) -> Any:
        return self.llama._cache.kv

    @property
    def n_whole(self) -> int:
        """Tokens at the end that every head holds, one and all."""
        missing = np.flatnonzero(~self.oracle.held.all(axis=(0, 1)))
        return self.oracle.n_tokens - (int(missing[-1]) + 1 if len(missing) else 0)

    @property
    def room(self) -> int:
        """Tokens that can be appended."""
        info = self.kv.info()
        return int(info.n_cells_max - info.n_cells)

    def take(self, n: int) -> list[int]:
        return list(itertools.islice(self._tokens, n))

    def append(self, tokens: Sequence[int]) -> tuple[F64, F64]:
        """Logits of every token, llama.cpp's and the oracle's, ``[n, n_vocab]``."""
        n_before = self.oracle.n_tokens
        got = decode(self.llama, tokens, n_before)
        self._set_n_tokens(n_before + len(tokens))
        expected = self.oracle.decode_all(tokens)
        for n in range(n_before + 1, self.oracle.n_tokens + 1):
            self._marks[n] = self.oracle.held[..., :n].copy()
        return got, expected

    def evict(self, keep_tokens: Mask) -> None:
        self.kv.evict(as_cells(keep_tokens, self.kv.positions()))
        self.oracle.evict(keep_tokens)
        self._marks[self.oracle.n_tokens] = self.oracle.held.copy()

    def go_back(self, n_tokens: int) -> None:
        """Take tokens back: all of them, those behind a token that all heads go on with, or those
        behind which nothing was evicted that was there before they were."""
        before, held = self.snapshot(), self.oracle.held
        done = self.llama._ctx.kv_cache_seq_rm(0, n_tokens, -1)
        assert done == (
            n_tokens == 0
            or held[..., n_tokens - 1 :].all()
            or np.array_equal(held[..., :n_tokens], self._marks[n_tokens])
        )
        if done:
            self.oracle.truncate(n_tokens)
            self._marks[n_tokens] = self.oracle.held.copy()
            self._set_n_tokens(n_tokens)
        else:
            assert self.snapshot() == before

    def clear(self) -> None:
        self.llama.reset()
        self.llama._ctx.kv_cache_clear()
        self.oracle = self._empty.copy()

    def save(self) -> tuple[Any, Float64Llama, dict[int, Mask]]:
        return self.llama.save_state(), self.oracle.copy(), dict(self._marks)

    def load(self, saved: tuple[Any, Float64Llama, dict[int, Mask]]) -> None:
        """Go on from what :meth:`save` returned, unless it holds more rows than there are now."""
        state, oracle, marks = saved
        before = self.snapshot()
        try:
            self.llama.load_state(state)
        except StateError:
            assert oracle.held.sum() > self.kv.info().n_rows_max, "a state that fits"
            assert self.snapshot() == before
            return
        self.oracle, self._marks = oracle.copy(), dict(marks)

    def set_budget(self, budget: int) -> None:
        """Change the budget; a smaller one gives cells up, the policy says which."""
        before, smaller = self.kv.positions(), budget < self.llama._cache.budget
        self.llama.set_kv_budget(budget)
        positions = self.kv.positions()
        if np.array_equal(positions, before):
            return
        assert smaller
        keep = np.zeros_like(self.oracle.held)
        for head in np.ndindex(*positions.shape[:2]):
            keep[head][positions[head][positions[head] >= 0]] = True
        assert keep.sum() <= budget * np.prod(keep.shape[:2])
        self.oracle.evict(keep)  # asserts that it is among what was held
        self._marks[self.oracle.n_tokens] = self.oracle.held.copy()

    def snapshot(self) -> tuple[Any, int, bytes]:
        return self.kv.info(), self.llama.n_tokens, self.kv.positions().tobytes()

    # -- checks --------------------------------------------------------------------------------

    def check_cells(self) -> None:
        info, expected = self.kv.info(), self.oracle.positions()
        assert np.array_equal(self.kv.positions(), expected)
        assert info.n_cells == expected.shape[-1] <= info.n_cells_max
        assert info.n_rows == self.oracle.held.sum() <= info.n_rows_max
        assert self.llama.n_tokens == self.oracle.n_tokens

    def check_rows(self) -> None:
        """Every row of every head is there once: decodes the probe."""
        if self.room < N_TILE:
            last = np.arange(self.oracle.n_tokens) >= self.oracle.n_tokens - 50
            self.evict(self.oracle.held & last)
        got, expected = self.append(self.take(N_TILE))
        assert relative_error(got, expected) < TOLERANCE[self.kind]
        self.check_cells()

    def _set_n_tokens(self, n_tokens: int) -> None:
        # As StreamingLlama does, whose own chunks would evict by themselves.
        self.llama.n_tokens = n_tokens


def chunks(tokens: list[int]) -> list[list[int]]:
    """As many at once as llama.cpp decodes at once."""
    return [tokens[i : i + N_TILE] for i in range(0, len(tokens), N_TILE)]


def as_cells(keep_tokens: Mask, positions: np.ndarray[Any, Any]) -> Mask:
    """``[n_layer, n_head_kv, n_cells]`` of ``[n_layer, n_head_kv, n_tokens]``."""
    keep: Mask = np.take_along_axis(keep_tokens, positions.clip(0), axis=-1) & (positions >= 0)
    return keep


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Paths:
    """``path(**options)`` of a tiny llama, written once."""
    folder = tmp_path_factory.mktemp("ragged")

    def build(**options: Any) -> Path:
        file = folder / ("-".join(f"{key}{value}" for key, value in options.items()) + ".gguf")
        return file if file.exists() else tiny.llama(file, **options)

    return build


@pytest.fixture(scope="module")
def pair(path: Paths) -> Iterator[Pair]:
    """Two layers of two KV heads, f16, opened once: what went before is left in its memory."""
    opened = Pair(path(head_dim=32))
    yield opened
    opened.llama.close()


# -- attention over ragged cells ------------------------------------------------------------------


@settings(max_examples=200)
@given(
    n_layer=st.integers(1, 3),
    head_dim=st.sampled_from([32, 64, 128, 256]),
    heads=st.sampled_from([(4, 2), (2, 2), (4, 1), (6, 3)]),
    kind=st.sampled_from(KINDS),
    n_prompt=st.integers(1, 120),
    seed=st.integers(0, 2**32 - 1),
)
def test_logits_are_those_of_masked_cells(
    path: Paths,
    n_layer: int,
    head_dim: int,
    heads: tuple[int, int],
    kind: str,
    n_prompt: int,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    options = {"head_dim": head_dim, "n_head": heads[0], "n_head_kv": heads[1], "n_layer": n_layer}
    both = Pair(path(**options), kind)
    # Singly decoded tokens are in for it: sums in f16, in the order of the positions.
    both.oracle.sum_f16 = kind in ("f16", "f32")
    with both:
        for tokens in chunks(both.take(n_prompt)):
            both.append(tokens)
        for n_new in (1, 1, 7):
            both.evict(oracle.random_mask(rng, both.oracle.held))
            both.check_cells()
            got, expected = both.append(both.take(n_new))
            assert relative_error(got, expected) < TOLERANCE[kind]
        both.check_rows()


# -- any order of operations ----------------------------------------------------------------------

NAMES = ["append"] * 4 + ["evict"] * 3 + ["fill", "append too many"]
NAMES += ["evict the newer"] * 2 + ["go back anywhere"] * 2
NAMES += ["go back", "go back to the evicted", "save", "load", "budget", "clear"]
BUDGETS = (BUDGET, 8, 200)


@settings(
    max_examples=1000,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(
    n_prompt=st.integers(1, N_TILE),
    operations=st.lists(
        st.tuples(st.sampled_from(NAMES), st.integers(0, 2**32 - 1)), min_size=8, max_size=20
    ),
)
def test_no_row_is_lost_or_doubled(
    pair: Pair, n_prompt: int, operations: list[tuple[str, int]]
) -> None:
    """What the number of an operation means is up to the operation."""
    pair.clear()
    pair.set_budget(BUDGET)
    pair.append(pair.take(n_prompt))
    saved = None
    for name, number in operations:
        n_tokens = pair.oracle.n_tokens
        if name == "append" and (n := min(1 + number % 20, pair.room)) > 0:
            pair.append(pair.take(n))
        elif name == "fill":
            for tokens in chunks(pair.take(max(0, pair.room - number % 20))):
                pair.append(tokens)
        elif name == "append too many" and pair.room < N_TILE:
            refused(pair, pair.room + 1)
        elif name == "evict" and n_tokens > 0:
            pair.evict(oracle.random_mask(np.random.default_rng(number), pair.oracle.held))
        elif name == "evict the newer" and n_tokens > 0:
            keep = oracle.random_mask(np.random.default_rng(number), pair.oracle.held)
            keep[..., : number % n_tokens] = pair.oracle.held[..., : number % n_tokens]
            pair.evict(keep)
        elif name == "go back anywhere" and n_tokens > 0:
            pair.go_back(number % n_tokens)
        elif name == "go back" and n_tokens > 0:
            pair.go_back(max(0, n_tokens - 1 - number % 30))
        elif name == "go back to the evicted" and n_tokens > 0:
            pair.go_back(min(max(0, n_tokens - pair.n_whole - 1 + number % 4), n_tokens - 1))
        elif name == "save":
            saved = pair.save()
        elif name == "load" and saved is not None:
            pair.load(saved)
        elif name == "budget":
            pair.set_budget(BUDGETS[number % len(BUDGETS)])
        elif name == "clear":
            pair.clear()
        pair.check_cells()
    pair.check_rows()


def refused(pair: Pair, n_tokens: int) -> None:
    """More tokens than there is room for: an error, and nothing has changed."""
    before = pair.snapshot()
    with pytest.raises(RuntimeError, match="llama_decode"):
        decode(pair.llama, pair.take(n_tokens), pair.oracle.n_tokens)
    assert pair.snapshot() == before


# -- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head_dim", [32, 128])
def test_memory_is_the_rows(path: Paths, head_dim: int, kind: str) -> None:
    with Pair(path(head_dim=head_dim), kind) as both:
        both.append(both.take(60))
        both.evict(oracle.random_mask(np.random.default_rng(1), both.oracle.held))
        both.check_cells()
        info = both.kv.info()
        # One row is K and V of one head of one layer.
        assert info.n_bytes_kv == info.n_rows_max * int(2 * head_dim * BYTES[kind])
        assert both.llama.kv_stats().kv_bytes == info.n_bytes_kv


@settings(max_examples=20)
@given(data=st.data(), seed=st.integers(0, 2**32 - 1))
def test_freed_rows_take_new_tokens(pair: Pair, data: st.DataObject, seed: int) -> None:
    rng = np.random.default_rng(seed)
    pair.clear()
    pair.set_budget(BUDGET)
    shape = pair.oracle.held.shape[:2]
    fill(pair)
    for largest in data.draw(st.lists(st.sampled_from([1, 8, 100]), min_size=1, max_size=3)):
        counts = rng.integers(1, largest + 1, shape)
        counts[tuple(rng.integers(shape))] = largest
        pair.evict(oracle.random_mask(rng, pair.oracle.held, counts))
        pair.check_cells()
        info = pair.kv.info()
        assert info.n_cells == largest
        assert info.n_rows == counts.sum()
        fill(pair)
    # There is no room left, but what is held can still be given up.
    pair.evict(oracle.random_mask(rng, pair.oracle.held, np.full(shape, 50)))
    pair.check_rows()


def fill(pair: Pair) -> None:
    """Append what there is room for; one token more fails."""
    for tokens in chunks(pair.take(pair.room)):
        pair.append(tokens)
    pair.check_cells()
    refused(pair, 1)


@pytest.mark.parametrize(
    "damage",
    [
        lambda keep: keep[:1],
        lambda keep: keep[..., 1:],
        lambda keep: np.zeros_like(keep),
        lambda keep: keep & (np.arange(keep.shape[-1]) < keep.shape[-1] - 1),
        lambda keep: np.ones_like(keep),
    ],
    ids=["one layer", "too short", "nothing", "without the last", "cells that are absent"],
)
def test_wrong_masks_are_refused_and_change_nothing(
    pair: Pair, damage: Callable[[Mask], Mask]
) -> None:
    pair.clear()
    pair.append(pair.take(50))
    counts = np.array([[50, 10], [20, 1]])
    pair.evict(oracle.random_mask(np.random.default_rng(2), pair.oracle.held, counts))
    before = pair.snapshot()
    keep = pair.kv.positions() >= 0
    with pytest.raises(NativeError):
        pair.kv.evict(damage(keep))
    assert pair.snapshot() == before
    pair.check_rows()


# -- history --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15)
@given(n_prompt=st.integers(2, 100), seed=st.integers(0, 2**32 - 1))
def test_what_is_held_decides_and_not_how_it_came_about(
    path: Paths, kind: str, n_prompt: int, seed: int
) -> None:
    """The same rows by one eviction and by several: not one bit of the next logits differs."""
    rng = np.random.default_rng(seed)
    with Pair(path(head_dim=64), kind) as both:
        prompt = both.take(n_prompt)
        following = [both.take(1), both.take(9), both.take(N_TILE)]
        first = oracle.random_mask(rng, np.ones((*both.oracle.held.shape[:2], n_prompt), np.bool_))
        second = oracle.random_mask(rng, first)
        last = oracle.random_mask(rng, second)
        logits = []
        for evictions in ([last], [second, last], [first, second, last]):
            both.clear()
            for tokens in chunks(prompt):
                both.append(tokens)
            for keep in evictions:
                both.evict(keep)
            both.check_cells()
            logits.append(np.concatenate([both.append(tokens)[0] for tokens in following]))
    assert np.array_equal(logits[0], logits[1])
    assert np.array_equal(logits[0], logits[2])
