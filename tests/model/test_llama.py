"""``Llama`` as users of llama-cpp-python use it."""

from __future__ import annotations

import ctypes
import os
import signal
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest

import capkv_local
from capkv_local import (
    BudgetError,
    ContextOverflow,
    ContextWarning,
    Llama,
    ModelFileError,
    StateError,
    native,
)
from capkv_local.budget.allocate import ALLOCATORS
from capkv_local.native import loading
from capkv_local.policies import get_policy, policy_names
from tests.model.conftest import Models, observe_of, recent_of

SMALL = {"kv_budget": 256, "n_ctx": 4096, "n_batch": 256}


def logits(llama: Any) -> np.ndarray[Any, Any]:
    return np.ctypeslib.as_array(llama._ctx.get_logits(), (llama.n_vocab(),)).copy()


def greedy(llama: Llama, prompt: list[int], n: int) -> list[int]:
    out: list[int] = []
    for token in llama.generate(prompt, temp=0.0):
        out.append(token)
        if len(out) == n:
            return out
    return out


@pytest.mark.parametrize("flash_attn", [False, True])
def test_without_a_policy_logits_are_those_of_stock(
    models: Models, model_path: Path, tokens: list[int], flash_attn: bool
) -> None:
    ours = models(kv_policy=None, n_ctx=1024, flash_attn=flash_attn)
    stock = llama_cpp.Llama(
        str(model_path), n_ctx=1024, flash_attn=flash_attn, n_threads=2, verbose=False
    )
    for llama in (ours, stock):
        llama.eval(tokens[:300])
    assert np.array_equal(logits(ours), logits(stock))
    stock.close()


@pytest.mark.parametrize("policy", ["capkv", "capkv-paper"])
def test_until_the_first_eviction_logits_are_those_of_stock(
    models: Models, tokens: list[int], policy: str
) -> None:
    """Observing does not touch what is computed."""
    ours = models(kv_policy=policy, kv_budget=1024, n_ctx=2048)
    ours.eval(tokens[:600])
    stock = models(kv_policy=None, flash_attn=True, n_ctx=2048)
    stock.eval(tokens[:600])
    assert ours.kv_stats().evictions == 0
    assert np.array_equal(logits(ours), logits(stock))


def check_heads(positions: np.ndarray[Any, Any], n_tokens: int, n_recent: int = 32) -> None:
    """Every head holds sinks and recent tokens, in order, in the last of the cells."""
    recent = list(range(n_tokens - n_recent, n_tokens))
    for head in positions.reshape(-1, positions.shape[-1]):
        held = head[head >= 0]
        assert (head[-len(held) :] == held).all()
        assert held[:4].tolist() == [0, 1, 2, 3] and held[-n_recent:].tolist() == recent
        assert (np.diff(held) > 0).all()


@pytest.mark.parametrize(
    ("policy", "observe"),
    [(name, observe_of(name)) for name in policy_names() if name != "full"] + [("capkv", "probe")],
)
def test_every_policy_streams_a_long_prompt(
    models: Models, tokens: list[int], policy: str, observe: str
) -> None:
    llama = models(kv_policy=policy, kv_observe=observe, **SMALL)
    llama.prefill(tokens[:1500])
    stats = llama.kv_stats()
    assert (stats.policy, stats.n_tokens, stats.n_cells) == (policy, 1500, 256)
    assert stats.evictions >= 3
    check_heads(llama.kv_positions(), 1500, recent_of(policy, observe))
    assert np.isfinite(logits(llama)).all()
    assert len(greedy(llama, tokens[:1500], 4)) == 4


