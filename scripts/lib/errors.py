"""The one error that the scripts report as a sentence instead of a trace."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from typing import NoReturn


class SetupError(Exception):
    """Something the user can act on: what happened and what to do, in one message."""


def run_main(name: str, main: Callable[[list[str]], int]) -> NoReturn:
    """Run ``main(argv)`` and exit: 1 with one message on failure, 130 when interrupted."""
    # A polite kill must clean up as Ctrl-C does; by default Python dies without unwinding.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        sys.exit(main(sys.argv[1:]))
    except SetupError as error:
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted; run it again to go on from here", file=sys.stderr)
        sys.exit(130)
