"""``capkv rpc-server``: lend the devices of this machine to a ``capkv`` on another one."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from capkv_local.cli.guard import debug_option
from capkv_local.home import home

if TYPE_CHECKING:
    from capkv_local.devices.ggml import Device

_LOCAL = ("127.", "localhost")


@click.command("rpc-server", short_help="Lend this machine's devices to another one (--rpc).")
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    metavar="ADDRESS",
    help="Address of this machine to listen at, IPv4; 0.0.0.0 is all of them.",
)
@click.option(
    "--port",
    type=click.IntRange(1, 65535),
    default=50052,
    show_default=True,
    metavar="N",
    help="Port to listen at.",
)
@click.option(
    "--device",
    "names",
    multiple=True,
    metavar="NAME",
    help="Serve this device, as `capkv doctor` names it; can be given again. "
    "[default: all GPUs, or else the CPU]",
)
@click.option(
    "--threads",
    "n_threads",
    type=click.IntRange(min=1),
    metavar="N",
    help="CPU threads. [default: all]",
)
@click.option(
    "--keep-weights",
    is_flag=True,
    help="Keep the weights that are received on the disk, so that each is sent once.",
)
@debug_option
def rpc_server_command(
    host: str, port: int, names: Sequence[str], n_threads: int | None, keep_weights: bool
) -> None:
    """Serve the devices of this machine until Ctrl-C; elsewhere, `--rpc HOST:PORT` uses them.

    One program at a time. It is llama.cpp's own server, from the same build: both sides must be
    of the same version of capkv-local.

    NOBODY IS ASKED FOR A PASSWORD, and nothing is encrypted. Whoever reaches the port can use the
    devices, read what others have in them, and perhaps more: listen only at addresses of a network
    that you trust, or leave it at 127.0.0.1 and take a tunnel (ssh -L 50052:127.0.0.1:50052 HOST).

    \b
    Examples:
      capkv rpc-server                                  # this machine only
      capkv rpc-server --host 10.0.0.2 --device CUDA0   # in the network 10.0.0.*
      capkv chat --rpc 10.0.0.2:50052 book.pdf          # on another machine
    """
    from capkv_local.devices import rpc

    def ready(endpoint: str, devices: Sequence[Device]) -> None:
        shown = ", ".join(f"{device.name} ({device.description})" for device in devices)
        click.echo(f"serving {shown} at {endpoint}; Ctrl-C ends it", err=True)

    if not host.startswith(_LOCAL):
        click.echo(
            f"warning: whoever reaches {host}:{port} can use this server: there is no password "
            "and no encryption",
            err=True,
        )
    # It never returns to Python, which would have to raise KeyboardInterrupt.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    cache: Path | None = home() / "rpc" if keep_weights else None
    rpc.serve(host, port, names=names, n_threads=n_threads, cache=cache, ready=ready)
