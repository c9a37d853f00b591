"""Compile our CUDA sources for every architecture and read what the compiler says of them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .errors import SetupError
from .patchedtree import names_below, patched_tree, read_files

ARCHITECTURES = ("75", "86", "89", "90", "120")

_BACKEND = "ggml/src/ggml-cuda"
OURS = (f"{_BACKEND}/leverage-score.cu",)
CALL_SITES = f"{_BACKEND}/ggml-cuda.cu"
HEADERS = (("ggml/include", (".h",)), ("ggml/src", (".h", ".cuh")))
# ggml's own flags, and warnings as errors. The two exceptions are for ggml-impl.h and cuda_fp4.hpp.
_FLAGS = (
    *("-std=c++17", "-O3", "-use_fast_math", "-extended-lambda", "-DGGML_CUDA_NO_VMM"),
    *("-Werror", "all-warnings"),
    *("-Xcompiler", "-Wall,-Wextra,-Wno-unused-function,-Wno-unused-parameter"),
)


@dataclass(frozen=True)
class Usage:
    """What a kernel takes of a multiprocessor."""

    kernel: str
    registers: int  # per thread
    shared: int  # bytes per block
    spilled: int  # bytes per thread, stores and loads
    waves: int | None = None  # groups of threads in step that fit at once (AMD)


@dataclass(frozen=True)
class Toolkit:
    """The compiler, and where the headers are that it does not bring."""

    nvcc: str
    cublas: Path


def check_cuda(architectures: Sequence[str], cublas: Path | None) -> None:
    """Compile, and print a table of all kernels.

    Raises
    ------
    SetupError
        The toolkit is not complete, a file does not compile without a warning, or a kernel spills.
    """
    toolkit = find_toolkit(architectures, cublas)
    targets = [f"sm_{arch}" for arch in architectures]
    with sources() as work:

        def usage(name: str, target: str) -> list[Usage]:
            return parse_usage(compile_file(toolkit, work, name, target))

        spilling = show_usage("registers of a thread, by architecture", targets, usage)
        compile_file(toolkit, work, CALL_SITES, targets[0])
        print(f"{CALL_SITES}: compiles for {targets[0]}")
    refuse_spills(spilling)


def show_usage(
    heading: str, targets: Sequence[str], usage: Callable[[str, str], list[Usage]]
) -> list[tuple[str, Usage]]:
    """Print what the kernels of our sources take; return those that spill, with the target.

    ``usage`` compiles a file for a target and reads what the compiler says.
    """
    spilling = []
    for name in OURS:
        print(f"{name}: {heading}")
        usages = {target: usage(name, target) for target in targets}
        print("\n".join(table(usages)))
        spilling += [(at, kernel) for at, found in usages.items() for kernel in found]
    return [(target, kernel) for target, kernel in spilling if kernel.spilled]


def refuse_spills(spilling: Sequence[tuple[str, Usage]]) -> None:
    """Raise :class:`SetupError` that names the worst, or say that there is none."""
    if spilling:
        target, worst = max(spilling, key=lambda found: found[1].spilled)
        raise SetupError(
            f"{len(spilling)} kernels spill registers, most of all {worst.kernel} for {target} "
            f"({worst.spilled} bytes): give it fewer values per thread or more registers"
        )
    print("no spills, no warnings")


@contextmanager
def sources() -> Iterator[Path]:
    """Lay our sources and ggml's headers into a folder that goes away afterwards."""
    tree = patched_tree()
    headers = [n for folder, suffixes in HEADERS for n in names_below(tree, folder, suffixes)]
    texts = read_files(tree, (*OURS, CALL_SITES, *headers))
    with tempfile.TemporaryDirectory() as work:
        for name, text in texts.items():
            path = Path(work, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8", errors="surrogateescape")
        yield Path(work)


def find_toolkit(
    architectures: Sequence[str], cublas: Path | None, env: Mapping[str, str] = os.environ
) -> Toolkit:
    """Find nvcc and the header of cuBLAS.

    Raises
    ------
    SetupError
        One sentence that names what is missing and where it comes from.
    """
    nvcc = env.get("CUDACXX") or shutil.which("nvcc", path=env.get("PATH"))
    if nvcc is None:
        raise SetupError(
            "nvcc not found: install the CUDA toolkit, 12.8 or newer for sm_120 (its compiler is "
            "enough, no GPU is needed), or name it with CUDACXX"
        )
    try:
        known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout
    except OSError as error:
        raise SetupError(f"cannot run {nvcc}: {error.strerror}") from error
    if lacking := [arch for arch in architectures if f"sm_{arch}" not in known.split()]:
        raise SetupError(
            f"{nvcc} cannot compile for sm_{', sm_'.join(lacking)}: use another toolkit, or name "
            "the architectures with --arch"
        )
    candidates = [cublas] if cublas else list(_cublas_folders(nvcc))
    for folder in candidates:
        if (folder / "cublas_v2.h").is_file():
            return Toolkit(nvcc, folder)
    where = f"in {cublas}" if cublas else "beside nvcc or in this Python"
    raise SetupError(
        f"cublas_v2.h not found {where}: install cuBLAS's development files, or `pip install "
        "--no-deps nvidia-cublas` (or unpack that wheel and name its include folder with --cublas)"
    )


def _cublas_folders(nvcc: str) -> Iterator[Path]:
    toolkit = Path(nvcc).resolve().parent.parent
    yield toolkit / "include"
    yield from sorted(toolkit.glob("targets/*/include"))
    for root in (Path("/usr/local/cuda"), *(Path(entry) for entry in sys.path)):
        yield from sorted(root.glob("nvidia/*/include"))
    yield Path("/usr/local/cuda/include")


def compile_file(toolkit: Toolkit, work: Path, name: str, target: str, *more: str) -> str:
    """Compile one of the files in ``work``; return what the compiler says."""
    command = [toolkit.nvcc, *_FLAGS, f"-arch={target}", "-Xptxas", "-v", *more]
    command += [f"-I{work / folder}" for folder, _ in HEADERS] + [f"-I{toolkit.cublas}"]
    command += ["-c", str(work / name), "-o", str(work / "out.o")]
    return run_compiler(command, f"{name} does not compile for {target}", _complaints)


def _complaints(log: str) -> list[str]:
    return [line for line in log.splitlines() if not line.startswith("ptxas info")]


def run_compiler(
    command: Sequence[str],
    failure: str,
    complaints: Callable[[str], list[str]],
    env: Mapping[str, str] | None = None,
) -> str:
    """Run a compiler; return what it says.

    Raises
    ------
    SetupError
        It cannot be run, or it failed: then with its first ``complaints``.
    """
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env
        )
    except OSError as error:
        raise SetupError(f"cannot run {command[0]}: {error.strerror}") from error
    if done.returncode != 0:
        said = "\n".join(f"    {line}" for line in complaints(done.stdout)[:30])
        raise SetupError(f"{failure} without warnings:\n{said}")
    return done.stdout


