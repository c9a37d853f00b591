"""Native eviction against an independent oracle, and what the cache promises afterwards."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from capkv_local import NativeError
from capkv_local.native import cache_type as cache_type_number
from tests.model import oracle
from tests.model.conftest import Models, decode

N_PROMPT, N_KEEP, N_NEXT = 300, 120, 24


def next_logits(llama: Any, tokens: list[int], start: int) -> np.ndarray[Any, Any]:
    """Logits of the tokens behind ``start``, one decode each, ``[n, n_vocab]``."""
    return np.concatenate([decode(llama, [token], start + i) for i, token in enumerate(tokens)])


def test_wrong_masks_are_refused_and_change_nothing(models: Models, tokens: list[int]) -> None:
    llama = models(kv_policy="random", kv_budget=512, n_ctx=1024)
    llama.eval(tokens[:64])
    kv = llama._cache.kv
    info = kv.info()
    keep = np.ones((info.n_layer, info.n_head_kv, 64), np.bool_)
    for wrong in (keep[..., 1:], keep[:1], keep[..., None], ~keep):
        with pytest.raises(NativeError):
            kv.evict(wrong)
    assert kv.info() == info


@pytest.mark.parametrize("cache_type", ["f16", "q8_0", "q4_0", "q5_1", "iq4_nl", "bf16", "f32"])
def test_eviction_equals_the_oracle_bit_for_bit(
    models: Models, tokens: list[int], cache_type: str
) -> None:
    kind = cache_type_number(cache_type)
    kinds = {"type_k": kind, "type_v": kind}
    ours = models(kv_policy="random", kv_budget=512, n_ctx=1024, **kinds)
    ours.eval(tokens[:N_PROMPT])
    kv = ours._cache.kv
    info = kv.info()
    shape = (info.n_layer, info.n_head_kv)
    keep = oracle.random_keep(np.random.default_rng(7), shape, N_PROMPT, N_KEEP)
    kv.evict(oracle.as_mask(keep, N_PROMPT))
    assert np.array_equal(kv.positions(), keep)
    got = next_logits(ours, tokens[N_PROMPT : N_PROMPT + N_NEXT], N_PROMPT)

    stock = models(kv_policy=None, flash_attn=True, n_ctx=1024, **kinds)
    stock.eval(tokens[:N_PROMPT])
    state = oracle.read(stock._ctx.ctx)
    oracle.write(stock._ctx.ctx, oracle.evict(state, keep))
    expected = next_logits(stock, tokens[N_PROMPT : N_PROMPT + N_NEXT], N_PROMPT)

    # Same rows in the same cells, same kernels: not one bit may differ.
    assert np.array_equal(got, expected)


def test_repeated_eviction_keeps_the_positions_of_every_head(
    models: Models, tokens: list[int]
) -> None:
    llama = models(kv_policy="random", kv_budget=512, n_ctx=1024)
    kv = llama._cache.kv
    rng = np.random.default_rng(3)
    held = None
    n_past = 0
    for n_new, n_keep in ((200, 150), (100, 130), (77, 60), (1, 61)):
        llama._batch.set_batch(tokens[n_past : n_past + n_new], n_past, False)
        llama._ctx.decode(llama._batch)
        new = np.arange(n_past, n_past + n_new, dtype=np.int32)
        n_past += n_new
        if held is None:
            info = kv.info()
            held = np.empty((info.n_layer, info.n_head_kv, 0), np.int32)
        held = np.concatenate(
            [held, np.broadcast_to(new, (*held.shape[:2], n_new))], axis=-1
        )  # what every head holds now
        keep = oracle.random_keep(rng, held.shape[:2], held.shape[-1], n_keep)
        kv.evict(oracle.as_mask(keep, held.shape[-1]))
        held = np.take_along_axis(held, keep, axis=-1)
        assert np.array_equal(kv.positions(), held)
    # Positions of new tokens go on behind the last one.
    assert held[..., -1].min() == held[..., -1].max() == n_past - 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda keep: keep[..., ::-1].copy(),
        lambda keep: keep[..., :-1],
        lambda keep: keep - 1,
        lambda keep: keep + 1,
        lambda keep: np.zeros_like(keep),
        lambda keep: keep[:1],
        lambda keep: keep[..., :0],
    ],
    ids=["descending", "without the last", "negative", "beyond", "repeated", "one layer", "empty"],
)
def test_wrong_keep_lists_are_refused_and_change_nothing(
    models: Models, tokens: list[int], damage: Any
) -> None:
    llama = models(kv_policy="random", kv_budget=512, n_ctx=1024)
    llama.eval(tokens[:64])
    kv = llama._cache.kv
    info = kv.info()
    keep = np.broadcast_to(np.arange(64, dtype=np.int32), (info.n_layer, info.n_head_kv, 64)).copy()
    lists = np.ascontiguousarray(damage(keep))
    n_keep = np.full(info.n_heads, lists.shape[-1], np.uint32)
    status = kv._f["llama_memory_evict"](kv._ctx, n_keep.ctypes.data, lists.ctypes.data, lists.size)
    assert status < 0
    assert kv.info() == info
    assert np.array_equal(kv.positions(), keep)


def test_memory_is_the_physical_cells(models: Models, tokens: list[int]) -> None:
    llama = models(kv_policy="streaming", kv_budget=512, n_ctx=8192)
    stats = llama.kv_stats()
    info = llama._cache.kv.info()
    # 2 bytes a value, K and V, as llama.cpp allocates them: not the 8192 of the context.
    per_cell = 2 * info.n_layer * info.n_head_kv * (info.n_embd_head_k + info.n_embd_head_v)
    assert stats.n_cells_max < 2048 and llama.n_ctx() == 8192
    assert stats.kv_bytes == stats.n_cells_max * per_cell
    assert stats.kv_bytes_full == 8192 * per_cell


def test_going_back_behind_the_eviction_is_refused(models: Models, tokens: list[int]) -> None:
    llama = models(kv_policy="streaming", kv_budget=256, n_ctx=4096, n_batch=256)
    llama.eval(tokens[:1000])
    n_cells = llama.kv_stats().n_cells
    assert not llama._ctx.kv_cache_seq_rm(0, 100, -1)
    assert not llama._ctx.kv_cache_seq_rm(0, 100, 200)
    assert llama.kv_stats().n_cells == n_cells
    assert llama._ctx.kv_cache_seq_rm(0, 995, -1)  # the recent window is whole in every head
    assert llama.kv_stats().n_cells == n_cells - 5
    assert llama._ctx.kv_cache_seq_rm(0, 0, -1)
    assert llama.kv_stats().n_cells == 0
