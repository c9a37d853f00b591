"""Records on disk, intervals and comparisons, and what a report says about planted results."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from capkv_local.errors import EvaluationError
from capkv_local.evaluate.records import Record, Results, key, write_csv
from capkv_local.evaluate.report import make_console, markdown, print_tables, write_report
from capkv_local.evaluate.report.cells import Cells
from capkv_local.evaluate.report.findings import losses, verdicts
from capkv_local.evaluate.report.grid import mark_best, setting_grids
from capkv_local.evaluate.report.measures import KL, RECALL
from capkv_local.evaluate.report.table import tables
from capkv_local.evaluate.statistics import compare, mean, recall, relative, summarise


def record(**changed: Any) -> Record:
    """Return a record of capkv's KL on one case, with some fields changed."""
    fields: dict[str, Any] = dict(
        model="tiny", split="report", task="continuation", case="a", item="", kind="continuation",
        depth=None, n_tokens=2048, method="capkv", allocation="global", observe="tail",
        reading="streamed", question="unseen", kv_type="f16", share=0.25, kv_bytes=1 << 20,
        seed=0, metric="kl", value=0.1, full=None, seconds=1.0,
    )  # fmt: skip
    return Record(**fields | changed)


def fact(case: str, item: str, value: float, **changed: Any) -> Record:
    """Return the record of one question about a fact."""
    fields: dict[str, Any] = dict(
        task="facts", case=case, item=item, kind="single", depth=0.5, metric="exact",
        value=value, full=1.0,
    )  # fmt: skip
    return record(**fields | changed)


# KL of each method relative to capkv's; keydiff wins at 5%, and only there.
METHODS = {"capkv": 1.0, "snapkv": 1.5, "keydiff": 2.5, "capkv:noise=1": 1.0}


def synthetic(n_cases: int = 8, *, readings: tuple[str, ...] = ("streamed",)) -> list[Record]:
    """Return a run of a few methods whose differences are known."""
    rng = np.random.default_rng(7)
    records = []
    for case in (f"doc-{i}" for i in range(n_cases)):
        hard = math.exp(rng.normal(0, 0.5))
        for reading in readings:
            for method, factor in METHODS.items():
                for share in (0.05, 0.25):
                    wins = (method, share) == ("keydiff", 0.05)
                    how = dict(case=case, method=method, share=share, reading=reading)
                    kl = (
                        0.02
                        / share
                        * hard
                        * (0.5 if wins else factor)
                        * math.exp(rng.normal(0, 0.01))
                    )
                    records.append(record(**how, value=kl))
                    records.append(record(**how, metric="top1", value=math.exp(-kl), full=1.0))
                    for i in range(3):
                        said = float(rng.random() < math.exp(-kl))
                        depth = i / 2
                        records.append(fact(item=str(i), value=said, depth=depth, **how))  # type: ignore[arg-type]
                        logprob = dict(metric="logprob", value=-kl, full=-0.1, depth=depth)
                        records.append(fact(item=str(i), **how, **logprob))  # type: ignore[arg-type]
            for kv_type, kl in (("f16", 0.0), ("q8_0", 0.002)):
                how = dict(case=case, method="full", allocation="", observe="", share=1.0)
                how |= dict(reading=reading, kv_type=kv_type)
                records.append(record(**how, value=kl))
                records.append(fact(item="0", value=1.0, **how))  # type: ignore[arg-type]
    return records


# ---- records -----------------------------------------------------------------------------------


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


# ---- statistics --------------------------------------------------------------------------------


def test_mean_counts_items_and_draws_cases() -> None:
    # All spread is between cases: twice the items in each must not narrow the interval.
    values = {f"c{i}": i / 10 for i in range(10)}
    once = mean(fact(case, "0", value) for case, value in values.items())
    often = mean(fact(case, str(i), v) for case, v in values.items() for i in range(9))
    assert once.value == often.value == pytest.approx(0.45)
    assert (once.low, once.high) == pytest.approx((often.low, often.high))
    assert (often.n_items, often.n_cases) == (90, 10)
    # The standard error of this mean is 0.0908.
    assert once.low == pytest.approx(0.45 - 1.96 * 0.0908, abs=0.015)
    assert once.high == pytest.approx(0.45 + 1.96 * 0.0908, abs=0.015)


