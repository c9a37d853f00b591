"""The allocators: what each hands to which head, against slow references that give cell by cell."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from capkv_local.budget.allocate import (
    ALLOCATORS,
    LONGEST,
    SHORT,
    Allocator,
    adaptive_layer,
    get_allocator,
    global_,
    pyramid,
    share_out,
    uniform,
)
from capkv_local.budget.select import contested, keep_mask
from capkv_local.errors import BudgetError, PolicyError

LARGEST = float(np.finfo(np.float32).max)
Head = tuple[int, int]  # layer, KV head


class Case(NamedTuple):
    scores: np.ndarray
    contested: np.ndarray
    total: int
    floor: int


@st.composite
def cases(draw: st.DrawFn, *, full: bool = False) -> Case:
    """Scores with many ties over contested cells: all of them (`full`), or any."""
    shape = draw(st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(0, 12)))
    kind = "full" if full else draw(st.sampled_from(["full", "right-aligned", "any"]))
    if kind == "full":
        mask = np.ones(shape, bool)
    elif kind == "any":
        mask = draw(hnp.arrays(np.bool_, shape))
    else:
        n_held = draw(hnp.arrays(np.int64, shape[:2], elements=st.integers(0, shape[2])))
        held = np.arange(shape[2]) >= shape[2] - n_held[..., None]
        mask = contested(held, n_sinks=draw(st.integers(0, 2)), n_recent=draw(st.integers(0, 2)))
    few = st.sampled_from([-LARGEST, -1.0, -0.0, 0.0, 1.0, LARGEST])
    anything = st.floats(-LARGEST, LARGEST, width=32)
    elements = draw(st.sampled_from([few, anything]))
    scores = draw(hnp.arrays(np.float32, shape, elements=elements))
    scores[~mask] = draw(st.sampled_from([np.nan, np.inf, LARGEST]))
    total = draw(st.integers(0, int(mask.sum()) + 3))
    floor = draw(st.integers(0, shape[2] + 1))
    return Case(scores, mask, total, floor)


# --- slow references: plain Python, one cell at a time ----------------------------------------


def give(
    upper: dict[Head, int],
    total: int,
    order: Callable[[Head, int], tuple[object, ...]],
    have: dict[Head, int] | None = None,
) -> dict[Head, int]:
    """Hand out cells until `total` is out: each to the head with room whose `order` is least."""
    counts = dict.fromkeys(upper, 0) if have is None else dict(have)
    while sum(counts.values()) < total:
        room = [key for key in upper if counts[key] < upper[key]]
        if not room:
            break
        counts[min(room, key=lambda key: order(key, counts[key]))] += 1
    return counts


def fewest_then_last(key: Head, count: int) -> tuple[object, ...]:
    return count, -key[0], -key[1]


def fewest_then_first_layer(key: Head, count: int) -> tuple[object, ...]:
    return count, key[0], -key[1]


def cells_of(case: Case) -> dict[Head, list[int]]:
    n_layer, n_head, _ = case.contested.shape
    return {
        (layer, head): np.flatnonzero(case.contested[layer, head]).tolist()
        for layer in range(n_layer)
        for head in range(n_head)
    }


def sizes_of(case: Case) -> dict[Head, int]:
    return {key: len(cells) for key, cells in cells_of(case).items()}


def slow_uniform(case: Case) -> dict[Head, int]:
    return give(sizes_of(case), case.total, fewest_then_last)


def slow_line(case: Case) -> list[int]:
    """Pyramid's budget per head by layer, from its last layer up."""
    n_layer, n_head, _ = case.contested.shape
    total = min(case.total, int(case.contested.sum()))
    mean = Fraction(total, n_layer * n_head)
    half = mean - min(mean, max(mean / 20, Fraction(case.floor)))  # from the middle to an end
    half = max(Fraction(0), min(half, Fraction(int(case.contested[0].sum()), n_head) - mean))
    if n_layer == 1:
        return [int(mean)]
    return [int(mean + half * (n_layer - 1 - 2 * k) / (n_layer - 1)) for k in range(n_layer)]


def slow_pyramid(case: Case) -> dict[Head, int]:
    sizes, line = sizes_of(case), slow_line(case)
    floors = {key: min(size, case.floor) for key, size in sizes.items()}
    have = give(floors, case.total, fewest_then_first_layer)
    return give(sizes, case.total, lambda key, count: (count - line[key[0]], key[0], -key[1]), have)


