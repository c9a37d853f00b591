"""Rows that are evicted in the memory of a device: not a bit may change, and none takes the bus.

Rows of random bytes: NaNs of every kind, numbers too small to be normal, and scales that no kernel
would write.
"""

from __future__ import annotations

import contextlib
import ctypes
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest

from capkv_local import Llama
from capkv_local.native import CACHE_TYPES, Info, cache_type
from capkv_local.policies import get_policy
from tests.model import oracle, tiny
from tests.model.conftest import decode

server = pytest.importorskip("tests.model.server")

N_TOKENS = 375  # of 384: segments that move are in the way of others
TOKENS: list[int] = np.random.default_rng(5).integers(0, tiny.N_VOCAB, N_TOKENS).tolist()
OPTIONS: dict[str, Any] = {
    **{"n_ctx": 4096, "n_batch": 64, "kv_budget": 256, "kv_room": 64, "verbose": False},
    **{"kv_policy": get_policy("random", n_sinks=1, n_recent=2)},
    **{"n_threads": 1, "n_threads_batch": 1},
}
# What the graph of one layer takes on its way: a few nodes of about 300 bytes for each head.
N_GRAPH = 16384


class Counter:
    """Stands before a server and counts the bytes both ways."""

    def __init__(self, endpoint: str) -> None:
        host, port = endpoint.split(":")
        self._server, self.n_bytes = (host, int(port)), 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            client = self._listener.accept()[0]
            remote = socket.create_connection(self._server)
            for ends in ((client, remote), (remote, client)):
                ends[0].setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                threading.Thread(target=self._pass_on, args=ends, daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 20):
                self.n_bytes += len(data)
                target.sendall(data)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)  # a server takes one client after the other


@pytest.fixture(scope="module")
def counters() -> Iterator[list[Counter]]:
    with server.server() as one, server.server() as two:
        yield [Counter(one.endpoint), Counter(two.endpoint)]


def state(llama: Any) -> bytes:
    ctx = llama._ctx.ctx
    size = llama_cpp.llama_state_seq_get_size(ctx, 0)
    buffer = (ctypes.c_uint8 * size)()
    assert llama_cpp.llama_state_seq_get_data(ctx, buffer, size, 0) == size
    return bytes(buffer)


def with_random_rows(data: bytes, info: Info, rng: np.random.Generator) -> bytes:
    """The same cells of other rows: they are the end of a state, K then V of each layer."""
    out = np.frombuffer(data, np.uint8).copy()
    row = info.n_bytes_cell // info.n_heads // 2
    n, end = info.n_head_kv * N_TOKENS * row, len(out)
    for _ in range(2 * info.n_layer):
        assert int.from_bytes(out[end - n - 8 : end - n].tobytes(), "little") == row
        out[end - n : end] = rng.integers(0, 256, n, np.uint8)
        end -= n + 12
    return out.tobytes()


def masks(rng: np.random.Generator, llama: Any) -> Iterator[oracle.Mask]:
    """What to keep: layers move onto the old rows of those before and behind, some, and not."""

    def held() -> oracle.Mask:
        return np.asarray(llama._cache.kv.positions() >= 0)

    counts = np.full(held().shape[:2], N_TOKENS)
    counts[0] = 5
    yield oracle.random_mask(rng, held(), counts)
    counts[2:] = 5, 6, 6  # heads
    yield oracle.random_mask(rng, held(), counts)
    counts[1] = 90, 90, 70
    yield oracle.random_mask(rng, held(), counts)
    yield held()


@pytest.mark.parametrize("kind", CACHE_TYPES)
@pytest.mark.parametrize(("head_dim", "n_devices"), [(32, 1), (64, 2), (96, 1)])
def test_rows_are_those_of_the_cpu(
    counters: list[Counter], tmp_path: Path, head_dim: int, kind: str, n_devices: int
) -> None:
    path = tiny.llama(tmp_path / "tiny.gguf", head_dim=head_dim, n_head=3, n_head_kv=3, n_layer=5)
    types = dict.fromkeys(("type_k", "type_v"), cache_type(kind))
    used = counters[:n_devices]
    devices = {"rpc_servers": [counter.endpoint for counter in used]}
    cpu: Any = Llama(path, **OPTIONS, **types)
    device: Any = Llama(path, **OPTIONS, **types, **devices)
    for llama in (cpu, device):
        llama._cache.kv.observe(0)
        for i in range(0, N_TOKENS, 64):
            decode(llama, TOKENS[i : i + 64], i)
    info = cpu._cache.kv.info()
    rng = np.random.default_rng(head_dim)
    data = with_random_rows(state(cpu), info, rng)
    buffer = (ctypes.c_uint8 * len(data)).from_buffer_copy(data)
    for llama in (cpu, device):
        assert llama_cpp.llama_state_seq_set_data(llama._ctx.ctx, buffer, len(data), 0)
        assert state(llama) == data

    # As 32-bit words; other rows go through host memory.
    words = info.n_bytes_cell // info.n_heads // 2 % 4 == 0
    for keep in masks(rng, cpu):
        n_bytes = cost(lambda keep=keep: device._cache.kv.evict(keep), used, device)
        cpu._cache.kv.evict(keep)
        assert state(device) == state(cpu)
        # The index of a row is sent for K and V together.
        assert n_bytes > 0
        assert not words or n_bytes <= 4 * keep.sum() + N_GRAPH * info.n_layer
    for n_cells in (300, 200):
        n_bytes = cost(lambda n=n_cells: device._cache.kv.resize(n), used, device)
        cpu._cache.kv.resize(n_cells)
        assert state(device) == state(cpu)
        assert n_bytes <= N_GRAPH * info.n_layer
    for llama in (cpu, device):
        llama.close()


def cost(action: Callable[[], None], counters: list[Counter], llama: Any) -> int:
    """Bytes that an action takes. Requests need no answer: a state waits for those before it."""

    def total() -> int:
        return sum(counter.n_bytes for counter in counters)

    counts = []
    for what in (action, lambda: None):
        before = total()
        what()
        state(llama)
        counts.append(total() - before)
    return counts[0] - counts[1]
