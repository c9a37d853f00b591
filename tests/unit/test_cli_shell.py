"""The command among other programs: pipes, closed streams, completion, plain output."""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import click
import pytest

from capkv_local.cli import display, main
from tests.unit.fake_chat import Run

TXT = str(Path(__file__).parent.parent / "data" / "harbour.txt")
CAPKV = [sys.executable, "-m", "capkv_local.cli"]
POSIX = pytest.mark.skipif(sys.platform == "win32", reason="runs a POSIX shell")


def verbs(group: click.Group = main, before: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = []
    for name, command in group.commands.items():
        found.append((*before, name))
        if isinstance(command, click.Group):
            found += verbs(command, (*before, name))
    return found


@pytest.mark.parametrize("verb", verbs(), ids=" ".join)
def test_help_is_a_page_with_examples(
    run: Run, monkeypatch: pytest.MonkeyPatch, verb: tuple[str, ...]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    page = run(*verb, "--help").stdout
    assert re.search(rf"Examples.*:\n.*capkv {' '.join(verb)}", page)
    assert max(map(len, page.splitlines())) <= 80


# ---- pipes and closed streams ------------------------------------------------------------------


def shell(script: str) -> subprocess.CompletedProcess[str]:
    command = " ".join(f"'{word}'" for word in CAPKV)
    script = f'capkv() {{ {command} "$@"; }}; {script}'
    return subprocess.run(["sh", "-c", script], capture_output=True, text=True, timeout=60)


@POSIX
def test_a_reader_that_leaves_is_no_trouble() -> None:
    done = shell("{ capkv chat --help; echo $? >&2; } | true")
    assert done.stderr in ("0\n", "1\n")
    done = shell("{ capkv cache ls --json; echo $? >&2; } | head -1")
    assert done.stderr == "0\n" and done.stdout.count("\n") == 1


@POSIX
@pytest.mark.parametrize(
    ("script", "code", "words"),
    [
        ("capkv ask - why? <&-", 1, "'stdin'"),
        ("capkv chat nowhere.txt <&-", 1, "nowhere.txt"),
        ("capkv chat nowhere.txt <&- >&-", 1, "nowhere.txt"),
        ("capkv config >&-", 0, ""),
        ("capkv ask nowhere.txt why? 2>&-", 1, ""),
        ("capkv nothing 2>&-", 2, ""),
    ],
)
def test_closed_streams(script: str, code: int, words: str) -> None:
    done = shell(script)
    assert (done.returncode, done.stdout) == (code, "")
    assert words in done.stderr and "Traceback" not in done.stderr
    assert "internal error" not in done.stderr


# ---- completion --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bash", "zsh", "fish"])
def test_completion_scripts(run: Run, kind: str) -> None:
    result = run("completion", kind)
    assert result.exit_code == 0 and "_CAPKV_COMPLETE" in result.stdout
    if program := shutil.which(kind):
        subprocess.run([program, "-n"], input=result.stdout, text=True, check=True, timeout=60)


def test_completion_knows_no_other_shell(run: Run) -> None:
    result = run("completion", "tcsh")
    assert result.exit_code == 2 and "'tcsh' is not one of" in result.stderr


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("capkv sna", "plain,snapshot"),
        ("capkv chat --pol", "plain,--policy"),
        ("capkv chat --policy sna", "plain,snapkv"),
        ("capkv ask --allocation py", "plain,pyramid"),
        ("capkv chat --type-k q8", "plain,q8_0"),
        ("capkv chat harb", "file,harb"),
        ("capkv ask harb", "file,harb"),
        ("capkv snapshot a.txt -o bo", "file,bo"),
        ("capkv plan mod", "file,mod"),
        ("capkv cache rm 3f", "plain,3f2a"),
    ],
)
def test_what_is_completed(tmp_path: Path, words: str, found: str) -> None:
    (tmp_path / "snapshots").mkdir()
    (tmp_path / "snapshots" / "3f2a.capkv").write_bytes(b"damaged")
    environment = os.environ | {
        "CAPKV_HOME": str(tmp_path),
        "CAPKV_CONFIG": str(tmp_path / "missing.toml"),  # told when the command runs, not here
        "_CAPKV_COMPLETE": "bash_complete",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split()) - 1),
    }
    done = subprocess.run(CAPKV, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == (f"{found}\n", "")


# ---- plain output ------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("variables", "terminal", "fancy"),
    [
        ({}, True, True),
        ({}, False, False),
        ({"NO_COLOR": "1"}, True, False),
        ({"TERM": "dumb"}, True, False),
    ],
)
def test_progress_is_plain_where_it_must(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], terminal: bool, fancy: bool
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    stream = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    state = {"seconds": 10.0, "n_cells": 64, "kv_bytes": 1024, "rss_bytes": 2 << 20}
    with display.waiting("loading"), display.ingest_progress() as show:
        show(types.SimpleNamespace(done=500, total=1000, estimated=False, **state))  # type: ignore[arg-type]
    assert ("\x1b" in stream.getvalue()) is fancy
    if not fancy:
        assert stream.getvalue().startswith("reading: 500/1,000 tokens")