def slow_compete(case: Case, layers: list[int], total: int) -> dict[Head, int]:
    """Floors, then one top-k over all heads of these layers."""
    cells = {key: cells for key, cells in cells_of(case).items() if key[0] in layers}
    floors = {key: min(len(row), case.floor) for key, row in cells.items()}
    counts = give(floors, total, fewest_then_last)
    rest = []
    for key, row in cells.items():
        ranked = sorted(row, key=lambda cell: (case.scores[key][cell], cell), reverse=True)
        rest += [(case.scores[key][cell], cell, key) for cell in ranked[counts[key] :]]
    for _, _, key in sorted(rest, reverse=True)[: total - sum(counts.values())]:
        counts[key] += 1
    return counts


def slow_adaptive_layer(case: Case) -> dict[Head, int]:
    layers = range(case.contested.shape[0])
    sizes = sizes_of(case)
    upper = {(k, 0): sum(n for key, n in sizes.items() if key[0] == k) for k in layers}
    floors = {
        (k, 0): sum(min(n, case.floor) for key, n in sizes.items() if key[0] == k) for k in layers
    }
    have = give(floors, case.total, fewest_then_last)
    totals = give(upper, case.total, fewest_then_last, have)
    counts: dict[Head, int] = {}
    for k in layers:
        counts |= slow_compete(case, [k], totals[k, 0])
    return counts


def slow_global(case: Case) -> dict[Head, int]:
    total = min(case.total, int(case.contested.sum()))
    return slow_compete(case, list(range(case.contested.shape[0])), total)


SLOW: dict[Allocator, Callable[[Case], dict[Head, int]]] = {
    uniform: slow_uniform,
    pyramid: slow_pyramid,
    adaptive_layer: slow_adaptive_layer,
    global_: slow_global,
}

every_allocator = pytest.mark.parametrize("allocate", SLOW, ids=lambda f: f.__name__)


# --- what holds for all -----------------------------------------------------------------------


@every_allocator
@given(case=cases())
def test_equals_the_slow_reference(allocate: Allocator, case: Case) -> None:
    counts = allocate(*case)
    assert {key: int(counts[key]) for key in np.ndindex(*counts.shape)} == SLOW[allocate](case)


@every_allocator
@given(case=cases())
def test_contract(allocate: Allocator, case: Case) -> None:
    counts = allocate(*case)
    available = case.contested.sum(axis=-1)
    assert counts.dtype == np.int64
    assert counts.shape == available.shape
    assert (counts >= 0).all()
    assert (counts <= available).all()
    assert counts.sum() == min(case.total, available.sum())
    floors = np.minimum(case.floor, available)
    if floors.sum() <= case.total:
        assert (counts >= floors).all()
    else:
        assert (counts <= floors).all()


@every_allocator
@given(case=cases())
def test_order_in_memory_changes_nothing(allocate: Allocator, case: Case) -> None:
    counts = allocate(*case)
    columns = Case(
        np.asfortranarray(case.scores), np.asfortranarray(case.contested), case.total, case.floor
    )
    spread = np.zeros((*case.scores.shape[:-1], 2 * case.scores.shape[-1]), np.float32)[..., ::2]
    spread[...] = case.scores
    assert (allocate(*columns) == counts).all()
    assert (allocate(spread, case.contested, case.total, case.floor) == counts).all()


@every_allocator
@given(case=cases())
def test_inputs_are_left_alone(allocate: Allocator, case: Case) -> None:
    scores, mask = case.scores.copy(), case.contested.copy()
    allocate(*case)
    np.testing.assert_array_equal(case.scores, scores)
    np.testing.assert_array_equal(case.contested, mask)


@every_allocator
@pytest.mark.parametrize("total", [0, 5])
@pytest.mark.parametrize("shape", [(0, 3, 5), (2, 0, 5), (2, 3, 0), (0, 0, 0)])
def test_nothing_to_share_out(allocate: Allocator, shape: tuple[int, int, int], total: int) -> None:
    counts = allocate(np.zeros(shape), np.ones(shape, bool), total, 2)
    assert counts.dtype == np.int64
    assert counts.shape == shape[:2]
    assert not counts.any()


@every_allocator
@pytest.mark.parametrize("shape", [(3, 2, 5), (1, 2, 5), (3, 1, 5), (3, 2, 1), (1, 1, 1)])
def test_all_or_nothing(allocate: Allocator, shape: tuple[int, int, int]) -> None:
    scores, mask = np.zeros(shape), np.ones(shape, bool)
    for floor in (0, 1, 100):
        assert not allocate(scores, mask, 0, floor).any()
        assert not allocate(scores, ~mask, 7, floor).any()
        assert (allocate(scores, mask, mask.size, floor) == shape[-1]).all()
        assert (allocate(scores, mask, 10**12, floor) == shape[-1]).all()


