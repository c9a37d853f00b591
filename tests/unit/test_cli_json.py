"""``--json``: every verb prints one object, or one a line, and nothing else on standard output."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.unit.fake_chat import FakeChat, Run

TXT = str(Path(__file__).parent.parent / "data" / "harbour.txt")


def test_chat_prints_an_object_a_line(fake: type[FakeChat], run: Run) -> None:
    lines = ["why?", "/budget 64", "/budget lots", "/nothing", "one\\", "two", "/stats"]
    result = run("chat", TXT, "--json", stdin="\n".join(lines))
    why, budget, lots, nothing, two, stats = map(json.loads, result.stdout.splitlines())
    assert (why["question"], why["answer"], why["stopped"]) == ("why?", "The code is 48213.", False)
    assert (why["policy"], why["tokens"], why["kv"]["cells"]) == ("capkv", 1000, 64)
    assert why["seconds"]["answer"] >= 0
    assert budget == {"command": "/budget 64", "output": "budget: 64 cells per head, global"}
    assert lots == {
        "command": "/budget lots",
        "error": "the budget 'lots' cannot be read; give cells",
    }
    assert nothing["command"] == "/nothing" and "there is no command" in nothing["error"]
    assert two["question"] == "one\ntwo"
    assert stats["output"].startswith("policy ")
    assert result.exit_code == 1  # one of them failed


def test_chat_tells_an_answer_that_was_stopped(fake: type[FakeChat], run: Run) -> None:
    fake.interrupt_answer = True
    result = run("chat", TXT, "--json", stdin="why?\n")
    record = json.loads(result.stdout)
    assert (record["answer"], record["stopped"]) == ("The code is 48213.", True)


def test_snapshot(fake: type[FakeChat], run: Run, tmp_path: Path) -> None:
    path = tmp_path / "book.capkv"
    result = run("snapshot", TXT, "-o", str(path), "--json")
    report = json.loads(result.stdout)
    assert (report["path"], report["bytes"], report["tokens"]) == (str(path), 7, 1000)
    assert report["model"] == "/models/small.gguf"
    assert report["seconds"].keys() >= {"load", "read", "write"}
    assert result.stderr == ""


def test_cache(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAPKV_HOME", str(tmp_path))
    (tmp_path / "snapshots").mkdir()
    (tmp_path / "snapshots" / "3f2a.capkv").write_bytes(b"damaged")
    (entry,) = json.loads(run("cache", "ls", "--json").stdout)["snapshots"]
    assert (entry["name"], entry["model"]) == ("3f2a", None)
    gone = json.loads(run("cache", "rm", "3f", "--json").stdout)
    assert gone == {"deleted": ["3f2a"], "bytes": 7}


@pytest.mark.parametrize(
    "verb", ["ask", "chat", "snapshot", "cache ls", "cache rm", "plan", "doctor", "config", "eval"]
)
def test_every_verb_has_it(run: Run, verb: str) -> None:
    assert "--json" in run(*verb.split(), "--help").stdout
