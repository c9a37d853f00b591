"""The steps of ``scripts/check-vulkan``: the Vulkan backend on a software driver, end to end."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from .checks import DEVICE_TESTS, DEVICE_VARIABLE, passed_on, run_python
from .config import ROOT
from .errors import SetupError
from .keys import cmake_args
from .setup import Environment, ensure

DEVICE = "Vulkan0"
PACKAGES = "glslc libvulkan-dev spirv-headers mesa-vulkan-drivers vulkan-tools"
# Older ones corrupt the heap: they count references of buffers that are gone (docs/gpu/vulkan.md).
MIN_MESA = (25, 0)


@dataclass(frozen=True)
class Plan:
    """What was asked for."""

    all_devices: bool = False
    tokens: int = 300
    jobs: int | None = None


def check_vulkan(plan: Plan) -> int:
    """Build, run everything, print a summary; return 0 if all passed, else 1.

    Raises
    ------
    SetupError
        Something that is needed is missing, or it does not build.
    """
    driver = require_driver(devices_of(_vulkaninfo()))
    print(f"== driver: {driver}", flush=True)
    # llama.cpp passes over devices that are a CPU unless they are named.
    os.environ.setdefault("GGML_VK_VISIBLE_DEVICES", "0")
    os.environ["CMAKE_ARGS"] = shlex.join([*cmake_args(), "-DGGML_VULKAN=ON"])
    environment = ensure(dev=True, op_tests=True, jobs=plan.jobs)
    log = environment.build.root / "logs" / "check-vulkan.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("")
    size = ["--tokens", str(plan.tokens)]
    steps: list[tuple[str, Callable[[], str]]] = [
        ("test-backend-ops", lambda: passed_on(DEVICE, environment, log)),
        ("operators against float64", lambda: _pytest(environment, log, "tests/native")),
        ("the default model, f32", lambda: _end_to_end(environment, log, *size, f32=True)),
        ("the default model", lambda: _end_to_end(environment, log, *size)),
    ]
    if plan.all_devices:
        steps.append(("device tests", lambda: _pytest(environment, log, *DEVICE_TESTS)))
    failed = []
    for title, step in steps:
        started = time.monotonic()
        print(f"== {title}", flush=True)
        try:
            said = step()
        except SetupError as error:
            failed.append(title)
            said = f"FAILED: {error}"
        print(f"{said} [{time.monotonic() - started:.0f} s]", flush=True)
    print(f"\n{'FAILED: ' + ', '.join(failed) if failed else 'all passed'} on {driver}; log: {log}")
    return 1 if failed else 0


def _vulkaninfo() -> str:
    for program in ("glslc", "vulkaninfo"):
        if shutil.which(program) is None:
            raise SetupError(f"{program} not found: sudo apt-get install {PACKAGES}")
    done = subprocess.run(["vulkaninfo", "--summary"], capture_output=True, text=True, check=False)
    return done.stdout


def devices_of(summary: str) -> list[dict[str, str]]:
    """Return what ``vulkaninfo --summary`` says of every device."""
    parts = re.split(r"^GPU\d+:\s*$", summary, flags=re.MULTILINE)[1:]
    return [dict(re.findall(r"^\s+(\w+)\s*=\s*(.+?)\s*$", part, re.MULTILINE)) for part in parts]


def require_driver(devices: list[dict[str, str]], env: Mapping[str, str] = os.environ) -> str:
    """Return the device that will be used, with its driver, in words.

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
    asked = env.get("GGML_VK_VISIBLE_DEVICES", "0").split(",")[0]
    if not asked.isdigit() or int(asked) >= len(devices):
        raise SetupError(
            f"GGML_VK_VISIBLE_DEVICES={asked}: there are {len(devices)} Vulkan devices, "
            "counted from 0"
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
    return said


def _pytest(environment: Environment, log: Path, *names: str) -> str:
    output = _python(environment, log, "-m", "pytest", "-q", "-ra", *names)
    return output.strip().splitlines()[-1]


def _end_to_end(environment: Environment, log: Path, *args: str, f32: bool = False) -> str:
    """With ``f32``, keep lists can be compared closely; without, it is as users have it."""
    script = str(ROOT / "scripts" / "vulkan" / "endtoend.py")
    env = {"GGML_VK_DISABLE_F16": "1"} if f32 else {}
    return _python(environment, log, script, *args, env=env).strip()


def _python(
    environment: Environment, log: Path, *args: str, env: Mapping[str, str] | None = None
) -> str:
    return run_python(environment, log, *args, env={DEVICE_VARIABLE: "gpu", **(env or {})})
