"""The main job through the real command line: a long text, a small cache, the right answer."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Over 7,000 tokens, and short enough for the model to answer with its full cache, too.
N_CHARACTERS = 33270
TEXT = (ROOT / "tests" / "data" / "licence.txt").read_text()[:N_CHARACTERS]


@dataclass(frozen=True)
class Fact:
    place: float  # as a share of the text
    sentence: str
    question: str
    answer: str


FACTS = (
    Fact(
        0.1,
        "The access code of the harbour gate is 48213.",
        "What is the access code of the harbour gate?",
        "48213",
    ),
    Fact(
        0.5,
        "The inventory number of the blue piano is 70952.",
        "What is the inventory number of the blue piano?",
        "70952",
    ),
    Fact(
        0.9,
        "The telephone extension of the night nurse is 31687.",
        "What is the telephone extension of the night nurse?",
        "31687",
    ),
)


def planted() -> str:
    """The text with every fact as a paragraph of its own, at the paragraph nearest before."""
    out, start = [], 0
    for fact in FACTS:
        end = TEXT.rindex("\n\n", 0, int(fact.place * len(TEXT)))
        out += [TEXT[start:end], "\n\n", fact.sentence]
        start = end
    return "".join([*out, TEXT[start:]])


def capkv(
    *args: str, stdin: str | None = None, timeout: int = 900
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "capkv_local.cli", *args],
        cwd=ROOT,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("document") / "licence.txt"
    path.write_text(planted())
    return path


@pytest.mark.slow
@pytest.mark.parametrize("fact", FACTS, ids=lambda fact: f"at {fact.place:.0%}")
def test_a_planted_fact_is_answered(document: Path, fact: Fact) -> None:
    run = capkv("ask", str(document), fact.question, "--budget", "1024", "--json")
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    assert result["tokens"] >= 7000
    assert result["budget"] == 1024
    assert fact.answer in result["answer"]
