"""The ``capkv`` command: one file per verb; models and libraries load only when a verb needs them.

Exit codes: 0 done, 1 failure (one line on standard error), 2 wrong usage, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import click

from capkv_local import __version__
from capkv_local.cli.ask import ask_command
from capkv_local.cli.cache import cache_group
from capkv_local.cli.chat import chat_command
from capkv_local.cli.common import CONTEXT_SETTINGS
from capkv_local.cli.completion import completion_command
from capkv_local.cli.config import config_command
from capkv_local.cli.defaults import configurable
from capkv_local.cli.doctor import doctor_command
from capkv_local.cli.eval import eval_command
from capkv_local.cli.guard import GuardedGroup
from capkv_local.cli.inspect import inspect_command
from capkv_local.cli.plan import plan_command
from capkv_local.cli.rpc_server import rpc_server_command
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
      capkv chat report.pdf --rpc 10.0.0.2:50052
      capkv doctor

    \b
    Options come from the command line, the environment (--n-ctx: CAPKV_N_CTX) or
    a file; `capkv config` shows them.

    \b
    Exit codes:
      0    done
      1    it failed; one line on standard error says why and what to do
      2    wrong usage: arguments, environment or configuration file
      130  stopped by Ctrl-C
    """


main.add_command(configurable(chat_command))
main.add_command(configurable(ask_command))
main.add_command(configurable(snapshot_command))
main.add_command(cache_group)
main.add_command(configurable(inspect_command))
main.add_command(configurable(plan_command))
# Its seed is another one: where the texts are cut, not how answers are sampled.
main.add_command(configurable(eval_command, ("model", "threads")))
main.add_command(rpc_server_command)
main.add_command(doctor_command)
main.add_command(config_command(chat_command))
main.add_command(completion_command)
