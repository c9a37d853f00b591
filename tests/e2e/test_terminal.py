"""The chat in a terminal of its own, as somebody types into it."""

from __future__ import annotations

import shlex
import subprocess
import sys

import pytest

from tests.e2e.test_ask import ROOT
from tests.e2e.test_cli import HARBOUR, QUESTION

pexpect = pytest.importorskip("pexpect")
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
CHAT = [sys.executable, "-m", "capkv_local.cli", "chat", "-", "--max-tokens", "24"]


def test_chat_asks_at_the_terminal_about_a_document_from_a_pipe() -> None:
    line = f"cat {shlex.quote(str(HARBOUR))} | {shlex.join(CHAT)}"
    with pexpect.spawn(
        "/bin/sh", ["-c", line], cwd=str(ROOT), timeout=300, encoding="utf-8", dimensions=(24, 100)
    ) as terminal:
        terminal.expect("Ask about stdin")
        terminal.expect(">")
        terminal.send(f"{QUESTION}\r")
        terminal.expect("48213")
        terminal.expect(">")
        terminal.send("/quit\r")
        terminal.expect(pexpect.EOF)
    assert terminal.exitstatus == 0


def test_a_document_from_a_pipe_needs_a_terminal_for_the_questions() -> None:
    run = subprocess.run(
        CHAT,
        cwd=ROOT,
        input=HARBOUR.read_bytes(),
        capture_output=True,
        start_new_session=True,  # has no terminal
        timeout=300,
    )
    assert run.returncode == 2 and run.stdout == b""
    assert b"questions come from the terminal, and there is none" in run.stderr
