"""``capkv chat --json``: a conversation as one JSON object a line."""

from __future__ import annotations

import contextlib
import io
import json
import sys
import time
from dataclasses import dataclass
from typing import Any

import click

from capkv_local.cli.chat import Conversation
from capkv_local.cli.guard import one_line
from capkv_local.cli.results import numbers
from capkv_local.errors import CapKVError


@dataclass
class JsonConversation(Conversation):
    """Prints an object for each question and command; see ``capkv chat --help``."""

    def handle(self, line: str) -> None:
        record: dict[str, Any] = {"command" if line.startswith("/") else "question": line}
        try:
            if line.startswith("/"):
                with contextlib.redirect_stdout(io.StringIO()) as output:
                    self.command(line)
                record["output"] = output.getvalue().strip()
            else:
                record |= self._answer(line)
        except CapKVError as error:
            self.failed = True
            record["error"] = one_line(error)
        click.echo(json.dumps(record))
        sys.stdout.flush()

    def _answer(self, question: str) -> dict[str, Any]:
        start, pieces, stopped = time.perf_counter(), list[str](), False
        try:
            pieces.extend(self.session.ask(question, max_tokens=self.max_tokens))
        except KeyboardInterrupt:
            stopped = True
        seconds = {"answer": time.perf_counter() - start}
        stats = self.session.stats()
        record = {"answer": "".join(pieces).strip(), "stopped": stopped}
        record |= numbers(stats, stats.n_tokens, seconds)
        if self.session.cite:
            record["citations"] = [citation.to_json() for citation in self.session.citations()]
        return record
