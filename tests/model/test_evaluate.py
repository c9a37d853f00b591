"""The evaluation on the real model: what it measures, and that a stopped run goes on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from capkv_local.errors import EvaluationError
from capkv_local.evaluate.corpus import split_of
from capkv_local.evaluate.methods import parse_method
from capkv_local.evaluate.plan import Plan
from capkv_local.evaluate.records import Record, Results
from capkv_local.evaluate.run import run

LICENCE = Path(__file__).parent.parent / "data" / "licence.txt"


@pytest.fixture(scope="module")
def plan(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    folder = tmp_path_factory.mktemp("texts")
    name = next(name for i in range(9) if split_of(name := f"licence{i}.txt") == "tuning")
    (folder / name).write_bytes(LICENCE.read_bytes())
    return Plan(
        texts=folder,
        models=(model_path,),
        methods=tuple(map(parse_method, ("capkv+probe", "snapkv", "random"))),
        shares=(0.5,),
        n_tokens=(600,),
        n_cases=1,
        split="tuning",
    )


def figures(records: list[Record]) -> dict[Any, float]:
    return {
        (r.method, r.task, r.item, r.reading, r.question, r.share, r.kv_type, r.metric): r.value
        for r in records
    }


def of(records: list[Record], **wanted: Any) -> list[Record]:
    return [r for r in records if all(getattr(r, k) == v for k, v in wanted.items())]


def test_a_stopped_run_goes_on_to_the_same_figures(plan: Plan, tmp_path: Path) -> None:
    whole = Results(tmp_path / "whole.jsonl")
    run(plan, whole)
    expected = figures(whole.read().records)
    # continuation: 3 metrics; 8 questions: 4 each; 3 methods
    assert len(expected) == 3 * (3 + 8 * 4)

    class Stop(Exception):
        pass

    def stop_after_two(done: int, total: int, what: str) -> None:
        if done == 2:
            raise Stop

    stopped = Results(tmp_path / "stopped.jsonl")
    with pytest.raises(Stop):
        run(plan, stopped, stop_after_two)
    assert 0 < len(stopped.read().records) < len(expected)
    steps: list[tuple[int, int]] = []
    run(plan, stopped, lambda done, total, what: steps.append((done, total)))
    assert figures(stopped.read().records) == expected
    assert steps[-1] == (6, 6)

    size = stopped.path.stat().st_size
    run(plan, stopped)
    assert stopped.path.stat().st_size == size


def test_what_is_kept_whole_loses_nothing_and_chance_loses_most(plan: Plan, tmp_path: Path) -> None:
    results = Results(tmp_path / "r.jsonl")
    methods = tuple(map(parse_method, ("capkv+probe", "random")))
    run(replace(plan, methods=methods, shares=(0.25, 0.999)), results)
    records = results.read().records
    kl = {(r.method, r.share): r.value for r in of(records, metric="kl", task="continuation")}
    # A cell of 600 less, in heads that hardly look at it.
    assert kl["capkv+probe", 0.999] < 0.01
    assert kl["capkv+probe", 0.25] < kl["random", 0.25]
    for record in records:
        assert record.kv_bytes < record.share * 640 * 30 * 3 * (2 * 64 * 2 + 4)


def test_streamed_seen_and_retrieved(plan: Plan, tmp_path: Path) -> None:
    results = Results(tmp_path / "r.jsonl")
    run(
        replace(
            plan,
            methods=tuple(
                map(parse_method, ("capkv", "capkv+probe", "bm25"))
            ),  # a probe hears no question
            tasks=("facts",),
            readings=("one-shot", "streamed"),
            questions=("seen",),
            n_seen=2,
            shares=(0.4,),
        ),
        results,
    )
    records = results.read().records
    assert {(r.method, r.reading, r.observe) for r in records} == {
        ("capkv", "one-shot", "question"),
        ("capkv", "streamed", "question"),
        ("bm25", "one-shot", ""),
    }
    assert len({r.item for r in records}) == 2
    # The passage with the fact is among 40% of the text: as good as the full cache or better.
    for record in of(records, method="bm25", metric="exact"):
        assert record.full is not None
        assert record.value >= record.full


def test_who_knows_what_comes_loses_least(plan: Plan, tmp_path: Path) -> None:
    results = Results(tmp_path / "r.jsonl")
    methods = tuple(map(parse_method, ("oracle", "capkv+probe", "random")))
    # It evicts when all is there, and is the same whether questions are known or not.
    ways = dict(readings=("one-shot", "streamed"), questions=("unseen", "seen"))
    run(replace(plan, methods=methods[:1], shares=(0.25,), n_seen=2, **ways), results)  # type: ignore[arg-type]
    run(replace(plan, methods=methods[1:], shares=(0.25,)), results)
    records = of(results.read().records, metric="kl")
    oracle = of(records, method="oracle")
    assert {(r.reading, r.allocation, r.observe) for r in oracle} == {
        ("one-shot", "global", "what comes")
    }
    unseen, seen = ({r.item: r.value for r in of(oracle, question=q)} for q in ("unseen", "seen"))
    assert len(unseen) == 1 + 8
    assert len(seen) == 2 and seen.items() <= unseen.items()
    for method in ("capkv+probe", "random"):
        lost = {r.item: r.value for r in of(records, method=method)}
        assert sum(unseen.values()) < sum(lost.values())
        assert unseen[""] < lost[""]  # the continuation


def test_a_quantised_cache_is_compared_with_f16(plan: Plan, tmp_path: Path) -> None:
    results = Results(tmp_path / "r.jsonl")
    methods = tuple(map(parse_method, ("full", "snapkv")))
    run(replace(plan, methods=methods, tasks=("continuation",), kv_types=("q8_0", "q4_0")), results)
    records = of(results.read().records, metric="kl")
    kl = {(r.method, r.kv_type): r.value for r in records}
    assert 0 < kl["full", "q8_0"] < kl["full", "q4_0"]
    size = {(r.method, r.kv_type): r.kv_bytes for r in records}
    assert size["snapkv", "q8_0"] < size["full", "q8_0"] * 0.51
    assert size["full", "q4_0"] < size["full", "q8_0"] * 0.6


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("snapkv@everywhere", "everywhere"),
        ("snapkv+question", r"\+probe or \+tail"),
        ("kvzip+tail", r"needs \+probe"),
        ("bm25@global", "no cells to allocate"),
        ("oracle+probe", "observes nothing"),
        ("oracle:n_sinks=2", "no fields"),
        ("oracle@everywhere", "everywhere"),
        ("capkv:noise", "name=value"),
        ("no method", "is no method"),
        ("snapkw", "snapkv"),
    ],
)
def test_a_method_that_cannot_be_says_why(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_method(text)


def test_too_few_cells_are_told_before_anything_is_measured(plan: Plan, tmp_path: Path) -> None:
    results = Results(tmp_path / "r.jsonl")
    with pytest.raises(EvaluationError, match=r"30 cells, but 'snapkv' needs 37.*--tokens"):
        run(replace(plan, methods=plan.methods[1:], shares=(0.5, 0.05)), results)
    assert not results.path.exists()


def test_nothing_to_measure_is_an_error(plan: Plan, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError):
        run(replace(plan, n_tokens=(100_000,)), Results(tmp_path / "r.jsonl"))
