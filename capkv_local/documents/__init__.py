"""Files to text with its sources: plain text, Markdown, source code, HTML, PDF, docx and epub.

A wrong guess here is worse than a refusal, because the reader of an answer never sees the text the
model saw: binary data, scans and damaged files are refused instead of being read in part.
"""

from __future__ import annotations

from capkv_local.documents.base import Document, DocumentStream, Part, Passage
from capkv_local.documents.folder import Folder, read_documents
from capkv_local.documents.opening import open_document, read_document

__all__ = [
    "Document",
    "DocumentStream",
    "Folder",
    "Part",
    "Passage",
    "open_document",
    "read_document",
    "read_documents",
]
