"""``capkv cache`` and ``--cache``: readings that are kept for the next time."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from capkv_local.cli.common import ModelOptions, Sources, ingest, json_option, open_chat
from capkv_local.cli.display import columns, count, size
from capkv_local.cli.guard import debug_option, one_line
from capkv_local.cli.names import complete_kept
from capkv_local.errors import CapKVError, StateError

if TYPE_CHECKING:
    from capkv_local.chat import DocumentChat
    from capkv_local.snapshot.cache import Entry

cache_option = click.option(
    "--cache/--no-cache",
    help="Keep what is read on the disk, text included, and open it at once the next time; "
    "`capkv cache` shows and deletes it. [default: no]",
)


def open_and_read(
    sources: Sources, options: ModelOptions, *, cache: bool, cite: bool
) -> DocumentChat:
    """Open the model and have it read the documents, or what was kept of them.

    Only documents read from the beginning are kept: a session is a file of its own already, and a
    pipe gives its text only once.
    """
    a_pipe = any(document.n_bytes is None for document in sources.documents)
    if not cache or a_pipe or sources.session is not None or not sources.documents:
        return _read(sources, options, cite)[0]

    from capkv_local.models import default_model, fingerprint
    from capkv_local.snapshot.cache import SnapshotCache

    kept = SnapshotCache()
    model = fingerprint(options.model or default_model())
    path = kept.path(model, sources.documents, options.reading())
    if path.exists():
        try:
            session = open_chat(Sources(path, (), ()), options)
        except StateError as error:
            click.echo(f"what was kept cannot be used: {one_line(error)}", err=True)
        else:
            session.set_cite(cite)
            kept.used(path)
            tokens = count(session.stats().n_tokens, "token")
            click.echo(f"opened {sources.title} as read before: {tokens}", err=True)
            return session
    session, complete = _read(sources, options, cite)
    if complete:
        try:
            kept.store(path, session)
        except CapKVError as error:
            click.echo(f"not kept for the next time: {one_line(error)}", err=True)
    return session


def _read(sources: Sources, options: ModelOptions, cite: bool) -> tuple[DocumentChat, bool]:
    """A chat that has read the sources, and whether it has read all of them."""
    session = open_chat(sources, options)
    try:
        session.set_cite(cite)  # before reading: that it cannot be is told at once
        report = ingest(session, sources, keep_part=True)
    except BaseException:
        session.close()
        raise
    return session, report is not None and report.complete


@click.group("cache", short_help="Show or delete what --cache has kept.")
def cache_group() -> None:
    """Show or delete what `capkv chat --cache` has kept of documents.

    \b
    Examples:
      capkv cache ls
      capkv cache rm 3f2a
      capkv cache rm --all
    """


@cache_group.command("ls", short_help="List what is kept.")
@json_option
@debug_option
def ls_command(as_json: bool) -> None:
    """List what is kept, what was used last first, and how much room it takes.

    \b
    Examples:
      capkv cache ls
      capkv cache ls --json | jq '.snapshots[].documents'

    \b
    The JSON object, sizes in bytes:
      {"folder", "bytes", "bytes_max", "snapshots": [{"name", "bytes",
       "last_used", "tokens", "model" (null: damaged), "documents": [names]}]}
    """
    from capkv_local.snapshot.cache import SnapshotCache

    kept = SnapshotCache()
    entries = kept.entries()
    rows = [_row(entry) for entry in entries]
    n_bytes = sum(entry.n_bytes for entry in entries)
    if as_json:
        about = {"folder": str(kept.folder), "bytes": n_bytes, "bytes_max": kept.limit}
        click.echo(json.dumps({**about, "snapshots": rows}))
        return
    table = [("NAME", "SIZE", "LAST USED", "TOKENS", "MODEL", "DOCUMENTS")]
    for row in rows:
        tokens = "" if row["tokens"] is None else f"{row['tokens']:,}"
        documents = ", ".join(row["documents"]) if row["model"] else "(damaged)"
        cells = (row["name"], size(row["bytes"]), row["last_used"], tokens, row["model"] or "")
        table.append((*cells, documents))
    if rows:
        click.echo("\n".join(columns(table)))
    total = f"{count(len(rows), 'snapshot')}, {size(n_bytes)} of at most {size(kept.limit)}"
    click.echo(f"{total} in {kept.folder}", err=bool(rows))


def _row(entry: Entry) -> dict[str, Any]:
    header = entry.header or {}
    extra, n_tokens = header.get("extra"), header.get("n_tokens")
    documents = extra.get("documents") if isinstance(extra, dict) else None
    return {
        "name": entry.name,
        "bytes": entry.n_bytes,
        "last_used": time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.last_used)),
        "tokens": n_tokens if isinstance(n_tokens, int) else None,
        "model": Path(str(header["model"])).name if "model" in header else None,
        "documents": list(map(str, documents)) if isinstance(documents, list) else [],
    }


@cache_group.command("rm", short_help="Delete what is kept.")
@click.argument("names", nargs=-1, metavar="[NAME]...", shell_complete=complete_kept)
@click.option("--all", "all_", is_flag=True, help="Delete everything that is kept.")
@json_option
@debug_option
def rm_command(names: tuple[str, ...], all_: bool, as_json: bool) -> None:
    """Delete what is kept under each NAME, of which the beginning is enough.

    \b
    Examples:
      capkv cache rm 3f2a
      capkv cache rm --all
      capkv cache rm --all --json | jq .bytes

    \b
    The JSON object:
      {"deleted": [names], "bytes": freed}
    """
    from capkv_local.snapshot.cache import SnapshotCache

    if bool(names) == all_:
        raise click.UsageError("give the names to delete (capkv cache ls), or --all")
    kept = SnapshotCache()
    gone = kept.clear() if all_ else kept.remove(names)
    freed = sum(entry.n_bytes for entry in gone)
    if as_json:
        click.echo(json.dumps({"deleted": [entry.name for entry in gone], "bytes": freed}))
    else:
        click.echo(f"deleted {count(len(gone), 'snapshot')} ({size(freed)})")
