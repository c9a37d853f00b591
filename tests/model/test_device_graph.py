"""What attention over rows per head reads on a device: from aligned addresses, all of it.

Vulkan aborts at a view that begins anywhere else, and CUDA reads a mask in pieces of 16 bytes; a
server that serves a CPU takes everything, so the addresses themselves are looked at.
"""

from __future__ import annotations

import ctypes as ct
from collections.abc import Iterator
from typing import Any

import llama_cpp
import numpy as np
import pytest

from capkv_local.native import cache_type
from tests.model import oracle, tiny
from tests.model.capture import Tensor
from tests.model.conftest import Load, Make
from tests.model.device import Places

TOKENS: list[int] = np.random.default_rng(7).integers(0, tiny.N_VOCAB, 120).tolist()
OPTIONS: dict[str, Any] = {
    **{"n_ctx": 1024, "n_batch": 64, "kv_budget": 128, "kv_room": 32, "verbose": False},
    **{"n_threads": 1, "n_threads_batch": 1},
}


class Addresses:
    """Notes what attention is about to read, in graphs of contexts made from now on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.offsets: list[int] = []  # from the aligned address before
        self._lib = lib = llama_cpp.llama_cpp._lib
        lib.ggml_op_desc.argtypes = lib.ggml_backend_buffer_get_alignment.argtypes = [ct.c_void_p]
        lib.ggml_op_desc.restype = ct.c_char_p
        lib.ggml_backend_buffer_get_alignment.restype = ct.c_size_t
        self._callback = llama_cpp.ggml_backend_sched_eval_callback(self._on_tensor)
        default = llama_cpp.llama_context_default_params

        def params() -> Any:
            out = default()
            out.cb_eval = self._callback
            return out

        monkeypatch.setattr(llama_cpp, "llama_context_default_params", params)
        monkeypatch.setattr(llama_cpp.llama_cpp, "llama_context_default_params", params)

    def _on_tensor(self, address: int, ask: bool, _: Any) -> bool:
        tensor = Tensor.from_address(address)
        if ask and self._lib.ggml_op_desc(address) == b"FLASH_ATTN_EXT":
            for source in filter(None, tensor.src):
                read = Tensor.from_address(source)
                alignment = self._lib.ggml_backend_buffer_get_alignment(read.buffer)
                self.offsets.append(read.data % alignment)
        return not ask  # never computed one by one


@pytest.fixture(scope="module")
def on_device() -> Iterator[dict[str, Any]]:
    places = Places()
    yield places.one().options
    places.close()


@pytest.mark.parametrize("kind", ["f16", "q8_0", "q4_0"])
def test_attention_reads_from_aligned_addresses(
    make: Make, load: Load, on_device: dict[str, Any], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    addresses = Addresses(monkeypatch)
    number = cache_type(kind)
    llama = load(
        make(tiny.llama, n_layer=3, n_head=6, n_head_kv=3),
        **{**OPTIONS, **on_device, "type_k": number, "type_v": number},
    )
    llama.prefill(TOKENS[:100])
    held = llama.kv_positions() >= 0
    llama._cache.kv.evict(oracle.random_mask(np.random.default_rng(11), held))
    addresses.offsets.clear()
    llama.eval(TOKENS[100:101])
    llama.eval(TOKENS[101:110])
    # 2 decodes, 3 layers and 3 heads: queries, keys, values and mask
    assert len(addresses.offsets) == 2 * 3 * 3 * 4
    assert not any(addresses.offsets)
