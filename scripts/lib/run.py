"""Running a program with its output in a log, its progress shown, and its failure explained."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from .errors import SetupError
from .progress import Tick

# A line of output -> (fraction done, detail), or None when it says nothing about progress.
LineParser = Callable[[str], "tuple[float, str] | None"]

_TAIL_LINES = 25


def run_logged(
    argv: Sequence[str | Path],
    *,
    log: Path,
    tick: Tick,
    parse: LineParser | None = None,
    measure: Callable[[], tuple[float, str] | None] | None = None,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    keep_fd: int | None = None,
) -> None:
    """Run a command, append its output to ``log`` and report progress while it runs.

    Parameters
    ----------
    parse, measure : two ways to know how far it is: from its output, or by looking elsewhere.
    keep_fd : a file descriptor that the command and its children keep open (the set-up lock).

    Raises
    ------
    SetupError
        When it fails: the end of the log and where the log is.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as sink:
        sink.write(f"$ {' '.join(map(str, argv))}\n".encode())
        sink.flush()
        process = subprocess.Popen(
            [str(arg) for arg in argv],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=env,
            cwd=cwd,
            pass_fds=() if keep_fd is None else (keep_fd,),
        )
        assert process.stdout is not None
        try:
            _pump(process.stdout.fileno(), sink.fileno(), tick, parse, measure)
            code = process.wait()
        except BaseException:
            _stop(process)
            raise
        finally:
            process.stdout.close()
    if code != 0:
        raise SetupError(
            f"{Path(argv[0]).name} failed (exit {code}); the log is {log} and ends with:\n"
            + _tail(log)
        )


def _pump(
    source: int,
    sink: int,
    tick: Tick,
    parse: LineParser | None,
    measure: Callable[[], tuple[float, str] | None] | None,
) -> None:
    state: tuple[float | None, str] = (None, "")
    pending = b""
    with selectors.DefaultSelector() as selector:
        selector.register(source, selectors.EVENT_READ)
        while True:
            if selector.select(timeout=0.25):
                chunk = os.read(source, 65536)
                if not chunk:
                    return
                os.write(sink, chunk)
                *lines, pending = (pending + chunk).split(b"\n")
                for line in lines if parse else ():
                    state = (parse(line.decode("utf-8", "replace")) if parse else None) or state
            elif measure:
                state = measure() or state
            tick(*state)


def _stop(process: subprocess.Popen[bytes]) -> None:
    # Ctrl-C reaches the whole process group; a signal sent to Python alone does not.
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signum)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=5)
            return


def _tail(log: Path) -> str:
    lines = log.read_bytes()[-20_000:].decode("utf-8", "replace").splitlines()
    # Ninja goes on with what it had begun: the cause stands where the first failure is.
    first = next((i for i, line in enumerate(lines) if line.startswith("FAILED:")), None)
    shown = lines[-_TAIL_LINES:] if first is None else lines[first : first + _TAIL_LINES]
    return "\n".join(f"    {line}" for line in shown)
