"""``capkv ask``: one question, one answer, for scripts."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from dataclasses import replace

import click

from capkv_local.cli.citing import cite_option, show_citations
from capkv_local.cli.common import (
    ModelOptions,
    files_argument,
    ingest,
    json_option,
    max_tokens_option,
    model_options,
    open_chat,
    read_sources,
)
from capkv_local.cli.display import stream_answer
from capkv_local.cli.results import numbers


@click.command("ask", short_help="Ask one question about documents; for scripts.")
@files_argument
@click.argument("question", metavar="QUESTION")
@json_option
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
      {"answer": ..., "model": path, "policy": name, "allocation": name,
       "budget": cells per head, "tokens": tokens read,
       "seconds": {"load", "read", "answer", "decode", "score", "select",
       "evict"}, "kv": {"cells", "cells_max", "cells_range", "bytes",
       "bytes_full", "observe_bytes", "evictions", "cells_evicted"}}
    With --cite also "citations", best first, empty if no passage stands out:
      [{"document": name, "page" (or "line", "chapter", "section",
        "paragraph"): [first, last], "title": of a chapter,
        "share": 0 to 1, "quote": ...}]
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
        result = {"answer": answer, "model": model, **numbers(session.stats(), tokens, seconds)}
        if cite:
            result["citations"] = [citation.to_json() for citation in session.citations()]
        click.echo(json.dumps(result))
