"""What a report says about planted results: tables, losses, verdicts, page."""

from __future__ import annotations

import io
import json
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from capkv_local.errors import EvaluationError
from capkv_local.evaluate.records import Results
from capkv_local.evaluate.report import make_console, markdown, print_tables, write_report
from capkv_local.evaluate.report.cells import Cells
from capkv_local.evaluate.report.findings import losses, verdicts
from capkv_local.evaluate.report.grid import headline_grid, mark_best, setting_grids
from capkv_local.evaluate.report.measures import KL, RECALL
from capkv_local.evaluate.report.table import tables
from tests.unit.planted import METHODS, record, synthetic

# ---- tables ------------------------------------------------------------------------------------


def test_best_and_as_good_are_marked() -> None:
    cells = Cells(synthetic())
    f16 = cells.settings[0]
    marks = {share: mark_best(cells, KL, f16, share, cells.names_in(f16)) for share in (0.05, 0.25)}
    assert marks[0.05] == {"keydiff": "best"}
    assert set(marks[0.25]) == {"capkv", "capkv:noise=1"}
    assert sorted(marks[0.25].values()) == ["best", "tied"]


def test_the_first_table_shows_what_was_run_the_usual_way() -> None:
    # Longer texts, and other shares, that were only evicted once.
    extra = [
        replace(r, n_tokens=4096, reading="one-shot", share=share)
        for r in synthetic()
        for share in (0.5, 0.125)
    ]
    grid = headline_grid(Cells(synthetic() + extra))
    assert grid.title.startswith("5% of the cells kept · streamed")
    assert [section.heading for section in grid.sections] == ["tiny, 2,048 tokens"]
    assert {name for name, row in grid.sections[0].rows if any(cell.text for cell in row)} == set(
        METHODS
    )


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
