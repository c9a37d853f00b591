"""RPC servers: llama.cpp's way to the devices of other machines, and to more of them.

ggml ends the program when a server is not there, is of another version, or is gone in the middle.
The first two are found here before ggml is asked: :func:`check` shakes hands as ggml does, and
whatever is wrong becomes a :class:`~capkv_local.errors.ServerError`. The third cannot be caught: it
happens deep inside of a computation, whose memory is lost with the server anyway. A sentence that
says so is all there is (:func:`loss`).
"""

from __future__ import annotations

import collections
import contextlib
import os
import re
import socket
import struct
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from capkv_local import native
from capkv_local.devices import ggml
from capkv_local.devices.ggml import Device
from capkv_local.errors import NativeBuildMissing, ServerError

DEFAULT_PORT = 50052  # as in llama.cpp

PROTOCOL = (7, 0, 1)
"""What this build speaks, RPC_PROTO_*_VERSION. The last number counts changes of the operators."""

_HELLO = 14  # RPC_CMD_HELLO
_CAPS = 24  # RPC_CONN_CAPS_SIZE
_REPLY = 4 + _CAPS
_TIMEOUT_S = 5.0

Servers = str | Sequence[str]

# Sessions of this process at each server: a server talks with one program at a time, over one
# connection, which the sessions of a program share.
_open: collections.Counter[str] = collections.Counter()
_lock = threading.Lock()


def endpoints(servers: Servers) -> list[str]:
    """Addresses as ``HOST:PORT``, each once, in their order.

    Parameters
    ----------
    servers
        ``"HOST[:PORT][,HOST[:PORT]...]"`` or a sequence of such.

    Raises
    ------
    ServerError
        None, or one that is no address.

    Examples
    --------
    >>> endpoints("10.0.0.2, desk:4000")
    ['10.0.0.2:50052', 'desk:4000']
    """
    texts = [servers] if isinstance(servers, str) else list(servers)
    names = [name.strip() for text in texts for name in text.split(",") if name.strip()]
    if not names:
        raise ServerError(f"no RPC server in {servers!r}: name some as HOST:PORT[,HOST:PORT]")
    return list(dict.fromkeys(map(_endpoint, names)))


def _endpoint(name: str) -> str:
    match = re.fullmatch(r"([A-Za-z0-9._-]+)(?::(\d{1,5}))?", name)
    if match is None:
        raise ServerError(f"'{name}' is no address of an RPC server: write HOST:PORT (IPv4)")
    port = int(match[2] or DEFAULT_PORT)
    if not 0 < port < 1 << 16:
        raise ServerError(f"'{name}': a port is a number from 1 to 65535")
    return f"{match[1]}:{port}"


def version(endpoint: str) -> tuple[int, int, int]:
    """The version of llama.cpp's RPC protocol that a server speaks.

    Raises
    ------
    ServerError
        Out of reach, busy, or no RPC server.
    """
    host, port = endpoint.rsplit(":", 1)
    start = f"start one there with: capkv rpc-server --port {port}"
    try:
        connection = socket.create_connection(
            (socket.gethostbyname(host), int(port)), timeout=_TIMEOUT_S
        )
    except socket.gaierror as error:
        raise ServerError(f"RPC server {endpoint}: there is no host '{host}'") from error
    except OSError as error:
        reason = "no answer" if isinstance(error, TimeoutError) else error.strerror or str(error)
        raise ServerError(f"no RPC server at {endpoint} ({reason}): {start}") from error
    with connection:
        try:
            connection.sendall(struct.pack(f"<BQ{_CAPS}x", _HELLO, _CAPS))
            reply = _receive(connection, 8 + _REPLY)
        except TimeoutError as error:
            raise ServerError(
                f"the RPC server {endpoint} does not answer: it serves one program at a time, and "
                "another may be using it; close that, or start a server on another port"
            ) from error
        except OSError as error:
            reply = b""
            reason = error.strerror or str(error)
        else:
            reason = f"{len(reply)} bytes where a version was expected"
    if len(reply) != 8 + _REPLY or reply[:8] != struct.pack("<Q", _REPLY):
        raise ServerError(
            f"what listens at {endpoint} is no RPC server that this build can talk with "
            f"({reason}): {start}"
        )
    return reply[8], reply[9], reply[10]


def _receive(connection: socket.socket, n_bytes: int) -> bytes:
    data = b""
    while len(data) < n_bytes:
        chunk = connection.recv(n_bytes - len(data))
        if not chunk:
            break
        data += chunk
    return data


