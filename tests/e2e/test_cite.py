"""``--cite`` through the real command line: the answer on standard output, its place beside it."""

from __future__ import annotations

from tests.e2e.test_ask import ROOT, capkv

DOCUMENT = str(ROOT / "tests" / "data" / "harbour.pdf")
QUESTION = "What is the storage code of the old lighthouse?"


def test_ask_names_the_page_on_standard_error() -> None:
    run = capkv("ask", DOCUMENT, QUESTION, "--max-tokens", "24", "--cite")
    assert run.returncode == 0, run.stderr
    assert "48213" in run.stdout and "[1]" not in run.stdout
    assert '[1] harbour.pdf, p. 1: "' in run.stderr and "48213" in run.stderr


def test_what_cannot_be_cited_is_told_before_reading() -> None:
    run = capkv("ask", DOCUMENT, QUESTION, "--policy", "knorm", "--cite")
    assert run.returncode == 1 and run.stdout == ""
    assert "'knorm' observes no queries" in run.stderr and "read harbour" not in run.stderr
