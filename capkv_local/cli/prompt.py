"""Where questions come from: an editor with history on a terminal, plain lines from a pipe."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from capkv_local.errors import CapKVError

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.key_binding import KeyPressEvent

KEYS_HELP = {
    "Enter": "send",
    "Alt-Enter": "new line; so does \\ at the end of a line",
    "Up, Down": "earlier questions (or lines); Ctrl-R searches",
    "Tab": "complete a command, or the name behind it",
    "Ctrl-C": "stop an answer; twice at the prompt: leave",
}

history_option = click.option(
    "--history/--no-history",
    help="Keep what you ask on the disk, for your eyes only, and find it with Up the next time. "
    "[default: no, in memory only]",
)


def question_reader(
    commands: Callable[[], list[str]], *, on_disk: bool = False
) -> Callable[[], str]:
    """Return what reads a question, which may have several lines.

    Parameters
    ----------
    commands
        Returns what Tab completes.
    on_disk
        Keep the history in a file. Without it questions about private documents stay off the disk.

    Raises
    ------
    CapKVError
        The file of the history cannot be written.
    """
    if not sys.stdin.isatty():
        return continued(input)
    history = history_file() if on_disk else None
    if not sys.stdout.isatty() or os.environ.get("TERM") in ("dumb", "unknown"):

        def prompted() -> str:
            click.echo("> ", nl=False, err=True)
            return input()

        return continued(prompted)
    return editor(commands, history).prompt


def open_terminal() -> int:
    """A descriptor of the terminal that questions come from when a document comes from a pipe.

    Raises
    ------
    click.UsageError
        There is no terminal.
    """
    try:
        return os.open("/dev/tty", os.O_RDWR)
    except OSError as error:
        raise click.UsageError(
            "with the document on standard input, questions come from the terminal, and there is "
            'none; give the document as a file, or use: capkv ask - "QUESTION"'
        ) from error


def read_from(terminal: int) -> None:
    """Put the terminal in the place of standard input, whose document has been read."""
    os.dup2(terminal, 0)
    os.close(terminal)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115


def continued(read_line: Callable[[], str]) -> Callable[[], str]:
    """Return a reader of questions from one of lines: a backslash at the end goes on.

    What stands before the end of the input is a question, backslash or not.
    """

    def read() -> str:
        lines = [read_line()]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
            try:
                lines.append(read_line())
            except EOFError:
                break
        return "\n".join(lines)

    return read


def history_file() -> Path:
    """The file of the history, made for the user alone.

    Raises
    ------
    CapKVError
        It cannot be made or written.
    """
    from capkv_local.home import home

    path = home() / "history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_APPEND | os.O_RDWR, 0o600))
        path.chmod(0o600)
    except OSError as error:
        raise CapKVError(
            f"the history cannot be kept in {path}: {error.strerror}; name another folder with "
            "CAPKV_HOME, or use --no-history"
        ) from error
    return path


def editor(commands: Callable[[], list[str]], history: Path | None) -> PromptSession[str]:
    """An editor of several lines; what is pasted stays one question."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.history import FileHistory, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings
    from prompt_toolkit.output import ColorDepth

    keys = KeyBindings()

    @keys.add("enter")
    def send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.current_line_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.newline(copy_margin=False)
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def new_line(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    return PromptSession(
        "> ",
        multiline=True,
        prompt_continuation="  ",
        key_bindings=keys,
        history=InMemoryHistory() if history is None else FileHistory(str(history)),
        completer=WordCompleter(commands, sentence=True),
        complete_while_typing=False,
        color_depth=ColorDepth.DEPTH_1_BIT if "NO_COLOR" in os.environ else None,
        enable_open_in_editor=False,
    )
