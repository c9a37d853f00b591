"""Documents: what is read, how it looks as text, and what is refused with which words."""

from __future__ import annotations

import io
import os
import sys
import threading
from pathlib import Path

import pytest

from capkv_local.documents import read_document
from capkv_local.errors import DocumentError

DATA = Path(__file__).parent.parent / "data"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("harbour.txt", "text"),
        ("harbour.md", "markdown"),
        ("harbour.html", "html"),
        ("harbour.pdf", "pdf"),
        ("restricted.pdf", "pdf"),  # encrypted, with the empty password: opens everywhere
    ],
)
def test_reads_every_kind(name: str, kind: str) -> None:
    document = read_document(DATA / name)
    assert (document.name, document.kind) == (name, kind)
    assert "storage code of the old lighthouse is 48213." in document.text


def test_source_code_is_text_as_it_is(tmp_path: Path) -> None:
    code = "def f(x):\n\treturn x  # twice\n"
    (tmp_path / "f.py").write_text(code)
    assert read_document(tmp_path / "f.py").text == code


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"piped text")))
    document = read_document("-")
    assert (document.name, document.text) == ("stdin", "piped text")


# ---- encodings ---------------------------------------------------------------------------------

FRENCH = "L'été dernier, le garçon « naïf » est allé à la forêt.\n"


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        (FRENCH, "utf-8"),
        (FRENCH, "utf-8-sig"),
        (FRENCH, "utf-16"),
        (FRENCH, "utf-32"),
        (FRENCH, "latin-1"),
        ("It\u2019s the “best” café \u2013 5 €", "cp1252"),
        ("café", "latin-1"),  # short: what detectors get wrong
        ("Größe 5 µm", "latin-1"),
        ("Zażółć gęślą jaźń. Wczoraj wieczorem pojechałem do Łodzi, żeby spotkać się.", "cp1250"),
        ("Привет, мир. Это проверка кодировки текста.", "cp1251"),
        ("日本語の文章です。これは試験です。漢字とかな", "shift_jis"),
        (
            3 * "昨天晚上我们去剧院看了一场精彩的演出。大家都很高兴,回家的时候已经很晚了。",
            "gb18030",
        ),
    ],
)
def test_encodings(tmp_path: Path, text: str, encoding: str) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(text.encode(encoding))
    assert read_document(path).text == text


def test_broken_byte_in_utf8_does_not_change_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "cut.txt"
    path.write_bytes(20 * FRENCH.encode() + b"caf\xc3")
    assert read_document(path).text == 20 * FRENCH + "caf\ufffd"


def test_encoding_of_a_big_file_is_detected_from_its_beginning(tmp_path: Path) -> None:
    line = "Příliš žluťoučký kůň úpěl ďábelské ódy, a večer jsme viděli představení.\n"
    path = tmp_path / "big.txt"
    path.write_bytes(line.encode("cp1250") * 20_000)
    assert read_document(path).text == line * 20_000


def test_line_ends_and_stray_characters(tmp_path: Path) -> None:
    path = tmp_path / "dos.txt"
    path.write_bytes(b"one\r\ntwo\rthree\n")
    assert read_document(path).text == "one\ntwo\nthree\n"


# ---- HTML --------------------------------------------------------------------------------------


def test_html_keeps_blocks_and_drops_what_is_not_text() -> None:
    text = read_document(DATA / "harbour.html").text
    assert text.startswith("The harbour of Norrvik\n\n# The harbour of Norrvik\n\nThe harbour")
    assert "keeps the tide tables.\nThe storage code" in text  # <br>, and a wrapped line joined
    assert "- Alma\n" in text and "- Brita\n" in text
    assert "Ship | Passengers\nAlma | 212" in text
    assert "04:12  high water\n10:31    low water" in text  # <pre> as it is
    assert text.endswith("Grönland <3")
    for dropped in ("not part of the text", "navy", "Turn on scripts", "doctype"):
        assert dropped not in text


def html(tmp_path: Path, page: bytes, name: str = "page.html") -> str:
    path = tmp_path / name
    path.write_bytes(page)
    return read_document(path).text


