"""``capkv ask``: one question, one answer, for scripts."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from capkv_local.cli.citing import cite_option, show_citations
from capkv_local.cli.common import (
    ModelOptions,
    ingest,
    max_tokens_option,
    model_options,
    open_chat,
    read_sources,
)
from capkv_local.cli.display import stream_answer

if TYPE_CHECKING:
    from capkv_local.cache import KVCacheStats


@click.command("ask", short_help="Ask one question about documents; for scripts.")
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@click.argument("question", metavar="QUESTION")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
@cite_option
@max_tokens_option
@model_options
def ask_command(
    files: tuple[str, ...],
    question: str,
    as_json: bool,
    cite: bool,
    max_tokens: int,
    options: ModelOptions,
) -> None:
    """Read each FILE and answer the QUESTION, which is its last argument.

    The question is known before reading, so the cells that it needs are the ones that stay.
    A FILE is text, Markdown, source code, HTML, PDF, Word (docx), an e-book (epub), a folder of
    these, a snapshot or saved session (*.capkv), or - for standard input. The answer goes to
    standard output, all else to standard error.

    \b
    Examples:
      capkv ask report.pdf "Who signed the contract?"
      capkv ask --budget 1024 a.txt b.txt "What changed between them?"
      capkv ask src/ "Where is the cache resized?"
      capkv ask book.capkv "Who is the murderer?"
      git log | capkv ask - "Which release broke the build?"
      capkv ask report.pdf "How many pages?" --json | jq .answer
      capkv ask report.pdf "Who signed the contract?" --cite

    \b
    The JSON object:
      {"answer": ..., "model": path, "policy": name, "allocation": name, "budget": cells per head,
       "tokens": tokens read, "seconds": {"load", "read", "answer", "decode", "score",
       "select", "evict"}, "kv": {"cells", "cells_max", "cells_range", "bytes", "bytes_full",
       "observe_bytes", "evictions", "cells_evicted"}}
    With --cite also "citations", the strongest first, empty if no passage stands out:
      [{"document": name, "page": [first, last] (or "line", "chapter", "section", "paragraph"),
       "title": of a chapter, "share": 0 to 1, "quote": ...}]
    """
    if not question.strip():
        raise click.UsageError("the question is empty")
    if os.path.exists(question):
        raise click.UsageError(
            f"the last argument is the question, but '{question}' is a file or folder; "
            "add a question"
        )
    sources = read_sources(files)
    if sources.session is None and options.kv_observe is None:
        options = replace(options, kv_observe="tail")  # the question is known: nothing to probe for
    start = time.perf_counter()
    with contextlib.closing(open_chat(sources, options)) as session:
        session.set_cite(cite)
        loaded = time.perf_counter()
        # Ctrl-C raises here: a script must not take a part of the text for the whole.
        report = ingest(session, sources, question=question, quiet=not sys.stderr.isatty())
        before = session.stats()
        read = time.perf_counter()
        pieces = session.ask(question, max_tokens=max_tokens)
        if not as_json:
            stream_answer(pieces)
            if cite:
                show_citations(session.citations())
            return
        answer = "".join(pieces).strip()
        seconds = {
            "load": loaded - start,
            "read": read - loaded,
            "answer": time.perf_counter() - read,
        }
        model = str(session.llama.model_path)
        tokens = report.tokens if report is not None else before.n_tokens
        result = {"answer": answer, "model": model, **_numbers(session.stats(), tokens, seconds)}
        if cite:
            result["citations"] = [citation.to_json() for citation in session.citations()]
        click.echo(json.dumps(result))


def _numbers(stats: KVCacheStats, tokens: int, seconds: dict[str, float]) -> dict[str, Any]:
    native = {
        "decode": stats.t_decode_s,
        "score": stats.t_score_s,
        "select": stats.t_select_s,
        "evict": stats.t_evict_s,
    }
    return {
        "policy": stats.policy,
        "allocation": stats.allocation,
        "budget": stats.budget,
        "tokens": tokens,
        "seconds": {name: round(value, 4) for name, value in (seconds | native).items()},
        "kv": {
            "cells": stats.n_cells,
            "cells_max": stats.n_cells_max,
            "cells_range": list(stats.n_cells_range),
            "bytes": stats.kv_bytes,
            "bytes_full": stats.kv_bytes_full,
            "observe_bytes": stats.observe_bytes,
            "evictions": stats.evictions,
            "cells_evicted": stats.cells_evicted,
        },
    }
