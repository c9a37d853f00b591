"""Snapshots from the command line: written, opened, read on from, kept, listed, deleted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.test_ask import ROOT, capkv
from tests.e2e.test_cli import HARBOUR, QUESTION

SMALL = ["--budget", "128", "--n-ctx", "1024"]
NOTES = ROOT / "tests" / "data" / "harbour.md"


def test_a_snapshot_is_written_once_opened_and_read_on_from(tmp_path: Path) -> None:
    book, both = tmp_path / "book.capkv", tmp_path / "both.capkv"
    # The ending is how a snapshot is known: it is added.
    run = capkv("snapshot", str(HARBOUR), "-o", str(tmp_path / "book"), *SMALL)
    assert run.returncode == 0, run.stderr
    assert f"capkv chat {book}" in run.stdout
    run = capkv("ask", str(book), QUESTION, "--max-tokens", "40")
    assert run.returncode == 0 and "48213" in run.stdout
    before = book.read_bytes()
    run = capkv("snapshot", str(HARBOUR), "-o", str(book), *SMALL)
    assert run.returncode == 1 and "--force" in run.stderr
    assert book.read_bytes() == before
    run = capkv("snapshot", str(book), str(NOTES), "-o", str(both))
    assert run.returncode == 0, run.stderr
    stats = capkv("chat", str(both), stdin=f"{QUESTION}\n/stats")
    assert "48213" in stats.stdout and stats.returncode == 0
    run = capkv("chat", str(both), "--type-k", "q8_0", stdin="")
    assert run.returncode == 1 and run.stderr.count("\n") == 1 and "--type-k" in run.stderr


def test_what_is_kept_is_opened_listed_and_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CAPKV_HOME", str(tmp_path))
    first = capkv("chat", str(HARBOUR), *SMALL, "--cache", stdin=QUESTION)
    assert first.returncode == 0 and "as read before" not in first.stderr
    monkeypatch.setenv("CAPKV_CACHE", "1")
    again = capkv("chat", str(HARBOUR), *SMALL, stdin=QUESTION)
    assert "opened harbour.txt as read before" in again.stderr
    assert again.stdout == first.stdout
    listed = json.loads(capkv("cache", "ls", "--json").stdout)["snapshots"]
    assert [entry["documents"] for entry in listed] == [["harbour.txt"]]
    # Damaged: told, read anew, and kept again.
    file = tmp_path / "snapshots" / f"{listed[0]['name']}.capkv"
    file.write_bytes(file.read_bytes()[:-1])
    third = capkv("chat", str(HARBOUR), *SMALL, stdin=QUESTION)
    assert "cannot be used" in third.stderr and third.stdout == first.stdout
    assert listed[0]["name"] in capkv("cache", "ls").stdout
    gone = capkv("cache", "rm", listed[0]["name"][:4])
    assert gone.returncode == 0 and "deleted 1 snapshot" in gone.stdout
    assert capkv("cache", "rm", "--all").stdout.startswith("deleted 0 snapshots")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["snapshot", str(HARBOUR), "-o", "/nowhere/book"], "no folder '/nowhere'"),
        (["snapshot", str(HARBOUR), "-o", "."], "folder"),
        (["chat", "gone.capkv"], "no saved session"),
        (["cache", "rm", "gone"], "nothing is kept"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CAPKV_HOME", str(tmp_path))
    run = capkv(*arguments, stdin="")
    assert run.returncode == 1 and message in run.stderr
    assert run.stderr.count("\n") == 1
