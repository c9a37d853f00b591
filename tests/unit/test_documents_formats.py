"""Word documents, e-books and PDFs: text, places, and what is refused."""

from __future__ import annotations

import io
import random
import zipfile
from pathlib import Path

import docx
import pytest
from docx.oxml import parse_xml

from capkv_local.documents import read_document
from capkv_local.errors import DocumentError

# ---- docx --------------------------------------------------------------------------------------


def word_file(path: Path) -> Path:
    document = docx.Document()
    document.add_heading("The harbour", 0)
    document.add_heading("Safety", 1)
    document.add_paragraph("Keep the <pier> clear & dry. " * 12)
    document.add_paragraph("Ropes", style="List Bullet")
    table = document.add_table(2, 2)
    for cell, text in zip(table._cells, ("Ship", "Passengers", "Alma", "212"), strict=True):
        cell.text = text
    document.add_heading("Codes", 1)
    document.add_paragraph("The storage code is 48213.")
    document.save(str(path))
    return path


def test_docx_has_its_structure_and_places(tmp_path: Path) -> None:
    document = read_document(word_file(tmp_path / "a.docx"))
    assert document.kind == "docx"
    assert document.text.startswith("# The harbour\n\n# Safety\n\nKeep the <pier> clear & dry.")
    assert "\n\n- Ropes\n\nShip | Passengers\nAlma | 212\n\n# Codes\n\nThe st" in document.text
    source = document.source(document.text.index("48213"))
    assert str(source) == 'a.docx, par. 6-7 "Codes"'


def test_docx_loses_nothing_that_is_not_a_plain_paragraph(tmp_path: Path) -> None:
    document = docx.Document()
    name = 'xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"'
    body = document.element.body
    for number, xml in enumerate(
        (
            f"<w:sdt {name}><w:sdtContent><w:p><w:r><w:t>controlled</w:t></w:r></w:p>"
            "</w:sdtContent></w:sdt>",
            f"<w:p {name}><w:ins><w:r><w:t>inserted</w:t></w:r></w:ins>"
            "<w:del><w:r><w:delText>deleted</w:delText></w:r></w:del></w:p>",
        )
    ):
        body.insert(number, parse_xml(xml))
    document.save(str(tmp_path / "a.docx"))
    assert read_document(tmp_path / "a.docx").text == "controlled\n\ninserted"


def test_docx_without_text(tmp_path: Path) -> None:
    docx.Document().save(str(tmp_path / "a.docx"))
    with pytest.raises(DocumentError, match="no text in it"):
        read_document(tmp_path / "a.docx")


# ---- epub --------------------------------------------------------------------------------------

CONTAINER = (
    '<?xml version="1.0"?><container xmlns="urn:oasis:names:tc:opendocument:xmlns:container">'
    '<rootfiles><rootfile full-path="OPS/book.opf"/></rootfiles></container>'
)
CHAPTERS = {
    "cover.xhtml": "<html><body><img src='cover.png'/></body></html>",
    "one.xhtml": "<html><body><h1>The\n Harbour</h1><p>It is calm.</p></body></html>",
    "two b.xhtml": "<html><body><p>The storage code is 48213.</p></body></html>",
}


def book(path: Path, **more: str | bytes) -> Path:
    manifest = "".join(
        f'<item id="c{i}" href="{name.replace(" ", "%20")}" media-type="application/xhtml+xml"/>'
        for i, name in enumerate(reversed(CHAPTERS))  # the list is not the order of reading
    )
    spine = "".join(f'<itemref idref="c{i}"/>' for i in reversed(range(len(CHAPTERS))))
    package = (
        f'<package xmlns="http://www.idpf.org/2007/opf"><manifest>{manifest}</manifest>'
        f"<spine>{spine}</spine></package>"
    )
    members = {"mimetype": "application/epub+zip", "META-INF/container.xml": CONTAINER}
    members |= {"OPS/book.opf": package, **{f"OPS/{n}": text for n, text in CHAPTERS.items()}}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in {**members, **more}.items():
            if content:
                archive.writestr(name, content)
    return path


