"""What scripts/check-cuda reads from the compiler, and what it says when that is missing."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from lib.cudacheck import Toolkit, Usage, find_toolkit, parse_usage, table
from lib.errors import SetupError

LOG = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z13leverage_gramILi1ELi1EXadL_ZN62_INTERNAL_5537da95_\
17_leverage_score_cu_0ff2c4e2\
16dequantize_floatI6__halfEEvPKvliR6float2EEEv15leverage_params' for 'sm_86'
ptxas info    : Function properties for _Z13leverage_gram
    48 bytes stack frame, 76 bytes spill stores, 64 bytes spill loads
ptxas info    : Used 96 registers, used 1 barriers, 48 bytes cumulative stack size, 16512 bytes smem
ptxas info    : Compile time = 265.794 ms
ptxas info    : Compiling entry function '_Z13leverage_normILi32ELi1EXadL_ZN62_INTERNAL_5537da95_\
17_leverage_score_cu_0ff2c4e2\
15dequantize_q8_0EPKvliR6float2EEEv15leverage_params' for 'sm_86'
ptxas info    : Function properties for _Z13leverage_norm
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 95 registers, used 1 barriers, 17408 bytes smem, 464 bytes cmem[0]
ptxas info    : Compiling entry function '_Z15leverage_reduce15leverage_params' for 'sm_86'
ptxas info    : Function properties for _Z15leverage_reduce15leverage_params
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 0 barriers, 464 bytes cmem[0]
"""


def test_registers_shared_memory_and_spills_are_read() -> None:
    assert parse_usage(LOG) == [
        Usage("leverage_gram f16", 96, 16512, 140),
        Usage("leverage_norm q8_0", 95, 17408, 0),
        Usage("leverage_reduce", 40, 0, 0),
    ]


def test_a_spill_is_in_the_table() -> None:
    lines = table({"sm_86": parse_usage(LOG), "sm_90": parse_usage(LOG)[1:]})
    assert lines[0].split() == ["kernel", "shared", "sm_86", "sm_90"]
    assert lines[1].split() == ["leverage_gram", "f16", "16512", "96", "(140", "sp)", "-"]
    assert len(lines) == 4


def test_a_log_that_says_something_else_is_an_error() -> None:
    with pytest.raises(SetupError, match="cannot read what ptxas says of _Z1x"):
        parse_usage("ptxas info : Compiling entry function '_Z1x' for 'sm_86'\nnothing")


@pytest.fixture
def nvcc(tmp_path: Path) -> Path:
    """A program that lists two architectures, as nvcc does."""
    path = tmp_path / "bin" / "nvcc"
    path.parent.mkdir()
    path.write_text("#!/bin/sh\necho sm_75\necho sm_86\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_no_compiler_no_architecture_no_header(tmp_path: Path, nvcc: Path) -> None:
    with pytest.raises(SetupError, match="nvcc not found: install the CUDA toolkit"):
        find_toolkit(["86"], None, {"PATH": str(tmp_path)})
    with pytest.raises(SetupError, match=r"cannot run .*: No such file"):
        find_toolkit(["86"], None, {"CUDACXX": str(tmp_path / "gone")})
    env = {"PATH": str(nvcc.parent)}
    with pytest.raises(SetupError, match=r"cannot compile for sm_90, sm_120: .* --arch"):
        find_toolkit(["86", "90", "120"], None, env)
    with pytest.raises(SetupError, match=r"cublas_v2.h not found in .*--cublas"):
        find_toolkit(["75", "86"], tmp_path, env)


def test_a_header_beside_the_compiler_is_found(nvcc: Path) -> None:
    header = nvcc.parent.parent / "include" / "cublas_v2.h"
    header.parent.mkdir()
    header.touch()
    env = {"PATH": str(nvcc.parent)}
    assert find_toolkit(["86"], None, env) == Toolkit(str(nvcc), header.parent)
    assert find_toolkit(["86"], header.parent, env) == Toolkit(str(nvcc), header.parent)
