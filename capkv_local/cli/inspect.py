"""``capkv inspect``: what survived of a text, on the terminal and as a page."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from capkv_local.cli import display
from capkv_local.cli.common import (
    ModelOptions,
    ingest,
    json_option,
    model_options,
    open_chat,
    read_sources,
)
from capkv_local.errors import CapKVError

if TYPE_CHECKING:
    from capkv_local.inspect import Attention, Passage, Survival


@click.command("inspect", short_help="Show what the cache still holds of a text.")
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="PAGE.html",
    help="Write a page, too: the text by layer and head. A page that is there is replaced.",
)
@click.option(
    "--question",
    metavar="TEXT",
    help="Also say what this question would lose; reads the text again with the full cache, "
    "if that fits into memory.",
)
@json_option
@model_options
def inspect_command(
    files: tuple[str, ...],
    output: Path | None,
    question: str | None,
    as_json: bool,
    options: ModelOptions,
) -> None:
    """Read each FILE as `capkv chat` does and show which of its tokens the heads still hold.

    A FILE may be a snapshot or saved session (*.capkv), which is opened as it is. The page needs
    no network and holds the text itself. Sinks (the first tokens) are not counted as attended.

    \b
    Examples:
      capkv inspect report.pdf --budget 1024
      capkv inspect book.capkv -o book.html
      capkv inspect report.pdf -o page.html --question "Who signed it?"
      capkv inspect book.capkv --json | jq '.passages[-1]'

    \b
    The JSON object:
      {"model", "policy", "allocation", "budget", "tokens", "tokens_held_by_none",
       "cells": [[cells of each head] of each layer], "bytes", "bytes_full",
       "passages": [{"first", "last", "source", "share", "text"}], best first,
       "question": {"text", "lost_share", "lost_by_head", "why_not",
                    "tokens": [{"position", "text", "source", "heads",
                              "attended", "lost"}],
                    "passages": [...]} or null}
    """
    if question is not None and not question.strip():
        raise click.UsageError("the question is empty")
    if output is not None:
        _check_output(output, files)  # before hours of reading
    sources = read_sources(files)
    with contextlib.closing(open_chat(sources, options)) as session:
        ingest(session, sources, quiet=as_json and not sys.stderr.isatty())
        from capkv_local.inspect import collect, question_attention

        survival = collect(session)
        attention = None
        if question is not None:
            with display.waiting("reading once more with the full cache, to compare"):
                attention = question_attention(session, survival, question)
    if output is not None:
        from capkv_local.inspect import write_page

        n_bytes = write_page(
            output, survival, attention, title=_title(session.extra, sources.title)
        )
    if as_json:
        click.echo(json.dumps(_as_json(survival, attention)))
    else:
        from capkv_local.inspect import print_strip

        print_strip(survival, attention, fancy=display.is_fancy(sys.stdout))
    if output is not None:
        click.echo(f"wrote {output} ({display.size(n_bytes)})", err=True)


def _title(extra: dict[str, Any], files: str) -> str:
    return ", ".join(map(str, extra.get("documents", []))) or files


def _check_output(path: Path, files: tuple[str, ...]) -> None:
    folder = path.parent
    if any(path.exists() and Path(file).exists() and path.samefile(file) for file in files):
        raise CapKVError(f"'{path}' is what is to be read; name another file with -o")
    if path.is_dir():
        raise CapKVError(f"'{path}' is a folder; name a file with -o")
    if path.suffix.lower() not in (".html", ".htm"):
        raise CapKVError(f"'{path}' does not end in .html: a page is written, name it so with -o")
    if not folder.is_dir():
        raise CapKVError(f"there is no folder '{folder}'; make it first, or name another with -o")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise CapKVError(f"you may not write '{path}'; name another with -o")


def _as_json(survival: Survival, attention: Attention | None) -> dict[str, Any]:
    from capkv_local.inspect.collect import ranked

    return {
        "model": survival.model,
        "policy": survival.policy,
        "allocation": survival.allocation,
        "budget": survival.budget,
        "tokens": survival.n_tokens,
        "tokens_held_by_none": survival.n_gone,
        "cells": survival.cells.tolist(),
        "bytes": survival.kv_bytes,
        "bytes_full": survival.kv_bytes_full,
        "passages": [_passage(survival, p) for p in ranked(survival)],
        "question": None if attention is None else _question(survival, attention),
    }


def _passage(survival: Survival, passage: Passage) -> dict[str, Any]:
    return {
        "first": passage.first,
        "last": passage.last,
        "source": None if passage.source is None else str(passage.source),
        "share": round(passage.share(survival), 4),
        "text": passage.text(survival),
    }


def _question(survival: Survival, attention: Attention) -> dict[str, Any]:
    compared = attention.full is not None
    by_head = attention.lost_by_head
    return {
        "text": attention.question,
        "lost_share": attention.lost_share,
        "lost_by_head": None if by_head is None else by_head.round(5).tolist(),
        "why_not": attention.why_not or None,
        "tokens": [
            {
                "position": token,
                "text": survival.pieces[token],
                "source": str(survival.sources[token]) if survival.sources[token] else None,
                "heads": int(survival.n_held[token]),
                "attended": float(attention.attended[token]),
                "lost": float(attention.lost[token]) if compared else None,
            }
            for token in attention.worst_tokens()
        ],
        "passages": [_passage(survival, p) for p in attention.worst_passages()],
    }
