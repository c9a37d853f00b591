"""One set-up at a time: a file lock that dies with its holder."""

from __future__ import annotations

import fcntl
import os
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import TextIO


class Lock:
    """Exclusive lock on a file, with a word to the user while it waits.

    The kernel drops it when the last holder of the file is gone, so a killed set-up leaves no
    stale lock. Compilers inherit it (``fd``): when only Python was killed, the next run waits for
    the orphans to end instead of building into the same files.
    """

    def __init__(self, path: Path, stream: TextIO | None = None) -> None:
        self._path = path
        self._stream = sys.stderr if stream is None else stream
        self.fd = -1

    def __enter__(self) -> Lock:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self.fd = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if not self._try():
                self._wait()
            os.truncate(self.fd, 0)
            os.pwrite(self.fd, f"{os.getpid()}\n".encode(), 0)
        except BaseException:
            os.close(self.fd)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # Closing, not LOCK_UN: a child that is still alive keeps the lock.
        os.close(self.fd)

    def _try(self) -> bool:
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _wait(self) -> None:
        holder = os.pread(self.fd, 32, 0).decode("ascii", "replace").strip() or "unknown"
        print(
            f"Another capkv set-up (process {holder}) is at work; waiting for it to end ...",
            file=self._stream,
            flush=True,
        )
        started = told = time.monotonic()
        while not self._try():
            time.sleep(0.2)
            if time.monotonic() - told >= 30:
                told = time.monotonic()
                waited = int(told - started)
                print(f"... still waiting ({waited} s)", file=self._stream, flush=True)
