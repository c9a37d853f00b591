"""Many questions about one document: it loses nothing, and what was said can be dropped."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from capkv_local import Llama
from capkv_local.chat import DocumentChat
from capkv_local.documents import read_document
from capkv_local.errors import BudgetError, ContextOverflow, StateError
from capkv_local.native import Stat
from tests.model import tiny
from tests.model.conftest import TEXT, Models

SMALL: dict[str, Any] = {"n_ctx": 4096, "n_batch": 64, "kv_budget": 128, "kv_room": 64}
N_DOCUMENT = 300

FACT = "The access code of the harbour gate is 48213."
QUESTION = "What is the access code of the harbour gate?"
LONG_QUESTION = f"Count on: {' '.join(['one two three'] * 100)}"
FILLERS = ("Who may copy this licence?", "What is software?", "Say hello.", "Why?")

Array = np.ndarray[Any, Any]


def logits(llama: Any) -> Array:
    """Of the last token."""
    array = np.ctypeslib.as_array(llama._ctx.get_logits(), (llama._n_vocab,))
    return np.asarray(array.copy())


def document_cells(llama: Llama, n_tokens: int) -> list[Array]:
    """Position and norms of every cell that holds a document's token, head by head."""
    kv = llama._require_cache().kv
    positions = kv.positions()
    cells = (positions >= 0) & (positions < n_tokens)
    norms = [
        kv.score(stat, n_cells=positions.shape[-1]) for stat in (Stat.KEY_NORM, Stat.VALUE_NORM)
    ]
    return [cells.sum(axis=-1), *(x[cells] for x in (positions, *norms))]


def same(a: list[Array], b: list[Array]) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def talk(llama: Llama, tokens: list[int], n_turns: int) -> None:
    """Questions of 36 tokens, each followed by an answer of 4 that comes token by token."""
    for i in range(n_turns):
        turn = tokens[1000 + 40 * i :][:40]
        llama.begin_turn(36)
        start = llama.n_tokens
        llama.prefill(turn[:36])
        for token in turn[36:]:
            llama.eval([token])
        held = llama.kv_positions()[..., -40:]
        assert np.array_equal(held, np.broadcast_to(np.arange(start, start + 40), held.shape))


# ---- the cache ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "observe"),
    [
        ("capkv", "probe"),
        ("kvzip", "probe"),
        ("snapkv", "tail"),
        ("expected-attention", "tail"),
        ("streaming", "tail"),
    ],
)
def test_a_conversation_takes_no_cell_from_the_document(
    models: Models, tokens: list[int], policy: str, observe: str
) -> None:
    llama = models(kv_policy=policy, kv_observe=observe, **SMALL)
    llama.prefill(tokens[:N_DOCUMENT])
    llama.protect()
    before, positions = document_cells(llama, N_DOCUMENT), llama.kv_positions()
    allocated, n_evictions = llama.kv_stats().n_cells_max, llama.kv_stats().evictions

    def first_question() -> Array:
        llama.begin_turn(30)
        llama.prefill(tokens[700:730])
        return logits(llama)

    expected = first_question()
    llama.forget()
    n_turns = 8
    talk(llama, tokens, n_turns)
    stats = llama.kv_stats()
    assert stats.evictions > n_evictions + 1
    assert stats.n_cells <= stats.n_cells_max == allocated
    assert stats.n_protected == N_DOCUMENT and llama.n_tokens == N_DOCUMENT + 40 * n_turns
    assert stats.n_cells_protected + stats.n_cells_conversation <= stats.n_cells_max
    assert same(document_cells(llama, N_DOCUMENT), before)

    # The mean query moves, and cannot go back without a copy.
    assert (stats.copy_bytes > 0) == (policy == "expected-attention")
    llama.forget()
    assert llama.n_tokens == N_DOCUMENT
    assert np.array_equal(llama.kv_positions(), positions)
    assert same(document_cells(llama, N_DOCUMENT), before)
    assert np.array_equal(first_question(), expected)  # bit for bit


