"""``capkv chat``: read documents once, then ask about them as often as you like."""

from __future__ import annotations

import contextlib
import difflib
import shlex
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from capkv_local.cli.cache import cache_option, open_and_read
from capkv_local.cli.citing import cite_option, show_citations
from capkv_local.cli.common import (
    ModelOptions,
    budget_value,
    files_argument,
    json_option,
    max_tokens_option,
    model_options,
    read_sources,
    session_path,
)
from capkv_local.cli.display import budget_text, size, stats_text, stream_answer
from capkv_local.cli.guard import one_line
from capkv_local.cli.prompt import (
    KEYS_HELP,
    history_file,
    history_option,
    open_terminal,
    question_reader,
    read_from,
)
from capkv_local.errors import CapKVError

if TYPE_CHECKING:
    from capkv_local.chat import DocumentChat


@click.command("chat", short_help="Talk with documents, or go on with a saved session.")
@files_argument
@click.option(
    "--forget",
    is_flag=True,
    help="Drop each question and its answer: every question meets the document alone.",
)
@cite_option
@cache_option
@history_option
@json_option
@max_tokens_option
@model_options
def chat_command(
    files: tuple[str, ...],
    forget: bool,
    cite: bool,
    cache: bool,
    history: bool,
    as_json: bool,
    max_tokens: int,
    options: ModelOptions,
) -> None:
    """Read each FILE, then answer what you ask about them.

    A FILE is text, Markdown, source code, HTML, PDF, Word (docx), an e-book (epub) or a folder of
    these; one that ends in .capkv is a snapshot, or a session saved with /save, and goes on where
    it was. Ctrl-C while reading keeps what was read, during an answer it stops the answer, and
    twice at the prompt it quits. At the prompt, /help lists what else can be done. Questions may
    also come from a pipe, one a line (a backslash at its end goes on with the next). When one of
    them failed, the exit code is 1 at the end. With "-" the document comes from the pipe, and the
    questions from the terminal.

    The conversation has cells of its own and takes none from the document. When they run out,
    what matters least in it goes; with --forget each question meets the document alone.

    \b
    Examples:
      capkv chat report.pdf
      capkv chat chapter1.md chapter2.md --budget 4096
      capkv chat my-project/
      man bash | capkv chat -
      capkv chat report.pdf --n-ctx 100000 --budget 512MiB --type-k q8_0
      capkv chat report.capkv
      capkv chat report.pdf --cache
      capkv chat report.pdf --forget < questions.txt > answers.txt
      capkv chat report.pdf notes.docx --cite
      capkv chat report.pdf --json < questions.txt | jq -r .answer

    \b
    With --json there is one object a line for each question or command:
      {"question": ..., "answer": ..., "stopped": by Ctrl-C, "policy",
       "allocation", "budget", "tokens": so far, "seconds": {"answer", ...},
       "kv": {...}}, as in `capkv ask --help`; {"command": ..., "output": text};
      what failed has "error": text instead of answer or output.
    With --cite questions also have "citations", as in `capkv ask --help`
    """
    terminal = open_terminal() if "-" in files else None
    if history and (terminal is not None or sys.stdin.isatty()):
        history_file()  # now: reading may take long
    sources = read_sources(files)
    with contextlib.closing(open_and_read(sources, options, cache=cache, cite=cite)) as session:
        if terminal is not None:
            read_from(terminal)
        reader = question_reader(completions, on_disk=history)
        if forget:
            session.set_keep_turns(False)
        interactive = sys.stdin.isatty()
        if interactive:
            click.echo(f"Ask about {sources.title}. /help lists commands and keys.", err=True)
        conversation = conversation_type(as_json)(session, reader, max_tokens)
        conversation.run(interactive=interactive)
    if conversation.failed and not interactive:
        click.get_current_context().exit(1)


@dataclass
class Conversation:
    """Questions and slash commands, line by line, until the lines end.

    Attributes
    ----------
    session : DocumentChat
        What answers.
    read_line : callable
        Returns the next line; raises EOFError at the end, KeyboardInterrupt for Ctrl-C.
    max_tokens : int
        Longest answer in tokens.
    failed : bool
        Whether a question or command failed.
    """

    session: DocumentChat
    read_line: Callable[[], str]
    max_tokens: int = 512
    failed: bool = False

    def run(self, *, interactive: bool) -> None:
        """Answer until the end of input, ``/quit``, or Ctrl-C twice at the prompt."""
        warned = False
        while True:
            try:
                line = self.read_line().strip()
            except EOFError:
                return
            except KeyboardInterrupt:
                if not interactive:
                    raise
                if warned:
                    click.echo(err=True)
                    return
                click.echo("(Ctrl-C again, Ctrl-D or /quit leaves)", err=True)
                warned = True
                continue
            warned = False
            if line in ("/quit", "/exit"):
                return
            if line:
                self.handle(line)

    def handle(self, line: str) -> None:
        """Answer one question, or obey one command; errors are shown, not raised."""
        try:
            if line.startswith("/"):
                self.command(line)
            else:
                pieces = self.session.ask(line, max_tokens=self.max_tokens)
                stream_answer(pieces)
                if self.session.cite:
                    show_citations(self.session.citations())
                click.echo()
        except KeyboardInterrupt:
            click.echo("\n(stopped)", err=True)
        except CapKVError as error:
            self.failed = True
            click.echo(f"error: {one_line(error)}", err=True)

    def command(self, line: str) -> None:
        """Obey a slash command.

        Raises
        ------
        CapKVError
            An unknown command, or one that failed.
        """
        name, _, argument = line.partition(" ")
        if name not in COMMANDS:
            near = difflib.get_close_matches(name, [*COMMANDS, "/quit"], n=1, cutoff=0.0)
            raise CapKVError(f"there is no command {name}; did you mean {near[0]}? (see /help)")
        COMMANDS[name].run(self.session, argument.strip())


