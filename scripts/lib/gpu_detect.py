"""Which GPU backend can be built here, and what the system says of the GPUs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from .errors import SetupError
from .keys import cmake_args
from .tools import first_line
from .vulkan import VISIBLE, find_driver


@dataclass(frozen=True)
class Toolchain:
    """A backend, the options of its build, and environment variables that its CMake wants."""

    name: str
    args: tuple[str, ...]
    found: str
    env: dict[str, str] = field(default_factory=dict)
    timed: bool = True  # a driver in software proves everything, but its speed says nothing


# Files by which a driver shows that there is a GPU; /dev/dxg is that of Windows below WSL.
_NVIDIA, _AMD, _ANY = ("nvidia0", "dxg"), ("kfd",), ("dri/renderD128", "nvidia0", "dxg")


def toolchain(
    env: Mapping[str, str] = os.environ, platform: str = sys.platform, dev: Path = Path("/dev")
) -> Toolchain:
    """Return what to build for: what CMAKE_ARGS says, else the first with a compiler and a GPU.

    Raises
    ------
    SetupError
        There is none; says what is there and what to install.
    """
    if env.get("CMAKE_ARGS", "").strip():
        return Toolchain("CMAKE_ARGS", tuple(cmake_args(env)), "CMAKE_ARGS of the environment")
    if platform == "darwin":
        return Toolchain("Metal", (), "macOS")  # llama.cpp builds it there by itself
    idle: list[str] = []
    for name, program, files in (
        ("CUDA", env.get("CUDACXX") or "nvcc", _NVIDIA),
        ("HIP", "hipconfig", _AMD),
        ("Vulkan", "glslc", _ANY),
    ):
        found = shutil.which(program, path=env.get("PATH"))
        if found and any((dev / file).exists() for file in files):
            missing = {} if name != "HIP" else _hip(found, env)
            return Toolchain(name, (f"-DGGML_{name.upper()}=ON",), found, missing)
        if found:
            idle.append(f"{program} ({name})")
    here = f"the compilers {', '.join(idle)} are here, but" if idle else "no compiler for GPUs, and"
    if any((dev / file).exists() for file in (*_ANY, *_AMD)):
        here = "there is a GPU, but no compiler for it"
    else:
        here += " no driver shows a GPU"
    raise SetupError(
        f"{here}: install CUDA (nvcc), ROCm (hipcc) or Vulkan's compiler and headers (Debian, "
        "Ubuntu: sudo apt-get install glslc libvulkan-dev spirv-headers) with the driver; set "
        "CMAKE_ARGS to build for something all the same; or go a way that needs no GPU: "
        "scripts/check-gpu --vulkan (a driver in software), scripts/check-gpu --rpc"
    )


def vulkan(env: Mapping[str, str] = os.environ) -> Toolchain:
    """Return Vulkan, on whatever device its driver shows, in software where there is no GPU.

    Raises
    ------
    SetupError
        See :func:`.vulkan.require_driver`.
    """
    driver = find_driver(env)
    visible = {VISIBLE: env.get(VISIBLE, "0")}
    args = (*cmake_args(env), "-DGGML_VULKAN=ON")
    return Toolchain("Vulkan", args, driver.said, visible, timed=not driver.software)


def _hip(hipconfig: str, env: Mapping[str, str]) -> dict[str, str]:
    wanted = {
        "HIPCXX": f"{first_line(hipconfig, '-l')}/clang",
        "HIP_PATH": first_line(hipconfig, "-R"),
    }
    return {name: value for name, value in wanted.items() if not env.get(name)}


# What names GPUs and drivers, each with the lines of its output that do.
_TELLERS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"), ()),
    (("rocminfo",), ("Marketing Name", "Runtime Version")),
    (("vulkaninfo", "--summary"), ("deviceName", "driverInfo", "apiVersion")),
    (
        ("system_profiler", "SPDisplaysDataType"),
        ("Chipset Model", "Total Number of Cores", "Metal"),
    ),
    (("sw_vers",), ()),
)


def gpus(env: Mapping[str, str] = os.environ) -> list[str]:
    """Return what the tools of GPU makers say, a line each; empty where there are none."""
    lines: list[str] = []
    for command, wanted in _TELLERS:
        program = shutil.which(command[0], path=env.get("PATH"))
        if program is None:
            continue
        try:
            done = subprocess.run(
                [program, *command[1:]], capture_output=True, text=True, timeout=60, check=True
            )
        except (OSError, subprocess.SubprocessError):
            continue
        for line in done.stdout.splitlines():
            if line.strip() and (not wanted or any(word in line for word in wanted)):
                lines.append(f"{command[0]}: {' '.join(line.split())}")
    return lines
