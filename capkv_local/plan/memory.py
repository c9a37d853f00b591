"""How much memory is there to take."""

from __future__ import annotations

from pathlib import Path

import psutil

# Of the memory that is available, what a session takes by itself: other programs grow, too.
SHARE = 0.8

_CGROUP = Path("/sys/fs/cgroup")


def available_memory(cgroup: Path = _CGROUP) -> int:
    """Bytes that can be taken without swapping: the machine's, or fewer in a container.

    Parameters
    ----------
    cgroup
        Folder with the limits of a container (cgroup v2).
    """
    machine = int(psutil.virtual_memory().available)
    try:
        limit = int((cgroup / "memory.max").read_text())
        used = int((cgroup / "memory.current").read_text())
        stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        # Cached files are given back when memory is wanted.
        used -= int(stat.get("inactive_file", 0)) + int(stat.get("active_file", 0))
    except (OSError, ValueError):  # no container, or one without a limit ("max")
        return machine
    return max(0, min(machine, limit - used))
