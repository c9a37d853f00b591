"""``capkv inspect`` as it is run: text, JSON and page say the same."""

from __future__ import annotations

import json
from pathlib import Path

from tests.e2e.test_ask import ROOT, capkv
from tests.e2e.test_cli import QUESTION

TEXT = (ROOT / "tests" / "data" / "licence.txt").read_text()[:3000]


def test_a_snapshot_is_inspected_as_it_is(tmp_path: Path) -> None:
    text, book, page = (tmp_path / name for name in ("text.txt", "text.capkv", "text.html"))
    text.write_text(TEXT)
    read = capkv(
        "snapshot", str(text), "-o", str(book), "--budget", "128", "--n-ctx", "1024",
        "--observe", "tail",
    )  # fmt: skip
    assert read.returncode == 0, read.stderr
    before = book.read_bytes()
    run = capkv("inspect", str(book), "--json", "--question", QUESTION, "-o", str(page))
    assert run.returncode == 0, run.stderr
    assert book.read_bytes() == before
    found = json.loads(run.stdout)
    cells = [n for layer in found["cells"] for n in layer]
    assert found["budget"] == 128 and 100 < sum(cells) / len(cells) < 300
    shares = [passage["share"] for passage in found["passages"]]
    assert shares == sorted(shares, reverse=True)
    assert found["passages"][0]["source"].startswith("text.txt, lines ")
    assert 0 < found["question"]["lost_share"] < 1 and len(found["question"]["tokens"]) == 10
    assert f"{found['question']['lost_share']:.1%}" in page.read_text()

    plain = capkv("inspect", str(book))
    assert plain.returncode == 0 and "\x1b" not in plain.stdout
    assert f"{found['tokens']:,} tokens" in plain.stdout
    assert capkv("inspect", str(book), "-o", str(text)).returncode == 1
    assert text.read_text() == TEXT