def parse_usage(log: str) -> list[Usage]:
    """Read what ``ptxas -v`` prints of the kernels of one file and one architecture."""
    found = []
    for part in re.split(r"Compiling entry function '", log)[1:]:
        registers, shared = (
            re.search(r"Used (\d+) registers", part),
            re.search(r"(\d+) bytes smem", part),
        )
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", part)
        if registers is None or spills is None:
            raise SetupError(f"cannot read what ptxas says of {part.partition(chr(39))[0]}")
        found.append(
            Usage(
                kernel_name(part.partition("'")[0]),
                int(registers[1]),
                int(shared[1]) if shared else 0,
                int(spills[1]) + int(spills[2]),
            )
        )
    return sorted(found, key=lambda usage: usage.kernel)


def kernel_name(symbol: str) -> str:
    """Return a short name for a mangled one: the kernel, and what it reads the cache with."""
    names = [symbol[m.end() : m.end() + int(m[0])] for m in re.finditer(r"\d+(?=[a-z_])", symbol)]
    kernel = next((name for name in names if name.startswith("leverage_")), symbol)
    reader = re.search(
        r"dequantize_(q\d_\d|iq4_nl|float)(?:\w*?I(f|6__half|13__nv_bfloat16|14__hip_bfloat16)E)?",
        symbol,
    )
    if reader is None:
        return kernel
    element = {"f": "f32", "6__half": "f16"}.get(reader[2], "bf16")
    return f"{kernel} {element if reader[1] == 'float' else reader[1]}"


def table(usages: Mapping[str, Sequence[Usage]]) -> list[str]:
    """Return lines: a kernel each, with its shared memory, registers, and spills if any."""
    kernels = sorted({usage.kernel for found in usages.values() for usage in found})
    lines = [f"  {'kernel':<24}{'shared':>8}" + "".join(f"{name:>15}" for name in usages)]
    for kernel in kernels:
        row = [next((u for u in found if u.kernel == kernel), None) for found in usages.values()]
        shared = max(usage.shared for usage in row if usage)
        cells = [_cell(usage) for usage in row]
        lines.append(f"  {kernel:<24}{shared:>8}" + "".join(f"{cell:>15}" for cell in cells))
    return lines


def _cell(usage: Usage | None) -> str:
    if usage is None:
        return "-"
    waves = "" if usage.waves is None else f"/{usage.waves}"
    return f"{usage.registers}{waves}" + (f" ({usage.spilled} sp)" if usage.spilled else "")
