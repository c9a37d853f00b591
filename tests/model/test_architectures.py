"""What the native eviction takes and what it refuses, on tiny models with random weights."""

from __future__ import annotations

import collections
import copy
import json
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest

from capkv_local import (
    BudgetError,
    CapKVError,
    Llama,
    StateError,
    UnsupportedModel,
    native,
)
from capkv_local.budget.allocate import ALLOCATORS
from capkv_local.evaluate import reference
from capkv_local.native import Stat
from capkv_local.native import cache_type as cache_type_number
from capkv_local.policies import get_policy, policy_names
from tests.model import oracle, tiny
from tests.model.conftest import Load, Make, observe_of, recent_of

Array = np.ndarray[Any, Any]
TOKENS: list[int] = np.random.default_rng(0).integers(0, tiny.N_VOCAB, 3000).tolist()
QUIET: dict[str, Any] = {"verbose": False, "n_threads": 1, "n_threads_batch": 1}
# 256 cells, which is the least that llama.cpp allocates.
SMALL: dict[str, Any] = {"n_ctx": 4096, "n_batch": 64, "kv_budget": 64, "kv_room": 64, **QUIET}
N_CELLS = 256
N_PROMPT, N_KEEP, N_NEXT, N_WINDOW = 60, 24, 8, 16


def logits(llama: Any) -> Array:
    return np.ctypeslib.as_array(llama._ctx.get_logits(), (tiny.N_VOCAB,)).copy()


def one_by_one(llama: Any, tokens: list[int]) -> Array:
    """Logits behind each token, ``[n, n_vocab]``; public ``eval``, one token at a time."""
    rows = []
    for token in tokens:
        llama.eval([token])
        rows.append(logits(llama))
    return np.array(rows)


# -- refusals ------------------------------------------------------------------------------------

DECODERS = [
    (tiny.mamba, "recurrent"),
    (tiny.jamba, "recurrent"),
    (tiny.mpt, "ALiBi"),
    (tiny.qwen2vl, "M-RoPE"),
    (tiny.deepseek2, "MLA"),
    (tiny.deci, "differ between layers"),
    (tiny.openelm, "differ between layers"),
    (tiny.grok, "flash attention is off"),
]
REFUSED = [*DECODERS, (tiny.bert, "not causal"), (tiny.t5, "encoder")]


def _name(value: Any) -> str | None:
    return getattr(value, "__name__", None)


@pytest.mark.parametrize(("builder", "reason"), REFUSED, ids=_name)
# A budget in bytes and the trained context are only known once the model is loaded.
@pytest.mark.parametrize(
    "options", [{}, {"kv_budget": "64KiB", "n_ctx": 0}], ids=["cells", "bytes"]
)
def test_a_model_that_cannot_be_compacted_is_refused(
    make: Make,
    load: Load,
    builder: Callable[..., Path],
    reason: str,
    options: dict[str, Any],
) -> None:
    with pytest.raises(UnsupportedModel, match=reason) as caught:
        load(make(builder), kv_policy="capkv", **{**SMALL, **options})
    assert "kv_policy=None" in str(caught.value)
    usable = load(make(tiny.llama), kv_policy="streaming", **SMALL)
    usable.prefill(TOKENS[:300])
    assert np.isfinite(logits(usable)).all()


@pytest.mark.parametrize("flash_attn", [False, True])
@pytest.mark.parametrize("builder", [builder for builder, _ in REFUSED], ids=_name)
def test_a_refused_model_runs_on_the_stock_cache(
    make: Make, load: Load, builder: Callable[..., Path], flash_attn: bool
) -> None:
    options = {"n_ctx": 256, "flash_attn": flash_attn, **QUIET}
    ours = load(make(builder), kv_policy=None, **options)
    if builder in [decoder for decoder, _ in DECODERS]:
        stock = llama_cpp.Llama(str(make(builder)), **options)
        for llama in (ours, stock):
            llama.eval(TOKENS[:40])
        assert np.array_equal(logits(ours), logits(stock))
        stock.close()
    assert ours.n_vocab() == tiny.N_VOCAB


