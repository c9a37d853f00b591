"""The steps of ``scripts/check-sanitizers``: a build that checks itself, and the tests on it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from . import tools
from .config import ROOT
from .devtree import build_dev
from .errors import SetupError
from .setup import ensure

TESTS = (
    *("tests/native/test_leverage_op.py", "tests/native/test_leverage_meta.py"),
    *(f"tests/model/test_{name}.py" for name in ("evict", "ragged", "statistics", "probe")),
    *(f"tests/model/test_{name}.py" for name in ("added_attention", "snapshot", "device_rows")),
    *(f"tests/model/test_{name}.py" for name in ("devices", "rpc")),
)
"""What calls all of the native interface, on the real model and over RPC."""

# The shadow memory of AddressSanitizer is larger than any limit of an address space.
_NOT_HERE = "tests/model/test_rpc.py::test_a_server_without_the_memory_goes_on"

_FLAGS = "-O1 -g1 -fno-omit-frame-pointer -fsanitize=address,undefined"
CMAKE_ARGS = (
    "-DCMAKE_BUILD_TYPE=Debug",
    *(f"-DCMAKE_{language}_FLAGS_DEBUG={_FLAGS}" for language in ("C", "CXX")),
)

# Names of the files that the series adds.
_OURS = re.compile(
    r"(llama-kv-(attn|evict|observe|pool|score)|leverage-score)[\w-]*\.(cpp|cuh?|h)$"
)
_UNDEFINED = re.compile(r"^(?P<file>[^\s:]+):(?P<line>\d+):\d+: runtime error: (?P<what>.*)$", re.M)
_ADDRESS = re.compile(r"^==\d+==ERROR: AddressSanitizer:? (?P<what>.*)$", re.M)


def check_sanitizers(tests: Sequence[str], jobs: int | None) -> int:
    """Build, run the tests file by file, list what was found; return 0 if nothing is ours, else 1.

    Raises
    ------
    SetupError
        Something that is needed is missing, or it does not build.
    """
    runtimes = find_runtimes()
    environment = ensure(dev=True, jobs=jobs)
    dev = build_dev(None, jobs, variant="sanitizers", args=CMAKE_ARGS)
    logs = environment.build.root / "logs" / "sanitizers"
    shutil.rmtree(logs, ignore_errors=True)
    logs.mkdir(parents=True)
    env = {**environment.process_env(), **sanitizer_env(runtimes, logs)}
    env["LLAMA_CPP_LIB_PATH"] = str(dev.bin_dir)
    python = str(environment.venv.python)
    require_canary([python, str(ROOT / "scripts" / "sanitizers" / "canary.py")], env, logs)
    failed = []
    for test in tests:
        started = time.monotonic()
        print(f"== {test}", flush=True)
        command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        command += ["--deselect", _NOT_HERE]
        if subprocess.run([*command, test], cwd=ROOT, env=env, check=False).returncode != 0:
            failed.append(test)
        print(f"[{time.monotonic() - started:.0f} s]", flush=True)
    ours, theirs = findings(_reports(logs))
    for title, found in (("in llama.cpp's own files", theirs), ("in ours", ours)):
        print(f"== found {title}: {len(found)}")
        for what, n in found.items():
            print(f"{what} ({n} reports)")
    print(f"failed: {', '.join(failed) or 'nothing'}; reports: {logs}")
    return 1 if ours or failed else 0


def require_canary(command: Sequence[str], env: Mapping[str, str], logs: Path) -> None:
    """Run a program with a mistake in it and take its report away again.

    Raises
    ------
    SetupError
        There is no report: then a clean run of the tests would mean nothing.
    """
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    ours, _ = findings(_reports(logs))
    if not any("heap-buffer-overflow" in what for what in ours):
        said = (done.stderr or done.stdout).strip()[-500:]
        raise SetupError(f"the sanitizers did not notice a write behind a buffer: {said}")
    for path in logs.iterdir():
        path.unlink()


def _reports(logs: Path) -> list[str]:
    return [path.read_text(errors="replace") for path in sorted(logs.iterdir())]


def find_runtimes(env: Mapping[str, str] = os.environ) -> list[Path]:
    """Return the libraries of the sanitizers, which have to be loaded before Python is.

    Raises
    ------
    SetupError
        The compiler is not g++, or has no sanitizers.
    """
    compiler = tools.cxx_compiler(env)
    if compiler is None or "Free Software" not in _output(compiler, "--version"):
        raise SetupError("the sanitizers need g++: install the package g++ (CXX names another)")
    found = [Path(_output(compiler, f"-print-file-name=lib{n}.so")) for n in ("asan", "ubsan")]
    if lacking := [path.name for path in found if not path.is_file()]:
        raise SetupError(f"{compiler} has no {' and '.join(lacking)}: install libasan and libubsan")
    return found


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def sanitizer_env(runtimes: Sequence[Path], logs: Path) -> dict[str, str]:
    """Return what loads the sanitizers and sends their reports into a folder."""
    return {
        # Python, and any program that a test starts, too: they load the libraries under test.
        "LD_PRELOAD": os.pathsep.join(map(str, runtimes)),
        # Python frees little at its end, so leaks say nothing. Some tests ask for too much memory.
        "ASAN_OPTIONS": f"detect_leaks=0:allocator_may_return_null=1:log_path={logs / 'address'}",
        # It goes on, so that a finding in llama.cpp's files hides none in ours.
        "UBSAN_OPTIONS": f"print_stacktrace=1:log_path={logs / 'undefined'}",
    }


def findings(reports: Iterable[str]) -> tuple[dict[str, int], dict[str, int]]:
    """Return what is ours and what is not: place and kind, each with the number of reports.

    An error of memory is ours if one of our files is in the stack of the access: its first frames.
    """
    ours: dict[str, int] = {}
    theirs: dict[str, int] = {}
    for report in reports:
        for match in _UNDEFINED.finditer(report):
            name = Path(match["file"]).name
            text = f"{name}:{match['line']}: {match['what']}"
            into = ours if _OURS.search(name) else theirs
            into[text] = into.get(text, 0) + 1
        for match in _ADDRESS.finditer(report):
            stack = report[match.end() :].partition("\n\n")[0]
            files = re.findall(r" (\S+\.(?:cpp|c|cuh?|h)):\d+", stack)
            place = Path(files[0]).name if files else "unknown place"
            text = f"{place}: {match['what'].partition(' on address')[0]}"
            into = ours if any(map(_OURS.search, files)) else theirs
            into[text] = into.get(text, 0) + 1
    return ours, theirs
