"""The float64 oracle: against kvpress' recorded scores, and against its own mathematics."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from capkv_local.evaluate import reference
from tests.golden.array_stats import GOLDEN, golden_raw, golden_scores


@pytest.fixture(scope="module")
def raw() -> dict[str, Any]:
    return golden_raw()


@pytest.fixture(scope="module")
def scores(raw: dict[str, Any]) -> dict[str, np.ndarray]:
    """By policy, of the layers in `raw`: [n_raw_layers, n_head_kv, n_tokens]."""
    return golden_scores(raw["meta"]["raw_layers"])


def close(ours: np.ndarray, theirs: np.ndarray, tolerance: float = 1e-5) -> None:
    """Relative to each value, but no tighter than float32 rounding of the layer's largest."""
    atol = 1e-7 * float(np.abs(theirs).max())
    np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=atol)


# --- against kvpress ---------------------------------------------------------------------------


def test_golden_files_stay_small_and_say_how_to_read_them(raw: dict[str, Any]) -> None:
    assert all(file.stat().st_size < 1.5e6 for file in GOLDEN.glob("*.npz"))
    assert "permute" in raw["meta"]["note"]


def test_capkv_paper(raw: dict[str, Any], scores: dict[str, np.ndarray]) -> None:
    n = len(raw["tokens"])
    ours = reference.capkv_paper_score(raw["mean_query"], raw["k"], raw["v"], n, raw["inv_freq"])
    close(ours, scores["capkv-paper"][..., 4:])


def test_window_attention_is_snapkvs_before_its_pool(
    raw: dict[str, Any], scores: dict[str, np.ndarray]
) -> None:
    n, window, pool = len(raw["tokens"]), raw["meta"]["window"], raw["meta"]["snapkv_pool"]
    a = reference.window_attention(
        raw["window_query"], raw["k"], np.arange(n - window, n), np.arange(n), scale=64**-0.5
    )[..., : n - window]
    pooled = np.apply_along_axis(lambda row: np.convolve(row, np.ones(pool) / pool, "same"), -1, a)
    close(pooled, scores["snapkv"][..., : n - window])


def test_last_query_is_tovas(raw: dict[str, Any], scores: dict[str, np.ndarray]) -> None:
    n = len(raw["tokens"])
    a = reference.window_attention(
        raw["window_query"][..., -1:, :], raw["k"], np.array([n - 1]), np.arange(n), 64**-0.5
    )
    theirs = scores["tova"][..., :-1]
    close(np.broadcast_to(a.mean(axis=1, keepdims=True), a.shape)[..., :-1], theirs)


def test_anchor_is_expected_attentions_logit(
    raw: dict[str, Any], scores: dict[str, np.ndarray]
) -> None:
    n = len(raw["tokens"])
    logit = reference.anchor(raw["mean_query"], raw["k"], n, raw["inv_freq"], kind="dot")[..., 4:]
    a = np.exp(logit)
    a = (a / a.sum(axis=-1, keepdims=True)).reshape(-1, 3, 3, n - 4).mean(axis=2)
    theirs = scores["expected-attention"][..., 4:]
    close(a * reference.norm(raw["v"])[..., 4:], theirs)


def test_key_norm_and_cosine(raw: dict[str, Any], scores: dict[str, np.ndarray]) -> None:
    close(-reference.norm(raw["k"]), scores["knorm"])
    close(-reference.key_cosine(raw["k"]), scores["keydiff"])


# --- its own mathematics -----------------------------------------------------------------------

unit_floats = st.floats(-4, 4, width=32)


@st.composite
def leverage_cases(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, float]:
    """u [n_head_kv, n, d], w [n_head, n] with zeros among them, noise."""
    n_head_kv, group, n, d = (draw(st.integers(1, top)) for top in (2, 3, 12, 6))
    u = draw(hnp.arrays(np.float64, (n_head_kv, n, d), elements=unit_floats))
    weights = st.one_of(st.just(0.0), st.floats(1e-6, 100))
    w = draw(hnp.arrays(np.float64, (n_head_kv * group, n), elements=weights))
    return u, w, draw(st.floats(1e-3, 100))