@pytest.mark.parametrize(
    ("policy", "allocation"), [*(("capkv", name) for name in ALLOCATORS), ("knorm", "global")]
)
def test_every_allocation_keeps_to_the_budget(
    models: Models, tokens: list[int], policy: str, allocation: str
) -> None:
    llama = models(kv_policy=policy, kv_allocation=allocation, **SMALL)
    memory = llama.kv_stats().kv_bytes
    llama.prefill(tokens[:1500])
    stats, info = llama.kv_stats(), llama._cache.kv.info()
    fewest, most = stats.n_cells_range
    assert info.n_rows == 256 * 90 and stats.kv_bytes == memory
    assert (fewest == most == 256) if allocation == "uniform" else fewest < 256 < most
    # A fifth of what a uniform budget gives the contested cells is every head's own.
    assert fewest >= 36 + int(0.2 * 220) or allocation == "uniform"
    check_heads(llama.kv_positions(), 1500)
    # All rows that were given up take new tokens: as many as the cache has room for.
    n_free = info.n_rows_max // 90 - 256
    assert info.n_free == n_free
    llama.prefill(tokens[1500:1900])
    check_heads(llama.kv_positions(), 1900)
    assert llama._cache.kv.info().n_rows == 256 * 90


def test_allocations_can_change(models: Models, model_path: Path, tokens: list[int]) -> None:
    llama = Llama(model_path, kv_policy="snapkv", verbose=False, n_threads=2, **SMALL)
    llama.prefill(tokens[:1200])
    assert llama.kv_stats().n_cells_range == (256, 256)
    llama.set_kv_allocation("global")
    llama.prefill(tokens[1200:2000])
    fewest, most = llama.kv_stats().n_cells_range
    assert fewest < 256 < most
    llama.set_kv_budget(300)
    assert llama.kv_stats().n_cells_range == (fewest, most)
    state = llama.save_state()
    expected = greedy(llama, tokens[:2000], 6)
    # Back to equal heads: those that hold too little fill up with new tokens only.
    llama.set_kv_allocation("uniform")
    llama.prefill(tokens[2000:3200])
    assert llama._cache.kv.info().n_rows == 300 * 90
    llama.load_state(state)
    assert llama.kv_stats().n_cells_range == (fewest, most)
    assert greedy(llama, tokens[:2000], 6) == expected
    with pytest.raises(BudgetError, match="adaptive-layer"):
        llama.set_kv_allocation("adaptive_layer")
    with pytest.raises(BudgetError, match="global"):
        Llama(model_path, kv_allocation="globall", verbose=False)
    llama.close()


def test_a_budget_of_the_whole_context(model_path: Path, tokens: list[int]) -> None:
    """Nothing has to go, whatever is read; a question finds room behind the text."""
    for room in (0, 64):
        llama = Llama(model_path, n_ctx=700, kv_budget=1.0, kv_room=room, verbose=False)
        llama.prefill(tokens[:600], observe="question", question=tokens[900:920])
        llama.prefill(tokens[600:690])
        stats = llama.kv_stats()
        assert (stats.n_cells, stats.evictions) == (690, 0)
        llama.close()


def test_a_policy_that_keeps_only_the_last_token_in_all_heads(
    model_path: Path, tokens: list[int]
) -> None:
    policy = get_policy("random", n_recent=1)
    llama = Llama(model_path, kv_policy=policy, verbose=False, n_threads=2, **SMALL)
    llama.prefill(tokens[:1200])
    assert llama.kv_stats().n_cells == 256
    assert len(greedy(llama, tokens[:1200], 4)) == 4
    llama.close()


def test_full_never_evicts(models: Models, tokens: list[int]) -> None:
    llama = models(kv_policy="full", n_ctx=1024)
    llama.prefill(tokens[:900])
    stats = llama.kv_stats()
    assert (stats.evictions, stats.n_cells) == (0, 900)


def test_generation_goes_on_past_the_room(models: Models, tokens: list[int]) -> None:
    llama = models(kv_policy="streaming", kv_room=16, **SMALL)
    llama.prefill(tokens[:700])
    before, n_max = llama.kv_stats().evictions, llama.kv_stats().n_cells_max
    assert llama.kv_stats().n_cells == 256
    n_new = n_max - 256 + 10
    for i in range(n_new):
        llama.eval([tokens[700 + i]])
    assert llama.kv_stats().evictions == before + 1
    assert llama.kv_stats().n_cells == 256 + 10
    assert llama.n_tokens == 700 + n_new


