"""RPC servers of this machine for tests: started on a free port, stopped whatever happens."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from capkv_local.devices import rpc
from capkv_local.errors import ServerError

ROOT = Path(__file__).resolve().parents[2]
_PR_SET_PDEATHSIG = 1
_START_S = 60.0  # a busy machine, not a usual one


def free_port() -> int:
    """A port that nobody listens at; somebody else may take it before we do."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """``capkv rpc-server`` on a port of its own; ``memory`` limits its address space, in bytes."""

    def __init__(self, *options: str, memory: int | None = None) -> None:
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed in stop)
        for _ in range(3):
            port = free_port()
            self.endpoint = f"127.0.0.1:{port}"
            command = [sys.executable, "-m", "capkv_local.cli", "rpc-server", "--port", str(port)]
            self.process = subprocess.Popen(
                [*command, "--threads", "1", *options],
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                preexec_fn=_before(memory),
            )
            if self._answers():
                return
            self.kill()
        log = self.log()
        self._log.close()
        raise AssertionError(f"the server does not start:\n{log}")

    def _answers(self) -> bool:
        deadline = time.monotonic() + _START_S
        while time.monotonic() < deadline and self.process.poll() is None:
            with contextlib.suppress(ServerError):
                rpc.version(self.endpoint)
                return True
            time.sleep(0.05)
        return False

    def log(self) -> str:
        """What it said so far."""
        self._log.seek(0)
        return self._log.read()

    def kill(self) -> None:
        """End it at once, as a machine that loses power."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        self.kill()
        self._log.close()


def _before(memory: int | None) -> Callable[[], None] | None:
    """What the server does before it is one."""
    if sys.platform != "linux":
        return None
    import resource

    prctl = ctypes.CDLL(None).prctl

    def before() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # a test that crashes stops nothing any more
        if memory is not None:
            resource.setrlimit(resource.RLIMIT_AS, (memory, memory))

    return before


@contextlib.contextmanager
def server(*options: str, memory: int | None = None) -> Iterator[Server]:
    """A running server; stopped at the end."""
    running = Server(*options, memory=memory)
    try:
        yield running
    finally:
        running.stop()