@pytest.mark.parametrize("kinds", [("type_k",), ("type_v",), ("type_k", "type_v")])
def test_a_head_that_is_not_made_of_blocks(make: Make, load: Load, kinds: tuple[str, ...]) -> None:
    """llama.cpp refuses these itself, with flash attention on."""
    options = {kind: cache_type_number("q4_0") for kind in kinds}
    with pytest.raises(UnsupportedModel, match="block size 32 does not divide"):
        load(make(tiny.llama, head_dim=48), **SMALL, **options)
    load(make(tiny.llama, head_dim=48), **SMALL).prefill(TOKENS[:300])


def test_advice_where_llama_cpp_switches_flash_attention_off(make: Make) -> None:
    with pytest.raises(UnsupportedModel) as caught:
        Llama(make(tiny.grok), flash_attn=True, **SMALL)
    assert "use flash_attn=True" not in str(caught.value)


def test_advice_where_blocks_do_not_fit(make: Make) -> None:
    with pytest.raises(UnsupportedModel) as caught:
        Llama(make(tiny.llama, head_dim=48), type_k=cache_type_number("q4_0"), **SMALL)
    assert "type_k" in str(caught.value) or "kv_policy=None" in str(caught.value)


# -- shapes that work ----------------------------------------------------------------------------

HEADS = {"MHA": (4, 4), "GQA": (4, 2), "MQA": (4, 1)}
TYPES = ["f16", "q8_0", "f32"]


def _shapes() -> Iterator[Any]:
    """Every head size with every layout of heads; cache types take turns."""
    for i, head_dim in enumerate((32, 64, 80, 96, 128, 256)):
        for j, (layout, (n_head, n_head_kv)) in enumerate(HEADS.items()):
            kind = TYPES[(i + j) % 3]
            if head_dim % 32 and kind == "q8_0":
                kind = "f16"
            options = {"head_dim": head_dim, "n_head": n_head, "n_head_kv": n_head_kv}
            yield pytest.param(tiny.llama, options, kind, kind, id=f"{head_dim}-{layout}-{kind}")
    mixed = {"head_dim": 64, "n_head": 4, "n_head_kv": 2}
    yield pytest.param(tiny.llama, mixed, "q8_0", "f16", id="64-GQA-q8_0-f16")
    for kind in ("f16", "f32"):
        yield pytest.param(tiny.deepseek2, {"mla": False}, kind, kind, id=f"48-and-32-{kind}")


def _check_statistics(llama: Any, n_cells: int) -> None:
    kv = llama._cache.kv
    info = kv.info()
    assert (info.n_cells, info.n_queries) == (n_cells, N_WINDOW)
    rng = np.random.default_rng(1)
    for stat in Stat:
        attention = stat <= Stat.ATTN_SQR
        anchor = stat in (Stat.ANCHOR_COS, Stat.ANCHOR_DOT)
        for per_head in (False, True) if attention else (False,):
            out = kv.score(
                stat, n_cells=n_cells, per_head=per_head, n_future=32 if anchor else 0, noise=1.0
            )
            n_rows = info.n_head if anchor or per_head else info.n_head_kv
            assert out.shape == (info.n_layer, n_rows, n_cells)
            assert np.isfinite(out).all(), stat.name
            assert np.ptp(out, axis=-1).min() > 0, stat.name
            if stat == Stat.ATTN_MEAN:
                # Attention is a distribution over the cells.
                assert np.allclose(out.sum(axis=-1), 1, atol=1e-3)
    for stat in (Stat.LEVERAGE_K, Stat.LEVERAGE_V):
        for n_rows in (info.n_head_kv, info.n_head):
            weights = rng.random((info.n_layer, n_rows, n_cells), dtype=np.float32)
            out = kv.score(stat, n_cells=n_cells, noise=0.5, weights=weights)
            assert out.shape == (info.n_layer, info.n_head_kv, n_cells)
            assert np.isfinite(out).all() and out.min() >= 0 and out.max() <= 1


