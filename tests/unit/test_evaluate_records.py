"""Records on disk: torn, foreign, repeated."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from capkv_local.errors import EvaluationError
from capkv_local.evaluate.records import Record, Results, key, write_csv
from tests.unit.planted import fact, record


def test_records_come_back(tmp_path: Path) -> None:
    results = Results(tmp_path / "new" / "results.jsonl")
    assert results.read() == ([], False)
    first, second = record(case="é <ü>\n"), fact("b", "1", 1.0)
    results.append([first])
    results.append([])
    results.append([second])
    assert results.read() == ([first, second], False)


def test_torn_line_is_dropped_and_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    Results(path).append([record(case="a"), record(case="b")])
    path.write_bytes(path.read_bytes()[:-30])
    loaded = Results(path).read()
    assert loaded.torn and [r.case for r in loaded.records] == ["a"]
    Results(path).append([record(case="c")])
    assert Results(path).read() == ([record(case="a"), record(case="c")], False)


def test_last_line_without_its_end_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    Results(path).append([record(case="a")])
    path.write_bytes(path.read_bytes()[:-1])
    Results(path).append([record(case="b")])
    assert [r.case for r in Results(path).read().records] == ["a", "b"]


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("notes about the run", 1),
        ("notes\nabout the run\n", 1),
        ('{"model": "x"}\n', 1),
        ("GOOD\n[1]\n", 2),
        ("GOOD\n\n" + "GOOD".replace("GOOD", "STRING") + "\n", 3),
    ],
)
def test_other_files_are_refused_and_left_alone(tmp_path: Path, content: str, line: int) -> None:
    row = record().__dict__
    content = content.replace("GOOD", json.dumps(row))
    content = content.replace("STRING", json.dumps(row | {"value": "0.1"}))
    path = tmp_path / "results.jsonl"
    path.write_text(content)
    for use in (Results(path).read, lambda: Results(path).append([record()])):
        with pytest.raises(EvaluationError, match=f"line {line} of"):
            use()
    assert path.read_text() == content


def test_a_folder_is_no_results_file(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="cannot be read"):
        Results(tmp_path).read()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_have_to_be_finite(value: float) -> None:
    with pytest.raises(EvaluationError, match=r"value=.* is not finite"):
        record(value=value)


def test_key_is_what_was_run_not_what_came_out(tmp_path: Path) -> None:
    a = record()
    assert key(a) == key(replace(a, metric="top1", value=1.0, full=1.0, seconds=9.0, kv_bytes=1))
    for change in (dict(seed=1), dict(share=0.5), dict(kv_type="q8_0"), dict(item="x")):
        assert key(a) != key(replace(a, **change))
    results = Results(tmp_path / "results.jsonl")
    results.append([a, replace(a, metric="top1"), replace(a, seed=1)])
    assert results.done() == {key(a): {"kl", "top1"}, key(replace(a, seed=1)): {"kl"}}


def test_what_is_measured_again_replaces_the_old(tmp_path: Path) -> None:
    results = Results(tmp_path / "results.jsonl")
    results.append([record(value=0.1), record(value=0.2)])
    assert [r.value for r in results.read().records] == [0.2]


def test_csv_round_trip(tmp_path: Path) -> None:
    records = [record(case='a, "b"\nc', value=1 / 3), fact("ü", "1", 1.0)]
    write_csv(records, tmp_path / "results.csv")
    with (tmp_path / "results.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [typed(row) for row in rows] == records


def typed(row: dict[str, str]) -> Record:
    """Return the record of a CSV row, by the annotations of its fields."""
    read: dict[str, Callable[[str], Any]] = {
        "str": str,
        "int": int,
        "float": float,
        "float | None": lambda text: float(text) if text else None,
    }
    types = Record.__annotations__
    return Record(**{name: read[types[name]](text) for name, text in row.items()})
