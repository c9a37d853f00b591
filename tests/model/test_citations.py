"""Citations: the passage of a planted fact comes first, and citing changes nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from capkv_local.chat import DocumentChat
from capkv_local.documents import read_document
from capkv_local.documents.sources import Place
from capkv_local.errors import PolicyError, StateError
from tests.model.conftest import TEXT

FACTS = (
    (
        "The access code of the harbour gate is 48213.",
        "What is the access code of the harbour gate?",
    ),
    (
        "The inventory number of the blue piano is 70952.",
        "What is the inventory number of the blue piano?",
    ),
)


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 600 tokens, a fact in the middle of each half."""
    text = TEXT.read_text(encoding="utf-8")[:2400]
    parts, start = [], 0
    for i, (sentence, _) in enumerate(FACTS):
        end = text.rindex("\n\n", 0, 700 + 1100 * i)
        parts += [text[start:end], "\n\n", sentence]
        start = end
    path = tmp_path_factory.mktemp("cited") / "document.txt"
    path.write_text("".join([*parts, text[start:]]), encoding="utf-8")
    return path


def place_of(document: Path, sentence: str) -> int:
    """Line of a sentence."""
    text = document.read_text(encoding="utf-8")
    return text[: text.index(sentence)].count("\n") + 1


def open_chat(document: Path, **options: Any) -> DocumentChat:
    chat = DocumentChat(**{"kv_budget": 2048, "n_ctx": 2048, "n_threads": 2, "seed": 1, **options})
    chat.ingest([read_document(document)])
    return chat


def ask(chat: DocumentChat, question: str, max_tokens: int = 24) -> str:
    return "".join(chat.ask(question, max_tokens=max_tokens))


def test_the_passage_of_a_fact_is_cited_first(document: Path) -> None:
    chat = open_chat(document)
    chat.set_cite(True)
    for sentence, question in FACTS:
        ask(chat, question)
        first = chat.citations()[0]
        line = place_of(document, sentence)
        assert first.document == "document.txt" and first.place.first <= line <= first.place.last
        assert first.quote == sentence
    chat.close()


@pytest.mark.parametrize(
    "options",
    [
        {"kv_budget": 300, "kv_room": 0},
        {"kv_budget": 300, "kv_policy": "tova", "kv_observe": "tail"},
        {"kv_policy": "full", "kv_observe": "tail"},
    ],
    ids=("capkv", "tova", "full"),
)
def test_citing_changes_neither_answers_nor_cells(
    document: Path, tmp_path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Answers that do not end, so that cells are evicted while they are cited.
    monkeypatch.setattr("llama_cpp.llama_vocab_is_eog", lambda vocab, token: False)
    questions = (FACTS[0][1], f"Count on: {'one two three ' * 100}", FACTS[1][1])
    chat = open_chat(document, **options)
    chat.save(tmp_path / "read.capkv")
    chat.close()
    said: list[list[str]] = []
    states = []
    for cite in (False, True):
        chat = DocumentChat.load(tmp_path / "read.capkv", n_threads=2)
        n_evictions = chat.stats().evictions
        chat.set_cite(cite)
        said.append([ask(chat, question, 70) for question in questions])
        state = chat.llama.save_state()
        states.append((chat.llama.kv_positions(), state.input_ids, state.llama_state))
        assert chat.stats().evictions > n_evictions or "kv_room" not in options
        assert not cite or chat.citations() is not None
        chat.close()
    assert said[0] == said[1]
    assert np.array_equal(states[0][0], states[1][0])
    assert np.array_equal(states[0][1], states[1][1])
    # Byte for byte: cells, what is observed, and where the next ones go.
    assert states[0][2] == states[1][2]


def test_what_cannot_be_cited_is_told(document: Path) -> None:
    chat = open_chat(document, kv_policy="knorm", kv_observe="tail", kv_budget=300)
    with pytest.raises(PolicyError, match=r"'knorm' observes no queries.*--observe probe"):
        chat.set_cite(True)
    assert not chat.cite
    ask(chat, FACTS[0][1], 4)
    with pytest.raises(StateError, match="no cited answer"):
        chat.citations()
    chat.set_policy("snapkv")
    chat.set_cite(True)
    ask(chat, FACTS[0][1], 4)
    assert chat.citations() is not None
    chat.set_policy("knorm")
    with pytest.raises(PolicyError, match="observes no queries"):
        ask(chat, FACTS[0][1], 4)
    chat.close()


def test_a_snapshot_is_cited_with_its_own_places(document: Path, tmp_path: Path) -> None:
    chat = open_chat(document)
    chat.save(tmp_path / "read.capkv")
    chat.close()
    again = DocumentChat.load(tmp_path / "read.capkv", n_threads=2)
    again.set_cite(True)
    ask(again, FACTS[0][1])
    citation = again.citations()[0]
    assert isinstance(citation.place, Place) and citation.place.unit == "line"
    assert citation.quote == FACTS[0][0]
    again.close()
