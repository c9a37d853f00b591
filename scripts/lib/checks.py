"""The steps of ``scripts/test`` before pytest; the first that fails ends the run."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from . import gitseries
from .config import ROOT
from .errors import SetupError
from .setup import Environment

_SUMMARY = re.compile(r"(\d+)/(\d+) tests passed")
_HEAD_SIZE = re.compile(r"[(,]d=(\d+)")
_DEVICES = re.compile(r"Testing (\d+) devices")
_TAIL_LINES = 40

DEVICE_VARIABLE = "CAPKV_TEST_DEVICE"
"""Says on which device tests run that run on any."""

OPERATOR_TESTS = ("tests/native/test_leverage_op.py",)
"""The operators on that device, against float64."""

DECISION_TESTS = ("tests/model/test_decisions.py",)
"""The real model on that device, eviction by eviction, against the CPU."""

DEVICE_TESTS = (
    *DECISION_TESTS,
    "tests/model/test_device_graph.py",
    "tests/model/test_devices.py",
    "tests/e2e/test_devices.py",
)
"""The cache in the memory of that device, against the CPU."""


def run_checks(environment: Environment) -> None:
    """Run everything but pytest.

    Raises
    ------
    SetupError
        Names the step that failed; its own output stands above.
    """
    checks: list[tuple[str, Callable[[], str]]] = [
        ("ruff format --check", lambda: _tool(environment, "ruff", "format", "--check", ".")),
        ("ruff check", lambda: _tool(environment, "ruff", "check", ".")),
        ("mypy --strict", lambda: _tool(environment, "mypy", "capkv_local", "scripts/lib")),
        ("scripts/patches check", gitseries.check),
        ("test-backend-ops", lambda: check_ops(environment)),
    ]
    for title, check in checks:
        started = time.monotonic()
        print(f"== {title}", flush=True)
        try:
            said = check()
        except SetupError as error:
            raise SetupError(f"FAILED at {title}: {error}") from error
        print(f"{said} [{time.monotonic() - started:.1f} s]", flush=True)
    print("== pytest", flush=True)


def check_ops(environment: Environment) -> str:
    """Run ggml's tests of every operator the series adds, on every device there is."""
    series = environment.series
    if not series.patches:
        return "no patches in the series, no operators to test"
    log = environment.build.root / "logs" / f"ops-{environment.build.key}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("")
    said = []
    for op in series.test_ops:
        # The CPU is only tested when named; other devices only when none is.
        output = run_op_tests(environment, log, "test", "-b", "CPU", "-o", op)
        said.append(f"{op}: {count_passed(output, op, log)} cases pass on CPU")
        devices = _DEVICES.search(output)
        if devices and int(devices[1]) > 1:
            output = run_op_tests(environment, log, "test", "-o", op)
            said.append(", ".join(f"{ok}/{n} elsewhere" for ok, n in _SUMMARY.findall(output)))
    return "; ".join(said)


def count_passed(output: str, op: str, log: Path) -> int:
    """Return how many cases passed.

    Raises
    ------
    SetupError
        When none ran: the program calls that a success, also for an operator it never heard of.
    """
    counts = [int(total) for _, total in _SUMMARY.findall(output)]
    if not sum(counts):
        raise SetupError(f"test-backend-ops knows no case of {op}; the log is {log}")
    return sum(counts)


def left_to_cpu(output: str, device: str) -> int:
    """Return how many cases a device did not take that it should.

    Head sizes beyond 256 are left to the CPU by design, but not by CUDA.
    """
    most = sys.maxsize if device.startswith("CUDA") else 256
    lines = [line for line in output.splitlines() if "not supported" in line]
    sizes = [_HEAD_SIZE.search(line) for line in lines]
    return sum(size is None or int(size[1]) <= most for size in sizes)


def passed_on(device: str, environment: Environment, log: Path) -> str:
    """Run the tests of every operator of the series on a device, against the CPU.

    Raises
    ------
    SetupError
        See :func:`judged`.
    """
    said = []
    for op in environment.series.test_ops:
        output = run_op_tests(environment, log, "test", "-b", device, "-o", op)
        said.append(judged(output, op, device, log))
    return "; ".join(said)


def judged(output: str, op: str, device: str, log: Path) -> str:
    """Return how many cases passed on the device.

    Raises
    ------
    SetupError
        The device was not there, or it left cases to the CPU: the program calls that a success.
    """
    if not re.search(rf"^Backend \d+/\d+: {re.escape(device)}$", output, re.MULTILINE):
        raise SetupError(
            f"llama.cpp does not see {device}, so all ran on the CPU; the log is {log}"
        )
    passed = count_passed(output, op, log)
    if lacking := left_to_cpu(output, device):
        raise SetupError(f"{device} leaves {lacking} cases of {op} to the CPU; the log is {log}")
    return f"{op}: {passed} cases pass on {device}"


def run_python(
    environment: Environment, log: Path, *args: str, env: Mapping[str, str] | None = None
) -> str:
    """Run Python with arguments in the environment; return its standard output.

    Raises
    ------
    SetupError
        It failed: how the log ends, and where it is.
    """
    command = [str(environment.venv.python), *args]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**environment.process_env(), **(env or {})},
        capture_output=True,
        text=True,
        check=False,
    )
    said = f"{done.stderr}{done.stdout}"
    with log.open("a") as sink:
        sink.write(f"$ {shlex.join(command)}\n{said}")
    if done.returncode != 0:
        last = "\n".join(f"    {line}" for line in said.strip().splitlines()[-15:])
        raise SetupError(f"exit {done.returncode}; the log is {log} and ends with:\n{last}")
    return done.stdout


def run_op_tests(environment: Environment, log: Path, *args: str) -> str:
    """Run test-backend-ops with arguments; return what it printed, without colours.

    Raises
    ------
    SetupError
        It failed: what did not pass, and where the log is.
    """
    lib_dir = str(environment.venv.lib_dir)
    variable = "DYLD_LIBRARY_PATH" if sys.platform == "darwin" else "LD_LIBRARY_PATH"
    path = os.pathsep.join(filter(None, (lib_dir, os.environ.get(variable))))
    done = subprocess.run(
        [environment.build.op_tests, *args],
        env={**os.environ, variable: path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    output = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout.decode("utf-8", "replace"))
    with log.open("a") as sink:
        sink.write(output)
    if done.returncode != 0:
        shown = [line for line in output.splitlines() if not line.rstrip().endswith(": OK")]
        raise SetupError(
            f"test-backend-ops {' '.join(args)} failed (exit {done.returncode}); the log is {log} "
            "and says:\n" + "\n".join(f"    {line}" for line in shown[-_TAIL_LINES:])
        )
    return output


def _tool(environment: Environment, *args: str) -> str:
    command = [str(environment.venv.python), "-m", *args]
    done = subprocess.run(command, cwd=ROOT, env=environment.process_env(), check=False)
    if done.returncode != 0:
        raise SetupError(f"{' '.join(args)} (exit {done.returncode})")
    return "ok"
