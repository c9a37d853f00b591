"""The probe: its attention is that of tokens that are really read, and it leaves nothing behind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest

from capkv_local import Llama
from capkv_local.cache.probe import Probe
from capkv_local.errors import BudgetError, PolicyError
from capkv_local.native import Stat
from capkv_local.policies import KVStats, get_policy
from capkv_local.policies.base import F32, BasePolicy
from model.conftest import Models, decode

N_READ = 300
BUDGET = 256


@dataclass(frozen=True)
class Listening(BasePolicy):
    """Keeps the newest cells and remembers what it was told."""

    name: ClassVar[str] = "listening"
    needs: ClassVar[frozenset[str]] = frozenset({"queries"})
    n_window: int = 16
    reduce: Any = "mean"

    def score(self, stats: KVStats) -> F32:
        heard.append(stats.probe_attention(reduce=self.reduce))
        return stats.positions.astype(np.float32)


heard: list[Any] = []


@pytest.fixture(autouse=True)
def _silence() -> None:
    heard.clear()


def probing(models: Models, **options: Any) -> Llama:
    settings = {"kv_policy": Listening(), "kv_budget": BUDGET, "kv_observe": "probe"}
    return models(**{**settings, **options})


def read(llama: Llama, text: list[int]) -> None:
    """In two prompts, so that neither fills a cache of BUDGET cells."""
    llama.prefill(text[:200])
    llama.prefill(text[200:])


def really_read(
    models: Models, tokens: list[int], probe: Probe, reduce: str
) -> np.ndarray[Any, Any]:
    """Attention of the repetition of ``tokens`` when it is part of the sequence, float64."""
    stat = {"mean": Stat.ATTN_MEAN, "max": Stat.ATTN_MAX, "second_moment": Stat.ATTN_SQR}[reduce]
    total: Any = 0.0
    for piece, n_queries in probe.pieces(tokens, 0):
        llama = models(kv_policy=get_policy("snapkv", n_window=probe.n_piece), kv_budget=2048)
        read(llama, tokens)
        llama.prefill(piece)
        kv = llama._require_cache().kv
        n = len(tokens) + len(piece)
        each = kv.score(stat, n_cells=n, n_queries=n_queries, per_head=True)[..., : len(tokens)]
        info = kv.info()
        each = each.reshape(info.n_layer, info.n_head_kv, -1, len(tokens)).astype(np.float64)
        if reduce == "max":
            total = np.maximum(total, each.max(axis=2))
        else:
            total = total + n_queries * each.mean(axis=2)
    return np.asarray(total)


def same_attention(got: Any, expected: Any) -> None:
    # Nothing is attended to before the first layer: the same batches give the same attention.
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-5, atol=1e-7)
    # A repetition attends with explicit weights, a text that is read by flash attention, in other
    # roundings; behind quantised weights they come to 1 to 3% of a head's attention. (Number by
    # number, test_added_attention.py has the queries of the same decodes.)
    off = np.abs(got - expected).sum(axis=-1) / expected.sum(axis=-1)
    assert off.max() < 0.05


@pytest.mark.parametrize("reduce", ["mean", "max", "second_moment"])
def test_the_attention_is_that_of_a_text_that_is_read_twice(
    models: Models, tokens: list[int], reduce: str
) -> None:
    text = tokens[:N_READ]
    llama = probing(models, kv_policy=Listening(reduce=reduce))
    cache = llama._require_cache()
    read(llama, text)
    assert not heard  # not full: the eviction is ours
    assert llama._probe is not None
    probe = llama._probe
    llama._evict(cache, llama._observers("probe", None))
    expected = really_read(models, text, probe, reduce)
    same_attention(heard[-1], expected)


def test_it_leaves_nothing_behind(models: Models, tokens: list[int]) -> None:
    """Cells, tail queries and logits are those of a cache that was only ever read into."""
    llama = probing(models, kv_budget=2048)
    llama.prefill(tokens[:N_READ])
    cache = llama._require_cache()

    def look() -> tuple[Any, ...]:
        return (
            cache.kv.score(Stat.ATTN_SQR, n_cells=N_READ, n_queries=16),
            cache.kv.positions(),
            cache.kv.info(),
        )

    before = look()
    repeated = llama._repeat(cache, llama._probe, N_READ, "mean")
    after = look()
    assert repeated.max() > 0
    for one, other in zip(before[:2], after[:2], strict=True):
        assert np.array_equal(one, other)
    assert before[2] == after[2]
    logits = decode(llama, tokens[N_READ : N_READ + 8], N_READ)
    fresh = models(kv_policy=Listening(), kv_budget=2048, kv_observe="probe")
    fresh.prefill(tokens[:N_READ])
    assert np.array_equal(logits, decode(fresh, tokens[N_READ : N_READ + 8], N_READ))


def test_with_nothing_new_nothing_is_found(models: Models, tokens: list[int]) -> None:
    """As when a budget is lowered right after an eviction."""
    llama = probing(models)
    read(llama, tokens[:N_READ])
    cache = llama._require_cache()
    for _ in range(2):
        llama._evict(cache, llama._observers("probe", None))
    assert heard[0].any() and not heard[1].any()


def test_the_mean_query_does_not_hear_the_repetition(models: Models, tokens: list[int]) -> None:
    llama = probing(models, kv_policy="capkv-paper", kv_budget=2048)
    llama.prefill(tokens[:N_READ])
    cache = llama._require_cache()

    def anchor() -> Any:
        return cache.kv.score(Stat.ANCHOR_DOT, n_cells=N_READ, n_future=16)

    before = anchor()
    llama._repeat(cache, llama._probe, N_READ, "mean")
    assert np.array_equal(before, anchor())


def test_every_token_is_repeated_once(models: Models, tokens: list[int]) -> None:
    """Streamed: each round repeats what came since the one before, and only that."""
    llama = probing(models)
    seen: list[int] = []
    spy = llama._probe.pieces

    class Spy(Probe):
        def pieces(self, tokens: Any, n_done: int) -> Any:
            for piece, n_queries in spy(tokens, n_done):
                seen.extend(piece[-n_queries:])
                yield piece, n_queries

    probe = llama._probe
    llama._probe = Spy(probe.prompt)
    try:
        llama.prefill(tokens[:1500])
    finally:
        llama._probe = probe
    assert seen == list(tokens[:1500])
    assert len(heard) >= 2
    assert llama.kv_stats().n_cells <= BUDGET + 128


def test_with_a_stride_every_nth_token_is_repeated_and_its_neighbours_are_as_relevant(
    models: Models, tokens: list[int]
) -> None:
    text = tokens[:N_READ]
    llama = probing(models, kv_policy=Listening(reduce="second_moment"), probe_stride=3)
    read(llama, text)
    probe = llama._probe
    assert probe is not None
    repeated = [t for piece, n in probe.pieces(text, 0) for t in piece[-n:]]
    assert repeated == text[::3]
    llama._evict(llama._require_cache(), llama._observers("probe", None))
    looked_at = really_read(models, text, probe, "second_moment")
    # Token 3 i looks for the next one, nothing for the two after that.
    expected = looked_at.copy()
    for at in range(len(text)):
        if at >= 2 and at % 3 != 1:
            expected[..., at] = np.maximum(expected[..., at], expected[..., at - 1])
    same_attention(heard[-1], expected)


def test_what_a_tail_call_reads_is_repeated_later(models: Models, tokens: list[int]) -> None:
    llama = probing(models)
    llama.prefill(tokens[:700], observe="tail")
    assert heard and all(attention is None for attention in heard)
    heard.clear()
    llama.prefill(tokens[700:1400])
    assert heard[0] is not None
    assert llama._require_cache().n_repeated == 1400


def test_a_question_decides_alone(models: Models, tokens: list[int]) -> None:
    """What it keeps does not depend on a probe that could have looked."""
    question = llama_question(models)
    kept = []
    for observe in ("probe", "tail"):
        llama = probing(models, kv_policy="capkv", kv_observe=observe)
        llama.prefill(tokens[:1000], observe="question", question=question)
        kept.append(llama.kv_positions())
    assert np.array_equal(*kept)
    with pytest.raises(ValueError, match="nothing else does"):
        llama.prefill(tokens[1000:1100], question=question)


def llama_question(models: Models) -> list[int]:
    return models(n_ctx=512, kv_policy=None).tokenize(b"\n\nWho may copy it?", add_bos=False)


def test_saved_and_loaded_it_goes_on_as_if_nothing_had_been(
    models: Models, tokens: list[int]
) -> None:
    llama = probing(models, kv_policy="capkv")
    llama.prefill(tokens[:900])
    state = llama.save_state()
    llama.prefill(tokens[900:1500])
    straight = llama.kv_positions()
    llama.reset()
    llama.load_state(state)
    llama.prefill(tokens[900:1500])
    assert np.array_equal(straight, llama.kv_positions())


def test_capkv_keeps_half_of_the_recent_cells_in_any_case(
    models: Models, tokens: list[int]
) -> None:
    """The others among them have to be wanted, as any cell has; a tail keeps all of them."""
    always = []
    for observe in ("probe", "tail"):
        llama = probing(models, kv_policy="capkv", kv_observe=observe, kv_budget=64)
        llama.prefill(tokens[:1000])
        held = llama.kv_positions()
        n_tokens = int(held.max()) + 1
        in_all = [at for at in range(n_tokens) if (held == at).any(axis=-1).all()]
        always.append(next(n for n in range(1, 65) if n_tokens - n - 1 not in in_all))
    assert 16 <= always[0] < 32 <= always[1]


def test_kvzip_keeps_what_the_repetition_looked_at(models: Models, tokens: list[int]) -> None:
    llama = probing(models, kv_policy="kvzip")
    llama.prefill(tokens[:1200])
    assert llama.kv_stats().evictions > 0
    with pytest.raises(PolicyError, match="kv_observe='probe'"):
        models(kv_policy="kvzip", kv_budget=BUDGET)


def test_bad_settings_are_told(models: Models) -> None:
    with pytest.raises(BudgetError, match="probe_stride=0"):
        probing(models, probe_stride=0)
    with pytest.raises(PolicyError, match="kv_observe='head'"):
        probing(models, kv_observe="head")
    with pytest.raises(ValueError, match="kv_observe"):
        models(kv_policy="capkv", kv_budget=BUDGET).prefill([1, 2], observe="probe")
