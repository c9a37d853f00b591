"""How far the set-up is: one moving line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

# tick(fraction of the step in 0..1 or None when unknown, detail shown behind the title)
Tick = Callable[[float | None, str], None]

_PLAIN_INTERVAL_S = 10.0
_TERMINAL_INTERVAL_S = 0.1


class Progress:
    """Shows a run of steps as percent of the whole, elapsed time and the step at hand.

    Parameters
    ----------
    steps : titles in the order in which they will run, each with its usual seconds. The seconds
        only weigh the steps against each other, so that the percentage moves evenly.
    stream : where to write; a terminal gets a moving line.
    """

    def __init__(self, steps: Sequence[tuple[str, float]], stream: TextIO | None = None) -> None:
        self._weights = dict(steps)
        self._total = sum(self._weights.values()) or 1.0
        self._stream = sys.stderr if stream is None else stream
        self._is_terminal = self._stream.isatty()
        self._started = time.monotonic()
        self._done = 0.0
        self._shown_at = 0.0

    @contextmanager
    def step(self, title: str) -> Iterator[Tick]:
        """Run one step; yields the function that reports how far inside the step we are."""
        weight = self._weights.get(title, 0.0)
        begun = time.monotonic()

        def tick(fraction: float | None = None, detail: str = "") -> None:
            if fraction is None:  # unknown: creep towards the usual time, never past it
                spent = time.monotonic() - begun
                fraction = spent / (spent + weight) if spent else 0.0
            part = self._done + weight * min(max(fraction, 0.0), 1.0)
            self._show(part, title + (f" ({detail})" if detail else ""))

        self._show(self._done, title, force=True)
        yield tick
        self._done += weight
        self._show(self._done, f"{title}: done in {_clock(time.monotonic() - begun)}", last=True)

    def finish(self, message: str) -> None:
        """Say that all is made, with the whole time."""
        elapsed = _clock(time.monotonic() - self._started)
        self._stream.write(f"{message} ({elapsed})\n")
        self._stream.flush()

    def _show(self, done: float, text: str, *, force: bool = False, last: bool = False) -> None:
        now = time.monotonic()
        interval = _TERMINAL_INTERVAL_S if self._is_terminal else _PLAIN_INTERVAL_S
        if not (force or last) and now - self._shown_at < interval:
            return
        self._shown_at = now
        line = f"[{100 * done / self._total:3.0f}% {_clock(now - self._started):>5}] {text}"
        if self._is_terminal:
            width = shutil.get_terminal_size().columns - 1
            self._stream.write(f"\r\x1b[K{line[:width]}" + ("\n" if last else ""))
        else:
            self._stream.write(line + "\n")
        self._stream.flush()


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
