"""The prompt of ``capkv chat``: several lines, history, and questions from a pipe."""

from __future__ import annotations

import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from capkv_local.cli.prompt import continued, editor, history_file
from capkv_local.errors import CapKVError

ENTER, ALT_ENTER, UP = "\r", "\x1b\r", "\x1b[A"


@pytest.fixture
def typed() -> Iterator[Callable[..., list[str]]]:
    """What the editor returns, question by question, for keys typed one after the other."""
    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):

        def ask(*questions: str, history: Path | None = None) -> list[str]:
            session = editor(lambda: ["/budget", "/stats"], history)
            answers = []
            for question in questions:
                keys.send_text(question)
                answers.append(session.prompt())
            return answers

        yield ask


@pytest.mark.parametrize(
    ("keys", "question"),
    [
        (f"why?{ENTER}", "why?"),
        ("why?\n", "why?"),
        (f"one{ALT_ENTER}two{ENTER}", "one\ntwo"),
        (f"one\\{ENTER}two{ENTER}", "one\ntwo"),
        (f"one\\ {ENTER}", "one\\ "),
        ("\x1b[200~a\nb\r\nc\x1b[201~" + ENTER, "a\nb\nc"),  # pasted
    ],
)
def test_keys(typed: Callable[..., list[str]], keys: str, question: str) -> None:
    assert typed(keys) == [question]


def test_history_is_in_memory(typed: Callable[..., list[str]], tmp_path: Path) -> None:
    assert typed(f"one{ALT_ENTER}two{ENTER}", f"{UP}{ENTER}") == ["one\ntwo"] * 2
    assert list(tmp_path.iterdir()) == []


def test_history_on_the_disk_comes_back(
    typed: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CAPKV_HOME", str(tmp_path / "home"))
    path = history_file()
    typed(f"one{ALT_ENTER}two{ENTER}", history=path)
    assert typed(f"{UP}{ENTER}", history=history_file()) == ["one\ntwo"]


@pytest.mark.skipif(sys.platform == "win32", reason="permissions of POSIX")
def test_history_is_for_the_user_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAPKV_HOME", str(tmp_path))
    (tmp_path / "history").touch(mode=0o644)
    assert stat.S_IMODE(history_file().stat().st_mode) == 0o600


def test_history_that_cannot_be_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("CAPKV_HOME", str(tmp_path / "file"))
    with pytest.raises(CapKVError, match=r"history cannot be kept.*--no-history"):
        history_file()


@pytest.mark.parametrize(
    ("lines", "questions"),
    [
        (["a", "b"], ["a", "b"]),
        (["a\\", "b", "c"], ["a\nb", "c"]),
        (["a\\", "\\", ""], ["a\n\n"]),
        (["a\\"], ["a"]),
    ],
)
def test_a_backslash_goes_on_in_a_pipe(lines: list[str], questions: list[str]) -> None:
    queue = iter(lines)

    def line() -> str:
        try:
            return next(queue)
        except StopIteration:
            raise EOFError from None

    read, found = continued(line), []
    while True:
        try:
            found.append(read())
        except EOFError:
            break
    assert found == questions
