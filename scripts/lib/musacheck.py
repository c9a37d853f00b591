"""Compile our CUDA sources through ggml's header for MUSA, as far as its compiler is not needed.

No public package has that compiler. nvcc takes its place, with headers that give every name of
MUSA which ggml maps CUDA's to the meaning of CUDA's again. What that proves: every name of CUDA's
libraries that our sources use is mapped, and they fit what ggml's own headers are for MUSA. What it
does not: what MUSA's compiler and devices make of them.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

from .cudacheck import OURS, Toolkit, compile_file, find_toolkit, sources
from .errors import SetupError

_ARCH = "86"
VENDORS = "ggml/src/ggml-cuda/vendors"
# What ggml includes for MUSA; all are one here.
_HEADERS = ("musa_runtime.h", "musa.h", "mublas.h", "musa_bf16.h", "musa_fp16.h")
_CUDA = ("cuda_runtime.h", "cuda.h", "cublas_v2.h", "cuda_fp16.h", "cuda_bf16.h", "cuda_fp8.h")


def check_musa(cublas: Path | None) -> None:
    """Compile our sources through ggml's header for MUSA.

    Raises
    ------
    SetupError
        A name of CUDA is not mapped for HIP or MUSA, or a file does not compile.
    """
    toolkit = find_toolkit((_ARCH,), cublas)
    with sources() as work:
        for vendor in ("hip", "musa"):
            header = (work / VENDORS / f"{vendor}.h").read_text()
            for name in OURS:
                if lacking := unmapped((work / name).read_text(), header):
                    raise SetupError(
                        f"{name} uses {', '.join(lacking)}, which {VENDORS}/{vendor}.h does not map"
                    )
        mapping = mapped((work / VENDORS / "musa.h").read_text())
        folder = work / "stand-ins"
        folder.mkdir()
        text = stand_in(mapping, _macros(toolkit, work))
        for header in _HEADERS:
            (folder / header).write_text(text)
        for name in OURS:
            compile_file(toolkit, work, name, f"sm_{_ARCH}", "-w", "-DGGML_USE_MUSA", f"-I{folder}")
            print(f"{name}: compiles through {VENDORS}/musa.h, with nvcc in MUSA's place")


def mapped(header: str) -> dict[str, str]:
    """Return the names of CUDA that a vendor's header defines, with what they become."""
    return dict(re.findall(r"^#define (\w+)(?:\([^)]*\))? +(\w+)", header, re.MULTILINE))


def unmapped(source: str, header: str) -> list[str]:
    """Return the names of CUDA's libraries in a source that a vendor's header does not define."""
    code = re.sub(r"//.*|/\*.*?\*/|\"(?:\\.|[^\"\\])*\"", "", source)
    names = set(re.findall(r"\b(?:cu|cuda|cublas|CU_|CUDA_|CUBLAS_)[A-Z]\w*", code))
    return sorted(names - mapped(header).keys())


def stand_in(mapping: Mapping[str, str], macros: Mapping[str, str]) -> str:
    """Return a header in which MUSA's names mean what CUDA's do.

    ``macros`` are CUDA's names that are macros: the vendor's header defines those again.
    """
    lines = ["#pragma once", *(f"#include <{header}>" for header in _CUDA)]
    for cuda, musa in sorted(mapping.items()):
        if re.match(r"mu|MU|make_musa", musa):
            lines += [
                f"#undef {cuda}",
                f"#undef {musa}",
                f"#define {musa} {macros.get(cuda, cuda)}",
            ]
    lines += ["typedef __nv_bfloat16 __mt_bfloat16;", "typedef __nv_bfloat162 __mt_bfloat162;"]
    return "\n".join(lines) + "\n"


def _macros(toolkit: Toolkit, work: Path) -> dict[str, str]:
    source = work / "macros.cu"
    source.write_text("".join(f"#include <{header}>\n" for header in _CUDA))
    command = [toolkit.nvcc, "-E", "-Xcompiler", "-dM", f"-I{toolkit.cublas}", str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SetupError(f"{toolkit.nvcc} cannot read its own headers:\n{done.stderr[-2000:]}")
    return dict(re.findall(r"^#define (\w+) (.+)$", done.stdout, re.MULTILINE))
