"""Reading documents into a conversation: which tokens, their sources, and what stops it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import capkv_local.chat.reading as reading
from capkv_local import Llama
from capkv_local.chat import DocumentChat
from capkv_local.chat.reading import IngestProgress
from capkv_local.chat.tokenise import Tokeniser, Vocabulary
from capkv_local.documents import Document, DocumentStream, open_document, read_documents
from capkv_local.errors import ContextOverflow, DocumentError
from tests.model.conftest import TEXT, Models

HARBOUR = TEXT.parent / "harbour.pdf"
LICENCE = TEXT.read_text(encoding="utf-8")


@pytest.fixture
def chat() -> Iterator[DocumentChat]:
    opened = DocumentChat(kv_budget=128, n_ctx=2048, n_threads=2, kv_observe="tail")
    yield opened
    opened.close()


@pytest.fixture
def streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a pipe, or text of millions of tokens: nothing is counted ahead."""
    monkeypatch.setattr(reading, "_MOST_AHEAD", 0)
    monkeypatch.setattr(reading, "_PIECE", 128)
    monkeypatch.setattr("capkv_local.chat.tokenise._BLOCK", 400)


def documents(tmp_path: Path) -> list[DocumentStream]:
    (tmp_path / "part.txt").write_text(f"\n\n{LICENCE[:2500]}\n\n", encoding="utf-8")
    return [open_document(tmp_path / "part.txt"), open_document(HARBOUR)]


def tokens_read(chat: DocumentChat) -> list[int]:
    return [int(token) for token in chat.llama.input_ids[: chat.llama.n_tokens]]


def whole(chat: DocumentChat, tmp_path: Path) -> list[int]:
    """Tokens of all documents, made at once."""
    text = "".join(document.read().text.strip() + "\n\n" for document in documents(tmp_path))
    return chat._user_tokens() + chat.llama.tokenize(text.encode(), add_bos=False)


@pytest.mark.parametrize("how", ["counted", "streamed"])
def test_tokens_are_those_of_the_whole_text_and_know_their_source(
    chat: DocumentChat, tmp_path: Path, how: str, request: pytest.FixtureRequest
) -> None:
    if how == "streamed":
        request.getfixturevalue("streamed")
    seen: list[IngestProgress] = []
    expected = whole(chat, tmp_path)
    report = chat.ingest(documents(tmp_path), progress=seen.append)
    assert report.complete and report.tokens == len(expected)
    assert tokens_read(chat) == expected
    assert report.n_cells <= 128 + 64
    # Each token has some of the lines that its source says.
    n_opening = len(chat._template.first)
    assert chat._sources.at(n_opening - 1) is None and chat._sources.at(len(expected)) is None
    first = chat._sources.at(n_opening)
    assert first is not None and str(first) == "part.txt, lines 1-9"
    line, n_checked = 3, 0
    for i, token in enumerate(expected[n_opening:-200], n_opening):
        source = chat._sources.at(i)
        assert source is not None
        if source.document == "part.txt":
            before = line
            line += chat.llama.detokenize([token]).count(b"\n")
            assert before <= source.place.last and source.place.first <= line
            n_checked += 1
    assert n_checked > 300
    assert str(chat._sources.at(len(expected) - 1)) == "harbour.pdf, p. 2"
    # Progress says what is known: exact where it was counted, an estimate where not.
    read = [now for now in seen if now.done]
    assert read[-1].done == read[-1].total == len(expected)
    assert all(now.rss_bytes > 10 << 20 and now.total is not None for now in read)
    assert read[0].estimated == (how == "streamed")


def test_a_folder_tells_the_model_names(chat: DocumentChat, tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "a.py").write_text("x = 1\n")
    (tmp_path / "src" / "b.py").write_text("y = 2\n")
    chat.ingest(read_documents(tmp_path / "src").documents)
    text = chat.llama.detokenize(tokens_read(chat)).decode()
    assert text.endswith("File: src/a.py\n\nx = 1\n\nFile: src/b.py\n\ny = 2\n\n")
    assert str(chat._sources.at(chat.llama.n_tokens - 1)) == "src/b.py, line 1"


def test_too_long_is_told_before_anything_is_read(chat: DocumentChat, tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text(LICENCE * 50, encoding="utf-8")
    stream = open_document(tmp_path / "long.txt")
    with pytest.raises(ContextOverflow, match=r"about \d+ tokens, the context has room for 1792"):
        chat.ingest([stream])
    document = Document("a.txt", LICENCE[:12000], "text")
    with pytest.raises(ContextOverflow, match=r"have (about )?\d{4} tokens") as caught:
        chat.ingest([document])
    assert caught.value.n_read == 0 and chat.llama.n_tokens == 0 and len(chat._sources) == 0


@pytest.mark.usefixtures("streamed")
def test_a_stream_that_is_too_long_keeps_what_fits(chat: DocumentChat) -> None:
    with pytest.raises(
        ContextOverflow, match=r"more than the 1792 tokens that were read"
    ) as caught:
        chat.ingest([Document("a.txt", LICENCE, "text")])
    assert caught.value.n_read == chat.llama.n_tokens == 1792
    assert str(chat._sources.at(1791)).startswith("a.txt, lines ")
    assert chat._sources.at(1792) is None
    assert "".join(chat.ask("What is this?", max_tokens=4))


@pytest.mark.usefixtures("streamed")
@pytest.mark.parametrize("error", [KeyboardInterrupt, DocumentError])
def test_what_was_read_before_it_stopped_stays(
    chat: DocumentChat, tmp_path: Path, error: type[BaseException]
) -> None:
    def stop(now: IngestProgress) -> None:
        if now.done > 200:
            raise error("stop")

    expected = whole(chat, tmp_path)
    if error is KeyboardInterrupt:
        report = chat.ingest(documents(tmp_path), progress=stop)
        assert not report.complete and report.tokens == chat.llama.n_tokens
    else:
        with pytest.raises(DocumentError):
            chat.ingest(documents(tmp_path), progress=stop)
    n = chat.llama.n_tokens
    assert 200 < n < 500
    assert tokens_read(chat) == expected[:n]
    assert chat._sources.at(n - 1) is not None and chat._sources.at(n) is None
    # More can be read behind it, in the same message.
    chat.ingest([Document("b.txt", "One more line.", "text")])
    assert str(chat._sources.at(chat.llama.n_tokens - 1)) == "b.txt, line 1"


@pytest.mark.parametrize("block", [200, 3000])
def test_the_real_vocabulary_in_blocks(models: Models, block: int) -> None:
    llama: Llama = models(n_ctx=512, kv_policy=None)
    vocabulary = Vocabulary(llama)
    text = (
        LICENCE
        + Path(__file__).read_text(encoding="utf-8")
        + "été 漢字 👍\n\n  x\n1. y\n'z'\n" * 50
    )
    parts = [(text[i : i + 333], i) for i in range(0, len(text), 333)]
    blocks = list(Tokeniser[int](vocabulary.tokenize, vocabulary.sizes, block).blocks(parts))
    assert len(blocks) > 10
    tokens = [token for made in blocks for token in made.tokens]
    assert tokens == llama.tokenize(text.encode(), add_bos=False)
