"""A plan that is carried out: the printed command takes no more memory than was planned."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest

from tests.e2e.test_ask import ROOT, capkv

TEXT = ROOT / "tests" / "data" / "licence.txt"


def test_the_printed_command_stays_within_the_memory(tmp_path: Path) -> None:
    planned = capkv("plan", "--memory", "275MiB", "--context", "3000", "--json")
    assert planned.returncode == 0, planned.stderr
    take = json.loads(planned.stdout)["take"]
    assert take["budget"] is not None
    text = tmp_path / "text.txt"
    text.write_text(TEXT.read_text()[:11000])
    command = [str(text) if word == "FILE" else word for word in take["command"][1:]]
    lines = "What is this text about?\n/stats\n"
    run = capkv(*command, "--max-tokens", "8", "--threads", "1", stdin=lines)
    assert run.returncode == 0, run.stderr
    assert f"budget       {take['budget']:,} cells" in run.stdout
    assert " 0 cells evicted" not in run.stdout
    # The largest of all programs that the tests have started.
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    assert peak <= take["need"]["total"] <= 275 << 20


def test_auto_says_which_budget_it_took() -> None:
    run = capkv("chat", str(ROOT / "tests/data/harbour.txt"), "--budget", "auto", stdin="/budget\n")
    assert run.returncode == 0, run.stderr
    assert run.stdout == "budget: 8,192 cells per head, global\n"


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
