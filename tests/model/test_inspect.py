"""What survived, of a real cache: it is what the cache holds, and looking changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from capkv_local.chat import DocumentChat
from capkv_local.documents import read_document
from capkv_local.errors import BudgetError, StateError
from capkv_local.inspect import collect, question_attention, render_page
from capkv_local.inspect import question as question_module
from tests.model.conftest import TEXT
from tests.model.test_turns import document_cells, same

QUESTION = "Who publishes the licence?"


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DocumentChat]:
    text = tmp_path_factory.mktemp("inspect") / "text.txt"
    text.write_text(TEXT.read_text()[:4000])
    with_text = DocumentChat(n_ctx=2048, kv_budget=256, kv_observe="tail", keep_turns=False)
    with_text.ingest([read_document(text)])
    yield with_text
    with_text.close()


def test_what_survived_is_what_the_cache_holds(chat: DocumentChat) -> None:
    survival, positions = collect(chat), chat.llama.kv_positions()
    for layer, head in np.ndindex(*positions.shape[:2]):
        here = positions[layer, head]
        assert np.array_equal(np.flatnonzero(survival.held[layer, head]), here[here >= 0])
    assert survival.cells.mean() == pytest.approx(chat.stats().n_cells, abs=1)
    text = "".join(survival.pieces)
    assert TEXT.read_text()[:4000].strip() in text and "<|im_start|>" in text
    assert str(survival.sources[500]).startswith("text.txt, lines ")
    assert survival.relevance is not None
    assert not survival.relevance[~survival.held].any() and survival.relevance.max() > 0


def test_a_question_looks_and_leaves_nothing_behind(chat: DocumentChat) -> None:
    llama, survival = chat.llama, collect(chat)
    answer = "".join(chat.ask(QUESTION, max_tokens=8))
    before, n_queries = document_cells(llama, llama.n_tokens), n_queries_of(chat)
    attention = question_attention(chat, survival, QUESTION)
    assert same(document_cells(llama, llama.n_tokens), before)
    assert n_queries_of(chat) == n_queries
    assert "".join(chat.ask(QUESTION, max_tokens=8)) == answer

    assert attention.full is not None and attention.lost_by_head is not None
    assert not attention.kept[~survival.held].any()
    # A softmax goes over the text and the question itself.
    for sums in (attention.full.sum(axis=-1), attention.kept.sum(axis=-1)):
        assert sums.mean() > 0.2 and sums.max() <= 1.001
    # In the first layer keys and queries do not depend on what was evicted, so what is left of
    # the softmax is the same up to its sum.
    held = survival.held[0] & (attention.full[0] > 1e-5)
    ratio = attention.kept[0][held] / attention.full[0][held]
    assert (ratio > 0.97).all()
    assert 0.05 < (attention.lost_share or 0) < 0.95
    assert ((attention.lost_by_head >= 0) & (attention.lost_by_head <= 1)).all()
    assert 'id="lost"' in render_page(survival, attention)


def test_without_memory_for_the_full_cache_it_says_so(
    chat: DocumentChat, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(question_module, "available_memory", lambda: 1 << 20)
    attention = question_attention(chat, collect(chat), QUESTION)
    assert attention.full is None and "MiB" in attention.why_not
    assert attention.attended.sum() > 0 and attention.worst_passages()


def test_what_was_observed_is_there_for_the_next_eviction(chat: DocumentChat) -> None:
    question_attention(chat, collect(chat), QUESTION)
    chat.set_budget(160)
    assert collect(chat).cells.mean() <= 161


def test_what_cannot_be_asked_is_refused(chat: DocumentChat) -> None:
    with pytest.raises(BudgetError, match="a question of"):
        question_attention(chat, collect(chat), "one two three " * 200)
    with pytest.raises(StateError, match="nothing has been read"):
        collect(empty(chat))


def n_queries_of(chat: DocumentChat) -> int:
    return chat.llama._require_cache().kv.info().n_queries


def empty(chat: DocumentChat) -> Any:
    chat.llama.reset()  # type: ignore[no-untyped-call]
    return chat
