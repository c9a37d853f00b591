"""What ``scripts/check-gpu --vulkan`` insists on, without a driver."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lib.checks import judged, left_to_cpu
from lib.errors import SetupError
from lib.gpu_detect import vulkan
from lib.vulkan import Driver, devices_of, require_driver

SUMMARY = """\
Devices:
========
GPU0:
\tapiVersion         = 1.4.305
\tdeviceType         = PHYSICAL_DEVICE_TYPE_DISCRETE_GPU
\tdeviceName         = Some GPU
\tdriverName         = radv
\tdriverInfo         = Mesa 22.3.6
GPU1:
\tdeviceType         = PHYSICAL_DEVICE_TYPE_CPU
\tdeviceName         = llvmpipe (LLVM 15.0.6, 256 bits)
\tdriverName         = llvmpipe
\tdriverInfo         = Mesa {} (LLVM 15.0.6)
"""
LOG = Path("some.log")


def test_the_device_asked_for_is_named_with_its_driver() -> None:
    devices = devices_of(SUMMARY.format("25.0.7"))
    assert require_driver(devices, {}) == Driver("Some GPU, Mesa 22.3.6", software=False)
    driver = require_driver(devices, {"GGML_VK_VISIBLE_DEVICES": "1"})
    assert driver.software and "Mesa 25.0.7" in driver.said


def test_a_software_driver_that_corrupts_memory_is_refused() -> None:
    devices = devices_of(SUMMARY.format("22.3.6"))
    with pytest.raises(SetupError, match="bookworm-backports"):
        require_driver(devices, {"GGML_VK_VISIBLE_DEVICES": "1"})


def test_a_driver_in_software_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    summary = SUMMARY.format("25.0.7").replace("`", "")
    for name, says in (("glslc", ""), ("vulkaninfo", summary)):
        (tmp_path / name).write_text(f"#!/bin/sh\ncat <<'EOF'\n{says}EOF\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    env = {"PATH": os.environ["PATH"], "CMAKE_ARGS": "-DA=1"}
    gpu, software = (vulkan({**env, "GGML_VK_VISIBLE_DEVICES": n}) for n in "01")
    assert gpu.timed and not software.timed
    assert software.args == ("-DA=1", "-DGGML_VULKAN=ON")
    assert vulkan(env).env == {"GGML_VK_VISIBLE_DEVICES": "0"}
    with pytest.raises(SetupError, match="glslc not found"):
        vulkan({"PATH": ""})


@pytest.mark.parametrize("asked", ["2", "x", ""])
def test_a_device_that_is_not_there(asked: str) -> None:
    with pytest.raises(SetupError, match="there are 2 Vulkan devices"):
        require_driver(devices_of(SUMMARY), {"GGML_VK_VISIBLE_DEVICES": asked})
    with pytest.raises(SetupError, match="apt-get install"):
        require_driver(devices_of("ERROR: no driver"), {})


PASSED = "Backend 1/2: Vulkan0\n  OP(a=1): OK\n  242/242 tests passed\nBackend 2/2: CPU\n"


def test_cases_that_pass_on_the_device_are_counted() -> None:
    assert judged(PASSED, "OP", "Vulkan0", LOG) == "OP: 242 cases pass on Vulkan0"


def test_only_long_heads_may_be_left_to_the_cpu() -> None:
    lines = [f"  OP(type_u=f16,d={d},nh_kv=1): not supported [X]" for d in (64, 256, 576)]
    assert left_to_cpu("\n".join(lines), "Vulkan0") == 2
    assert left_to_cpu("\n".join(lines), "CUDA0") == 3


@pytest.mark.parametrize(
    ("output", "said"),
    [
        (PASSED.replace("Vulkan0", "CPU"), "does not see Vulkan0"),
        (PASSED.replace("242/242", "0/0"), "no case"),
        (PASSED.replace("OK", "not supported [Vulkan0]"), "leaves 1 cases"),
    ],
)
def test_what_ran_elsewhere_does_not_count(output: str, said: str) -> None:
    """The program itself calls all of these a success."""
    with pytest.raises(SetupError, match=said):
        judged(output, "OP", "Vulkan0", LOG)
