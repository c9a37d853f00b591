"""Plans that are carried out: the printed command runs, and takes no more than was planned."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from capkv_local.cli.display import size
from capkv_local.models import default_model
from capkv_local.models.header import ModelHeader
from capkv_local.plan.planner import Planner, Settings
from capkv_local.policies import get_policy
from tests.e2e.test_ask import ROOT, capkv

TEXT = ROOT / "tests" / "data" / "licence.txt"
HARBOUR = ROOT / "tests" / "data" / "harbour.txt"


def test_the_printed_command_runs() -> None:
    planned = capkv("plan", "--memory", "260MiB", "--context", "4k", "--json")
    assert planned.returncode == 0, planned.stderr
    take = json.loads(planned.stdout)["take"]
    assert (take["type"], take["budget"]) == ("q8_0", None)
    assert "--model" not in take["command"]  # it is the default one
    command = [str(HARBOUR) if word == "FILE" else word for word in take["command"][1:]]
    run = capkv(*command, stdin="/stats\n")
    assert run.returncode == 0, run.stderr
    rows = [row.split(maxsplit=2) for row in run.stdout.splitlines()]
    assert ["KV", "memory", size(take["need"]["kv"])] in rows
    assert ["budget", "4,096", "cells per head"] in rows


def test_a_session_takes_no_more_than_is_planned(tmp_path: Path) -> None:
    text, questions, answers = (tmp_path / name for name in ("text.txt", "in", "out"))
    text.write_text(TEXT.read_text()[:11000])
    questions.write_text("/stats\n")
    options = ["--n-ctx", "2800", "--budget", "512", "--threads", "1"]
    with questions.open() as stdin, answers.open("w") as stdout:
        run = subprocess.Popen(
            [sys.executable, "-m", "capkv_local.cli", "chat", str(text), *options],
            cwd=ROOT,
            stdin=stdin,
            stdout=stdout,
        )
        _, status, usage = os.wait4(run.pid, 0)
        run.returncode = os.waitstatus_to_exitcode(status)
    assert run.returncode == 0
    assert "(0 cells evicted)" not in answers.read_text()
    settings = Settings(2800).with_policy(get_policy("capkv"), probe=True)
    with ModelHeader(default_model()) as header:
        need = Planner(header, settings).need(512)
    assert need.total * 0.6 < usage.ru_maxrss * 1024 <= need.total


def test_auto_says_which_budget_it_took() -> None:
    run = capkv("chat", str(HARBOUR), "--budget", "auto", "--n-ctx", "1000", stdin="/budget\n")
    assert run.returncode == 0, run.stderr
    assert run.stdout == "budget: 1,000 cells per head, global\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.gguf"], "no model file"),
        ([str(TEXT)], "not a GGUF"),
        (["--memory", "100MiB"], "does not fit into 100.0 MiB"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_1(arguments: list[str], message: str) -> None:
    run = capkv("plan", *arguments)
    assert run.returncode == 1
    assert run.stderr.startswith("capkv: error: ") and run.stderr.count("\n") == 1
    assert message in run.stderr
