"""``--cite``: where an answer comes from, below it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import click

from capkv_local.cli.display import printable

if TYPE_CHECKING:
    from capkv_local.citations import Citation

cite_option = click.option(
    "--cite",
    is_flag=True,
    help="Name the passages that each answer looked at most, on standard error "
    "(docs/citations.md: how often they are right).",
)


def show_citations(citations: Iterable[Citation]) -> None:
    """Write citations to standard error, numbered, one a line; standard output is the answer."""
    lines = [f"[{i}] {citation}" for i, citation in enumerate(citations, 1)]
    for line in lines or ["(no passage stands out)"]:
        click.echo(printable(line), err=True)