def test_intervals_cover_the_truth() -> None:
    rng = np.random.default_rng(3)
    hits = 0
    for _ in range(200):
        draws = rng.normal(0.5, 1.0, 30)
        estimate = mean([record(case=str(i), value=x) for i, x in enumerate(draws)], draws=500)
        hits += estimate.low <= 0.5 <= estimate.high
    assert 0.90 <= hits / 200 <= 0.99


def test_order_and_repetition_change_nothing() -> None:
    records = [record(case=str(i), value=i * 0.1) for i in range(7)]
    assert mean(records) == mean(records[::-1]) == mean(records)
    assert mean(records, seed=1) != mean(records)


def test_few_cases() -> None:
    assert math.isnan(mean([]).value)
    one = mean([record()])
    assert one.value == 0.1 and math.isnan(one.low)
    ours = [record(case=str(i), value=0.1) for i in range(4)]
    theirs = [replace(r, method="snapkv", value=0.9) for r in ours]
    assert compare(ours, theirs).verdict == "unclear"  # 4 of 4 is no proof
    assert compare([], theirs).n_items == 0


def test_relative_to_the_full_cache() -> None:
    records = [fact(str(i), "0", float(i < 3), full=float(i < 6)) for i in range(8)]
    assert relative(records).value == 0.5
    assert math.isnan(relative([replace(r, full=0.0) for r in records]).value)
    others = [
        fact("0", "x", 1.0, kind="absent"),
        fact("0", "y", 1.0, task="quote"),
        fact("0", "z", 1.0, metric="logprob"),
    ]
    own, of_full = recall([*records, *others])
    assert (own.value, own.n_items, of_full.value) == (3 / 8, 8, 0.5)


def test_comparison_uses_only_common_items() -> None:
    ours = [record(case=str(i), value=0.1 + 0.01 * i) for i in range(9)]
    theirs = [replace(r, method="snapkv", value=2 * r.value) for r in ours[:6]]
    theirs.append(record(case="only theirs", method="snapkv", value=1e6))
    theirs.append(replace(theirs[0], seed=1, value=1e6))
    compared = compare(ours, theirs)
    assert (compared.n_items, compared.n_cases, compared.neutral) == (6, 6, 1)
    assert compared.value == pytest.approx(0.5) and compared.high == pytest.approx(0.5)
    assert compared.verdict == "better" and compare(theirs, ours).verdict == "worse"


def test_pairing_sees_small_differences_between_unequal_cases() -> None:
    ours = [fact(str(i), "0", i / 10, metric="accuracy") for i in range(10)]
    theirs = [replace(r, method="snapkv", value=r.value - 0.02) for r in ours]
    compared = compare(ours, theirs)
    assert compared.value == pytest.approx(0.02) and compared.verdict == "better"
    assert mean(ours).low < mean(theirs).high  # which the single intervals cannot show


def test_noise_is_not_significant() -> None:
    rng = np.random.default_rng(5)
    ours = [record(case=str(i), value=x) for i, x in enumerate(rng.uniform(0.1, 1, 20))]
    theirs = [replace(r, value=x) for r, x in zip(ours, rng.permutation([r.value for r in ours]),
                                                  strict=True)]  # fmt: skip
    assert compare(ours, theirs).verdict == "unclear"


def test_metrics_are_not_mixed() -> None:
    both = [record(), record(metric="top1", value=1.0)]
    with pytest.raises(EvaluationError, match="kl, top1 cannot be averaged"):
        mean(both)
    groups = summarise(both, by=("method", "metric"))
    assert groups["capkv", "top1"].value == 1.0
    with pytest.raises(EvaluationError, match="no field 'metod'"):
        summarise(both, by=("metod",))


# ---- tables ------------------------------------------------------------------------------------


def test_best_and_as_good_are_marked() -> None:
    cells = Cells(synthetic())
    f16 = cells.settings[0]
    marks = {share: mark_best(cells, KL, f16, share, cells.names_in(f16)) for share in (0.05, 0.25)}
    assert marks[0.05] == {"keydiff": "best"}
    assert set(marks[0.25]) == {"capkv", "capkv:noise=1"}
    assert sorted(marks[0.25].values()) == ["best", "tied"]