@given(leverage_cases())
def test_leverage_is_a_share_and_sums_to_the_effective_dimension(
    case: tuple[np.ndarray, np.ndarray, float],
) -> None:
    u, w, noise = case
    n_head_kv, n, d = u.shape
    s = reference.leverage(u, w, noise)
    assert s.shape == (n_head_kv, n)
    assert (s >= 0).all()
    assert (s < 1).all()
    expected = []
    for head, weights in enumerate(w):
        of_head = u[head // (len(w) // n_head_kv)]
        scaled = np.sqrt(weights)[:, None] * of_head
        a = noise * np.eye(d) + scaled.T @ scaled
        expected.append(d - noise * np.trace(np.linalg.inv(a)))
        assert expected[-1] <= np.linalg.matrix_rank(scaled, tol=1e-9) + 1e-6
    per_kv_head = np.reshape(expected, (n_head_kv, -1)).mean(axis=1)
    np.testing.assert_allclose(s.sum(axis=-1), per_kv_head, rtol=1e-6, atol=1e-6)


@given(leverage_cases(), st.floats(0.1, 10))
def test_leverage_depends_on_weight_over_noise_alone(
    case: tuple[np.ndarray, np.ndarray, float], factor: float
) -> None:
    u, w, noise = case
    scaled = reference.leverage(u, w * factor, noise * factor)
    np.testing.assert_allclose(scaled, reference.leverage(u, w, noise), rtol=1e-6, atol=1e-12)


@given(leverage_cases())
def test_leverage_is_the_capacity_a_cell_adds(case: tuple[np.ndarray, np.ndarray, float]) -> None:
    """-log(1 - s_i) is what log det loses when cell i goes: the paper's marginal gain."""
    u, w, noise = case
    u, w = u[:1], w[:1]

    def capacity(weights: np.ndarray) -> float:
        scaled = np.sqrt(weights)[:, None] * u[0]
        return float(np.linalg.slogdet(np.eye(u.shape[2]) + scaled.T @ scaled / noise)[1])

    s = reference.leverage(u, w, noise)[0]
    for i in range(u.shape[1]):
        without = w[0].copy()
        without[i] = 0
        lost = capacity(w[0]) - capacity(without)
        np.testing.assert_allclose(-np.log1p(-s[i]), lost, rtol=1e-4, atol=1e-7)


def test_leverage_without_weights_and_with_large_noise() -> None:
    u = np.random.default_rng(1).normal(size=(2, 20, 5))
    ones = np.ones((2, 20))
    np.testing.assert_allclose(reference.leverage(u), reference.leverage(u, ones), rtol=1e-12)
    noisy = reference.leverage(u, ones, noise=1e8) * 1e8
    np.testing.assert_allclose(noisy, (u**2).sum(axis=-1), rtol=1e-5)


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 3]))
def test_window_attention_against_a_loop(seed: int, group: int) -> None:
    rng = np.random.default_rng(seed)
    n_head_kv, n, n_q, d = 2, 9, 4, 6
    q = rng.normal(size=(n_head_kv * group, n_q, d))
    k = rng.normal(size=(n_head_kv, n, d))
    # Survivors of an eviction: every head holds other tokens; the window's own are the last.
    k_pos = np.sort([rng.choice(20, n, replace=False) for _ in range(n_head_kv)], axis=-1)
    k_pos[:, -n_q:] = q_pos = np.arange(20, 20 + n_q)
    a = np.zeros((n_head_kv * group, n_q, n))
    for h in range(n_head_kv * group):
        for i in range(n_q):
            seen = k_pos[h // group] <= q_pos[i]
            e = np.where(seen, np.exp(0.3 * k[h // group] @ q[h, i]), 0)
            a[h, i] = e / e.sum()
    for reduce, want in (
        ("mean", a.mean(axis=1)),
        ("max", a.max(axis=1)),
        ("second_moment", (a**2).mean(axis=1)),
    ):
        per_head = reference.window_attention(q, k, q_pos, k_pos, 0.3, reduce, True)  # type: ignore[arg-type]
        np.testing.assert_allclose(per_head, want, rtol=1e-10)
        merged = reference.window_attention(q, k, q_pos, k_pos, 0.3, reduce)  # type: ignore[arg-type]
        want = want.reshape(n_head_kv, group, n).mean(axis=1)
        np.testing.assert_allclose(merged, want, rtol=1e-10)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_turns_and_averages(interleaved: bool) -> None:
    rng = np.random.default_rng(2)
    inv_freq = 10000.0 ** -(np.arange(4) / 4)
    x, y = rng.normal(size=(2, 8))

    def at(v: np.ndarray, p: int) -> np.ndarray:
        return reference.rotate(
            v, np.cos(p * inv_freq), np.sin(p * inv_freq), interleaved=interleaved
        )

    assert at(x, 7) @ at(y, 4) == pytest.approx(at(x, 13) @ at(y, 10))  # relative positions only
    cos, sin = reference.mean_rope(5, 3, inv_freq)
    mean = np.mean([at(x, p) for p in (5, 6, 7)], axis=0)
    np.testing.assert_allclose(reference.rotate(x, cos, sin, interleaved=interleaved), mean)


def test_llama_cpps_dimension_order_gives_the_same_scores(raw: dict[str, Any]) -> None:
    """Permute as a GGUF does, rotate adjacent pairs: nothing that a policy sees changes."""
    n, inv_freq = len(raw["tokens"]), raw["inv_freq"]
    order = np.arange(64).reshape(2, 32).T.ravel()  # 0, 32, 1, 33, ...
    k, mean_query = raw["k"][..., order], raw["mean_query"][..., order]
    theirs = reference.capkv_paper_score(raw["mean_query"], raw["k"], raw["v"], n, inv_freq)
    ours = reference.capkv_paper_score(mean_query, k, raw["v"], n, inv_freq, interleaved=True)
    np.testing.assert_allclose(ours, theirs, rtol=1e-9)
    np.testing.assert_allclose(reference.leverage(k), reference.leverage(raw["k"]), rtol=1e-7)


def test_zero_vectors_give_zeros_not_nan() -> None:
    zeros = np.zeros((1, 2, 5, 4))
    assert (reference.key_cosine(zeros) == 0).all()
    assert (reference.anchor(np.zeros((1, 2, 4)), zeros, 5, np.ones(2)) == 0).all()
    assert (reference.leverage(zeros) == 0).all()
