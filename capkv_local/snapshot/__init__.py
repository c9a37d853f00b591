"""Snapshots: a chat on disk, as it was after reading."""

from __future__ import annotations

from capkv_local.snapshot.file import VERSION, Array, read_header, read_snapshot, write_snapshot

__all__ = ["VERSION", "Array", "read_header", "read_snapshot", "write_snapshot"]
