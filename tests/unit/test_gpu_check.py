"""``scripts/check-gpu`` without a GPU: what it builds for, and what its report says."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from lib.checks import OPERATOR_TESTS
from lib.config import ROOT
from lib.errors import SetupError
from lib.gpu_check import Plan, _ties
from lib.gpu_detect import toolchain
from lib.gpu_report import Report, Section, benchmark_table, device_table

RESULT = {
    **{"model": "m.gguf", "policy": "capkv", "tokens": 7900, "budget": 1024, "evictions": 9},
    **{"prefill_ours_s": 2.0, "prefill_stock_s": 3.0, "prefill_ratio": 1.5},
    **{"score_select_evict_share": 0.02, "score_share": 0.015},
    **{"decode_ratio_to_stock_short": 0.97, "decode_ratio_to_stock_full": 2.5},
    **{"kv_MiB": 40.0, "kv_MiB_full": 180.0},
    "decode_tokens_per_s": {"ours": 100.0, "short": 103.0, "full": 40.0},
}


def machine(tmp_path: Path, programs: list[str], devices: list[str]) -> tuple[dict[str, str], Path]:
    """A PATH with programs, and a /dev with files."""
    for folder, names in (("bin", programs), ("dev", devices)):
        for name in names:
            path = tmp_path / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("#!/bin/sh\necho /opt/$1\n")
            path.chmod(0o755)
    return {"PATH": str(tmp_path / "bin")}, tmp_path / "dev"


@pytest.mark.parametrize(
    ("programs", "devices", "name"),
    [
        (["nvcc", "glslc"], ["nvidia0"], "CUDA"),
        (["glslc"], ["nvidia0"], "Vulkan"),
        (["nvcc", "glslc"], ["dri/renderD128"], "Vulkan"),
        (["nvcc", "hipconfig"], ["kfd", "dri/renderD128"], "HIP"),
    ],
)
def test_the_backend_whose_compiler_and_gpu_are_here(
    tmp_path: Path, programs: list[str], devices: list[str], name: str
) -> None:
    found = toolchain(*args(tmp_path, programs, devices))
    assert (found.name, found.args) == (name, (f"-DGGML_{name.upper()}=ON",))
    assert found.env == (
        {"HIPCXX": "/opt/-l/clang", "HIP_PATH": "/opt/-R"} if name == "HIP" else {}
    )


def args(
    tmp_path: Path, programs: list[str], devices: list[str]
) -> tuple[dict[str, str], str, Path]:
    env, dev = machine(tmp_path, programs, devices)
    return env, "linux", dev


@pytest.mark.parametrize(
    ("programs", "devices", "reason"),
    [
        ([], [], "no compiler for GPUs, and no driver shows a GPU"),
        (["nvcc"], [], r"the compilers nvcc \(CUDA\) are here, but no driver"),
        ([], ["nvidia0"], "there is a GPU, but no compiler"),
    ],
)
def test_nothing_to_build_for(
    tmp_path: Path, programs: list[str], devices: list[str], reason: str
) -> None:
    with pytest.raises(SetupError, match=rf"{reason}.*check-gpu --vulkan .*--rpc"):
        toolchain(*args(tmp_path, programs, devices))


def test_what_is_asked_for_wins(tmp_path: Path) -> None:
    env, _, dev = args(tmp_path, ["nvcc"], ["nvidia0"])
    assert toolchain({**env, "CMAKE_ARGS": "-DA=1 -DB='x y'"}, "linux", dev).args == (
        "-DA=1",
        "-DB=x y",
    )
    with pytest.raises(SetupError, match="cannot be split"):
        toolchain({**env, "CMAKE_ARGS": "'"}, "linux", dev)
    assert toolchain(env, "darwin", dev).name == "Metal"


def test_sizes_of_the_benchmark() -> None:
    assert Plan().benchmark() == ["--tokens", "7900", "--budget", "1024"]
    assert Plan(model=Path("m")).benchmark() == ["--tokens", "32768", "--budget", "4096"]
    assert Plan(quick=True, tokens=99).benchmark()[:4] == ["--tokens", "99", "--budget", "256"]


def test_a_quick_check_takes_few_tests_of_those_there_are() -> None:
    quick, full = (Plan(quick=quick).device_tests() for quick in (True, False))
    assert set(quick) < set(full)
    assert all((ROOT / name).is_file() for name in (*full, *OPERATOR_TESTS))


def test_goals_that_are_met_and_missed() -> None:
    table, said, ok = benchmark_table(RESULT)
    assert ok and "not met" not in table and "9 evictions" in said
    slow = {**RESULT, "score_select_evict_share": 0.2, "decode_ratio_to_stock_short": 0.9}
    assert benchmark_table(slow)[0].count("**not met**") == 2
    assert "goal" not in benchmark_table(slow, judged=False)[0]
    assert not benchmark_table({**RESULT, "evictions": 0})[2]  # it measured nothing of ours


def test_keep_lists_are_summed_up() -> None:
    line = "{} evictions: {} of {} kept cells differ, largest relative difference {}"
    texts = [line.format(2, 0, "1,000", "0.0e+00"), "", line.format(1, 3, "24", "2.0e-05")]
    suite = ET.Element("testsuite")
    for i, text in enumerate(texts):
        case = ET.SubElement(suite, "testcase", name=f"test_{i}")
        ET.SubElement(case, "system-out").text = text
    head, *differing = _ties(suite).splitlines()
    assert "3 of 1,024 kept cells differ, largest relative difference 2.0e-05" in head
    assert differing == [f"test_2: {texts[2]}"]
    assert _ties(ET.Element("testsuite")) == ""


def test_a_report_tells_failures_first() -> None:
    report = Report("check-gpu", built_for="CUDA", settings={"CMAKE_ARGS": "-DGGML_CUDA=ON"})
    report.devices = device_table(
        [{"name": "CUDA0", "description": "X", "kind": "gpu", "n_bytes_free": 0, "n_bytes": 2**33}]
    )
    report.sections = [Section("operators", ok=True), Section("tests", said="1 fails\nwhy")]
    text = report.text()
    assert "**1 of 2 steps failed.**" in text and "## tests: **FAILED**" in text
    assert "| CUDA0 | X | gpu | 0.0 of 8.0 GiB free |" in text
    assert "| CMAKE_ARGS | `-DGGML_CUDA=ON` |" in text and "```\nwhy\n```" in text
    assert "No GPU was checked" not in text
    assert "No GPU was checked" in Report("check-gpu", built_for="RPC").text()
