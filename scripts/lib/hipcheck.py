"""Compile our CUDA sources as HIP, for AMD's GPUs, and read what the compiler says of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from .cudacheck import (
    CALL_SITES,
    HEADERS,
    OURS,
    Usage,
    kernel_name,
    refuse_spills,
    run_compiler,
    show_usage,
    sources,
)
from .errors import SetupError
from .rocm import Rocm, find_rocm

# RDNA 2 and 3 run 32 threads in step, CDNA 2 and 3 run 64.
TARGETS = ("gfx1030", "gfx1100", "gfx90a", "gfx942")

# ggml's own flags for HIP. Fast math is not among them.
_FLAGS = (
    *("-x", "hip", "-std=gnu++17", "-O3", "-DNDEBUG", "-DGGML_USE_HIP", "-DGGML_HIP_NO_VMM"),
    *("-D__HIP_PLATFORM_AMD__=1", "-D_GNU_SOURCE"),
)
# Three exceptions are for ggml-impl.h and common.cuh.
_WARNINGS = (
    *("-Wall", "-Wextra", "-Werror"),
    *("-Wno-unused-function", "-Wno-unused-parameter", "-Wno-missing-braces"),
)


def check_hip(targets: Sequence[str], named: Path | None) -> None:
    """Compile, and print a table of all kernels.

    Raises
    ------
    SetupError
        There is no compiler, a file does not compile without a warning, or a kernel spills.
    """
    rocm = find_rocm(named)
    with sources() as work:

        def usage(name: str, target: str) -> list[Usage]:
            options = [*_WARNINGS, "-Rpass-analysis=kernel-resource-usage"]
            return parse_usage(_compile(rocm, work, name, target, "--cuda-device-only", *options))

        heading = "registers of a thread/waves per SIMD, by target"
        spilling = show_usage(heading, targets, usage)
        for name in OURS:
            _compile(rocm, work, name, targets[0], "--cuda-host-only", *_WARNINGS)
        # Not our file: its warnings are not ours, either.
        for side in ("--cuda-device-only", "--cuda-host-only"):
            _compile(rocm, work, CALL_SITES, targets[0], side, "-w")
        print(f"{CALL_SITES}: compiles for {targets[0]}")
    refuse_spills(spilling)


def _compile(rocm: Rocm, work: Path, name: str, target: str, side: str, *more: str) -> str:
    # Assembler is enough, and needs no linker for the device.
    output = ["-S", "-o", str(work / "out.s")]
    command = [str(rocm.clang), *_FLAGS, f"--offload-arch={target}", side, *rocm.flags(), *more]
    command += [f"-I{work / folder}" for folder, _ in HEADERS] + [str(work / name), *output]
    failure = f"{name} does not compile for {target}"
    return run_compiler(command, failure, complaints, rocm.env())


def complaints(log: str) -> list[str]:
    """Return what is left of the compiler's output without its remarks on resources."""
    said = re.split(r"^(?=\S+:\d+:\d+: )", log, flags=re.MULTILINE)
    others = [part for part in said if ": remark: " not in part.partition("\n")[0]]
    return "".join(others).splitlines()


def parse_usage(log: str) -> list[Usage]:
    """Read the remarks on the kernels of one file and one target."""
    found = []
    for part in re.split(r"remark: .*Function Name: ", log)[1:]:
        symbol = part.split()[0]
        values = [
            re.search(rf"remark: .*\b{re.escape(name)}: (\d+)", part)
            for name in (
                "VGPRs",
                "ScratchSize [bytes/lane]",
                "Occupancy [waves/SIMD]",
                "LDS Size [bytes/block]",
            )
        ]
        if None in values:
            raise SetupError(f"cannot read what the compiler says of {symbol}")
        vector, scratch, waves, shared = (int(value[1]) for value in values if value)
        # Only CDNA has these; they come out of the same file of registers.
        accumulators = re.search(r"remark: .*\bAGPRs: (\d+)", part)
        registers = vector + (int(accumulators[1]) if accumulators else 0)
        usage = Usage(kernel_name(symbol), registers, shared, scratch, waves)
        found.append(usage)
    return sorted(found, key=lambda usage: usage.kernel)