def test_html_declares_its_encoding(tmp_path: Path) -> None:
    assert html(tmp_path, '<meta charset="latin-1">café'.encode("latin-1")) == "café"
    assert html(tmp_path, "<p>naïve</p>".encode("utf-16")) == "naïve"


def test_html_is_known_by_its_content(tmp_path: Path) -> None:
    page = b'<?xml version="1.0"?>\n<!DOCTYPE html><p>hello'
    assert html(tmp_path, page, name="saved") == "hello"


def test_html_table_cells_stay_on_their_row(tmp_path: Path) -> None:
    page = b"<table><tr><td>a </td><td><p>b</p></td><td></td><td>c</td></tr></table>"
    assert html(tmp_path, page) == "a | b | | c"


def test_html_deeper_than_python_recurses(tmp_path: Path) -> None:
    assert html(tmp_path, b"<div>" * 5000 + b"deep" + b"</div>" * 5000) == "deep"


def test_html_bad_character_references_still_encode(tmp_path: Path) -> None:
    html(tmp_path, b"<p>&#xD800; &#x110000; &#0; x").encode("utf-8")


# ---- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [600, 900, -3])
def test_truncated_pdf(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "cut.pdf"
    path.write_bytes((DATA / "harbour.pdf").read_bytes()[:cut])
    with pytest.raises(DocumentError, match=r"cut short.*export the PDF again"):
        read_document(path)


def test_damaged_pdf(tmp_path: Path) -> None:
    path = tmp_path / "bad.pdf"
    path.write_bytes(b"%PDF-1.4\nnothing here\n%%EOF\n")
    with pytest.raises(DocumentError, match="damaged"):
        read_document(path)


def test_pdf_with_padding_after_its_end(tmp_path: Path) -> None:
    path = tmp_path / "padded.pdf"
    path.write_bytes((DATA / "harbour.pdf").read_bytes() + bytes(5000))
    assert "48213" in read_document(path).text


def test_encrypted_pdf() -> None:
    with pytest.raises(DocumentError, match=r"encrypted\.pdf' is encrypted; remove its password"):
        read_document(DATA / "encrypted.pdf")


def test_scanned_pdf() -> None:
    with pytest.raises(DocumentError, match=r"no text on its only page.*ocrmypdf"):
        read_document(DATA / "scanned.pdf")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"", "is empty"),
        ("a.txt", b" \n\t", "is empty"),
        ("a.txt", b"\xef\xbb\xbf \n", "no text in it"),
        ("a.txt", b"some\0text", "binary.*NUL"),
        ("a.txt", "text".encode("utf-16-le"), "binary.*NUL"),
        ("a.dat", bytes(range(1, 256)) * 8, "binary.*control bytes"),
        ("a.txt", b"\xff\xfea", "says it is utf-16 but is not"),
        ("a.pdf", b"hello", "does not begin like a PDF"),
        ("a.docx", b"PK\x03\x04....", "zip file.*save it as .pdf"),
        ("a.rtf", b"{\\rtf1 hello}", "RTF"),
        ("a.gguf", b"GGUF\3\0\0\0", "--model"),
        ("a.html", b"<script>x()</script>", "page without text"),
        ("a.html", b"<p>\0</p>", "binary.*NUL"),
    ],
)
def test_refused(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DocumentError, match=words) as caught:
        read_document(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(DocumentError, match=r"no file .*nowhere.txt'; check the name"):
        read_document(tmp_path / "nowhere.txt")
    with pytest.raises(DocumentError, match="is a folder; give the files in it"):
        read_document(tmp_path)
    with pytest.raises(DocumentError, match="not a file name"):
        read_document("a\0b")
    with pytest.raises(DocumentError, match="cannot be read"):
        read_document("n" * 5000)


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="needs a Unix device")
def test_device_is_refused() -> None:
    with pytest.raises(DocumentError, match="not a regular file"):
        read_document("/dev/zero")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_named_pipe_is_read(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_bytes, args=(b"through a pipe",))
    writer.start()
    assert read_document(path).text == "through a pipe"
    writer.join()