@pytest.mark.parametrize(("builder", "options", "type_k", "type_v"), list(_shapes()))
def test_every_shape_of_heads(
    make: Make,
    load: Load,
    builder: Callable[..., Path],
    options: dict[str, Any],
    type_k: str,
    type_v: str,
) -> None:
    path = make(builder, **options)
    kinds = {"type_k": cache_type_number(type_k), "type_v": cache_type_number(type_v)}
    ours = load(path, kv_policy=get_policy("capkv", n_window=N_WINDOW), **SMALL, **kinds)
    # Everything a statistic can need is observed, whatever this policy needs.
    ours._cache.kv.observe(N_WINDOW, mean_query=True, n_skip=4)
    ours.eval(TOKENS[:N_PROMPT])
    kv = ours._cache.kv
    info = kv.info()
    _check_statistics(ours, N_PROMPT)

    shape = (info.n_layer, info.n_head_kv)
    keep = oracle.random_keep(np.random.default_rng(7), shape, N_PROMPT, N_KEEP)
    kv.evict(oracle.as_mask(keep, N_PROMPT))
    assert np.array_equal(kv.positions(), keep)
    _check_statistics(ours, N_KEEP)
    got = one_by_one(ours, TOKENS[N_PROMPT : N_PROMPT + N_NEXT])

    stock = load(path, kv_policy=None, flash_attn=True, n_ctx=N_CELLS, n_batch=64, **QUIET, **kinds)
    stock.eval(TOKENS[:N_PROMPT])
    state = oracle.read(stock._ctx.ctx)
    oracle.write(stock._ctx.ctx, oracle.evict(state, keep))
    expected = np.array(
        [
            _decode(stock, token, N_PROMPT + i)
            for i, token in enumerate(TOKENS[N_PROMPT : N_PROMPT + N_NEXT])
        ]
    )
    assert np.array_equal(got, expected)

    ours.reset()
    ours.prefill(TOKENS[:400])
    stats = ours.kv_stats()
    assert stats.evictions >= 2 and (stats.n_tokens, stats.n_cells) == (400, 64)
    assert np.isfinite(logits(ours)).all()


def _decode(llama: Any, token: int, position: int) -> Array:
    llama._batch.set_batch(batch=[token], n_past=position, logits_all=False)
    llama._ctx.decode(llama._batch)
    return logits(llama)


@pytest.mark.parametrize("head_dim", [32, 80, 256])
def test_statistics_of_the_rows_are_those_of_the_rows(
    make: Make, load: Load, head_dim: int
) -> None:
    """Against the float64 reference, on the rows that the public state gives."""
    kinds = {"type_k": cache_type_number("f32"), "type_v": cache_type_number("f32")}
    path = make(tiny.llama, head_dim=head_dim, n_head=4, n_head_kv=2)
    ours = load(path, kv_policy="random", **SMALL, **kinds)
    ours.eval(TOKENS[:N_PROMPT])
    stock = load(path, kv_policy=None, flash_attn=True, n_ctx=N_CELLS, n_batch=64, **QUIET, **kinds)
    stock.eval(TOKENS[:N_PROMPT])  # the same rows, in the layout that the oracle reads
    state = oracle.read(stock._ctx.ctx)
    # [n_layer, n_head_kv, n_cells, head_dim]
    k, v = (
        np.array([layer.view("<f4").reshape(N_PROMPT, 2, head_dim) for layer in rows]).swapaxes(
            1, 2
        )
        for rows in (state.k, state.v)
    )

    def score(stat: Stat, **options: Any) -> Array:
        out: Array = ours._cache.kv.score(stat, n_cells=N_PROMPT, **options)
        return out

    weights = np.random.default_rng(2).random((2, 4, N_PROMPT), dtype=np.float32)
    for got, expected in (
        (score(Stat.KEY_NORM), reference.norm(k)),
        (score(Stat.VALUE_NORM), reference.norm(v)),
        (score(Stat.KEY_COS), reference.key_cosine(k)),
        (score(Stat.LEVERAGE_K, noise=1.0), reference.leverage(k, None, 1.0)),
        (score(Stat.LEVERAGE_V, noise=0.3, weights=weights), reference.leverage(v, weights, 0.3)),
    ):
        assert np.allclose(got, expected, rtol=1e-3, atol=1e-4)


def test_attention_of_queries_older_than_every_cell(make: Make, load: Load) -> None:
    """Only without sinks: the budget is shorter than the observation window."""
    llama = load(make(tiny.llama), kv_policy="snapkv", **SMALL)
    llama.eval(TOKENS[:N_PROMPT])
    kv = llama._cache.kv
    info = kv.info()
    last = np.arange(N_PROMPT - 10, N_PROMPT, dtype=np.int32)
    keep = np.broadcast_to(last, (info.n_layer, info.n_head_kv, 10))
    kv.evict(oracle.as_mask(keep, N_PROMPT))
    assert np.isfinite(kv.score(Stat.ATTN_MEAN, n_cells=10)).all()


