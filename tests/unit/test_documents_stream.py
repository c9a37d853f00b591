"""Documents in parts: the same text as whole, places that can be found again, little memory."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import capkv_local.documents.files as files
from capkv_local.documents import Document, open_document
from capkv_local.documents.encoding import decoded
from capkv_local.documents.text import line_parts
from capkv_local.errors import DocumentError

DATA = Path(__file__).parent.parent / "data"
TEXT = st.text(alphabet="ab \n\té漢", max_size=60)


@given(pieces=st.lists(TEXT, max_size=40), repeat=st.integers(1, 40))
def test_every_offset_is_in_the_lines_that_its_source_says(pieces: list[str], repeat: int) -> None:
    pieces = [piece * repeat for piece in pieces]
    text = "".join(pieces)
    parts = list(line_parts((piece, 0) for piece in pieces))
    assert "".join(part.text for part in parts) == text
    document = Document("a.txt", text, "text")
    assert "".join(part.text for part in document.parts()) == text
    for offset in range(0, len(text), max(1, len(text) // 50)):
        place = document.source(offset).place
        assert place.first <= text.count("\n", 0, offset) + 1 <= place.last
        # Passages are about a paragraph, unless a single line is longer.
        assert place.last - place.first < 802
    for offset in (-1, len(text)):
        with pytest.raises(IndexError, match="outside"):
            document.source(offset)


def test_places_of_a_real_text(tmp_path: Path) -> None:
    document = open_document(DATA / "licence.txt").read()
    lines = document.text.split("\n")
    offset = document.text.index("Conveying Non-Source Forms")
    place = document.source(offset).place
    assert "Conveying Non-Source Forms" in "\n".join(lines[place.first - 1 : place.last])
    assert place.last - place.first < 20
    assert len(document.passages) < len(document.text) / 250


@pytest.mark.parametrize("name", ["harbour.txt", "harbour.md", "harbour.html", "harbour.pdf"])
def test_parts_are_the_text_and_progress_reaches_the_end(name: str) -> None:
    stream = open_document(DATA / name)
    parts = list(stream.parts())
    assert "".join(part.text for part in parts) == stream.read().text
    done = [part.n_bytes for part in parts]
    assert done == sorted(done) and done[-1] == stream.n_bytes


@given(
    text=st.text(alphabet="ab\r\né漢€", max_size=80),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
    size=st.integers(1, 9),
)
def test_blocks_cut_anywhere_do_not_change_a_text(text: str, encoding: str, size: int) -> None:
    data = text.encode(encoding)

    def blocks() -> Iterator[tuple[bytes, bool]]:
        for i in range(0, len(data), size):
            yield data[i : i + size], i + size >= len(data)

    if encoding == "utf-16" and size < 2:
        size = 2  # the mark must be in the first block, which is 256 KiB or more
    if encoding == "utf-8-sig" and size < 3:
        size = 3
    got = "".join(piece for piece, _ in decoded("a", blocks()))
    assert got == text.replace("\r\n", "\n").replace("\r", "\n")


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_HEAD", 1000)
    monkeypatch.setattr(files, "_BLOCK", 1000)


@pytest.mark.usefixtures("small_blocks")
def test_encoding_is_decided_where_it_shows(tmp_path: Path) -> None:
    text = "plain\n" * 500 + "L'été, le garçon naïf est allé à la forêt.\n" * 100
    for encoding in ("utf-8", "latin-1"):
        (tmp_path / "a.txt").write_bytes(text.encode(encoding))
        assert open_document(tmp_path / "a.txt").read().text == text


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(
    ("later", "words"),
    [
        (b"caf\xe9\n" * 300, "is utf-8 at its start, but not behind byte [0-9]+; save"),
        (b"\0" * 2000, "binary"),
    ],
)
def test_what_goes_wrong_later_is_told_and_not_passed_on(
    tmp_path: Path, later: bytes, words: str
) -> None:
    (tmp_path / "a.txt").write_bytes("été\n".encode() * 400 + later)
    stream = open_document(tmp_path / "a.txt")  # its start is fine
    with pytest.raises(DocumentError, match=words):
        list(stream.parts())


def test_a_large_text_is_never_in_memory_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "large.txt"
    line = b"A line of a text that is larger than what may be taken of the memory.\n"
    with path.open("wb") as file:
        for _ in range(40):
            file.write(line * 8000)  # 22 MB in all
    tracemalloc.start()
    try:
        n_chars = sum(len(part.text) for part in open_document(path).parts())
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert n_chars == path.stat().st_size
    assert peak < n_chars / 2


def test_one_endless_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"word " * 100_000)
    parts = list(open_document(tmp_path / "a.txt").parts())
    assert len(parts) > 5 and {str(part.place) for part in parts} == {"line 1"}


# ---- pipes -------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_long_pipe_is_read_once_and_as_it_comes(tmp_path: Path) -> None:
    path, text = tmp_path / "pipe", "A line of the pipe, number one.\n" * 20_000
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_text, args=(text,))
    writer.start()
    stream = open_document(path)
    assert stream.n_bytes is None  # how much comes is not known
    assert stream.read().text == text
    writer.join()
    with pytest.raises(DocumentError, match="was read already"):
        stream.read()


@pytest.mark.parametrize("name", ["harbour.pdf", "harbour.html"])
def test_other_formats_through_standard_input(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_BLOCK", 500)  # the rest comes later
    data = io.BytesIO((DATA / name).read_bytes())
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(data))
    stream = open_document("-")
    assert stream.n_bytes == (DATA / name).stat().st_size
    assert stream.read().text == open_document(DATA / name).read().text


def test_a_page_of_absurd_size(tmp_path: Path) -> None:
    path = tmp_path / "a.html"
    with path.open("wb") as file:
        file.write(b"<html>")
        file.truncate(33 << 20)
    with pytest.raises(DocumentError, match=r"page of 33 MiB.*save it as \.txt"):
        open_document(path)


def test_opening_does_not_load_the_formats(tmp_path: Path) -> None:
    code = (
        "import sys, capkv_local.documents as d\n"
        f"d.open_document({str(DATA / 'harbour.txt')!r})\n"
        "print(sorted({'pypdfium2', 'bs4', 'mammoth', 'pathspec', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