@every_allocator
@given(case=cases(), n_sinks=st.integers(0, 3), n_recent=st.integers(1, 3))
def test_counts_fit_keep_mask(allocate: Allocator, case: Case, n_sinks: int, n_recent: int) -> None:
    """With sinks and recent window added, the counts are what keep_mask takes."""
    held = case.contested.copy()
    scores = np.where(held, case.scores, 0.0)
    if held.shape[-1] == 0:
        return
    held[..., -1] = True  # every head holds the newest cell
    middle = contested(held, n_sinks=n_sinks, n_recent=n_recent)
    counts = allocate(scores, middle, case.total, case.floor)
    always = (held & ~middle).sum(axis=-1)
    keep = keep_mask(scores, held, counts + always, n_sinks=n_sinks, n_recent=n_recent)
    assert (keep & middle).sum() == min(case.total, middle.sum())
    assert keep[..., -1].all()


# --- each on its own --------------------------------------------------------------------------


@given(cases())
def test_uniform_differs_by_one_at_most_where_cells_suffice(case: Case) -> None:
    counts = uniform(*case)
    wants_more = counts < case.contested.sum(axis=-1)
    if wants_more.any():
        assert counts.max() <= counts[wants_more].min() + 1


@pytest.mark.parametrize(
    ("total", "counts"),
    [
        (12, [[3, 3], [3, 3]]),
        (14, [[3, 3], [4, 4]]),  # what cannot be divided goes to the last heads
    ],
)
def test_uniform_by_hand(total: int, counts: list[list[int]]) -> None:
    shape = (2, 2, 8)
    assert uniform(np.zeros(shape), np.ones(shape, bool), total, 0).tolist() == counts


def test_uniform_passes_on_what_a_head_cannot_use() -> None:
    mask = np.arange(8) >= 8 - np.array([[8, 1], [8, 8]])[..., None]
    assert uniform(np.zeros(mask.shape), mask, 13, 0).tolist() == [[4, 1], [4, 4]]


@given(cases(full=True))
def test_pyramid_never_rises(case: Case) -> None:
    counts = pyramid(*case)
    assert (np.diff(counts.sum(axis=-1)) <= 0).all()
    assert (np.ptp(counts, axis=-1) <= 1).all()  # heads of a layer are equal


@pytest.mark.parametrize(
    ("n_cells", "floor", "layers"),
    [
        (4000, 0, [1560, 1180, 800, 420, 40]),  # 40 = 800 / 20, 1560 = 2 * 800 - 40
        (4000, 300, [1300, 1050, 800, 550, 300]),
        (1200, 0, [1200, 1000, 800, 600, 400]),  # flatter: the first layer has no more cells
        (1200, 300, [1200, 1000, 800, 600, 400]),
        (4000, 800, [800] * 5),
        (4000, 900, [800] * 5),
        (800, 0, [800] * 5),
    ],
)
@pytest.mark.parametrize("n_head", [1, 3])
def test_pyramid_by_hand(n_head: int, n_cells: int, floor: int, layers: list[int]) -> None:
    shape = (5, n_head, n_cells)
    counts = pyramid(np.zeros(shape), np.ones(shape, bool), 800 * 5 * n_head, floor)
    assert counts.tolist() == [[layer] * n_head for layer in layers]


@pytest.mark.parametrize(
    ("n_held", "layers"),
    [
        ([4000, 4000, 10], [1575, 815, 10]),  # 1560, 800, 40 and the missing 30 shared evenly
        ([4000, 200, 4000], [1860, 200, 340]),
        ([100, 4000, 4000], [100, 1150, 1150]),  # no line falls from so few: equal shares
    ],
)
def test_pyramid_passes_on_what_a_layer_cannot_use(n_held: list[int], layers: list[int]) -> None:
    mask = np.arange(4000) >= 4000 - np.array(n_held)[:, None, None]
    assert pyramid(np.zeros(mask.shape), mask, 2400, 0).ravel().tolist() == layers


def test_pyramid_gives_what_cannot_be_divided_to_the_first_layers() -> None:
    shape = (3, 2, 64)  # mean 11: 21.45, 11, 0.55 in each head, so 2 cells are left
    counts = pyramid(np.zeros(shape), np.ones(shape, bool), 66, 0)
    assert counts.tolist() == [[22, 22], [11, 11], [0, 0]]


