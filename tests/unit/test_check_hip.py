"""What scripts/check-cuda --hip and --musa read and find, and what they say when it is missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from lib import rocm
from lib.cudacheck import Usage, table
from lib.errors import SetupError
from lib.hipcheck import complaints, parse_usage
from lib.musacheck import mapped, stand_in, unmapped
from lib.rocm import Rocm, find_rocm, hip_version

_R = "[-Rpass-analysis=kernel-resource-usage]"
LOG = f"""\
x.cu:232:1: remark: Function Name: _ZL15leverage_reduce15leverage_params {_R}
  232 | static __global__ void __launch_bounds__(LEVERAGE_THREADS) leverage_reduce(
      | ^
x.cu:232:1: remark:     SGPRs: 26 {_R}
x.cu:232:1: remark:     VGPRs: 24 {_R}
x.cu:232:1: remark:     ScratchSize [bytes/lane]: 0 {_R}
x.cu:232:1: remark:     Dynamic Stack: False {_R}
x.cu:232:1: remark:     Occupancy [waves/SIMD]: 16 {_R}
x.cu:232:1: remark:     SGPRs Spill: 0 {_R}
x.cu:232:1: remark:     VGPRs Spill: 0 {_R}
x.cu:232:1: remark:     LDS Size [bytes/block]: 0 {_R}
x.cu:163:1: remark: Function Name: _ZL13leverage_gramILi1ELi1EXadL_\
ZL16dequantize_floatI14__hip_bfloat16EvPKvliR15HIP_vector_typeIfLj2EEEEEv15leverage_params {_R}
x.cu:163:1: remark:     VGPRs: 128 {_R}
x.cu:163:1: remark:     AGPRs: 4 {_R}
x.cu:163:1: remark:     ScratchSize [bytes/lane]: 364 {_R}
x.cu:163:1: remark:     Occupancy [waves/SIMD]: 2 {_R}
x.cu:163:1: remark:     VGPRs Spill: 90 {_R}
x.cu:163:1: remark:     LDS Size [bytes/block]: 16512 {_R}
"""


def test_registers_shared_memory_and_spills_are_read() -> None:
    assert parse_usage(LOG) == [
        Usage("leverage_gram bf16", 132, 16512, 364, 2),
        Usage("leverage_reduce", 24, 0, 0, 16),
    ]
    assert table({"gfx90a": parse_usage(LOG)})[1].split()[-3:] == ["132/2", "(364", "sp)"]


def test_remarks_that_lack_something_are_an_error() -> None:
    with pytest.raises(SetupError, match="cannot read what the compiler says of _ZL15lev"):
        parse_usage(LOG.replace("Occupancy", "Room"))


def test_what_does_not_compile_is_shown_without_the_remarks() -> None:
    log = LOG + "x.cu:9:1: error: unknown type name 'flot'\n    9 | flot x;\n1 error generated.\n"
    assert complaints(log)[0] == "x.cu:9:1: error: unknown type name 'flot'"
    assert not any("remark" in line for line in complaints(log))


def _install(root: Path, version: str = "6.4") -> Path:
    major, minor = version.split(".")
    for name, text in {
        "llvm/bin/clang++": "",
        "include/hip/hip_version.h": f"#define HIP_VERSION_MAJOR {major}\n"
        f"#define HIP_VERSION_MINOR {minor}\n",
        "include/hipblas/hipblas.h": "",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_an_installed_rocm_is_found(tmp_path: Path) -> None:
    root = _install(tmp_path / "rocm")
    found = Rocm(root / "llvm/bin/clang++", root)
    assert find_rocm(root, {}) == find_rocm(None, {"ROCM_PATH": str(root)}) == found
    other = tmp_path / "clang++"
    other.touch()
    assert find_rocm(root, {"HIPCXX": str(other)}).clang == other


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match=r"is not ROCm: it has no .*clang\+\+"):
        find_rocm(tmp_path, {})
    nowhere = {"PATH": str(tmp_path), "ROCM_PATH": str(tmp_path / "gone")}
    with pytest.raises(SetupError, match=r"ROCm not found: install it \(6.1 or newer"):
        find_rocm(None, nowhere)
    with pytest.raises(SetupError, match=r"is 5.7: ggml needs 6.1"):
        find_rocm(_install(tmp_path / "old", "5.7"), {})
    root = _install(tmp_path / "rocm")
    (root / "include/hipblas/hipblas.h").unlink()
    with pytest.raises(SetupError, match=r"no hipblas/hipblas.h"):
        find_rocm(root, {})
    assert hip_version("nothing") == (0, 0)


@pytest.fixture
def apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A machine with packages: programs that do what the set-up asks of apt-get and dpkg-deb."""
    programs = tmp_path / "bin"
    programs.mkdir()
    contents = _install(tmp_path / "package" / "usr")
    (contents / "llvm").rename(tmp_path / "llvm")
    (contents / "lib/llvm-19").mkdir(parents=True)
    (tmp_path / "llvm/bin").rename(contents / "lib/llvm-19/bin")
    for name, script in {
        "apt-get": 'for name in "$@"; do case $name in clang-19|lib*) touch "${name%/*}.deb";; '
        f'esac; done; echo "$@" >> {tmp_path}/calls',
        "dpkg-deb": f'mkdir -p "$3"; cp -r {contents.parent}/* "$3"',
    }.items():
        (programs / name).write_text(f"#!/bin/sh\n{script}\n")
        (programs / name).chmod(0o755)
    keyring = tmp_path / "keyring"
    keyring.touch()
    monkeypatch.setattr(rocm, "_KEYRING", keyring)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    gone = str(tmp_path / "gone")
    return {"PATH": str(programs), "CAPKV_HOME": str(tmp_path / "home"), "ROCM_PATH": gone}


def test_packages_are_fetched_once(apt: dict[str, str], tmp_path: Path) -> None:
    found = find_rocm(None, apt)
    assert found.clang.is_file()
    assert found.root == tmp_path / "home" / "rocm-debian" / "usr"
    assert found.env()["LD_LIBRARY_PATH"].startswith(str(found.root / "lib"))
    assert f"--rocm-device-lib-path={found.bitcode}" in found.flags()
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == 3  # the compiler, the lists of other releases, the headers
    assert "libamdhip64-dev/forky" in calls[2]
    assert find_rocm(None, apt) == found
    assert (tmp_path / "calls").read_text().splitlines() == calls


def test_a_fetch_that_fails_leaves_nothing(apt: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "bin" / "apt-get").write_text("#!/bin/sh\necho 'E: no route'\nexit 100\n")
    with pytest.raises(SetupError, match=r"cannot fetch a HIP compiler \(E: no route\): .*--rocm"):
        find_rocm(None, apt)
    assert not (tmp_path / "home" / "rocm-debian").exists()


HEADER = """\
#define cudaStream_t musaStream_t
#define cudaMallocHost(ptr, size) musaHostMalloc(ptr, size, musaHostMallocDefault)
#define CUBLAS_OP_N MUBLAS_OP_N
"""


def test_names_that_a_vendor_does_not_map_are_found() -> None:
    assert mapped(HEADER)["cudaMallocHost"] == "musaHostMalloc"
    used = (
        "cudaStream_t s; /* cudaFree */ cudaMallocHost(a, b); ggml_cuda_cast<float>(x); // cuInit"
    )
    assert unmapped(used, HEADER) == []
    assert unmapped(used + '\nf("cudaFree"); cudaMemset(a); cuInit(0);', HEADER) == [
        "cuInit",
        "cudaMemset",
    ]


def test_stand_ins_lead_back_to_cuda() -> None:
    lines = stand_in(mapped(HEADER), {"CUBLAS_OP_N": "0x0"}).splitlines()
    assert "#define musaStream_t cudaStream_t" in lines
    assert "#define MUBLAS_OP_N 0x0" in lines
    assert lines.index("#undef CUBLAS_OP_N") < lines.index("#define MUBLAS_OP_N 0x0")