def test_epub_in_the_order_of_reading_with_chapters(tmp_path: Path) -> None:
    document = read_document(book(tmp_path / "b.epub"))
    assert document.kind == "epub"
    assert document.text == "# The Harbour\n\nIt is calm.\n\nThe storage code is 48213."
    assert str(document.source(0)) == 'b.epub, ch. 1 "The Harbour"'
    assert str(document.source(document.text.index("48213"))) == "b.epub, ch. 2"


def test_epub_that_is_protected_says_so_but_encrypted_fonts_do_not_matter(tmp_path: Path) -> None:
    encrypted = (
        '<encryption xmlns:e="http://www.w3.org/2001/04/xmlenc#"><e:EncryptedData><e:CipherData>'
        '<e:CipherReference URI="OPS/{}"/></e:CipherData></e:EncryptedData></encryption>'
    )
    name = "META-INF/encryption.xml"
    fonts = book(tmp_path / "a.epub", **{name: encrypted.format("font.otf")})
    assert "48213" in read_document(fonts).text
    locked = book(tmp_path / "b.epub", **{name: encrypted.format("two%20b.xhtml")})
    with pytest.raises(DocumentError, match=r"protected against copying \(1 of 3 pages"):
        read_document(locked)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"OPS/one.xhtml": ""}, "damaged .it lists 'OPS/one.xhtml'"),
        ({"OPS/book.opf": "<package"}, "damaged .OPS/book.opf: unclosed token"),
        ({"META-INF/container.xml": "<container/>"}, "does not name its list of pages"),
        (dict.fromkeys((f"OPS/{n}" for n in CHAPTERS), "<p></p>"), "no text in it"),
        # A bomb: 33 MiB of blanks in 33 KiB.
        ({"OPS/one.xhtml": b" " * (33 << 20)}, r"unpacks 'OPS/one.xhtml' from [\d,]+ to 34,603,"),
    ],
)
def test_epub_refused(tmp_path: Path, more: dict[str, str | bytes], words: str) -> None:
    with pytest.raises(DocumentError, match=words) as caught:
        read_document(book(tmp_path / "b.epub", **more))
    assert "b.epub" in str(caught.value) and "\n" not in str(caught.value)


# ---- zip files ---------------------------------------------------------------------------------


def test_docx_bomb(tmp_path: Path) -> None:
    path = tmp_path / "a.docx"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("word/document.xml", b" " * (33 << 20))
    with pytest.raises(DocumentError, match="no more than 32 MiB are read of one part"):
        read_document(path)


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"xl/workbook.xml": b"x"}, "a spreadsheet; save it as .pdf"),
        ({"ppt/presentation.xml": b"x"}, "a presentation; save it as .pdf"),
        ({"content.xml": b"x"}, "an OpenDocument file; save it as .pdf"),
        ({"photo.jpg": b"x"}, "a zip file; unpack it"),
        ({"word/document.xml": b"<not"}, "damaged.*save it again"),
    ],
)
def test_other_zip_files(tmp_path: Path, members: dict[str, bytes], words: str) -> None:
    path = tmp_path / "a.docx"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    with pytest.raises(DocumentError, match=words):
        read_document(path)


@pytest.mark.parametrize("suffix", ["docx", "epub"])
@pytest.mark.parametrize("keep", [0.3, 0.7, 0.99])
def test_cut_files(tmp_path: Path, suffix: str, keep: float) -> None:
    path = tmp_path / f"a.{suffix}"
    whole = (book if suffix == "epub" else word_file)(path).read_bytes()
    path.write_bytes(whole[: int(keep * len(whole))])
    with pytest.raises(DocumentError, match="damaged"):
        read_document(path)


