"""``capkv eval`` through the real command line: figures in a folder, and errors on one line."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from capkv_local.evaluate.corpus import split_of
from tests.e2e.test_ask import ROOT, capkv

LICENCE = ROOT / "tests" / "data" / "licence.txt"


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    name = next(name for i in range(9) if split_of(name := f"licence{i}.txt") == "report")
    (folder / name).write_bytes(LICENCE.read_bytes())
    return folder


def small(texts: Path, out: Path, *methods: str) -> list[str]:
    named = [f"--method={method}" for method in methods]
    size = ["--tokens", "600", "--cases", "1", "--share", "0.5", "--task", "continuation"]
    return ["eval", "--texts", str(texts), "--out", str(out), *size, *named]


def test_what_was_measured_is_there_and_more_is_added(texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "figures"
    first = capkv(*small(texts, out, "snapkv"))
    assert first.returncode == 0, first.stderr
    assert "KL" in first.stdout
    assert "snapkv" in first.stdout
    assert "report.html" in first.stderr
    second = capkv(*small(texts, out, "snapkv", "capkv+probe"))
    assert second.returncode == 0, second.stderr
    assert "capkv (global, probe)" in second.stdout
    with (out / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["method"] for row in rows} == {"snapkv", "capkv+probe"}
    assert len(rows) == 2 * 3  # two methods, three figures, each measured once
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "<svg" in page
    assert list((out / "figures").glob("*.svg"))


@pytest.mark.parametrize(
    ("options", "code", "reason"),
    [
        (["--method", "snapkw"], 1, "did you mean 'snapkv'"),
        (["--method", "kvzip+tail"], 1, "needs +probe"),
        (["--share", "1.5"], 2, "1.5"),
        (["--texts", "nowhere"], 2, "nowhere"),
        (["--model", "nowhere.gguf"], 1, "nowhere.gguf"),
    ],
)
def test_errors_name_the_cause(
    options: list[str], code: int, reason: str, texts: Path, tmp_path: Path
) -> None:
    result = capkv(*small(texts, tmp_path / "out"), *options)
    assert result.returncode == code
    assert reason in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_no_result_is_left_alone(texts: Path, tmp_path: Path) -> None:
    notes = tmp_path / "results.jsonl"
    notes.write_text("my notes\n")
    result = capkv(*small(texts, tmp_path, "snapkv"))
    assert result.returncode == 1
    assert "line 1" in result.stderr
    assert notes.read_text() == "my notes\n"
