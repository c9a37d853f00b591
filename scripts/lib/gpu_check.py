"""The steps of ``scripts/check-gpu``; what fails is reported, and the next step still runs."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import re
import shlex
import subprocess
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from .checks import (
    DECISION_TESTS,
    DEVICE_TESTS,
    DEVICE_VARIABLE,
    OPERATOR_TESTS,
    passed_on,
    run_op_tests,
    run_python,
)
from .config import ROOT, cache_root
from .errors import SetupError
from .gpu_detect import gpus, toolchain, vulkan
from .gpu_report import Report, Section, benchmark_table, device_table
from .setup import Environment, ensure

_LIST_DEVICES = """
import dataclasses, json, sys
from capkv_local.devices import ggml, rpc
found = ggml.local_devices()
if len(sys.argv) > 1:
    with rpc.connected(sys.argv[1]) as theirs:
        found += theirs
print(json.dumps([dataclasses.asdict(device) for device in found]))
"""


@dataclass(frozen=True)
class Plan:
    """What was asked for; None where it depends."""

    rpc: str | None = None  # "rpc" for a server of our own
    vulkan: bool = False
    model: Path | None = None
    tokens: int | None = None
    budget: int | None = None
    quick: bool = False
    report: Path | None = None
    jobs: int | None = None

    def benchmark(self) -> list[str]:
        """Return the size of the benchmark as options."""
        tokens, budget = (32768, 4096) if self.model else (7900, 1024)
        if self.quick:
            tokens, budget = 1500, 256
        sizes = ["--tokens", str(self.tokens or tokens), "--budget", str(self.budget or budget)]
        return [*sizes, *(["--rounds", "2"] if self.quick else [])]

    def device_tests(self) -> tuple[str, ...]:
        """Return the tests of the cache on the device."""
        return DECISION_TESTS if self.quick else DEVICE_TESTS


def check_gpu(plan: Plan) -> int:
    """Run everything and write the report; return 0 if all passed, else 1.

    Raises
    ------
    SetupError
        There is nothing to check on, or it does not build.
    """
    report = Report(title=f"check-gpu, {datetime.date.today()}, {platform.node()}")
    timed = True
    if plan.rpc is None:
        tools = vulkan() if plan.vulkan else toolchain()
        timed = tools.timed
        os.environ.update(tools.env)
        os.environ["CMAKE_ARGS"] = shlex.join(tools.args)
        print(f"== build for {tools.name} ({tools.found}): {shlex.join(tools.args) or 'as it is'}")
        report.built_for = tools.name
        report.settings = {"CMAKE_ARGS": os.environ["CMAKE_ARGS"], **tools.env}
    else:
        print("== build; no GPU is checked, the way over RPC is")
        report.built_for = "RPC"
    environment = ensure(dev=True, op_tests=True, jobs=plan.jobs)
    report.about = _about(environment)
    steps = _Steps(plan, environment)
    names = _found(steps, report)
    todo: list[tuple[str, Callable[[], Section]]] = []
    for name in names:
        todo.append((f"operators on {name}", partial(steps.operators, name)))
        if timed:
            todo.append((f"speed on {name}", partial(steps.speed, name)))
    if names:
        todo.append(("operators against float64", partial(steps.tests, *OPERATOR_TESTS)))
    todo.append(("cache on the device", partial(steps.tests, *plan.device_tests())))
    if timed:
        todo.append(("benchmark", steps.benchmark))
    for title, step in todo:
        report.sections.append(_run(title, step))
    path = (
        plan.report or cache_root() / "reports" / f"{time.strftime('check-gpu-%Y%m%d-%H%M%S')}.md"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(report.text(), encoding="utf-8")
    failed = [section.title for section in report.sections if not section.ok]
    print(f"\n{'FAILED: ' + ', '.join(failed) if failed else 'all passed'}\nreport: {path}")
    return 1 if failed else 0


def _run(title: str, step: Callable[[], Section]) -> Section:
    started = time.monotonic()
    print(f"== {title}", flush=True)
    try:
        section = step()
    except SetupError as error:
        section = Section(title, ok=False, said=str(error))
    section.title, section.seconds = title, time.monotonic() - started
    print(f"{section.summary} [{section.seconds:.0f} s]", flush=True)
    return section


def _found(steps: _Steps, report: Report) -> list[str]:
    """Return the devices of this machine to run operators on; tell all that there are.

    Raises
    ------
    SetupError
        The build sees no GPU: everything would run on the CPU and pass.
    """
    found = steps.devices()
    report.devices = device_table(found)
    report.drivers = gpus()
    print(report.devices)
    names = [str(d["name"]) for d in found if d["kind"] in ("gpu", "igpu") and not d["remote"]]
    if steps.plan.rpc is None and not names:
        raise SetupError(
            f"llama.cpp was built for {report.built_for} and sees no GPU, only the devices above: "
            "is its driver loaded, and may you use it? (Vulkan in software: --vulkan)"
        )
    return [] if steps.plan.rpc else names


def _about(environment: Environment) -> dict[str, str]:
    def git(*args: str) -> str:
        command = ["git", "-C", str(ROOT), *args]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    changed = " and changes" if git("status", "--porcelain") else ""
    return {
        "capkv-local": (git("rev-parse", "--short", "HEAD") or "unknown") + changed,
        "llama.cpp": f"{environment.series.upstream[:9]} with {len(environment.series.patches)} "
        f"patches, build {environment.build.key}",
        "system": f"{platform.platform()}, {os.cpu_count()} cores",
        "Python": platform.python_version(),
    }


class _Steps:
    def __init__(self, plan: Plan, environment: Environment) -> None:
        self.plan, self.environment = plan, environment
        self.log = environment.build.root / "logs" / "check-gpu.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.log.write_text("")

    def _python(self, *args: str, env: dict[str, str] | None = None) -> str:
        return run_python(self.environment, self.log, *args, env=env)

    def devices(self) -> list[dict[str, object]]:
        named = [self.plan.rpc] if self.plan.rpc not in (None, "rpc") else []
        output = self._python("-c", _LIST_DEVICES, *map(str, named))
        found: list[dict[str, object]] = json.loads(output.splitlines()[-1])
        for device in found:
            device["remote"] = str(device["name"]).startswith("RPC")
        return found

    def operators(self, name: str) -> Section:
        """Every operator of the series, against the CPU."""
        said = passed_on(name, self.environment, self.log)
        ops = ",".join(self.environment.series.test_ops)
        return Section(command=f"test-backend-ops test -b {name} -o {ops}", said=said, ok=True)

    def speed(self, name: str) -> Section:
        """How fast the operators are alone."""
        lines: list[str] = []
        for op in self.environment.series.test_ops:
            output = run_op_tests(self.environment, self.log, "perf", "-b", name, "-o", op)
            lines += [" ".join(line.split()) for line in output.splitlines() if f" {op}(" in line]
        if not lines:
            raise SetupError(f"nothing was measured on {name} ({self.log})")
        return Section(
            command=f"test-backend-ops perf -b {name} -o {op}",
            said=f"{len(lines)} shapes measured",
            block="\n".join(lines),
            ok=True,
        )

    def tests(self, *names: str) -> Section:
        """What tests find on the device."""
        where = self.plan.rpc or "gpu"
        with tempfile.TemporaryDirectory() as folder:
            results = Path(folder) / "results.xml"
            options = ["-q", "-ra", f"--junitxml={results}", "-o", "junit_logging=system-out"]
            failure = ""
            try:
                self._python("-m", "pytest", *names, *options, env={DEVICE_VARIABLE: where})
            except SetupError as error:
                failure = str(error)
            if not results.is_file():
                raise SetupError(failure)
            suite = ET.parse(results).getroot().find("testsuite")
        assert suite is not None
        n = {key: int(suite.get(key, "0")) for key in ("tests", "failures", "errors", "skipped")}
        n_passed = n["tests"] - n["failures"] - n["errors"] - n["skipped"]
        said = f"{n_passed} of {n['tests']} tests pass, {n['skipped']} skipped"
        return Section(
            command=f"{DEVICE_VARIABLE}={where} scripts/test {' '.join(names)}",
            said=said + (f"\n{failure}" if failure else ""),
            block=_ties(suite),
            ok=not failure and n_passed > 0,
        )

    def benchmark(self) -> Section:
        """Speed with the small cache against stock, on the device."""
        options = [*self.plan.benchmark(), "--threads", str(os.cpu_count() or 1)]
        if self.plan.model:
            options += ["--model", str(self.plan.model.resolve())]
        if self.plan.rpc is None:
            options += ["--gpu-layers", "-1"]
        script = str(ROOT / "scripts" / "benchmarks" / "decode.py")
        if self.plan.rpc == "rpc":
            with _own_server(self.environment, self.log) as endpoint:
                output = self._python(script, "--json", *options, "--rpc", endpoint)
        else:
            options += ["--rpc", self.plan.rpc] if self.plan.rpc else []
            output = self._python(script, "--json", *options)
        result = json.loads(output.splitlines()[-1])
        table, said, ok = benchmark_table(result, judged=self.plan.rpc is None)
        return Section(
            command=f"scripts/bench-decode {shlex.join(options)}", said=said, table=table, ok=ok
        )


_TIES = re.compile(r"(\d+) of ([\d,]+) kept cells differ, largest relative difference (\S+)")


def _ties(suite: ET.Element) -> str:
    """Return what the tests print of keep lists: the sum, and those that differ."""
    n_swapped = n_kept = n_lists = 0
    worst = 0.0
    lines = []
    for case in suite:
        for line in (case.findtext("system-out") or "").splitlines():
            for swapped, kept, difference in _TIES.findall(line):
                n_lists, n_swapped = n_lists + 1, n_swapped + int(swapped)
                n_kept += int(kept.replace(",", ""))
                worst = max(worst, float(difference))
                if int(swapped):
                    lines.append(f"{case.get('name')}: {line}")
    if not n_lists:
        return ""
    head = f"keep lists, CPU and device: {n_swapped} of {n_kept:,} kept cells differ, "
    return "\n".join([f"{head}largest relative difference {worst:.1e}", *lines])


_SERVE = """
from tests.model.server import server
with server() as started:
    print(started.endpoint, flush=True)
    input()
"""


@contextlib.contextmanager
def _own_server(environment: Environment, log: Path) -> Iterator[str]:
    """Address of an RPC server of this machine, which runs as long as the ``with`` block."""
    with log.open("a") as errors:
        process = subprocess.Popen(
            [str(environment.venv.python), "-c", _SERVE],
            cwd=ROOT,
            env=environment.process_env(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    assert process.stdout is not None
    try:
        endpoint = process.stdout.readline().strip()
        if not endpoint:
            raise SetupError(f"no RPC server starts on this machine; the log is {log}")
        yield endpoint
    finally:
        process.communicate("\n")
