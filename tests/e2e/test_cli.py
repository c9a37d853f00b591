"""The command line with the real model, as scripts and pipes use it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.test_ask import ROOT, capkv

HARBOUR = ROOT / "tests" / "data" / "harbour.txt"
LICENCE = ROOT / "tests" / "data" / "licence.txt"
QUESTION = "What is the storage code of the old lighthouse?"


def test_doctor_finds_the_patched_library_and_the_model() -> None:
    run = capkv("doctor", "--json")
    assert run.returncode == 0, run.stdout + run.stderr
    report = json.loads(run.stdout)
    assert report["patched"] and report["problems"] == []
    assert Path(report["default_model"]).is_file()
    assert {"capkv", "capkv-paper", "snapkv", "full"} <= set(report["policies"])


@pytest.mark.parametrize("suffix", ["txt", "md", "html", "pdf"])
def test_ask_reads_every_kind_and_prints_the_answer_alone(suffix: str) -> None:
    run = capkv("ask", str(HARBOUR.with_suffix(f".{suffix}")), QUESTION, "--max-tokens", "40")
    assert run.returncode == 0, run.stderr
    assert "48213" in run.stdout
    assert run.stderr == ""


def test_ask_reads_a_pipe() -> None:
    run = capkv("ask", "-", QUESTION, "--max-tokens", "40", stdin=HARBOUR.read_text())
    assert run.returncode == 0 and "48213" in run.stdout


def test_chat_through_a_pipe_and_on_from_the_saved_session(tmp_path: Path) -> None:
    saved = tmp_path / "talk.capkv"
    lines = [QUESTION, "/stats", "/budget 512", "/policy snapkv", f"/save {saved}", "/quit"]
    run = capkv("chat", str(HARBOUR), "--max-tokens", "40", stdin="\n".join(lines))
    assert run.returncode == 0, run.stderr
    assert "48213" in run.stdout
    assert "budget: 512" in run.stdout and "policy: snapkv" in run.stdout
    again = capkv("chat", str(saved), "--max-tokens", "40", stdin=QUESTION)
    assert again.returncode == 0, again.stderr
    assert "48213" in again.stdout
    # One wrong byte anywhere, and the session is refused.
    data = bytearray(saved.read_bytes())
    data[len(data) // 2] ^= 1
    saved.write_bytes(data)
    damaged = capkv("chat", str(saved), stdin=QUESTION)
    assert damaged.returncode == 1
    assert "checksum" in damaged.stderr and damaged.stderr.count("\n") == 1


def test_chat_drops_turns_and_tells_what_does_not_fit() -> None:
    lines = [QUESTION, "Say hello.", QUESTION, "/keep on", QUESTION, "/forget", QUESTION]
    lines += ["long " * 9000, "/stats"]
    run = capkv("chat", str(HARBOUR), "--forget", "--max-tokens", "24", stdin="\n".join(lines))
    first = run.stdout.split("\n\n")[0]
    assert "48213" in first and run.stdout.count(first) == 4
    assert "document " in run.stdout and "conversation " in run.stdout
    assert run.returncode == 1
    assert run.stderr.count("error: ") == 1 and "does not fit into the context" in run.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.txt", "Why?"], "missing.txt"),
        ([str(HARBOUR), "Why?", "--model", "missing.gguf"], "no model file"),
        ([str(HARBOUR), "Why?", "--model", str(LICENCE)], "not a GGUF"),
        ([str(HARBOUR), "Why?", "--budget", "20"], "at least 37"),
        ([str(HARBOUR), "Why?", "--budget", "99999"], "exceeds the context"),
        ([str(HARBOUR), "Why?", "--policy", "snapkw"], "snapkv"),
        ([str(LICENCE), "Why?", "--n-ctx", "2048", "--budget", "512"], "--n-ctx"),
        ([str(ROOT / "tests" / "data" / "scanned.pdf"), "Why?"], "scanned"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_1(arguments: list[str], message: str) -> None:
    run = capkv("ask", *arguments)
    assert run.returncode == 1
    assert run.stdout == ""
    assert run.stderr.startswith("capkv: error: ") and run.stderr.count("\n") == 1
    assert message in run.stderr