def test_a_longer_prompt_reuses_the_cells(models: Models, tokens: list[int]) -> None:
    llama = models(kv_policy="snapkv", **SMALL)
    prompt = tokens[:1200]
    answer = greedy(llama, prompt, 8)
    decoded = llama.kv_stats().t_decode_s
    n_before = llama.n_tokens
    more = prompt + answer + tokens[1200:1220]
    greedy(llama, more, 4)
    # Only the 20 new tokens and the answers were decoded: nowhere near 1200 again.
    assert llama.n_tokens >= n_before + 20
    assert llama.kv_stats().t_decode_s - decoded < decoded / 2


def test_another_prompt_starts_anew(models: Models, tokens: list[int]) -> None:
    llama = models(kv_policy="capkv", **SMALL)
    first = greedy(llama, tokens[:1200], 8)
    greedy(llama, tokens[300:1500], 8)
    assert greedy(llama, tokens[:1200], 8) == first


def test_state_continues_as_if_nothing_happened(models: Models, tokens: list[int]) -> None:
    llama = models(kv_policy="capkv", **SMALL)
    llama.prefill(tokens[:1200])
    state = llama.save_state()

    def go_on() -> np.ndarray[Any, Any]:
        llama.prefill(tokens[1200:2000])  # evicts again: needs queries and carried relevance
        return logits(llama)

    expected = go_on()
    positions = llama.kv_positions()
    llama.reset()
    llama.prefill(tokens[2000:2300])
    llama.load_state(state)
    assert np.array_equal(go_on(), expected)
    assert np.array_equal(llama.kv_positions(), positions)


def test_a_state_that_does_not_fit_is_refused_and_nothing_is_lost(
    models: Models, tokens: list[int]
) -> None:
    llama = models(kv_policy="capkv", **SMALL)
    llama.prefill(tokens[:1200])
    state = llama.save_state()
    expected = greedy(llama, tokens[:1200], 6)
    damaged = llama.save_state()
    damaged.llama_state = damaged.llama_state[:-1000]
    damaged.llama_state_size = len(damaged.llama_state)
    with pytest.raises(StateError, match="does not fit"):
        llama.load_state(damaged)
    llama.load_state(state)
    assert greedy(llama, tokens[:1200], 6) == expected
    other = models(kv_policy="snapkv", **SMALL)
    other.prefill(tokens[:300])
    with pytest.raises(StateError, match="capkv"):
        other.load_state(state)
    assert other.n_tokens == 300


def test_a_stock_cache_refuses_a_compacted_state(models: Models, tokens: list[int]) -> None:
    llama = models(kv_policy="streaming", **SMALL)
    llama.prefill(tokens[:1200])
    state = llama.save_state()
    stock = models(kv_policy=None, flash_attn=True, n_ctx=2048)
    with pytest.raises(StateError, match="compacted"):
        stock.load_state(state)


def test_budget_and_policy_can_change(models: Models, model_path: Path, tokens: list[int]) -> None:
    llama = Llama(model_path, kv_policy="capkv", verbose=False, n_threads=2, **SMALL)
    llama.prefill(tokens[:1200])
    llama.set_kv_budget(128)
    assert llama.kv_stats().n_cells == 128
    llama.set_kv_budget(600)
    assert llama.kv_stats().n_cells == 128 and llama.kv_stats().n_cells_max >= 856
    llama.set_kv_policy("keydiff")
    llama.prefill(tokens[1200:2600])
    n_cells = llama.kv_stats().n_cells
    assert 600 <= n_cells <= 600 + 128 and llama.kv_stats().policy == "keydiff"
    for wrong, error in ((5, BudgetError), (10**6, BudgetError), ("soup", BudgetError)):
        with pytest.raises(error):
            llama.set_kv_budget(wrong)
    with pytest.raises(capkv_local.PolicyError, match="snapkv"):
        llama.set_kv_policy("snapkvv")
    assert llama.kv_stats().n_cells == n_cells
    # To a policy that needs another size and observes nothing: the sequence moves along.
    llama.set_kv_policy("capkv")
    llama.prefill(tokens[2600:2610])
    positions = llama.kv_positions()
    llama.set_kv_policy("full")
    assert llama.n_tokens == 2610 and np.array_equal(llama.kv_positions(), positions)
    assert len(greedy(llama, llama.input_ids[:2610].tolist(), 4)) == 4
    llama.close()