def test_sliding_windows_go_back_too(tmp_path: Path) -> None:
    path = tiny.gemma3(tmp_path / "gemma3.gguf")
    text = np.random.default_rng(0).integers(0, tiny.N_VOCAB, 3000).tolist()
    llama = Llama(path, kv_policy="capkv", verbose=False, n_threads=1, **SMALL)
    llama.prefill(text[:N_DOCUMENT])
    llama.protect()
    seen = []
    for n_turns in (0, 1, 15, 0):
        for i in range(n_turns):
            llama.begin_turn(30)
            llama.prefill(text[600 + 30 * i :][:30])
        llama.forget()
        llama.prefill(text[550:590])
        seen.append(logits(llama))
        llama.forget()
    assert all(np.array_equal(x, seen[0]) for x in seen)
    llama.close()


def test_a_state_carries_what_is_protected(models: Models, tokens: list[int]) -> None:
    llama = models(kv_policy="capkv", **SMALL)
    llama.prefill(tokens[:N_DOCUMENT])
    llama.protect()
    positions = llama.kv_positions()
    talk(llama, tokens, 8)
    state = llama.save_state()
    llama.reset()  # type: ignore[no-untyped-call]
    llama.prefill(tokens[:50])
    assert llama.n_protected == 0
    llama.load_state(state)
    assert llama.kv_stats().n_protected == N_DOCUMENT
    talk(llama, tokens, 8)
    llama.forget()
    assert np.array_equal(llama.kv_positions(), positions)


def test_without_a_copy_going_back_is_refused_and_nothing_is_lost(
    models: Models, tokens: list[int]
) -> None:
    llama = models(kv_policy="expected-attention", **SMALL)
    llama.prefill(tokens[:N_DOCUMENT])
    llama.protect()
    talk(llama, tokens, 8)
    llama.set_kv_policy("capkv-paper")  # has another mean query
    positions = llama.kv_positions()
    with pytest.raises(StateError, match="read the document again"):
        llama.forget()
    assert np.array_equal(llama.kv_positions(), positions)
    talk(llama, tokens, 8)
    llama.set_kv_policy("expected-attention")


def test_another_policy_in_between_is_no_obstacle(models: Models, tokens: list[int]) -> None:
    llama = models(kv_policy="capkv", **SMALL)
    llama.prefill(tokens[:N_DOCUMENT])
    llama.protect()
    before, positions = document_cells(llama, N_DOCUMENT), llama.kv_positions()
    talk(llama, tokens, 8)
    llama.set_kv_policy("snapkv")
    talk(llama, tokens, 8)
    llama.forget()
    assert np.array_equal(llama.kv_positions(), positions)
    assert same(document_cells(llama, N_DOCUMENT), before)
    llama.set_kv_policy("capkv")


# ---- the chat ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A document of about 1,000 tokens, read through 256 cells and saved."""
    folder = tmp_path_factory.mktemp("session")
    text = TEXT.read_text(encoding="utf-8")[:4500]
    place = text.rindex("\n\n", 0, 2000)
    document = folder / "document.txt"
    document.write_text(f"{text[:place]}\n\n{FACT}{text[place:]}", encoding="utf-8")
    chat = DocumentChat(kv_budget=256, n_ctx=1800, kv_observe="probe", kv_room=0, n_threads=2)
    report = chat.ingest([read_document(document)])
    assert report.n_cells < report.tokens / 2
    chat.save(folder / "session.capkv")
    chat.close()
    return folder / "session.capkv"


@pytest.fixture
def chat(session: Path) -> Iterator[DocumentChat]:
    opened = DocumentChat.load(session, n_threads=2)
    yield opened
    opened.close()


def ask(chat: DocumentChat, question: str, max_tokens: int = 24) -> str:
    return "".join(chat.ask(question, max_tokens=max_tokens))