@pytest.mark.parametrize(("suffix", "n_places"), [("docx", 8), ("epub", 60)])
def test_a_changed_byte_is_never_a_traceback(tmp_path: Path, suffix: str, n_places: int) -> None:
    path = tmp_path / f"a.{suffix}"
    whole = (book if suffix == "epub" else word_file)(path).read_bytes()
    for place in range(4, len(whole), len(whole) // n_places):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        try:
            read_document(path)
        except DocumentError as error:
            assert "a." in str(error)


def test_encrypted_office_document(tmp_path: Path) -> None:
    path = tmp_path / "a.docx"
    path.write_bytes(b"\xd0\xcf\x11\xe0" + bytes(5000) + "EncryptedPackage".encode("utf-16-le"))
    with pytest.raises(DocumentError, match="is encrypted; open it in the program that made it"):
        read_document(path)


# ---- PDF ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("password", ["", "secret"])
def test_pdf_with_aes(tmp_path: Path, password: str) -> None:
    from pypdf import PdfReader, PdfWriter

    data = Path(__file__).parent.parent / "data" / "harbour.pdf"
    writer = PdfWriter(clone_from=PdfReader(io.BytesIO(data.read_bytes())))
    writer.encrypt(user_password=password, owner_password="owner", algorithm="AES-256")
    writer.write(tmp_path / "a.pdf")
    if password:
        with pytest.raises(DocumentError, match="is encrypted; remove its password"):
            read_document(tmp_path / "a.pdf")
    else:  # printing is restricted, reading is not
        assert "48213" in read_document(tmp_path / "a.pdf").text


def test_pdf_has_pages_and_says_which_are_scans(tmp_path: Path) -> None:
    from pypdf import PdfWriter

    from capkv_local.documents import open_document

    data = Path(__file__).parent.parent / "data"
    writer = PdfWriter()
    for name in ("scanned.pdf", "harbour.pdf", "scanned.pdf"):
        writer.append(data / name)
    writer.write(tmp_path / "a.pdf")
    stream = open_document(tmp_path / "a.pdf")
    document = stream.read()
    assert str(document.source(0)) == "a.pdf, p. 2"
    assert [passage.label for passage in document.passages] == ["p. 2", "p. 3"]
    assert document.text[document.passages[1].start - 2 : document.passages[1].start] == "\n\n"
    assert (
        len(stream.notes) == 1 and "no text on pages 1, 4, which have an image" in stream.notes[0]
    )


def pdf_of(*lines: str) -> bytes:
    """A page with these lines."""
    shown = b" ".join(b"(%s) Tj T*" % line.encode() for line in lines)
    content = b"BT /F 12 Tf 14 TL 72 700 Td " + shown + b" ET"
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R"
        b" /Resources << /Font << /F << /Type /Font /Subtype /Type1"
        b" /BaseFont /Helvetica >> >> >> >>",
        b"<< /Length %d >> stream\n%s\nendstream" % (len(content), content),
    ]
    out = io.BytesIO(b"%PDF-1.4\n")
    out.seek(0, io.SEEK_END)
    places = []
    for number, body in enumerate(objects, 1):
        places.append(out.tell())
        out.write(b"%d 0 obj %s endobj\n" % (number, body))
    table = out.tell()
    out.write(
        b"xref\n0 5\n0000000000 65535 f \n" + b"".join(b"%010d 00000 n \n" % p for p in places)
    )
    out.write(b"trailer << /Size 5 /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % table)
    return out.getvalue()


def test_pdf_joins_broken_words_and_shortens_dots(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_bytes(
        pdf_of("Harbours . . . . . . . . . . . . 7", "One must imple-", "ment it. Wait...")
    )
    text = read_document(tmp_path / "a.pdf").text
    assert text == "Harbours ... 7\nOne must implement it. Wait..."


def test_damaged_pdf_is_refused_or_read(tmp_path: Path) -> None:
    data = (Path(__file__).parent.parent / "data" / "harbour.pdf").read_bytes()
    rng = random.Random(1)
    refused = 0
    for _ in range(100):
        damaged = bytearray(data)
        for _ in range(20):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        (tmp_path / "a.pdf").write_bytes(damaged)
        try:
            read_document(tmp_path / "a.pdf")
        except DocumentError as error:
            assert "a.pdf" in str(error)
            refused += 1
    assert refused > 10
