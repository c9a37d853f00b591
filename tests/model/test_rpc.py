"""RPC servers: what is wrong with one is told before llama.cpp ends the program over it."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from capkv_local import CapKVError, Llama, UnsupportedModel
from capkv_local.devices import ggml, rpc
from capkv_local.errors import ContextWarning, OutOfMemory, ServerError
from capkv_local.native import Stat
from tests.model import tiny
from tests.model.conftest import Load, Make
from tests.model.server import ROOT, Server, free_port, server

TOKENS: list[int] = np.random.default_rng(0).integers(0, tiny.N_VOCAB, 400).tolist()
SMALL: dict[str, Any] = {
    **{"n_ctx": 4096, "n_batch": 64, "kv_budget": 64, "kv_room": 64},
    **{"verbose": False, "n_threads": 1, "n_threads_batch": 1},
}


@pytest.fixture(scope="module")
def running() -> Iterator[Server]:
    with server() as started:
        yield started


@contextmanager
def listening(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """Something else at a port, for one client."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)

        def serve() -> None:
            client, _ = listener.accept()
            with client:
                answer(client)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        thread.join(timeout=10)


def speaking(*version: int) -> Callable[[socket.socket], None]:
    """An RPC server of a version, as far as the greeting goes."""

    def answer(client: socket.socket) -> None:
        assert len(client.recv(1 + 8 + 24, socket.MSG_WAITALL)) == 33
        client.sendall(struct.pack("<Q3B25x", 28, *version))

    return answer


# -- before a model is loaded --------------------------------------------------------------------


def test_this_build_speaks_the_version_that_it_says(running: Server) -> None:
    """Fails when the series changes operators: then the number in rpc.py has to change, too."""
    assert rpc.version(running.endpoint) == rpc.PROTOCOL


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("10.0.0.2", ["10.0.0.2:50052"]),
        ("a:1, b:2,a:1", ["a:1", "b:2"]),
        (["desk.lan:4000", "10.0.0.2"], ["desk.lan:4000", "10.0.0.2:50052"]),
    ],
)
def test_addresses(text: Any, expected: list[str]) -> None:
    assert rpc.endpoints(text) == expected


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (" , ", "no RPC server in"),
        ("http://desk:1", "no address"),
        ("::1", "no address"),
        ("a:0", "65535"),
        ("a:70000", "65535"),
        ("a:b", "no address"),
    ],
)
def test_what_is_no_address(text: str, reason: str) -> None:
    with pytest.raises(ServerError, match=reason):
        rpc.endpoints(text)


def test_nobody_is_there(make: Make) -> None:
    endpoint = f"127.0.0.1:{free_port()}"
    with pytest.raises(ServerError, match=f"no RPC server at {endpoint} .*capkv rpc-server"):
        Llama(make(tiny.llama), rpc_servers=endpoint, **SMALL)


def test_there_is_no_such_host(make: Make) -> None:
    with pytest.raises(ServerError, match=r"there is no host 'nowhere\.invalid'"):
        Llama(make(tiny.llama), rpc_servers="nowhere.invalid:50052", **SMALL)


def test_a_stock_server_is_refused(make: Make) -> None:
    """It would end itself at the first operator that it does not know, and us with it."""
    with (
        listening(speaking(*rpc.PROTOCOL[:2], rpc.PROTOCOL[2] - 1)) as endpoint,
        pytest.raises(ServerError, match=r"speaks version 7\.0\.0 .* this build 7\.0\.1.* stock"),
    ):
        Llama(make(tiny.llama), rpc_servers=endpoint, **SMALL)


def test_another_version_is_refused(make: Make) -> None:
    with (
        listening(speaking(6, 1, 0)) as endpoint,
        pytest.raises(ServerError, match=r"speaks version 6\.1\.0 .* of the same version"),
    ):
        Llama(make(tiny.llama), rpc_servers=endpoint, **SMALL)