def test_completions_and_chat(models: Models, tokens: list[int]) -> None:
    llama = models(kv_policy="capkv", **SMALL)
    text = llama.detokenize(tokens[:1000]).decode(errors="ignore")
    out = llama(text, max_tokens=6, temperature=0.0)
    assert out["usage"]["completion_tokens"] <= 6 and out["usage"]["prompt_tokens"] > 900
    stream = "".join(
        part["choices"][0]["text"]
        for part in llama.create_completion(text, max_tokens=6, temperature=0.0, stream=True)
    )
    assert stream == out["choices"][0]["text"]
    messages = [{"role": "user", "content": text + "\n\nSay hello."}]
    chat = llama.create_chat_completion(messages, max_tokens=6, temperature=0.0)
    assert chat["choices"][0]["message"]["content"]
    parts = list(llama.create_chat_completion(messages, max_tokens=6, temperature=0.0, stream=True))
    content = "".join(p["choices"][0]["delta"].get("content", "") for p in parts)
    assert content == chat["choices"][0]["message"]["content"]


def test_a_prompt_beyond_the_context(models: Models, tokens: list[int]) -> None:
    llama = models(kv_policy="capkv", **SMALL)
    llama.prefill(tokens[:500])
    with pytest.raises(ContextOverflow, match="n_ctx"):
        llama.prefill(tokens[:4000])
    assert llama.n_tokens == 500
    with pytest.raises(ContextOverflow, match="n_ctx"):
        llama(tokens[:5000], max_tokens=4)
    llama.prefill(tokens[500:600])
    assert llama.n_tokens == 600


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C as in a terminal: a test run in the background starts with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_in_prefill_keeps_the_chunks_so_far(models: Models, tokens: list[int]) -> None:
    llama = models(kv_policy="capkv", **SMALL)

    def press(done: int, total: int) -> None:
        if done >= 768:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        llama.prefill(tokens[:2000], progress=press)
    assert llama.n_tokens == 768
    llama.prefill(tokens[768:1500])
    whole = logits(llama)
    llama.reset()
    llama.prefill(tokens[:768])
    # The chunks are the same, but an uninterrupted prefill settles at its end.
    assert llama.n_tokens == 768
    assert np.isfinite(whole).all()


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_in_generation_keeps_the_session(models: Models, tokens: list[int]) -> None:
    llama = models(kv_policy="capkv", **SMALL)
    got = []
    with pytest.raises(KeyboardInterrupt):
        for token in llama.generate(tokens[:600], temp=0.0):
            got.append(token)
            if len(got) == 5:
                os.kill(os.getpid(), signal.SIGINT)
    assert greedy(llama, tokens[:600], 5) == got