def conversation_type(as_json: bool) -> type[Conversation]:
    """Return what holds the conversation."""
    if not as_json:
        return Conversation
    from capkv_local.cli.chat_json import JsonConversation

    return JsonConversation


def completions() -> list[str]:
    """Return what Tab completes at the prompt: commands, and the names they take."""
    from capkv_local.budget.allocate import ALLOCATORS
    from capkv_local.policies import policy_names

    names = [f"/policy {name}" for name in policy_names()]
    names += [f"/allocation {name}" for name in ALLOCATORS]
    return [*sorted(COMMANDS), "/quit", "/keep on", "/keep off", *names]


# ---- slash commands ----------------------------------------------------------------------------


def _stats(session: DocumentChat, argument: str) -> None:
    click.echo(stats_text(session.stats()))


def _budget(session: DocumentChat, argument: str) -> None:
    if argument:
        session.set_budget(budget_value(argument))
    click.echo(f"budget: {budget_text(session.stats())}")


def _policy(session: DocumentChat, argument: str) -> None:
    from capkv_local.policies import policy_names

    if argument:
        session.set_policy(argument)
    _show_choice("policy", session.stats().policy, [] if argument else policy_names())


def _allocation(session: DocumentChat, argument: str) -> None:
    from capkv_local.budget.allocate import ALLOCATORS

    if argument:
        session.set_allocation(argument)
    _show_choice("allocation", session.stats().allocation, [] if argument else ALLOCATORS)


def _keep(session: DocumentChat, argument: str) -> None:
    _switch("/keep", argument, session.set_keep_turns)
    if session.keep_turns:
        click.echo("keep: on, questions and answers stay in the conversation")
    else:
        click.echo("keep: off, each question meets the document alone")


def _cite(session: DocumentChat, argument: str) -> None:
    _switch("/cite", argument, session.set_cite)
    if session.cite:
        click.echo("cite: on, the passages that an answer looked at most are named below it")
    else:
        click.echo("cite: off")


def _switch(command: str, argument: str, turn: Callable[[bool], None]) -> None:
    """Turn something on or off; without an argument leave it as it is."""
    if argument not in ("", "on", "off"):
        raise CapKVError(f"{command} {argument}: it is either on or off")
    if argument:
        turn(argument == "on")


def _forget(session: DocumentChat, argument: str) -> None:
    session.forget()
    click.echo("forgotten: the next question meets the document alone")


def _show_choice(label: str, chosen: str | None, known: Iterable[str]) -> None:
    click.echo(f"{label}: {chosen or 'none'}")
    if names := ", ".join(known):
        click.echo(f"known: {names}")


def _save(session: DocumentChat, argument: str) -> None:
    if not argument:
        raise CapKVError("/save needs a file name, e.g. /save report.capkv")
    path = session_path(Path(argument.strip("'\"")))
    n_bytes = session.save(path)
    click.echo(f"saved {path} ({size(n_bytes)}); go on with: capkv chat {shlex.quote(str(path))}")


def _help(session: DocumentChat, argument: str) -> None:
    width = max(len(command.usage) for command in COMMANDS.values())
    for command in COMMANDS.values():
        click.echo(f"{command.usage:<{width}}  {command.help}")
    click.echo(f"{'/quit':<{width}}  leave (as Ctrl-D does)\n")
    for key, what in KEYS_HELP.items():
        click.echo(f"{key:<{width}}  {what}")


@dataclass(frozen=True)
class _Command:
    usage: str
    help: str
    run: Callable[[DocumentChat, str], None]


COMMANDS = {
    "/stats": _Command("/stats", "show the KV cache: cells, memory, evictions, times", _stats),
    "/budget": _Command("/budget N", "keep N cells, a fraction (0.25), or a size (64MiB)", _budget),
    "/policy": _Command("/policy NAME", "choose what decides which cells stay", _policy),
    "/allocation": _Command(
        "/allocation NAME", "choose how heads share the budget, from the next eviction", _allocation
    ),
    "/keep": _Command("/keep on|off", "keep questions and answers, or drop them at once", _keep),
    "/cite": _Command("/cite on|off", "name the passages that answers looked at most", _cite),
    "/forget": _Command("/forget", "drop the questions and answers so far", _forget),
    "/save": _Command("/save PATH", "save this session to a .capkv file", _save),
    "/help": _Command("/help", "show this list", _help),
}