@pytest.mark.parametrize("reply", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n" + 40 * b"x"])
def test_something_else_is_there(make: Make, reply: bytes) -> None:
    with (
        listening(lambda client: client.sendall(reply)) as endpoint,
        pytest.raises(ServerError, match=f"what listens at {endpoint} is no RPC server"),
    ):
        Llama(make(tiny.llama), rpc_servers=endpoint, **SMALL)


def test_a_server_that_is_busy(make: Make, running: Server, monkeypatch: Any) -> None:
    monkeypatch.setattr(rpc, "_TIMEOUT_S", 0.3)
    host, port = running.endpoint.split(":")
    with socket.create_connection((host, int(port))) as other:
        other.sendall(struct.pack("<BQ24x", 14, 24))
        assert other.recv(36, socket.MSG_WAITALL)
        with pytest.raises(ServerError, match="serves one program at a time"):
            Llama(make(tiny.llama), rpc_servers=running.endpoint, **SMALL)


def test_after_all_that_the_server_serves(make: Make, load: Load, running: Server) -> None:
    first = load(make(tiny.llama), rpc_servers=running.endpoint, **SMALL)
    first.prefill(TOKENS)
    second = load(make(tiny.llama), rpc_servers=running.endpoint, **SMALL)  # at the same time
    second.prefill(TOKENS)
    assert np.array_equal(first.kv_positions(), second.kv_positions())
    first.close()
    second.prefill(TOKENS)
    assert rpc.is_in_use()
    second.close()
    assert not rpc.is_in_use()
    rpc.check(running.endpoint)  # nobody is connected any more


def test_other_models_do_not_get_the_devices_of_servers(
    make: Make, load: Load, running: Server
) -> None:
    load(make(tiny.llama), rpc_servers=running.endpoint, **SMALL)
    names = [device.name for device in ggml.local_devices()]
    assert "CPU" in names and not any(name.startswith("RPC") for name in names)


def test_rows_of_matrices_cannot_be_split(make: Make, running: Server) -> None:
    with pytest.raises(UnsupportedModel, match="LLAMA_SPLIT_MODE_ROW"):
        Llama(make(tiny.llama), rpc_servers=running.endpoint, split_mode=2, **SMALL)


@pytest.mark.skipif(sys.platform != "linux", reason="address spaces have no limit elsewhere")
def test_a_server_without_the_memory_goes_on(make: Make, load: Load) -> None:
    with server(memory=1 << 30) as started:
        options = {**SMALL, "rpc_servers": started.endpoint}
        large = {**options, "n_ctx": 4_000_000, "kv_budget": 3_000_000}
        with (
            pytest.warns(ContextWarning),
            pytest.raises(OutOfMemory, match="no memory for 3000128 KV cells"),
        ):
            Llama(make(tiny.llama), **large)
        llama = load(make(tiny.llama), **options)
        llama.prefill(TOKENS)
        assert llama.kv_stats().evictions >= 2
        llama.close()  # before its server


def test_a_token_crosses_no_more_often_than_with_the_stock_cache(
    make: Make, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once for all layers: what is sent waits for the device, on a GPU as well as here."""
    monkeypatch.setenv("GGML_RPC_DEBUG", "1")
    path = make(tiny.llama, n_layer=6, n_head=6, n_head_kv=3)
    sent = {}
    for name, options in (("stock", {"kv_policy": None, "flash_attn": True}), ("ours", {})):
        with server() as started:
            llama = load(path, **{**SMALL, "rpc_servers": started.endpoint, **options})
            llama.eval(TOKENS[:300])
            llama.sample(temp=0.0)  # waits for the server, whose log is complete then
            before = started.log().count("[set_tensor]")
            for token in TOKENS[300:320]:
                llama.eval([token])
                llama.sample(temp=0.0)
            sent[name] = started.log().count("[set_tensor]") - before
            if name == "ours":
                first = llama.kv_positions()[..., 0]
                assert (first < 0).any()  # heads of unequal length, which have masks of their own
            llama.close()
    # One more or less for each token, and for graphs that are sent anew; a layer would be 6.
    assert 0 < sent["ours"] <= sent["stock"] + 2 * 20


@pytest.mark.parametrize(
    "stat", [Stat.ATTN_MEAN, Stat.ANCHOR_COS, Stat.VALUE_NORM, Stat.LEVERAGE_V]
)
def test_scores_cross_once_for_each_graph(
    make: Make, load: Load, monkeypatch: pytest.MonkeyPatch, stat: Stat
) -> None:
    """Not once for each head: 18 of unequal length."""
    monkeypatch.setenv("GGML_RPC_DEBUG", "1")
    with server() as started:
        path = make(tiny.llama, n_layer=6, n_head=6, n_head_kv=3)
        llama = load(path, **{**SMALL, "rpc_servers": started.endpoint})
        llama.prefill(TOKENS[:300])
        kv = llama._cache.kv
        kv.observe(16, mean_query=True, n_skip=4)
        llama.eval(TOKENS[300:320])
        llama.sample(temp=0.0)  # waits for the server
        n_cells = kv.info().n_cells
        weights = np.ones((6, 3, n_cells), np.float32) if stat == Stat.LEVERAGE_V else None
        before = started.log()
        kv.score(stat, n_cells=n_cells, n_future=64, weights=weights)
        log = started.log()[len(before) :]
        llama.close()
    n_graphs = log.count("[graph_compute]")
    assert 0 < n_graphs < 9
    assert log.count("[get_tensor]") == n_graphs
    assert log.count("[set_tensor]") <= 2 * n_graphs  # slots and mask


# -- in the middle -------------------------------------------------------------------------------

_IN_THE_MIDDLE = """
import sys
from capkv_local import Llama
from capkv_local.devices import rpc
from tests.model.test_rpc import SMALL, TOKENS
if sys.argv[3] == "exit":
    rpc.exit_on_loss()
llama = Llama(sys.argv[1], rpc_servers=sys.argv[2], **SMALL)
llama.prefill(TOKENS)
print("read", flush=True)
sys.stdin.readline()
llama.prefill(TOKENS)
llama.sample()
print("not reached", flush=True)
"""


@pytest.mark.parametrize("way", ["exit", "abort"])
def test_a_server_that_is_gone_ends_the_program_with_a_sentence(make: Make, way: str) -> None:
    """llama.cpp allows nothing better; what it does by itself is a trace of its stack."""
    with (
        server() as started,
        subprocess.Popen(
            [sys.executable, "-c", _IN_THE_MIDDLE, make(tiny.llama), started.endpoint, way],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as program,
    ):
        assert program.stdout is not None and program.stdout.readline() == "read\n"
        started.kill()
        out, err = program.communicate("\n", timeout=60)
    assert out == ""
    assert program.returncode == (1 if way == "exit" else -6)
    assert err.startswith(f"capkv: error: an RPC server is gone ({started.endpoint})"), err
    assert len(err.splitlines()) == 1


# -- the server itself ---------------------------------------------------------------------------


def serve(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "capkv_local.cli", "rpc-server", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--device", "CUDA7"], "no device 'CUDA7': there are CPU"),
        (["--host", "nowhere.invalid"], "cannot listen at nowhere.invalid:50052"),
        (["--host", "192.0.2.1"], "cannot listen at 192.0.2.1:50052"),
    ],
)
def test_a_server_that_cannot_start_says_why(options: list[str], reason: str) -> None:
    done = serve(*options)
    assert (done.returncode, done.stdout) == (1, "")
    *warnings, error = done.stderr.splitlines()  # of a host that is not this machine
    assert error.startswith("capkv: error: ") and reason in error
    assert len(warnings) == ("--host" in options)


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_a_port_that_is_taken_and_a_warning_before_others_may_come(
    running: Server, host: str
) -> None:
    done = serve("--host", host, "--port", running.endpoint.split(":")[1])
    *warnings, error = done.stderr.splitlines()
    assert done.returncode == 1 and f"cannot listen at {host}" in error
    assert ["there is no password" in line for line in warnings] == [True] * (host == "0.0.0.0")
    assert "password" not in running.log()


def test_errors_are_of_the_package() -> None:
    assert issubclass(ServerError, CapKVError) and issubclass(ServerError, ConnectionError)