def test_observing_a_question_leaves_no_trace_in_the_sequence(
    models: Models, tokens: list[int]
) -> None:
    llama = models(kv_policy="snapkv", **SMALL)
    question = llama.tokenize(b"Who may convey a work under this licence?", add_bos=False)
    llama.prefill(tokens[:1500], observe="question", question=question)
    assert llama.n_tokens == 1500
    assert llama.kv_positions().max() == 1499
    seen = llama.kv_positions()
    llama.reset()
    llama.prefill(tokens[:1500])
    assert not np.array_equal(seen, llama.kv_positions())  # the question did decide
    with pytest.raises(BudgetError, match="does not fit"):
        llama.prefill(tokens[1500:1600], observe="question", question=question * 100)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_budget": 36}, "at least 37"),
        ({"kv_budget": 5000, "n_ctx": 4096}, "exceeds the context"),
        ({"kv_budget": 0.0}, "kv_budget"),
        ({"kv_budget": 1.5}, "kv_budget"),
        ({"kv_budget": "many"}, "kv_budget"),
        ({"kv_budget": "1KiB", "n_ctx": 1024}, "below"),
        ({"kv_room": -1}, "kv_room"),
    ],
)
def test_impossible_budgets(model_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        Llama(model_path, verbose=False, **{"n_ctx": 2048, **options})


def test_budgets_in_bytes_and_fractions(model_path: Path) -> None:
    per_cell = 23040
    llama = Llama(model_path, n_ctx=4096, kv_budget="24MiB", verbose=False)
    assert llama.kv_stats().budget == 24 * 2**20 // per_cell
    assert llama.kv_stats().kv_bytes == llama.kv_stats().n_cells_max * per_cell
    llama.close()
    llama = Llama(model_path, n_ctx=0, kv_budget=0.25, verbose=False)
    assert (llama.kv_stats().budget, llama.n_ctx()) == (2048, 8192)
    llama.close()


def test_unknown_policy_names_the_nearest(model_path: Path) -> None:
    with pytest.raises(capkv_local.PolicyError, match="capkv-paper"):
        Llama(model_path, kv_policy="capkv-papers", verbose=False)


def test_model_files_that_are_none(tmp_path: Path, model_path: Path) -> None:
    with pytest.raises(ModelFileError, match="no model file"):
        Llama(tmp_path / "missing.gguf")
    with pytest.raises(ModelFileError, match="folder"):
        Llama(tmp_path)
    text = tmp_path / "text.gguf"
    text.write_text("Hello, this is a text.")
    with pytest.raises(ModelFileError, match="not a GGUF"):
        Llama(text)
    text.write_bytes(b"")
    with pytest.raises(ModelFileError, match="empty"):
        Llama(text)
    for n_bytes in (4, 1000, 10_000_000):
        cut = tmp_path / f"cut{n_bytes}.gguf"
        with model_path.open("rb") as file:
            cut.write_bytes(file.read(n_bytes))
        with pytest.raises(ModelFileError, match="cannot be loaded"):
            Llama(cut, verbose=False)


def test_flash_attention_off_is_refused(model_path: Path) -> None:
    with pytest.raises(capkv_local.UnsupportedModel, match="flash_attn"):
        Llama(model_path, flash_attn=False, verbose=False)
    with pytest.raises(capkv_local.UnsupportedModel, match="embedding"):
        Llama(model_path, embedding=True, verbose=False)


def test_a_stock_library_is_named_and_the_way_out(
    model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library without the added functions: here, that of the Python interpreter itself."""
    monkeypatch.setattr(llama_cpp.llama_cpp, "_lib", ctypes.CDLL(None))
    loading.functions.cache_clear()
    try:
        with pytest.raises(capkv_local.NativeBuildMissing, match=r"kv_policy=None"):
            Llama(model_path, verbose=False)
    finally:
        monkeypatch.undo()
        loading.functions.cache_clear()
    native.require()


def test_after_a_reset_the_budget_can_be_lowered(models: Models, tokens: list[int]) -> None:
    """What was given up needs no eviction, for which nothing was observed."""
    llama = models(kv_policy="snapkv", kv_budget=512)
    llama.prefill(tokens[:700])
    llama.reset()
    llama.set_kv_policy("snapkv")
    llama.set_kv_budget(128)
    llama.prefill(tokens[:700])
    assert llama.kv_stats().n_cells <= 128 + 128
    llama.set_kv_budget(512)


def test_a_context_beyond_the_trained_one_is_told(model_path: Path) -> None:
    def opened(**options: Any) -> None:
        Llama(model_path, kv_budget=128, verbose=False, **options).close()

    with pytest.warns(ContextWarning, match="trained with 8,192 tokens: beyond them its answers"):
        opened(n_ctx=16384)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ContextWarning)
        opened(n_ctx=8192)
        opened(n_ctx=16384, rope_freq_scale=0.5)
