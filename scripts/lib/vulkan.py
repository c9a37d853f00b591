"""Vulkan drivers: which device is used, and which drivers must not be."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from .errors import SetupError

PACKAGES = "glslc libvulkan-dev spirv-headers mesa-vulkan-drivers vulkan-tools"
# Older ones corrupt the heap: they count references of buffers that are gone (docs/gpu/vulkan.md).
MIN_MESA = (25, 0)
VISIBLE = "GGML_VK_VISIBLE_DEVICES"
"""Names devices; llama.cpp passes over those that are a CPU unless they are named."""


@dataclass(frozen=True)
class Driver:
    """The device that will be used, with its driver, in words."""

    said: str
    software: bool


def find_driver(env: Mapping[str, str] = os.environ) -> Driver:
    """Return what :func:`require_driver` does, of this machine."""
    for program in ("glslc", "vulkaninfo"):
        if shutil.which(program, path=env.get("PATH")) is None:
            raise SetupError(f"{program} not found: sudo apt-get install {PACKAGES}")
    done = subprocess.run(["vulkaninfo", "--summary"], capture_output=True, text=True, check=False)
    return require_driver(devices_of(done.stdout), env)


def devices_of(summary: str) -> list[dict[str, str]]:
    """Return what ``vulkaninfo --summary`` says of every device."""
    parts = re.split(r"^GPU\d+:\s*$", summary, flags=re.MULTILINE)[1:]
    return [dict(re.findall(r"^\s+(\w+)\s*=\s*(.+?)\s*$", part, re.MULTILINE)) for part in parts]


def require_driver(devices: list[dict[str, str]], env: Mapping[str, str] = os.environ) -> Driver:
    """Return the device that llama.cpp will use.

    Raises
    ------
    SetupError
        There is none, or its driver is known to corrupt memory.
    """
    if not devices:
        raise SetupError(
            f"no Vulkan driver shows a device: sudo apt-get install {PACKAGES} (the driver "
            "llvmpipe among them needs no GPU)"
        )
    asked = env.get(VISIBLE, "0").split(",")[0]
    if not asked.isdigit() or int(asked) >= len(devices):
        raise SetupError(
            f"{VISIBLE}={asked}: there are {len(devices)} Vulkan devices, counted from 0"
        )
    device = devices[int(asked)]
    said = f"{device.get('deviceName', '?')}, {device.get('driverInfo', 'driver unknown')}"
    version = re.search(r"Mesa (\d+)\.(\d+)", device.get("driverInfo", ""))
    software = device.get("driverName") == "llvmpipe"
    if software and version and (int(version[1]), int(version[2])) < MIN_MESA:
        raise SetupError(
            f"{said}: this driver corrupts the memory of the program; Mesa "
            f"{MIN_MESA[0]}.{MIN_MESA[1]} or newer is needed (Debian 12: sudo apt-get install -t "
            "bookworm-backports mesa-vulkan-drivers, or name another driver's file in "
            "VK_DRIVER_FILES)"
        )
    return Driver(said, software)