@given(cases(full=True))
def test_adaptive_layer_gives_layers_the_same(case: Case) -> None:
    layers = adaptive_layer(*case).sum(axis=-1)
    assert np.ptp(layers) <= 1
    assert (np.diff(layers) >= 0).all()  # what cannot be divided goes to the last layers


@given(cases())
def test_adaptive_layer_gives_layers_the_same_where_they_have_it(case: Case) -> None:
    n_layer = case.contested.shape[0]
    available = case.contested.sum(axis=(1, 2))
    total = n_layer * int(available.min())
    layers = adaptive_layer(case.scores, case.contested, total, 0).sum(axis=-1)
    assert (layers == available.min()).all()


def test_adaptive_layer_by_hand() -> None:
    scores = np.array(
        [
            [[9, 8, 7, 6], [5, 4, 3, 2]],  # the first head has the layer's best
            [[0, 0, 0, 0], [0, 0, 0, 0]],  # later cell, then later head
        ],
        float,
    )
    mask = np.ones(scores.shape, bool)
    assert adaptive_layer(scores, mask, 10, 0).tolist() == [[4, 1], [2, 3]]
    assert adaptive_layer(scores, mask, 10, 2).tolist() == [[3, 2], [2, 3]]
    assert adaptive_layer(scores, mask, 9, 0).tolist() == [[4, 0], [2, 3]]


def test_adaptive_layer_meets_a_floor_beyond_a_layers_share() -> None:
    mask = np.arange(10) >= 10 - np.array([[10, 0, 0], [5, 5, 5]])[..., None]
    counts = adaptive_layer(np.zeros(mask.shape), mask, 20, 5)
    assert counts.tolist() == [[5, 0, 0], [5, 5, 5]]


@given(cases())
def test_global_without_floor_is_a_plain_top_k(case: Case) -> None:
    """The counts, and through keep_mask the very cells."""
    scores, mask, total, _ = case
    found = [
        (scores[layer, head, cell], cell, layer, head)
        for layer, head, cell in np.argwhere(mask).tolist()
    ]
    best = np.zeros(mask.shape, bool)
    for _, cell, layer, head in sorted(found, reverse=True)[:total]:
        best[layer, head, cell] = True
    counts = global_(scores, mask, total, 0)
    assert (counts == best.sum(axis=-1)).all()
    some = counts.min(axis=-1, initial=1) > 0  # keep_mask wants a cell in every head
    keep = keep_mask(scores[some], mask[some], counts[some], n_sinks=0, n_recent=0)
    assert (keep == best[some]).all()


def test_global_by_hand() -> None:
    scores = np.array([[[9, 8, 7], [6, 5, 4]], [[3, 2, 1], [0, 0, 0]]], float)
    mask = np.ones(scores.shape, bool)
    assert global_(scores, mask, 5, 0).tolist() == [[3, 2], [0, 0]]
    assert global_(scores, mask, 5, 1).tolist() == [[2, 1], [1, 1]]
    assert global_(scores, mask, 3, 1).tolist() == [[0, 1], [1, 1]]  # not enough for the floor
    assert global_(np.zeros(mask.shape), mask, 5, 0).tolist() == [[1, 1], [1, 2]]


@given(cases())
def test_one_layer_makes_adaptive_and_global_the_same(case: Case) -> None:
    one = Case(case.scores[:1], case.contested[:1], case.total, case.floor)
    assert (adaptive_layer(*one) == global_(*one)).all()


@given(cases())
def test_one_layer_makes_pyramid_uniform(case: Case) -> None:
    one = Case(case.scores[:1], case.contested[:1], case.total, case.floor)
    assert (pyramid(*one) == uniform(*one)).all()


@given(cases())
def test_scores_play_no_part_in_uniform_and_pyramid(case: Case) -> None:
    for allocate in (uniform, pyramid):
        counts = allocate(*case)
        assert (allocate(-case.scores, case.contested, case.total, case.floor) == counts).all()


# --- refusals and names -----------------------------------------------------------------------


