"""The compiler and headers that ``scripts/check-cuda --hip`` needs: ROCm's, or Debian's packages.

Debian's need no installation: they are fetched with apt-get into the cache and unpacked there.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .config import cache_root
from .errors import SetupError
from .lock import Lock

# ggml asks for this one or newer.
MIN_HIP = (6, 1)

# The compiler is that of this system's own release, whose libraries it needs. HIP's headers and the
# bitcode of the device's functions fit every system; only these releases have them in a version
# that serves. Bitcode is read by compilers of its own version and by newer ones.
_COMPILER = ("clang-19", "libllvm19", "libclang-cpp19", "libclang-common-19-dev")
_FROM_DEBIAN = {
    "forky": ("libamdhip64-dev", "libhipblas-dev", "libhipblas-common-dev"),
    "trixie": ("rocm-device-libs-17",),
}
_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_BITCODE = "usr/lib/llvm-17/lib/clang/17/amdgcn/bitcode"


@dataclass(frozen=True)
class Rocm:
    """What compiles HIP: the program, where HIP is, and what the program needs besides."""

    clang: Path
    root: Path  # include/ is in it
    bitcode: Path | None = None  # None: clang finds it below root
    libraries: Sequence[Path] = field(default=())  # of clang itself

    def flags(self) -> list[str]:
        """Return the options that say where HIP is."""
        found = [f"--rocm-path={self.root}", "-isystem", str(self.root / "include")]
        return found + ([f"--rocm-device-lib-path={self.bitcode}"] if self.bitcode else [])

    def env(self) -> dict[str, str]:
        """Return the environment in which clang finds its own libraries."""
        if not self.libraries:
            return dict(os.environ)
        paths = [*map(str, self.libraries), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
        return {**os.environ, "LD_LIBRARY_PATH": os.pathsep.join(paths)}


def find_rocm(named: Path | None, env: Mapping[str, str] = os.environ) -> Rocm:
    """Return the ROCm that is named or installed, else Debian's packages.

    Raises
    ------
    SetupError
        One sentence that names what is missing and where it comes from.
    """
    candidates = [Path(env["ROCM_PATH"])] if env.get("ROCM_PATH") else [Path("/opt/rocm")]
    for root in [named] if named else candidates:
        clang = Path(env["HIPCXX"]) if env.get("HIPCXX") else root / "llvm" / "bin" / "clang++"
        if clang.is_file() and (root / "include" / "hip" / "hip_version.h").is_file():
            return _checked(Rocm(clang, root))
        if named:
            raise SetupError(f"{root} is not ROCm: it has no {clang} or no include/hip")
    if shutil.which("apt-get", path=env.get("PATH")) is None or not _KEYRING.is_file():
        raise SetupError(
            f"ROCm not found: install it ({MIN_HIP[0]}.{MIN_HIP[1]} or newer, with hipBLAS's "
            "headers; no GPU is needed) or name its folder with --rocm"
        )
    return _checked(_debian(cache_root(env)))


def _checked(rocm: Rocm) -> Rocm:
    found = hip_version((rocm.root / "include/hip/hip_version.h").read_text())
    if found < MIN_HIP:
        raise SetupError(
            f"HIP in {rocm.root} is {found[0]}.{found[1]}: ggml needs {MIN_HIP[0]}.{MIN_HIP[1]} "
            "or newer; name another with --rocm"
        )
    if not (rocm.root / "include" / "hipblas" / "hipblas.h").is_file():
        raise SetupError(f"{rocm.root} has no hipblas/hipblas.h: install hipBLAS's headers there")
    return rocm


def hip_version(header: str) -> tuple[int, int]:
    """Read the version in ``hip_version.h``."""
    numbers = [re.search(rf"#define HIP_VERSION_{n} (\d+)", header) for n in ("MAJOR", "MINOR")]
    major, minor = (int(number[1]) if number else 0 for number in numbers)
    return major, minor


def _debian(root: Path) -> Rocm:
    """Unpack the packages into the cache, unless that was done before."""
    home = root / "rocm-debian"
    rocm = Rocm(
        *(home / "usr/lib/llvm-19/bin/clang++", home / "usr", home / _BITCODE),
        libraries=[home / "usr/lib/x86_64-linux-gnu", home / "usr/lib/llvm-19/lib"],
    )
    with Lock(root / "lock"):
        if not home.is_dir():
            (root / "tmp").mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=root / "tmp") as work:
                print("fetching a HIP compiler and headers (60 MB, once)", flush=True)
                _fetch(Path(work))
                stage = Path(work, "unpacked")
                for package in sorted(Path(work).glob("*.deb")):
                    _run(["dpkg-deb", "-x", str(package), str(stage)], Path(work))
                stage.replace(home)
    return rocm


def _fetch(work: Path) -> None:
    """Download the packages; the lists of other releases stay in the folder, too."""
    _run(["apt-get", "download", *_COMPILER], work)
    for folder in ("lists/partial", "cache/archives/partial"):
        (work / folder).mkdir(parents=True)
    sources = [
        f"deb [signed-by={_KEYRING}] http://deb.debian.org/debian {release} main"
        for release in _FROM_DEBIAN
    ]
    (work / "sources.list").write_text("\n".join(sources) + "\n")
    options = {
        "Dir::Etc::SourceList": work / "sources.list",
        "Dir::Etc::SourceParts": "-",
        "Dir::State::Lists": work / "lists",
        "Dir::Cache": work / "cache",
        "Acquire::Languages": "none",
    }
    apt = ["apt-get", *(arg for key, value in options.items() for arg in ("-o", f"{key}={value}"))]
    _run([*apt, "update"], work)
    names = [f"{name}/{release}" for release, packages in _FROM_DEBIAN.items() for name in packages]
    _run([*apt, "download", *names], work)


def _run(command: Sequence[str], work: Path) -> None:
    # As root, apt-get downloads as a user who may not write here.
    options = ["-o", "APT::Sandbox::User=root"] if command[0] == "apt-get" else []
    done = subprocess.run(
        [command[0], *options, *command[1:]],
        cwd=work,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        said = [line for line in done.stdout.splitlines() if line.startswith(("E:", "dpkg"))]
        raise SetupError(
            f"cannot fetch a HIP compiler ({' '.join(said[:2]) or command[0] + ' failed'}): run "
            "`sudo apt-get update` and try again, or install ROCm and name it with --rocm"
        )