def test_an_unfinished_method_is_not_the_best() -> None:
    records = [r for r in synthetic() if r.method != "keydiff" or r.case == "doc-0"]
    cells = Cells(records)
    f16 = cells.settings[0]
    assert mark_best(cells, KL, f16, 0.05, cells.names_in(f16)).get("keydiff") != "best"
    (_, grid), *_ = setting_grids(cells)
    rows = dict(grid.sections[0].rows)
    assert "(1 of 8 cases)" in rows["keydiff (global, tail)"][0].text


def test_names_say_what_differs() -> None:
    same = [record(), record(question="seen", observe="question")]
    assert Cells(same).names == ["capkv"]
    several = [record(), record(observe="probe"), record(allocation="uniform")]
    assert Cells(several).names == [
        "capkv (global, probe)", "capkv (global, tail)", "capkv (uniform)"
    ]  # fmt: skip


def test_labels_with_allocation_and_observer_are_one_method() -> None:
    labels = ("capkv@global", "capkv@uniform", "capkv@global+probe", "snapkv")
    hows = (("global", "tail"), ("uniform", "tail"), ("global", "probe"), ("uniform", "tail"))
    unseen = [
        record(method=label, allocation=allocation, observe=observe)
        for label, (allocation, observe) in zip(labels, hows, strict=True)
    ]
    seen = [
        replace(r, question="seen", observe=r.observe.replace("tail", "question")) for r in unseen
    ]
    cells = Cells([*unseen, *seen])
    assert cells.names == [
        "capkv (global, probe)", "capkv (global, tail)", "capkv (uniform)", "snapkv"
    ]  # fmt: skip
    assert set(cells.method.values()) == {"capkv", "snapkv"}
    assert {f.theirs for f in verdicts(cells)} == {"snapkv"}


def test_full_f16_is_known_from_the_others() -> None:
    records = [r for r in synthetic() if r.method != "full"]
    (_, grid), *_ = setting_grids(Cells(records))
    assert [s.full for s in grid.sections if s.title.startswith("recall, % ↑")] == [
        "100.0 with f16"
    ]  # fmt: skip


def test_tables_as_json() -> None:
    (table, *_) = json.loads(json.dumps(tables(synthetic())))
    assert table.keys() >= {"title", "label", "columns", "sections"}
    rows = dict(table["sections"][0]["rows"])
    assert "capkv" in " ".join(rows)
    assert any(cell["mark"] == "best" for row in rows.values() for cell in row)


def test_tables_for_pipes_are_plain() -> None:
    file = io.StringIO()
    print_tables(synthetic(), make_console(file))
    text = file.getvalue()
    assert "\x1b" not in text and max(map(len, text.splitlines())) <= 120
    assert re.search(r"keydiff \(global, tail\) +0\.\d+ \[0\.\d+, 0\.\d+\]\*", text)
    assert text.count("[") == text.count("]")  # nothing is cut off


def test_markdown_escapes_and_lines_up() -> None:
    records = [replace(r, model="a|b*c") for r in synthetic()]
    text = markdown(records)
    assert r"### a\|b\*c · streamed" in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in tables} == {4, 2}  # 2 shares; only full
    assert re.search(r"\| keydiff \(global, tail\) \| \*\*0\.\d+ \\\[", text)
    assert markdown(records, headline=True).count("###") == 1


def test_nothing_to_report() -> None:
    with pytest.raises(EvaluationError, match="no records"):
        markdown([])


# ---- findings and page -------------------------------------------------------------------------


def test_planted_loss_is_listed_and_no_other() -> None:
    found = [f for f in losses(Cells(synthetic())) if f.measure == KL]
    (loss,) = [f for f in found if f.theirs != "capkv:noise=1"]
    assert (loss.share, loss.ours, loss.theirs) == (0.05, "capkv", "keydiff")
    assert loss.comparison.value == pytest.approx(2.0, abs=0.05)
    assert loss.text.startswith("×2.0") or loss.text.startswith("×1.9")


