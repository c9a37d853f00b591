"""``DocumentChat``: read documents through a small KV cache, then ask about them."""

from __future__ import annotations

from capkv_local.chat.chat import DocumentChat
from capkv_local.chat.reading import IngestProgress, IngestReport

__all__ = ["DocumentChat", "IngestProgress", "IngestReport"]