@every_allocator
def test_refuses_unusable_scores(allocate: Allocator) -> None:
    mask = np.ones((2, 2, 8), bool)
    for scores in (np.zeros((2, 8)), np.zeros((2, 2, 7)), np.zeros((2, 2, 8), int)):
        with pytest.raises(PolicyError, match=r"n_layer, n_head_kv, n_cells\], here \(2, 2, 8\)"):
            allocate(scores, mask, 4, 0)
    for bad in (np.nan, np.inf, -np.inf):
        scores = np.zeros(mask.shape)
        scores[1, 0, 5] = bad
        with pytest.raises(PolicyError, match=r"1 scores.*layer 1, head 0, cell 5"):
            allocate(scores, mask, 4, 0)


@every_allocator
@pytest.mark.parametrize(("total", "floor"), [(-1, 0), (4, -1)])
def test_refuses_negative_cells(allocate: Allocator, total: int, floor: int) -> None:
    shape = (2, 2, 8)
    with pytest.raises(BudgetError, match=f"total={total} and floor={floor}"):
        allocate(np.zeros(shape), np.ones(shape, bool), total, floor)


def test_names() -> None:
    assert list(ALLOCATORS) == ["uniform", "pyramid", "adaptive-layer", "global"]
    assert set(ALLOCATORS.values()) == set(SLOW)
    for name, allocate in ALLOCATORS.items():
        assert get_allocator(name) is allocate


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("globl", "'globl': did you mean 'global'"),
        ("Uniform", "did you mean 'uniform'"),
        ("adaptive_layer", "did you mean 'adaptive-layer'"),
        ("pyramidkv", "did you mean 'pyramid'"),
        ("xyz", "'xyz': There are uniform, pyramid, adaptive-layer, global"),
        ("", "'': There are uniform"),
    ],
)
def test_unknown_names(name: str, says: str) -> None:
    with pytest.raises(BudgetError, match=says):
        get_allocator(name)


# --- pools ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(ALLOCATORS))
def test_every_pool_keeps_to_its_own_budget(name: str) -> None:
    """Rows cannot move between devices, however much more the heads of one of them want."""
    rng = np.random.default_rng(3)
    scores = rng.random((5, 2, 200)).astype(np.float32)
    scores[1] *= 100
    pools = np.array([1, 0, 1, 0, 0])
    contested = np.ones(scores.shape, bool)
    contested[..., :4] = contested[..., -32:] = False
    n_always = np.full((5, 2), 36)
    counts = share_out(name, scores, contested, n_always, pools, 80, 0.2)
    for pool in (0, 1):
        layers = pools == pool
        assert counts[layers].sum() == 80 * counts[layers].size
        alone = share_out(
            name, scores[layers], contested[layers], n_always[layers], pools[layers], 80, 0.2
        )
        assert (counts[layers] == alone).all()
    assert counts.min() >= 36 + int(0.2 * 44)
    if name == "global":
        assert counts[1].min() > 80 > counts[0].mean() - 1


# --- the longest head -------------------------------------------------------------------------


# Lengths at which the limit begins take arrays of a million; a loaded machine is no fault.
@settings(max_examples=30, deadline=None)
@given(
    held=st.lists(st.integers(0, 60), min_size=1, max_size=12),
    budget=st.integers(1, 40),
    name=st.sampled_from(list(ALLOCATORS)),
    seed=st.integers(0, 2**32 - 1),
)
def test_no_head_grows_with_the_text(held: list[int], budget: int, name: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    unit = SHORT // 8
    budget *= unit // 4
    sizes = np.array(held)[:, None] * unit  # one head a layer
    cells = np.arange(60 * unit) >= 60 * unit - sizes[..., None]
    scores = rng.random(cells.shape) ** 9 * 10.0 ** rng.integers(0, 6, sizes.shape)[..., None]
    nothing = np.zeros_like(sizes)
    counts = share_out(name, scores, cells, nothing, np.zeros(len(held), int), budget, 0.2)
    total = min(budget * len(held), int(sizes.sum()))
    assert counts.sum() == total
    # More than that only if the others hold too little, and then as equally as can be.
    ceiling = max(LONGEST * budget, SHORT)
    others = np.minimum(sizes, ceiling).sum()
    assert (counts <= sizes).all()
    assert (counts <= ceiling).all() or others <= total + len(held)


def test_a_head_that_wants_everything_gets_its_multiple() -> None:
    scores = np.ones((20, 1, 20 * SHORT))
    scores[3] = 9
    nothing, one_pool, all_ = np.zeros((20, 1), int), np.zeros(20, int), np.ones(scores.shape, bool)
    for budget, most in ((SHORT, LONGEST * SHORT), (SHORT // 16, SHORT)):
        counts = share_out("global", scores, all_, nothing, one_pool, budget, 0.2)
        assert counts[3, 0] == most
