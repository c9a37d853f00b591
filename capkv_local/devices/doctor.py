"""What is loaded: the llama library, what it can do, and the devices that it sees."""

from __future__ import annotations

import contextlib
from typing import Any

import llama_cpp

from capkv_local import native
from capkv_local.devices.ggml import local_devices
from capkv_local.errors import CapKVError, NativeBuildMissing


def doctor() -> dict[str, Any]:
    """What is loaded: for ``capkv doctor`` and bug reports.

    Keys: ``library``, ``patched``, ``abi``, ``features``, ``devices``, ``system_info``,
    ``problems`` (one sentence each).
    """
    problems: list[str] = []
    abi: int | None = None
    devices: list[dict[str, str]] = []
    with contextlib.suppress(NativeBuildMissing):
        devices = [{"name": d.name, "description": d.description} for d in local_devices()]
    try:
        abi = native.abi()
    except CapKVError as error:
        problems.append(str(error))
    return {
        "library": native.library_path(),
        "patched": abi is not None,
        "abi": abi,
        "features": [stat.name.lower() for stat in native.Stat] if abi is not None else [],
        "devices": devices,
        "system_info": llama_cpp.llama_print_system_info().decode(errors="replace").strip(),
        "problems": problems,
    }
