"""What a shell completes behind the verbs and options; each loads only what it lists."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem


def complete_files(ctx: click.Context, param: click.Parameter, start: str) -> list[CompletionItem]:
    """Have the shell complete a file."""
    from click.shell_completion import CompletionItem

    return [CompletionItem(start, type="file")]


def complete_policies(ctx: click.Context, param: click.Parameter, start: str) -> list[str]:
    """Names of policies that begin so."""
    from capkv_local.policies import policy_names

    return [name for name in policy_names() if name.startswith(start)]


def complete_allocations(ctx: click.Context, param: click.Parameter, start: str) -> list[str]:
    """Names of allocations that begin so."""
    from capkv_local.budget.allocate import ALLOCATORS

    return [name for name in ALLOCATORS if name.startswith(start)]


def complete_kept(ctx: click.Context, param: click.Parameter, start: str) -> list[str]:
    """Names of kept readings that begin so."""
    from capkv_local.snapshot.cache import SnapshotCache

    return [entry.name for entry in SnapshotCache().entries() if entry.name.startswith(start)]
