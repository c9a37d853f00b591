"""``capkv snapshot``: read documents now, ask about them later."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import sys
import time
from pathlib import Path

import click

from capkv_local.cli.common import (
    ModelOptions,
    files_argument,
    ingest,
    json_option,
    model_options,
    open_chat,
    read_sources,
    session_path,
)
from capkv_local.cli.display import size
from capkv_local.cli.results import numbers
from capkv_local.errors import CapKVError


@click.command("snapshot", short_help="Read documents once, and open them at once later.")
@files_argument
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    metavar="FILE.capkv",
    help="Where the snapshot goes.",
)
@click.option("--force", is_flag=True, help="Overwrite the output if it is there.")
@json_option
@model_options
def snapshot_command(
    files: tuple[str, ...], output: Path, force: bool, as_json: bool, options: ModelOptions
) -> None:
    """Read each FILE and write what the model keeps of it to a snapshot.

    `capkv chat` and `capkv ask` open a snapshot in well under a second, with the model and the
    settings it was read with. It also holds the text itself: give it only to whom you would give
    the documents. A FILE may be a snapshot, too, which is then read on from.

    \b
    Examples:
      capkv snapshot book.pdf -o book.capkv
      capkv snapshot book.pdf -o book.capkv --type-k q8_0 --type-v q8_0
      capkv snapshot book.capkv appendix.pdf -o all.capkv
      capkv chat book.capkv
      capkv ask book.capkv "Who is the murderer?"
      capkv snapshot book.pdf -o book.capkv --json | jq .bytes

    \b
    The JSON object:
      {"path": of the snapshot, "bytes": its size, "model": path, "policy",
       "allocation", "budget", "tokens",
       "seconds": {"load", "read", "write", ...}, "kv": {...}},
      as in `capkv ask --help`
    """
    path = session_path(output)
    _check_output(path, force)  # before hours of reading
    sources = read_sources(files)
    start = time.perf_counter()
    with contextlib.closing(open_chat(sources, options)) as session:
        loaded = time.perf_counter()
        # Ctrl-C raises here: a snapshot of a part would be taken for the whole.
        ingest(session, sources, quiet=as_json and not sys.stderr.isatty())
        read = time.perf_counter()
        n_bytes = session.save(path)
        if as_json:
            done = time.perf_counter()
            seconds = {"load": loaded - start, "read": read - loaded, "write": done - read}
            about = {"path": str(path), "bytes": n_bytes, "model": str(session.llama.model_path)}
            stats = session.stats()
            click.echo(json.dumps({**about, **numbers(stats, stats.n_tokens, seconds)}))
            return
    click.echo(f"wrote {path} ({size(n_bytes)}); open it with: capkv chat {shlex.quote(str(path))}")


def _check_output(path: Path, force: bool) -> None:
    folder = path.parent
    if not folder.is_dir():
        raise CapKVError(f"there is no folder '{folder}'; make it first, or name another with -o")
    if not os.access(folder, os.W_OK):
        raise CapKVError(f"you may not write to the folder '{folder}'; name another with -o")
    if path.is_dir():
        raise CapKVError(f"'{path}' is a folder; name a file with -o")
    if path.exists() and not force:
        raise CapKVError(f"'{path}' is there already; name another, or overwrite it with --force")
