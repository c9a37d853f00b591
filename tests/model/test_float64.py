"""The float64 oracle against stock llama.cpp, which holds every cell, and how sharp it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest

from capkv_local.native import cache_type
from tests.model import tiny
from tests.model.conftest import decode
from tests.model.float64 import (
    F64,
    N_TILE,
    TOLERANCE,
    Float64Llama,
    as_stored,
    hadamard,
    relative_error,
)

TOKENS: list[int] = np.random.default_rng(0).integers(0, tiny.N_VOCAB, 400).tolist()
# Both of the kernel's paths, and 216 cells in the end.
CHUNKS = [N_TILE, 30, 1, 1, 1, 13, 1, 1, 40, N_TILE]
HEADS = [(4, 2), (2, 2), (4, 1), (6, 3)]


def model(folder: Path, **options: Any) -> Path:
    return tiny.llama(folder / "tiny.gguf", **options)


def stock_logits(path: Path, kv_type: str) -> list[F64]:
    """Logits of every token, ``[n, n_vocab]`` for each of :data:`CHUNKS`."""
    kind = cache_type(kv_type)
    llama = llama_cpp.Llama(
        str(path),
        n_ctx=256,
        n_batch=N_TILE,
        flash_attn=True,
        type_k=kind,
        type_v=kind,
        n_threads=1,
        n_threads_batch=1,
        verbose=False,
    )
    out, n_past = [], 0
    for n in CHUNKS:
        out.append(decode(llama, TOKENS[n_past : n_past + n], n_past))
        n_past += n
    llama.close()
    return out


def oracle_logits(oracle: Float64Llama) -> list[F64]:
    tokens = iter(TOKENS)
    return [oracle.decode_all([next(tokens) for _ in range(n)]) for n in CHUNKS]


@pytest.mark.parametrize("kv_type", list(TOLERANCE))
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("head_dim", [32, 64, 128, 256])
def test_full_cache_equals_stock_llama_cpp(
    tmp_path: Path, head_dim: int, heads: tuple[int, int], kv_type: str
) -> None:
    path = model(tmp_path, head_dim=head_dim, n_head=heads[0], n_head_kv=heads[1], n_layer=3)
    got = stock_logits(path, kv_type)
    expected = oracle_logits(Float64Llama(path, kv_type, sum_f16=True))
    assert max(map(relative_error, got, expected)) < TOLERANCE[kv_type]


@pytest.mark.parametrize("kv_type", ["q8_0", "q4_0"])
def test_nothing_but_rounding_is_left(tmp_path: Path, kv_type: str) -> None:
    """One layer: most decodes meet no number in the middle between two steps."""
    path = model(tmp_path, n_layer=1)
    expected = oracle_logits(Float64Llama(path, kv_type))
    errors = list(map(relative_error, stock_logits(path, kv_type), expected))
    assert np.median(errors) < 2e-6


def test_sums_in_f16_are_what_single_tokens_differ_by(tmp_path: Path) -> None:
    path = model(tmp_path, n_layer=2)
    got = stock_logits(path, "f16")
    errors = []
    for sum_f16 in (False, True):
        expected = oracle_logits(Float64Llama(path, "f16", sum_f16=sum_f16))
        single = [i for i, n in enumerate(CHUNKS) if n < N_TILE]
        errors.append(np.median([relative_error(got[i], expected[i]) for i in single]))
    assert errors[0] < 1e-2
    assert errors[1] < errors[0] / 3


# -- the oracle itself -----------------------------------------------------------------------------


def test_one_at_a_time_is_all_at_once(tmp_path: Path) -> None:
    path = model(tmp_path)
    together, single = Float64Llama(path, "q8_0"), Float64Llama(path, "q8_0")
    expected = together.decode_all(TOKENS[:50])
    got = np.array([single.decode([token]) for token in TOKENS[:50]])
    assert np.allclose(got, expected, rtol=0, atol=1e-9 * np.abs(expected).max())


def test_an_evicted_token_leaves_its_trace_in_later_ones_only(tmp_path: Path) -> None:
    path = model(tmp_path)
    full, evicted = Float64Llama(path), Float64Llama(path)
    for oracle in (full, evicted):
        oracle.decode(TOKENS[:20])
    keep = evicted.held.copy()
    keep[0, 0, 3] = False
    evicted.evict(keep)
    for oracle in (full, evicted):
        oracle.decode(TOKENS[20:30])
    for i in range(full.n_layer):
        assert np.array_equal(full.k[i][:20], evicted.k[i][:20])
    assert np.array_equal(full.k[0], evicted.k[0])
    assert not np.array_equal(full.k[1][20:], evicted.k[1][20:])


def test_copies_and_tokens_taken_back(tmp_path: Path) -> None:
    oracle = Float64Llama(model(tmp_path))
    oracle.decode(TOKENS[:20])
    saved = oracle.copy()
    expected = oracle.decode(TOKENS[20:30])
    oracle.evict(oracle.held & (np.arange(30) % 3 == 0))
    oracle.decode(TOKENS[40:50])
    assert saved.n_tokens == 20 and saved.held.all()
    assert np.array_equal(saved.copy().decode(TOKENS[20:30]), expected)
    saved.decode(TOKENS[50:60])
    saved.truncate(20)
    assert np.array_equal(saved.decode(TOKENS[20:30]), expected)


def test_positions_are_right_aligned(tmp_path: Path) -> None:
    oracle = Float64Llama(model(tmp_path, n_layer=1))
    assert oracle.positions().shape == (1, 2, 0)
    oracle.decode(TOKENS[:5])
    oracle.evict(np.array([[[True, False, True, False, True], [False] * 4 + [True]]]))
    oracle.decode(TOKENS[5:6])
    assert oracle.positions().tolist() == [[[0, 2, 4, 5], [-1, -1, 4, 5]]]


@pytest.mark.parametrize("size", [64, 128])
def test_hadamard_is_its_own_inverse(size: int) -> None:
    x = np.random.default_rng(0).standard_normal((3, 2, 128))
    rotated = hadamard(x, size)
    assert np.allclose(hadamard(rotated, size), x)
    assert np.allclose(np.linalg.norm(rotated, axis=-1), np.linalg.norm(x, axis=-1))
    # Row 0 of the matrix is constant.
    assert np.isclose(rotated[0, 0, 0], x[0, 0, :size].sum() / np.sqrt(size))


@pytest.mark.parametrize("kv_type", list(TOLERANCE))
def test_stored_rows_do_not_change_when_stored_again(kv_type: str) -> None:
    rows = as_stored(np.random.default_rng(0).standard_normal((7, 2, 64)), kv_type)
    again = as_stored(rows, kv_type)
    step = 0 if kv_type in ("f32", "f16", "bf16") else 1e-3  # the scale of a block is an f16
    assert np.allclose(again, rows, rtol=step, atol=0)


@pytest.mark.parametrize(("kv_type", "share"), [("f16", 1.0), ("q8_0", 0.8), ("q4_0", 0.3)])
def test_one_wrong_row_shows_in_the_probe(tmp_path: Path, kv_type: str, share: float) -> None:
    """A cell more or less in one head, twelve tokens ago or more: seen by as many as ``share``."""
    path = model(tmp_path)
    rng = np.random.default_rng(3)
    seen = []
    for _ in range(40):
        oracle = Float64Llama(path, kv_type)
        oracle.decode(TOKENS[:110])
        keep = rng.random(oracle.held.shape) < rng.random((*oracle.held.shape[:2], 1))
        keep[..., -1] = True
        oracle.evict(keep)
        wrong = oracle.copy()
        wrong.held = wrong.held.copy()
        wrong.held[rng.integers(2), rng.integers(2), rng.integers(109)] ^= True
        for each in (oracle, wrong):
            each.decode(TOKENS[110:122])
        probe = TOKENS[200 : 200 + N_TILE]
        seen.append(
            relative_error(wrong.decode_all(probe), oracle.decode_all(probe)) > TOLERANCE[kv_type]
        )
    assert np.mean(seen) >= share
