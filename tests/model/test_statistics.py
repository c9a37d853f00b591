"""Every native statistic on the real model against the float64 reference.

The reference gets the rows that the cache stores and the queries that the decodes computed, so
what is left is the rounding of float32 sums; a wrong head, position, scale or query is orders of
magnitude larger.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants

from capkv_local import Llama
from capkv_local.evaluate import reference
from capkv_local.native import Stat
from tests.model import oracle, tiny
from tests.model.capture import Session, hadamard

N_WINDOW, N_SKIP = 150, 4  # more queries than are computed at once
CHUNKS = (100, 1, 37, 1, 80, 1, 1, 63, 16)  # the ring wraps within and between them
N_KEEP = 150
CHUNKS_AFTER = (1, 23, 16)
N_AFTER = sum(CHUNKS_AFTER)


@dataclass
class Case:
    """A session with everything that its statistics are made of."""

    session: Session
    evicted: bool
    k: np.ndarray[Any, Any]  # as stored, [n_layer, n_head_kv, n_cells, d]
    v: np.ndarray[Any, Any]
    q: np.ndarray[Any, Any]  # as multiplied with k, [n_layer, n_head, n_tokens, d]
    held: np.ndarray[Any, Any]  # position in every cell or -1, [n_layer, n_head_kv, n_cells]

    @property
    def n_cells(self) -> int:
        return int(self.k.shape[2])

    def masks(self, n_queries: int) -> np.ndarray[Any, Any]:
        """Positions that hide cells from the last queries, shape of ``held``.

        A query that is older than the eviction sees a cell of mixed tokens as of the largest of
        their positions (docs/native.md); to a later one, the position of every head says the same.
        """
        if not self.evicted or n_queries <= N_AFTER:
            return self.held
        return np.broadcast_to(self.held.max(axis=(0, 1)), self.held.shape)

    def by_head(self, n_cells: int, n_rows: int, compute: Compute) -> np.ndarray[Any, Any]:
        """What ``compute`` says of each head's held cells, ``[n_layer, n_rows, n_cells]``.

        It gets slices of layers, KV heads, query heads and cells; 0 where no cell is held.
        """
        n_layer, n_head_kv = self.held.shape[:2]
        out = np.zeros((n_layer, n_rows, n_cells))
        n_gqa, n = self.q.shape[1] // n_head_kv, n_rows // n_head_kv
        for layer, head in np.ndindex(n_layer, n_head_kv):
            cells = slice(int((self.held[layer, head] < 0).sum()), n_cells)
            at = slice(layer, layer + 1), slice(head, head + 1)
            rows = compute(*at, slice(head * n_gqa, (head + 1) * n_gqa), cells)
            out[layer, head * n : (head + 1) * n, cells] = rows[0]
        return out


Compute = Callable[[slice, slice, slice, slice], np.ndarray[Any, Any]]
KINDS = ("f32", "f16", "q8_0", "f16 evicted", "q8_0 evicted", "f16 ragged", "q8_0 ragged")


@pytest.fixture(scope="module", params=KINDS)
def case(request: Any, model_path: Path, tokens: list[int]) -> Iterator[Case]:
    kind, *evicted = request.param.split()
    session = Session(model_path, kind, n_window=N_WINDOW, n_skip=N_SKIP)

    def decode(chunks: tuple[int, ...]) -> None:
        for n in chunks:
            session.decode(tokens[session.n_past : session.n_past + n])

    decode(CHUNKS)
    if evicted:
        shape = (session.info.n_layer, session.info.n_head_kv)
        rng = np.random.default_rng(11)
        if evicted == ["ragged"]:
            keep = oracle.random_mask(rng, session.kv.positions() >= 0)
        else:
            lists = oracle.random_keep(rng, shape, session.n_past, N_KEEP)
            keep = oracle.as_mask(lists, session.n_past)
        session.kv.evict(keep)
        decode(CHUNKS_AFTER)
    k, v = session.cells()
    q = as_multiplied(session.queries(rope=True), kind)
    yield Case(session, bool(evicted), k, v, q, session.kv.positions())
    session.close()


def as_multiplied(q: np.ndarray[Any, Any], kind: str) -> np.ndarray[Any, Any]:
    """Queries as the CPU multiplies them with keys of a type: rounded to the type of the keys.

    That rounding moves an attention by up to 1e-2 of itself with float16 and by far more with
    q8_0, so tolerances for unrounded queries would hide real faults.
    """
    if kind == "f32":
        return q
    if kind == "f16":
        return q.astype(np.float16)
    turned = (q @ hadamard(q.shape[-1])).astype(np.float32)
    rows = quants.quantize(turned.reshape(-1, q.shape[-1]), GGMLQuantizationType.Q8_0)
    return quants.dequantize(rows, GGMLQuantizationType.Q8_0).reshape(q.shape)


def some_cells(case: Case) -> tuple[int, int]:
    """All cells; and fewer, which ends inside the observation window."""
    return case.n_cells, case.n_cells - 20


# --- attention of the last queries ------------------------------------------------------------


@pytest.mark.parametrize("per_head", [False, True], ids=["group", "head"])
@pytest.mark.parametrize(
    ("stat", "reduce"),
    [(Stat.ATTN_MEAN, "mean"), (Stat.ATTN_MAX, "max"), (Stat.ATTN_SQR, "second_moment")],
)
def test_window_attention(case: Case, stat: Stat, reduce: Any, per_head: bool) -> None:
    assert case.session.info.n_head != case.session.info.n_head_kv
    assert case.session.kv.info().n_queries == N_WINDOW
    n = case.session.n_past
    for n_cells, n_queries in (
        (case.n_cells, N_WINDOW),
        (case.n_cells, N_AFTER),  # all that are newer than the eviction
        (case.n_cells, 7),
        (case.n_cells, 1),
        (case.n_cells - 20, N_WINDOW),
    ):
        got = case.session.kv.score(stat, n_cells=n_cells, n_queries=n_queries, per_head=per_head)
        masks = case.masks(n_queries)
        observing = np.arange(n - n_queries, n)

        def attention(
            layer: slice,
            head: slice,
            heads: slice,
            cells: slice,
            observing: np.ndarray[Any, Any] = observing,
            masks: np.ndarray[Any, Any] = masks,
        ) -> np.ndarray[Any, Any]:
            # A query that is older than all that a head holds sees nothing and does not count.
            seeing = observing[observing >= int(masks[layer, head, cells].min(initial=n))]
            if not len(seeing):
                return np.zeros((1, len(case.q[0, heads]) if per_head else 1, 0))
            return reference.window_attention(
                case.q[layer, heads, seeing],
                case.k[layer, head, cells],
                seeing,
                masks[layer, head, cells],
                case.k.shape[-1] ** -0.5,
                reduce,
                per_head,
            )

        info = case.session.info
        want = case.by_head(n_cells, info.n_head if per_head else info.n_head_kv, attention)
        close_attention(got, want, case.session.kind)


def close_attention(got: np.ndarray[Any, Any], want: np.ndarray[Any, Any], kind: str) -> None:
    # Logits reach 50: one float32 rounding of such a sum moves its exponential by 4e-6, twice
    # that when squared. Attentions go down to 1e-38, and still agree to that.
    if kind != "q8_0":
        np.testing.assert_allclose(got, want, rtol=3e-5, atol=1e-37)
        return
    got, want = got[want > 0], want[want > 0]
    # The rotation of a query is a sum in float32, too: now and then a component lies on the edge
    # of two q8_0 steps and rounds the other way, which moves that query's logits by 1e-2.
    assert np.median(np.abs(got - want) / want) < 1e-4
    np.testing.assert_allclose(got, want, rtol=3e-2, atol=1e-5)


def test_no_argument_means_all_queries(case: Case) -> None:
    kv = case.session.kv
    for stat in (Stat.ATTN_MEAN, Stat.ATTN_MAX):
        everything = kv.score(stat, n_cells=case.n_cells)
        assert np.array_equal(everything, kv.score(stat, n_cells=case.n_cells, n_queries=N_WINDOW))


# --- the mean query ---------------------------------------------------------------------------


@pytest.mark.parametrize(("stat", "kind"), [(Stat.ANCHOR_COS, "cosine"), (Stat.ANCHOR_DOT, "dot")])
def test_anchor(case: Case, stat: Stat, kind: Any) -> None:
    before_rope = case.session.queries(rope=False)[:, :, N_SKIP:].astype(np.float64)
    k = case.k
    if case.session.kind == "q8_0":
        k = k @ hadamard(k.shape[-1])  # back to the rotation of the model
    for n_cells in some_cells(case):
        for n_future in (1, 7, 512):
            got = case.session.kv.score(stat, n_cells=n_cells, n_future=n_future)

            def anchor(
                layer: slice,
                head: slice,
                heads: slice,
                cells: slice,
                n_future: int = n_future,
            ) -> np.ndarray[Any, Any]:
                return reference.anchor(
                    before_rope.mean(axis=2)[layer, heads],
                    k[layer, head, cells],
                    int(case.held[..., cells.stop - 1].max()) + 1,
                    case.session.inv_freq(),
                    kind=kind,
                    n_future=n_future,
                    interleaved=True,
                )

            want = case.by_head(n_cells, case.session.info.n_head, anchor)
            # Angles of 300 radians are exact to 3e-5 in float32, and the mean goes through RoPE
            # three times; what is left of that in the mean over tokens and positions is 3e-6.
            # One query of 296 more or less moves a cosine by 1e-3.
            atol = 1e-5 if kind == "cosine" else 1e-5 * np.abs(want).max()
            np.testing.assert_allclose(got, want, rtol=0, atol=atol)


# --- keys and values --------------------------------------------------------------------------


def test_norms_and_key_cosine(case: Case) -> None:
    kv = case.session.kv
    for n_cells in some_cells(case):
        k, v = case.k[:, :, :n_cells], case.v[:, :, :n_cells]
        # 64 squares summed in float32, half an error of 2e-7 after the root.
        for stat, rows in ((Stat.KEY_NORM, k), (Stat.VALUE_NORM, v)):
            got = kv.score(stat, n_cells=n_cells)
            np.testing.assert_allclose(got, reference.norm(rows), rtol=1e-6)
        got = kv.score(Stat.KEY_COS, n_cells=n_cells)
        want = case.by_head(
            n_cells,
            case.session.info.n_head_kv,
            lambda layer, head, _, cells: reference.key_cosine(case.k[layer, head, cells]),
        )
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-6)


@pytest.mark.parametrize("rows_of", ["weights of 1", "a KV head", "a query head"])
@pytest.mark.parametrize("of", ["key", "value"])
def test_leverage(case: Case, of: str, rows_of: str) -> None:
    u, stat = (case.k, Stat.LEVERAGE_K) if of == "key" else (case.v, Stat.LEVERAGE_V)
    info = case.session.info
    n_head_w = {"weights of 1": 0, "a KV head": info.n_head_kv, "a query head": info.n_head}
    rng = np.random.default_rng(5)
    for n_cells in some_cells(case):
        rows = u[:, :, :n_cells]
        w = None
        if n_head_w[rows_of]:
            w = rng.uniform(size=(info.n_layer, n_head_w[rows_of], n_cells)).astype(np.float32)
            w[..., ::7] = 0
        power = float((reference.norm(rows) ** 2).sum(axis=-1).max())
        # Noise as policies use it: 1, and a share of the whole power, as `capkv` does. float32
        # loses condition times 6e-8; keys are long and alike, their matrix spans 5e5 over 1.
        for noise, atol in ((1.0, 2e-4 if of == "key" else 1e-5), (power / 64, 1e-6)):
            got = case.session.kv.score(stat, n_cells=n_cells, noise=noise, weights=w)

            def leverage(
                layer: slice,
                head: slice,
                heads: slice,
                cells: slice,
                rows: np.ndarray[Any, Any] = rows,
                w: np.ndarray[Any, Any] | None = w,
                noise: float = noise,
            ) -> np.ndarray[Any, Any]:
                of_head = None
                if w is not None:
                    of_head = w[layer, head if w.shape[1] == info.n_head_kv else heads, cells]
                return reference.leverage(rows[layer, head, cells], of_head, noise)

            want = case.by_head(n_cells, info.n_head_kv, leverage)
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=atol)
            if w is not None and n_head_w[rows_of] == info.n_head_kv:
                assert (got[w == 0] == 0).all()


# --- what the capture promises ----------------------------------------------------------------


def test_captured_queries_are_those_before_and_after_rope(case: Case) -> None:
    before, after = (case.session.queries(rope=rope) for rope in (False, True))
    angles = np.arange(case.session.n_past)[:, None] * case.session.inv_freq()
    turned = reference.rotate(before, np.cos(angles), np.sin(angles), interleaved=True)
    # Angles of 300 radians are exact to 3e-5 in float32, queries reach 20.
    np.testing.assert_allclose(after, turned, rtol=0, atol=1e-3)


def test_the_last_head_of_a_full_cache(tmp_path: Path) -> None:
    """Products take some rows behind the cells along, and there it has none."""
    path = tiny.llama(tmp_path / "tiny.gguf", head_dim=64, n_head=6, n_head_kv=3)
    tokens = np.random.default_rng(3).integers(0, tiny.N_VOCAB, 201).tolist()
    scores = []
    for room in (37, 101):  # 201 cells, all of them used, and more
        options: dict[str, Any] = {"n_ctx": 512, "n_batch": 64, "kv_room": room, "kv_budget": 100}
        llama = Llama(path, **options, kv_policy="snapkv", n_threads=1, verbose=False)
        kv = llama._require_cache().kv
        kv.observe(150)
        for i in range(0, len(tokens), 64):
            llama._decode_chunk(tokens[i : i + 64])
        assert kv.info().n_free == room - 37
        scores.append(kv.score(Stat.ATTN_SQR, n_cells=len(tokens)))
        llama.close()
    # Products of other shapes sum up in another order.
    np.testing.assert_allclose(*scores, rtol=1e-5, atol=1e-12)
