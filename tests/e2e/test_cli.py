"""The command line with the real model, as scripts and pipes use it."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import docx
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


def test_ask_reads_a_word_document(tmp_path: Path) -> None:
    document = docx.Document()
    document.add_heading("The harbour of Norrvik", 1)
    for paragraph in HARBOUR.read_text().split("\n\n"):
        document.add_paragraph(paragraph)
    document.save(str(tmp_path / "harbour.docx"))
    run = capkv("ask", str(tmp_path / "harbour.docx"), QUESTION, "--max-tokens", "40")
    assert run.returncode == 0, run.stderr
    assert "48213" in run.stdout and run.stderr == ""


def test_ask_reads_a_folder_and_says_what_it_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "notes"
    folder.mkdir()
    (folder / "harbour.txt").write_text(HARBOUR.read_text())
    (folder / "tools.md").write_text("# Tools\n\nThe crane is painted green.\n")
    (folder / "photo.png").write_bytes(b"\x89PNG\r\n")
    run = capkv("ask", str(folder), QUESTION, "--max-tokens", "40")
    assert run.returncode == 0, run.stderr
    assert "48213" in run.stdout
    assert run.stderr == "skipped in notes: images: photo.png\n"


def test_ask_does_not_take_a_part_of_a_pipe_for_the_whole() -> None:
    pipe = LICENCE.read_text() * 8  # more than is looked at ahead
    run = capkv("ask", "-", QUESTION, "--n-ctx", "1024", "--budget", "128", stdin=pipe)
    assert run.returncode == 1 and run.stdout == ""
    assert "more than the 768 tokens that were read" in run.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
def test_chat_goes_on_with_what_was_read_before_ctrl_c() -> None:
    command = [sys.executable, "-m", "capkv_local.cli", "chat", str(LICENCE), "--max-tokens", "8"]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        stdin=-1,
        stdout=-1,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that runs the tests in the background has it ignored, for all below it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as chat:
        assert chat.stderr is not None
        for line in chat.stderr:  # the first tenth is read
            if re.match("reading: [0-9]", line):
                break
        chat.send_signal(signal.SIGINT)
        out, err = chat.communicate("What is this text?\n", timeout=600)
    assert chat.returncode == 0, err
    assert re.search(r"stopped after [\d,]+ of 7,\d+ tokens: answers know only this part", err)
    assert out.strip()


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
