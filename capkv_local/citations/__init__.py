"""Where an answer comes from: the passages of the documents that it looked at most."""

from __future__ import annotations

from capkv_local.citations.passages import Citation, Evidence, Passage, cite_passages, rank

__all__ = ["Citation", "Evidence", "Passage", "cite_passages", "rank"]
