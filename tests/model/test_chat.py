"""A conversation over a document that was read with a probe: saved, loaded, gone on with."""

from __future__ import annotations

from pathlib import Path

import pytest

from capkv_local.chat import DocumentChat
from capkv_local.documents import read_document
from capkv_local.errors import StateError
from tests.model.conftest import TEXT

QUESTION = "Who may copy this licence?"


def test_a_probed_document_is_saved_with_what_was_found(tmp_path: Path) -> None:
    part = tmp_path / "part.txt"
    part.write_text(TEXT.read_text(encoding="utf-8")[:5000], encoding="utf-8")
    settings = {"kv_budget": 256, "n_ctx": 2048, "n_threads": 2}
    chat = DocumentChat(**settings, kv_observe="probe")  # type: ignore[arg-type]
    report = chat.ingest([read_document(part)])
    assert report.n_cells < report.tokens / 2
    file = tmp_path / "talk.capkv"
    chat.save(file)
    answer = "".join(chat.ask(QUESTION, max_tokens=12))
    chat.close()

    again = DocumentChat.load(file, n_threads=2)
    assert again.llama.kv_observe == "probe"
    assert "".join(again.ask(QUESTION, max_tokens=12)) == answer
    again.close()
    with pytest.raises(StateError, match="kv_observe='probe'"):
        DocumentChat.load(file, n_threads=2, kv_observe="tail")
