"""``capkv completion``: what a shell needs to complete verbs, options, files and names."""

from __future__ import annotations

import click

from capkv_local.cli.guard import debug_option

_SHELLS = ("bash", "zsh", "fish")


@click.command("completion", short_help="Print the completion script of a shell.")
@click.argument("shell", type=click.Choice(_SHELLS))
@debug_option
def completion_command(shell: str) -> None:
    """Print what makes SHELL complete verbs, options, files, policies and kept readings.

    It is for the command `capkv` on the PATH. Bash must be 4.4 or newer.

    \b
    Examples, each for good:
      echo 'eval "$(capkv completion bash)"' >> ~/.bashrc
      echo 'eval "$(capkv completion zsh)"' >> ~/.zshrc     # below compinit
      capkv completion fish > ~/.config/fish/completions/capkv.fish
    """
    from click.shell_completion import get_completion_class

    group = click.get_current_context().find_root().command
    kind = get_completion_class(shell)
    assert kind is not None  # click has these three
    click.echo(kind(group, {}, "capkv", "_CAPKV_COMPLETE").source())