@pytest.mark.parametrize("allocation", list(ALLOCATORS))
@pytest.mark.parametrize(
    ("policy", "observe"),
    [(name, observe_of(name)) for name in policy_names() if name != "full"] + [("capkv", "probe")],
)
def test_every_policy_with_every_allocation(
    make: Make, load: Load, policy: str, observe: str, allocation: str
) -> None:
    path = make(tiny.llama, n_layer=3, n_head=6, n_head_kv=3)
    options = {"kv_policy": policy, "kv_allocation": allocation, "kv_observe": observe}
    llama = load(path, **options, **SMALL)
    n_recent = recent_of(policy, observe)
    for i in range(0, 1000, 250):  # each round starts from heads of unequal length
        llama.prefill(TOKENS[i : i + 250])
        info = llama._cache.kv.info()
        positions = llama.kv_positions()
        held = positions >= 0
        assert held.sum() == info.n_rows and info.n_held <= 64 + 32
        assert (np.diff(held.astype(int), axis=-1) >= 0).all()  # the last cells
        assert ((np.diff(positions, axis=-1) > 0) | ~held[..., :-1]).all()
        for head in positions.reshape(9, -1):
            assert head[head >= 0][:4].tolist() == [0, 1, 2, 3]
            assert head[-n_recent:].tolist() == list(range(i + 250 - n_recent, i + 250))
    assert llama.kv_stats().evictions >= 4
    assert np.isfinite(one_by_one(llama, TOKENS[1000:1010])).all()


# -- sliding windows -----------------------------------------------------------------------------

F32_CACHE = {"type_k": cache_type_number("f32"), "type_v": cache_type_number("f32")}


def test_only_full_attention_layers_are_compacted(make: Make, load: Load) -> None:
    llama = load(make(tiny.gemma3), kv_policy="capkv", **SMALL)
    info = llama._cache.kv.info()
    assert info.n_layer == 2 and info.n_bytes_other > 0
    llama.prefill(TOKENS[:500])
    stats = llama.kv_stats()
    assert stats.evictions >= 2 and (stats.n_tokens, stats.n_cells) == (500, 64)
    assert (llama.kv_positions() >= 0).sum() == 2 * 2 * 64
    assert stats.kv_bytes == info.n_bytes_kv + info.n_bytes_other
    assert np.isfinite(one_by_one(llama, TOKENS[500:510])).all()


@pytest.mark.parametrize("policy", ["capkv", "capkv-paper", "expected-attention"])
def test_sliding_windows_until_the_first_eviction(make: Make, load: Load, policy: str) -> None:
    ours = load(make(tiny.gemma3), kv_policy=policy, **{**SMALL, "kv_budget": 128})
    stock = load(
        make(tiny.gemma3), kv_policy=None, flash_attn=True, n_ctx=N_CELLS, n_batch=64, **QUIET
    )
    n = 144  # four windows and a half, and few enough that the prompt is not compacted at its end
    for llama in (ours, stock):
        llama.eval(TOKENS[:n])
    assert ours.kv_stats().evictions == 0
    assert np.array_equal(logits(ours), logits(stock))
    more = TOKENS[n : n + 20]
    assert np.array_equal(one_by_one(ours, more), one_by_one(stock, more))


def test_state_of_a_compacted_cache_with_sliding_windows(make: Make, load: Load) -> None:
    llama = load(make(tiny.gemma3), kv_policy="capkv", **SMALL, **F32_CACHE)
    llama.prefill(TOKENS[:500])
    state = llama.save_state()
    positions = llama.kv_positions()
    expected = one_by_one(llama, TOKENS[500:520])
    llama.reset()
    llama.prefill(TOKENS[1000:1300])
    llama.load_state(state)
    assert np.array_equal(llama.kv_positions(), positions)
    assert len(llama.save_state().llama_state) == len(state.llama_state)
    got = one_by_one(llama, TOKENS[500:520])
    # The window is a ring and a restored one begins at the first cell, in stock llama.cpp too:
    # sums are taken in another order.
    assert np.allclose(got, expected, atol=1e-3 * np.abs(expected).max())
    llama.load_state(state)
    assert np.array_equal(one_by_one(llama, TOKENS[500:520]), got)
    llama.prefill(TOKENS[520:900])
    assert 64 <= llama.kv_stats().n_cells <= 64 + 32  # half of the room may stay in use


