"""The ``capkv`` command: one file per verb; models and libraries load only when a verb needs them.

Exit codes: 0 done, 1 failure (one line on standard error), 2 wrong usage, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import click

from capkv_local import __version__
from capkv_local.cli.ask import ask_command
from capkv_local.cli.cache import cache_group
from capkv_local.cli.chat import chat_command
from capkv_local.cli.common import CONTEXT_SETTINGS, GuardedGroup
from capkv_local.cli.doctor import doctor_command
from capkv_local.cli.eval import eval_command
from capkv_local.cli.inspect import inspect_command
from capkv_local.cli.plan import plan_command
from capkv_local.cli.snapshot import snapshot_command

__all__ = ["main"]


@click.group(cls=GuardedGroup, context_settings=CONTEXT_SETTINGS)
@click.version_option(__version__, prog_name="capkv", message="%(prog)s %(version)s")
def main() -> None:
    """Talk with long documents on your own machine, in a memory budget you set.

    The documents stream through a fixed KV cache: when it is full, a policy keeps the cells
    that matter and evicts the rest.

    \b
    Examples:
      capkv chat report.pdf
      capkv chat report.pdf notes.md --budget 25%
      capkv ask report.pdf "Who signed the contract?"
      capkv snapshot book.pdf -o book.capkv
      capkv inspect book.capkv -o book.html
      capkv plan model.gguf --memory 8GiB --context 128k
      capkv doctor
    """


main.add_command(chat_command)
main.add_command(ask_command)
main.add_command(snapshot_command)
main.add_command(cache_group)
main.add_command(inspect_command)
main.add_command(plan_command)
main.add_command(eval_command)
main.add_command(doctor_command)
