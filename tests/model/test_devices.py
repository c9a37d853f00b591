"""The cache in the memory of a device: everything is as on the CPU.

What the CPU does is proven elsewhere, against the float64 reference and the oracle. Here two
sessions do the same, one on the CPU and one on the device of :mod:`tests.model.device`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from capkv_local import BudgetError, Llama, UnsupportedModel, native
from capkv_local.native import Stat
from capkv_local.native import cache_type as cache_type_number
from tests.model import near_ties, oracle, tiny
from tests.model.conftest import Load, Make, observe_of
from tests.model.device import Place, Places

Array = np.ndarray[Any, Any]
TOKENS: list[int] = np.random.default_rng(0).integers(0, tiny.N_VOCAB, 3000).tolist()
QUIET: dict[str, Any] = {"verbose": False, "n_threads": 1, "n_threads_batch": 1}
SMALL: dict[str, Any] = {"n_ctx": 4096, "n_batch": 64, "kv_budget": 64, "kv_room": 64, **QUIET}
MODEL: dict[str, Any] = {"n_layer": 3, "n_head": 6, "n_head_kv": 3}
N_TEXT = 500


@pytest.fixture(scope="module")
def places() -> Iterator[Places]:
    opened = Places()
    yield opened
    opened.close()


@pytest.fixture
def device(places: Places) -> Place:
    return places.one()


def kinds(name: str) -> dict[str, int]:
    return {"type_k": cache_type_number(name), "type_v": cache_type_number(name)}


def logits(llama: Any) -> Array:
    return np.ctypeslib.as_array(llama._ctx.get_logits(), (llama.n_vocab(),)).copy()


def close(got: Array, expected: Array, share: float) -> None:
    """Within a share of the largest."""
    np.testing.assert_allclose(got, expected, rtol=0, atol=share * np.abs(expected).max())


def both(load: Load, path: Path, device: Place, **options: Any) -> tuple[Any, Any]:
    """The same session on the CPU and on the device."""
    cpu = load(path, **{**SMALL, **options})
    return cpu, load(path, **{**SMALL, **options, **device.options})


def same_cells(cpu: Any, other: Any, n_tokens: int) -> None:
    """Read on the CPU, and have the same cells and queries in both."""
    cpu.prefill(TOKENS[:n_tokens])
    state = cpu.save_state()
    # Restored, a sliding window begins at the first cell: sums are taken in that order in both.
    for llama in (cpu, other):
        llama.load_state(state)


# -- where it is ---------------------------------------------------------------------------------


def test_the_cache_is_not_in_our_memory(
    make: Make, load: Load, device: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    """Else all that follows would compare the CPU with itself."""
    load(make(tiny.llama, **MODEL), **{**SMALL, **device.options, "verbose": True})
    load(make(tiny.llama, **MODEL), **SMALL).close()  # quiet again
    lines = [line for line in capsys.readouterr().err.splitlines() if "KV buffer size" in line]
    assert lines and not any("CPU KV buffer" in line for line in lines), lines


# -- statistics ----------------------------------------------------------------------------------

ATTENTION = [Stat.ATTN_MEAN, Stat.ATTN_MAX, Stat.ATTN_SQR]


@pytest.mark.parametrize("kept", ["all", "uniform", "ragged"])
@pytest.mark.parametrize("kind", ["f16", "f32", "q8_0", "q4_0"])
def test_every_statistic(make: Make, load: Load, device: Place, kind: str, kept: str) -> None:
    cpu, other = both(load, make(tiny.llama, **MODEL), device, **kinds(kind))
    for llama in (cpu, other):
        llama._cache.kv.observe(16, mean_query=True, n_skip=4)
    same_cells(cpu, other, 60)
    if kept != "all":
        mask = keep(cpu, ragged=kept == "ragged")
        for llama in (cpu, other):
            llama._cache.kv.evict(mask)
    kv = cpu._cache.kv
    n_cells, info = kv.info().n_cells, kv.info()
    rng = np.random.default_rng(3)
    per_kv, per_q = (
        rng.random((info.n_layer, n, n_cells), np.float32) for n in (info.n_head_kv, info.n_head)
    )
    per_head: dict[str, Any] = {"per_head": True}
    few: dict[str, Any] = {"n_queries": 7}
    weighted: tuple[dict[str, Any], ...] = (
        {"noise": 1.0},
        *({"noise": 0.3, "weights": w} for w in (per_kv, per_q)),
    )
    asked: list[tuple[Stat, dict[str, Any]]] = [
        *((stat, options) for stat in ATTENTION for options in ({}, per_head, few)),
        *((stat, {"n_future": 64}) for stat in (Stat.ANCHOR_COS, Stat.ANCHOR_DOT)),
        *((stat, {}) for stat in (Stat.KEY_NORM, Stat.VALUE_NORM, Stat.KEY_COS)),
        *((stat, options) for stat in (Stat.LEVERAGE_K, Stat.LEVERAGE_V) for options in weighted),
    ]
    assert {stat for stat, _ in asked} == set(Stat)
    for stat, options in asked:
        got, expected = (
            llama._cache.kv.score(stat, n_cells=n_cells, **options) for llama in (cpu, other)
        )
        assert np.isfinite(got).all()
        # The same rows and queries. Sums of float32 in another order, for keys and values of 32
        # numbers: 1e-6. Products of f16 in f16: 1e-3.
        close(got, expected, min(device.drift, 2e-3))


@pytest.mark.parametrize("kept", ["all", "uniform", "ragged"])
@pytest.mark.parametrize("kind", ["f16", "f32", "q8_0", "q4_0"])
def test_attention_that_is_added_up(
    make: Make, load: Load, device: Place, kind: str, kept: str
) -> None:
    cpu, other = both(load, make(tiny.llama, **MODEL), device, **kinds(kind))
    same_cells(cpu, other, 60)
    if kept != "all":
        mask = keep(cpu, ragged=kept == "ragged")
        for llama in (cpu, other):
            llama._cache.kv.evict(mask)
    n_cells = cpu._cache.kv.info().n_cells
    for stat in ATTENTION:
        added = []
        for llama in (cpu, other):
            kv = llama._cache.kv
            kv.add_attention(stat, 70)  # not by the first ten
            llama._decode_chunk(TOKENS[60:100])
            added.append(kv.attention(n_cells))
            kv.stop_attention()
            llama._ctx.kv_cache_seq_rm(-1, 60, -1)
            llama.n_tokens = 60
        assert added[0].any() and np.isfinite(added[1]).all()
        # Queries of hidden states that differ by the drift: as for statistics.
        close(added[1], added[0], min(device.drift, 2e-3))


def keep(llama: Any, *, ragged: bool) -> Any:
    rng = np.random.default_rng(11)
    held = llama.kv_positions() >= 0
    if ragged:
        return oracle.random_mask(rng, held)
    return oracle.as_mask(oracle.random_keep(rng, held.shape[:2], 60, 24), 60)


# -- eviction ------------------------------------------------------------------------------------


@pytest.mark.parametrize("ragged", [False, True], ids=["uniform", "ragged"])
@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0", "q5_1", "q4_0", "iq4_nl"])
@pytest.mark.parametrize("builder", [tiny.llama, tiny.gemma3])
def test_rows_move_as_they_are(
    make: Make, load: Load, device: Place, builder: Any, kind: str, ragged: bool
) -> None:
    cpu, other = both(load, make(builder), device, **kinds(kind))
    same_cells(cpu, other, 60)
    mask = keep(cpu, ragged=ragged)
    for llama in (cpu, other):
        llama._cache.kv.evict(mask)
    assert native.get_state(other._ctx.ctx) == native.get_state(cpu._ctx.ctx)
    for token in TOKENS[60:70]:
        got, expected = (decoded(llama, token) for llama in (other, cpu))
        close(got, expected, device.drift)
    # A second time: from heads of unequal length, with new rows in them.
    held = cpu.kv_positions() >= 0
    mask = oracle.random_mask(np.random.default_rng(12), held)
    for llama in (cpu, other):
        llama._cache.kv.evict(mask)
    assert np.array_equal(other.kv_positions(), cpu.kv_positions())
    got, expected = (decoded(llama, TOKENS[70]) for llama in (other, cpu))
    close(got, expected, device.drift)


def decoded(llama: Any, token: int) -> Array:
    llama.eval([token])
    return logits(llama)


# -- keep lists ----------------------------------------------------------------------------------

POLICIES = [
    *(("capkv", allocation, "tail") for allocation in ("uniform", "global")),
    ("capkv", "global", "probe"),
    *((name, "uniform", observe_of(name)) for name in ("snapkv", "capkv-paper", "keydiff")),
    *((name, "uniform", observe_of(name)) for name in ("expected-attention", "tova", "knorm")),
    ("kvzip", "adaptive-layer", "probe"),
]


@pytest.mark.parametrize(("policy", "allocation", "observe"), POLICIES)
@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_keep_lists_of_the_same_cells(
    make: Make, load: Load, device: Place, kind: str, policy: str, allocation: str, observe: str
) -> None:
    """The scores are all that differs."""
    options = {"kv_policy": policy, "kv_allocation": allocation, "kv_observe": observe}
    cpu, other = both(load, make(tiny.llama, **MODEL), device, **options, **kinds(kind))
    same_cells(cpu, other, 120)
    ties = near_ties.in_step(cpu, other, TOKENS[120:300])
    if device.drift <= near_ties.RTOL:
        print(near_ties.check(ties))  # decoding differs no more than that, either
    else:
        print(near_ties.check(ties[:1]), "; later:", *ties[1:])


@pytest.mark.parametrize("kind", ["f16", "q8_0"])
@pytest.mark.parametrize("observe", ["tail", "probe"])
@pytest.mark.parametrize("builder", [tiny.llama, tiny.gemma3])
def test_a_text_streams_through_a_small_cache(
    make: Make, load: Load, device: Place, builder: Any, observe: str, kind: str
) -> None:
    # A probe of 256 tokens needs as many cells, with sliding windows within one batch.
    n_batch = {"tail": 64, "probe": 320}[observe]
    options = {"kv_observe": observe, "n_batch": n_batch, **kinds(kind)}
    cpu, other = both(load, make(builder), device, **options)
    ties = near_ties.in_step(cpu, other, TOKENS[:1000])
    print(near_ties.check(ties, max(near_ties.RTOL, device.drift)))
    assert len(ties) >= 2
    close(logits(other), logits(cpu), device.drift)
    stats = other.kv_stats()
    # On a device, heads begin at aligned addresses: every 32nd row of 34 bytes.
    assert stats.n_cells == 64
    assert 0 <= stats.kv_bytes - cpu.kv_stats().kv_bytes <= 31 / 128 * stats.kv_bytes


# -- what is saved -------------------------------------------------------------------------------


@pytest.mark.parametrize("builder", [tiny.llama, tiny.gemma3])
def test_a_state_goes_from_device_to_cpu_and_back(
    make: Make, load: Load, device: Place, builder: Any
) -> None:
    cpu, other = both(load, make(builder), device)
    other.prefill(TOKENS[:N_TEXT])
    state = other.save_state()
    positions = other.kv_positions()
    for llama in (cpu, other):
        llama.reset()
        llama.prefill(TOKENS[1000:1200])
        llama.load_state(state)
        assert np.array_equal(llama.kv_positions(), positions)
    got, expected = (decoded(llama, 3) for llama in (cpu, other))
    close(got, expected, device.drift)
    state = cpu.save_state()
    for llama in (cpu, other):
        llama.load_state(state)
    got, expected = (decoded(llama, 5) for llama in (cpu, other))
    close(got, expected, device.drift)


def test_the_budget_changes_in_the_middle(make: Make, load: Load, device: Place) -> None:
    """Memory of the device is freed and taken while graphs of earlier decodes are known there."""
    cpu, other = both(load, make(tiny.llama, **MODEL), device, kv_allocation="uniform")
    for llama in (cpu, other):
        for i, budget in enumerate((40, 128, 64, 50)):
            llama.prefill(TOKENS[i * 200 : i * 200 + 200])
            decoded(llama, 1)
            llama.set_kv_budget(budget)
            decoded(llama, 2)
    if device.drift <= near_ties.RTOL:
        assert np.array_equal(other.kv_positions(), cpu.kv_positions())
        close(logits(other), logits(cpu), device.drift)
    assert np.isfinite(logits(other)).all()
    other.reset()
    other.prefill(TOKENS[:N_TEXT])
    assert other.kv_stats().n_cells == 50


# -- a part of the layers ------------------------------------------------------------------------


@pytest.mark.parametrize("builder", [tiny.llama, tiny.gemma3])
@pytest.mark.parametrize("n_gpu_layers", [0, 1, 2, 3])
def test_a_part_of_the_layers(
    make: Make, load: Load, device: Place, builder: Any, n_gpu_layers: int
) -> None:
    path = make(builder, n_layer=4)
    place = Place(device.name, {**device.options, "n_gpu_layers": n_gpu_layers}, device.drift)
    check_split(load, path, place)


@pytest.mark.parametrize("builder", [tiny.llama, tiny.gemma3])
def test_two_devices(make: Make, load: Load, places: Places, builder: Any) -> None:
    check_split(load, make(builder, n_layer=4), places.two(), n_pools=2)


def check_split(load: Load, path: Path, place: Place, n_pools: int = 1) -> None:
    # On one device all heads share one budget, on two only those of a device do: only equal
    # heads can be compared.
    cpu, other = both(load, path, place, kv_allocation="uniform")
    assert other._cache.kv.pools().max() + 1 >= n_pools
    ties = near_ties.in_step(cpu, other, TOKENS[:N_TEXT])
    print(near_ties.check(ties, max(near_ties.RTOL, place.drift)))
    close(logits(other), logits(cpu), place.drift)

    other = load(path, **SMALL, **place.options)  # global
    other.prefill(TOKENS[:N_TEXT])
    held = (other.kv_positions() >= 0).sum(axis=-1)
    pools = other._cache.kv.pools()
    for pool in np.unique(pools):
        assert held[pools == pool].mean() <= 64
    assert other.kv_stats().evictions >= 2
    assert np.isfinite(decoded(other, 3)).all()


def test_the_cache_stays_here_if_asked(make: Make, load: Load, device: Place) -> None:
    place = Place(device.name, {**device.options, "offload_kqv": False}, device.drift)
    check_split(load, make(tiny.llama, **MODEL), place)
    check_split(load, make(tiny.gemma3), place)


# -- how often scores are taken -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "room"),
    [({}, 1792), ({"n_gpu_layers": 1}, 1792), ({"n_gpu_layers": 0}, 256), ({"kv_room": 64}, 64)],
)
def test_the_room_is_larger_with_layers_on_a_device(
    make: Make, load: Load, device: Place, options: dict[str, Any], room: int
) -> None:
    settings = {name: value for name, value in SMALL.items() if name != "kv_room"}
    llama = load(make(tiny.llama, **MODEL), **{**settings, **device.options, **options})
    assert llama.kv_room == room
    stats = llama.kv_stats()
    assert stats.n_cells_max == 64 + 64 + room == llama._settings.n_cells(64)
    llama.prefill(TOKENS[:2500])
    evictions = llama.kv_stats().evictions
    assert evictions == 1 if room == 1792 else evictions >= 2500 // (64 + room)


def test_leverage_ops_of_all_heads_are_neighbours(
    make: Make,
    load: Load,
    device: Place,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Those of unequal length share launches where nothing reads a result in between."""
    monkeypatch.setenv("GGML_SCHED_DEBUG", "2")
    options = {**SMALL, **device.options, "verbose": True}
    llama = load(make(tiny.llama, **MODEL), **options)
    llama.prefill(TOKENS[:60])
    kv = llama._cache.kv
    kv.evict(keep(llama, ragged=True))
    n_cells, info = kv.info().n_cells, kv.info()
    n_heads = info.n_layer * info.n_head_kv
    n_lengths = len({int(n) for n in (llama.kv_positions() >= 0).sum(-1).ravel()})
    assert n_lengths > n_heads // 2  # so that hardly any share an op
    capfd.readouterr()
    kv.score(Stat.LEVERAGE_V, n_cells=n_cells, noise=1.0)
    load(make(tiny.llama, **MODEL), **SMALL).close()  # quiet again
    ops = [line for line in capfd.readouterr().err.splitlines() if line.startswith("node #")]
    is_ours = ["LEVERAGE" in line for line in ops]
    assert n_lengths <= sum(is_ours) <= n_heads
    first = is_ours.index(True)
    assert all(is_ours[first : first + sum(is_ours)])


# -- what is refused -----------------------------------------------------------------------------


def test_heads_shared_out_over_devices_are_refused(make: Make, device: Place) -> None:
    with pytest.raises(UnsupportedModel, match="kv_policy=None"):
        Llama(make(tiny.llama), split_mode=3, **SMALL, **device.options)


def test_an_automatic_budget_knows_no_device_memory(make: Make, device: Place) -> None:
    with pytest.raises(BudgetError, match="name a number"):
        Llama(make(tiny.llama), **{**SMALL, "kv_budget": "auto"}, **device.options)