def check(endpoint: str) -> None:
    """See that a server is there and computes what this build asks for.

    Raises
    ------
    ServerError
        As :func:`version`, or it speaks another version.
    """
    found = version(endpoint)
    if found == PROTOCOL:
        return
    theirs, ours = (".".join(map(str, numbers)) for numbers in (found, PROTOCOL))
    stock = found[:2] == PROTOCOL[:2] and found[2] < PROTOCOL[2]
    why = "a stock llama.cpp lacks operators that eviction needs; " if stock else ""
    raise ServerError(
        f"the RPC server {endpoint} speaks version {theirs} of the protocol, this build {ours}: "
        f"{why}start the server with `capkv rpc-server` of the same version of capkv-local"
    )


@contextlib.contextmanager
def connected(servers: Servers) -> Iterator[list[Device]]:
    """The devices of servers, for as long as a session uses them.

    Raises
    ------
    ServerError
        As :func:`endpoints` and :func:`check`.
    NativeBuildMissing
        The library was built without RPC.
    """
    names = endpoints(servers)
    with _lock:
        for name in names:
            if not _open[name]:
                check(name)
        ggml.on_abort(_tell_loss)
        found = [device for name in names for device in ggml.server_devices(name)]
        _open.update(names)
    try:
        yield found
    finally:
        with _lock:
            _open.subtract(names)


def is_in_use() -> bool:
    """Whether any session of this process has layers at a server."""
    return any(_open.values())


# -- a server that is gone -------------------------------------------------------------------------


_exits = False


def exit_on_loss() -> None:
    """End the program with exit code 1, as after other errors; ggml's way is a core dump."""
    global _exits
    _exits = True


def _tell_loss(reason: str) -> None:
    """Called by ggml before it ends the program, from any thread."""
    if sys.stderr is not None:
        shown = "\x1b[?25h\r" if sys.stderr.isatty() else ""  # a progress bar hides the cursor
        print(f"{shown}capkv: error: {loss(reason)}", file=sys.stderr, flush=True)
    if _exits:
        os._exit(1)


def loss(reason: str) -> str:
    """The sentence for the reason that ggml gives before it ends the program."""
    if is_in_use() and "RPC server crashed" in reason:
        names = ", ".join(sorted(name for name, n in _open.items() if n))
        return (
            f"an RPC server is gone ({names}), and with it the part of the session that was "
            "there: see what it said last, start it again, and read again or open what was saved"
        )
    return f"llama.cpp ends the program: {reason}"


# -- serving ---------------------------------------------------------------------------------------


def serve(
    host: str,
    port: int,
    *,
    names: Sequence[str] = (),
    n_threads: int | None = None,
    cache: Path | None = None,
    ready: Callable[[str, Sequence[Device]], None] = lambda endpoint, devices: None,
) -> None:
    """Serve devices of this machine until the program is ended.

    Whoever reaches the port can use them, and read and write the memory that is used: there is no
    password and no encryption.

    Parameters
    ----------
    host, port
        Where to listen; 127.0.0.1 is reached by programs of this machine only.
    names
        Devices to serve, as ``capkv doctor`` shows them; by default all GPUs, or else the CPU.
    n_threads
        CPU threads; None for all.
    cache
        Folder that keeps the weights that are received, so that each is sent once.
    ready
        Called with the address and the devices before they are served.

    Raises
    ------
    ServerError
        The address cannot be listened at, or there is no such device.
    NativeBuildMissing
        The library was built without RPC.
    """
    chosen = _chosen(names)
    address = _address(host, port)
    folder = None if cache is None else str(cache)
    if cache is not None:
        cache.mkdir(parents=True, exist_ok=True)
    endpoint = f"{address}:{port}"
    ready(endpoint, chosen)
    native.show_problems()
    ggml.serve(endpoint, chosen, n_threads or os.cpu_count() or 1, folder)
    raise ServerError(f"llama.cpp could not serve at {endpoint}; what it said stands above")


def _chosen(names: Sequence[str]) -> list[Device]:
    known = ggml.local_devices()
    if not known:
        raise NativeBuildMissing("llama.cpp knows no device at all: build with scripts/build")
    if not names:
        return ggml.offload_devices() or [d for d in known if d.kind == "cpu"]
    by_name = {device.name: device for device in known}
    for name in names:
        if name not in by_name:
            raise ServerError(f"there is no device '{name}': there are {', '.join(by_name)}")
    return [by_name[name] for name in names]


def _address(host: str, port: int) -> str:
    """The address in numbers, which is what ggml wants, if it can be listened at."""
    try:
        address = socket.gethostbyname(host)
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((address, port))
    except OSError as error:
        raise ServerError(
            f"cannot listen at {host}:{port} ({error.strerror or error}): "
            "use an address of this machine and a port that is free"
        ) from error
    return address