def test_the_oracle_is_shown_and_no_rival() -> None:
    how: dict[str, Any] = dict(method="oracle", observe="what comes", value=1e-6)
    records = synthetic() + [
        record(case=f"doc-{i}", share=share, **how) for i in range(8) for share in (0.05, 0.25)
    ]
    cells = Cells(records)
    f16 = cells.settings[0]
    names = cells.names_in(f16, 0.05)
    assert names[-1] == "oracle"
    assert mark_best(cells, KL, f16, 0.05, names) == {"keydiff": "best"}
    assert "oracle" not in {finding.theirs for finding in losses(cells) + verdicts(cells)}
    assert "oracle" in markdown(records)


def test_verdicts_name_the_best_peer() -> None:
    found = {(f.share, f.measure): f for f in verdicts(Cells(synthetic()))}
    assert {k: f.theirs for k, f in found.items() if k[1] == KL} == {
        (0.05, KL): "keydiff", (0.25, KL): "snapkv",
    }  # fmt: skip
    assert found[0.25, KL].comparison.verdict == "better"
    assert (0.25, RECALL) in found


def test_tuning_is_no_evidence() -> None:
    tuning = [replace(r, split="tuning") for r in synthetic()]
    report = [replace(r, value=0.1) for r in synthetic() if r.metric == "kl"]
    assert losses(Cells([*tuning, *report])) == []


class Page(HTMLParser):
    """Checks that every element is closed, and keeps what the tests ask about."""

    VOID = frozenset({"meta", "br", "hr", "img", "link", "input", "path", "use"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open and self.open.pop() == tag

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("report")
    evil = "<script>alert(1)</script> & $x^$"
    records = synthetic(6, readings=("one-shot", "streamed"))
    records = [replace(r, case=f"{evil} {r.case}", model=f"{evil}.m") for r in records]
    Results(folder / "results.jsonl").append(records)
    return write_report(folder / "results.jsonl", folder / "out")


def test_page_is_whole_and_loads_nothing(report: Path) -> None:
    html = report.read_text(encoding="utf-8")
    page = Page(html)
    assert page.open == []
    assert not re.search(r"https?:|//\w|@import|src=", html)
    assert page.of("script") == page.of("link") == page.of("img") == []
    assert "&lt;script&gt;alert(1)" in html
    ids = [attrs["id"] for _, attrs in page.tags if attrs.get("id")]
    assert len(ids) == len(set(ids))
    for target in re.findall(r'(?:href="|url\()#([^")]+)', html):
        assert target in ids


def test_page_is_accessible(report: Path) -> None:
    page = Page(report.read_text(encoding="utf-8"))
    figures = page.of("svg")
    assert len(figures) >= 6
    assert all(f["role"] == "img" and f["aria-label"] for f in figures)
    assert len(page.of("table")) == len(page.of("caption"))
    assert page.of("html")[0]["lang"] == "en" and page.of("meta")[1]["name"] == "viewport"


def test_page_lists_the_planted_loss(report: Path) -> None:
    html = report.read_text(encoding="utf-8")
    section = html[html.index('id="losses"') : html.index('id="figures"')]
    row = (
        r'<th scope="row">5%</th><td>KL, nats ↓</td><td>capkv</td><td>keydiff</td><td>×(2\.0|1\.9)'
    )
    assert re.search(row, section)


def test_report_writes_its_numbers_and_figures(report: Path) -> None:
    with (report.parent / "results.csv").open(encoding="utf-8") as file:
        assert file.readline().startswith("model,split,task")
    svg = {path.stem for path in (report.parent / "figures").glob("*.svg")}
    assert {
        "pareto-kl-streamed-2048", "methods-recall", "streamed-kl", "depth-recall-1"
    } <= svg  # fmt: skip


def test_report_is_the_same_every_time(report: Path, tmp_path: Path) -> None:
    again = write_report(report.parent.parent / "results.jsonl", tmp_path)
    assert again.read_bytes() == report.read_bytes()


def test_missing_matplotlib_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Results(tmp_path / "results.jsonl").append([record()])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(EvaluationError, match=r'pip install "capkv-local\[eval\]"'):
        write_report(tmp_path / "results.jsonl", tmp_path / "out")


def test_report_of_one_record(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    Results(tmp_path / "results.jsonl").append([record()])
    html = write_report(tmp_path / "results.jsonl", tmp_path / "out").read_text(encoding="utf-8")
    assert "was not run together with another method" in html and Page(html).open == []


def test_no_results(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="has no records"):
        write_report(tmp_path / "none.jsonl", tmp_path / "out")