def test_dropped_turns_leave_nothing_behind(
    chat: DocumentChat, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat.set_keep_turns(False)
    positions = chat.llama.kv_positions()
    answers = []
    for question in (QUESTION, *FILLERS, QUESTION):
        answers.append(ask(chat, question))
        assert np.array_equal(chat.llama.kv_positions(), positions)
    assert answers[0] == answers[-1] and "48213" in answers[0]
    # An answer that does not end: parts of the turn itself are evicted, then it is dropped, too.
    n_evictions = chat.stats().evictions
    with monkeypatch.context() as context:
        context.setattr("llama_cpp.llama_vocab_is_eog", lambda vocab, token: False)
        ask(chat, LONG_QUESTION, 240)
    assert chat.stats().evictions > n_evictions
    assert np.array_equal(chat.llama.kv_positions(), positions)
    assert ask(chat, QUESTION) == answers[0]


def test_kept_turns_take_nothing_from_the_document(chat: DocumentChat) -> None:
    n_document = chat.stats().n_protected
    before, allocated = document_cells(chat.llama, n_document), chat.stats().n_cells_max
    assert "48213" in ask(chat, QUESTION)
    dropped = 0
    for i in range(20):
        n_tokens = chat.stats().n_tokens
        ask(chat, f"{'Please, please. ' * 6}{FILLERS[i % 4]} ({i})", 32)
        dropped += chat.stats().n_tokens < n_tokens
        assert chat.stats().n_cells <= chat.stats().n_cells_max == allocated
        assert same(document_cells(chat.llama, n_document), before)
    assert dropped  # the context was full, and went on with the newest turns
    assert "48213" in ask(chat, QUESTION)
    chat.forget()
    assert chat.stats().n_tokens == n_document
    assert same(document_cells(chat.llama, n_document), before)


def test_saved_in_the_middle_of_a_conversation(chat: DocumentChat, tmp_path: Path) -> None:
    n_document, positions = chat.stats().n_protected, chat.llama.kv_positions()
    for _ in range(2):
        ask(chat, LONG_QUESTION, 8)
    assert not chat.stats().copy_bytes
    chat.save(tmp_path / "talk.capkv")
    answer = ask(chat, QUESTION)
    again = DocumentChat.load(tmp_path / "talk.capkv", n_threads=2)
    assert again.stats().n_protected == n_document
    assert ask(again, QUESTION) == answer
    again.set_keep_turns(False)
    assert np.array_equal(again.llama.kv_positions(), positions)
    again.close()


def test_a_question_that_does_not_fit_is_told_and_nothing_is_lost(chat: DocumentChat) -> None:
    answer = ask(chat, QUESTION)
    before, positions = chat.stats(), chat.llama.kv_positions()
    with pytest.raises(BudgetError, match=r"question of \d+ tokens .* has \d+ cells .*--room"):
        ask(chat, "very " * 450 + "long?")
    with pytest.raises(ContextOverflow, match="--n-ctx"):
        ask(chat, "very " * 3000 + "long?")
    assert np.array_equal(chat.llama.kv_positions(), positions)
    assert chat.stats().n_tokens == before.n_tokens
    chat.forget()
    assert ask(chat, QUESTION) == answer


def test_the_budget_and_the_policy_change_the_document(chat: DocumentChat) -> None:
    ask(chat, QUESTION)
    n_document, said = chat.stats().n_protected, chat.stats().n_tokens
    chat.set_budget(128)
    stats = chat.stats()
    assert stats.n_cells_protected == 128 and stats.n_protected == n_document
    assert stats.n_tokens == said  # the turn was read again
    before = document_cells(chat.llama, n_document)
    chat.set_policy("snapkv")
    chat.set_budget(400)  # what was given up does not come back: it is the conversation's
    ask(chat, FILLERS[0])
    assert same(document_cells(chat.llama, n_document), before)
    for wrong in (5, "soup"):
        with pytest.raises(BudgetError):
            chat.set_budget(wrong)
    assert same(document_cells(chat.llama, n_document), before)
    chat.set_budget(64)
    assert chat.stats().n_cells_protected == 64
    chat.forget()
    assert chat.stats().n_tokens == n_document


def test_a_further_document_shares_the_budget_and_is_protected(
    chat: DocumentChat, tmp_path: Path
) -> None:
    ask(chat, FILLERS[0])
    more = tmp_path / "more.txt"
    more.write_text(TEXT.read_text(encoding="utf-8")[9000:11000], encoding="utf-8")
    n_before = chat.stats().n_protected
    report = chat.ingest([read_document(more)])
    stats = chat.stats()
    assert stats.n_protected == stats.n_tokens > n_before + report.tokens
    assert stats.n_cells_protected == stats.n_cells <= 256
    positions = chat.llama.kv_positions()
    ask(chat, FILLERS[1])
    chat.forget()
    assert np.array_equal(chat.llama.kv_positions(), positions)
    with pytest.raises(ContextOverflow):
        chat.ingest([read_document(TEXT)])
    assert chat.stats().n_protected == stats.n_protected