def test_a_refused_removal_leaves_the_sliding_windows_alone(make: Make, load: Load) -> None:
    llama = load(make(tiny.gemma3), kv_policy="streaming", **SMALL)
    llama.prefill(TOKENS[:500])
    state = llama.save_state()
    llama.load_state(state)
    expected = one_by_one(llama, TOKENS[500:520])
    llama.load_state(state)
    for p0, p1 in ((100, -1), (100, 200), (430, -1), (-1, 490), (0, 499)):
        assert not llama._ctx.kv_cache_seq_rm(0, p0, p1)
    assert llama.save_state().llama_state == state.llama_state
    assert np.array_equal(one_by_one(llama, TOKENS[500:520]), expected)


@pytest.mark.parametrize("swa_full", [True, False])
def test_a_window_longer_than_the_cells(make: Make, load: Load, swa_full: bool) -> None:
    llama = load(make(tiny.gemma3, n_swa=512), kv_policy="streaming", swa_full=swa_full, **SMALL)
    llama.prefill(TOKENS[:600])
    assert llama.n_tokens == 600


def window_positions(llama: Any) -> set[int]:
    """Positions that the sliding-window layers still hold, from the public state."""
    data = native.get_state(llama._ctx.ctx)
    at = 4 + struct.unpack_from("<I", data)[0]  # name of the architecture
    held: set[int] = set()
    for _ in ("full", "sliding"):
        rows_per_head = struct.unpack_from("<I", data, at)[0] >> 31  # and nothing observed
        at += 4
        n_rows = []  # per head, or per cell in the sliding layers
        if rows_per_head:
            n_layer, n_head_kv, n_used, n_compact = struct.unpack_from("<4I", data, at + 12)
            at += 32
            for _ in range(n_layer * n_head_kv):
                first = struct.unpack_from("<I", data, at)[0]
                n_rows.append(n_used - first)
                at += 4 + 4 * max(0, n_compact - first)
            at += 4 + 8 * struct.unpack_from("<I", data, at)[0]  # what evictions took
        n_cells = struct.unpack_from("<I", data, at)[0]
        cells = np.frombuffer(data, "<i4", 3 * n_cells, at + 4).reshape(n_cells, 3)
        at += 4 + cells.nbytes
        held = set(cells[:, 0].tolist())
        if not rows_per_head:
            n_layer = struct.unpack_from("<II", data, at)[1]
            at += 8
        for i in range(2 * n_layer):
            layer = n_rows[i // 2 * n_head_kv :][:n_head_kv] if rows_per_head else [n_cells]
            at += 12 + sum(layer) * int(struct.unpack_from("<iQ", data, at)[1])
    assert at == len(data)
    return held


@pytest.mark.parametrize(
    ("n_swa", "n_question"),
    [(64, 20), (64, 32), (150, 32)],
)
def test_a_question_leaves_whole_windows(
    make: Make, load: Load, n_swa: int, n_question: int
) -> None:
    options = {**SMALL, "n_batch": 32, "kv_room": 160}
    llama = load(make(tiny.gemma3, n_swa=n_swa), kv_policy="streaming", **options)
    for i in range(0, 960, 32):
        llama.prefill(
            TOKENS[i : i + 32], observe="question", question=TOKENS[2000 : 2000 + n_question]
        )
        first = max(0, llama.n_tokens - n_swa + 1)
        assert set(range(first, llama.n_tokens)) <= window_positions(llama)
    assert llama.kv_stats().evictions >= 5


def test_a_question_that_would_cost_windows_is_refused(make: Make, load: Load) -> None:
    options = {**SMALL, "n_batch": 32, "kv_room": 160}
    llama = load(make(tiny.gemma3, n_swa=64), kv_policy="streaming", **options)
    with pytest.raises(BudgetError, match="n_ubatch"):
        llama.prefill(TOKENS[:300], observe="question", question=TOKENS[2000:2150])
    assert llama.n_tokens == 0


@pytest.mark.parametrize(
    ("n_swa", "n_back", "reloaded"),
    [
        (64, 130, False),
        (64, 60, True),
        (150, 130, False),
        (64, 100, True),
    ],
)
def test_taking_tokens_back_leaves_whole_windows(
    make: Make, load: Load, n_swa: int, n_back: int, reloaded: bool
) -> None:
    """As long as the eviction allows to go back, the sliding windows have to be there, too."""
    options = {**SMALL, "n_batch": 32, "kv_room": 100}
    llama = load(make(tiny.gemma3, n_swa=n_swa), kv_policy="streaming", **options)
    llama.prefill(TOKENS[:600])
    one_by_one(llama, TOKENS[600:640])
    if reloaded:
        llama.load_state(llama.save_state())
    one_by_one(llama, TOKENS[1000 : 1000 + n_back])
    if llama._ctx.kv_cache_seq_rm(0, 640, -1):
        assert set(range(641 - n_swa, 640)) <= window_positions(llama)


# -- damaged states ------------------------------------------------------------------------------

N_DAMAGED = 200


def damage(data: bytes, rng: np.random.Generator) -> bytes:
    """One damaged copy: a few bytes at the head, in our extension, at the tail, anywhere; or cut.

    All of the state is fair game: llama.cpp's own part throws, it does not abort.
    """
    n = len(data)
    # rows per head, observed, version, n_layer, n_head_kv
    extension = data.index(struct.pack("<5I", 1, 1, 3, 2, 2))
    regions = [(0, 300), (extension, extension + 1100), (n - 2000, n), (0, n)]
    kind = int(rng.integers(len(regions) + 1))
    if kind == len(regions):
        return data[: int(rng.choice([0, 3, int(rng.integers(300)), int(rng.integers(n)), n - 1]))]
    out = bytearray(data)
    first, end = regions[kind]
    for _ in range(int(rng.integers(1, 4))):
        at = int(rng.integers(first, end))
        out[at] = int(rng.choice([0, 1, 0x7F, 0x80, 0xFF, out[at] ^ 1 << int(rng.integers(8))]))
    return bytes(out)


def load_damaged_states(path: str) -> dict[str, int]:
    """Runs in a process of its own; prints nothing of its own but the number of each copy."""
    llama = Llama(path, kv_policy="capkv", **SMALL)
    llama.prefill(TOKENS[:400])
    state = llama.save_state()
    llama.load_state(state)
    expected = one_by_one(llama, TOKENS[400:404])
    llama.load_state(state)
    rng = np.random.default_rng(5)
    outcomes: collections.Counter[str] = collections.Counter()
    for i in range(N_DAMAGED):
        print(f"copy {i}", file=sys.stderr, flush=True)
        damaged = copy.copy(state)
        damaged.llama_state = damage(state.llama_state, rng)
        damaged.llama_state_size = len(damaged.llama_state)
        try:
            llama.load_state(damaged)
        except StateError:
            outcomes["refused"] += 1
            continue
        # What was taken can be wrong, but has to be safe to go on with: decode, score, evict.
        outcomes["taken"] += 1
        try:
            llama.prefill(TOKENS[400:410])
            llama.set_kv_budget(50)
        except CapKVError:
            outcomes["taken, then an error"] += 1
        llama.set_kv_budget(64)
    llama.load_state(state)
    outcomes["intact afterwards"] = int(
        np.array_equal(one_by_one(llama, TOKENS[400:404]), expected)
    )
    llama.close()
    return dict(outcomes)


def test_damaged_states_are_refused_or_taken_but_never_crash(make: Make) -> None:
    code = (
        "import json, sys; from tests.model.test_architectures import load_damaged_states; "
        "print(json.dumps(load_damaged_states(sys.argv[1])))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(make(tiny.llama))],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    outcomes = json.loads(done.stdout.splitlines()[-1])
    assert outcomes["refused"] + outcomes["taken"] == N_DAMAGED
    assert outcomes["refused"] >= 50 and outcomes["taken"] >= 20
    assert outcomes["intact afterwards"] == 1
