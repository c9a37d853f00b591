"""Tasks x methods x budgets x readings x KV types, one after the other, going on where it stopped.

Order: all that needs one text is done while the text is in the cache; records are written as soon
as they are measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from capkv_local.errors import EvaluationError
from capkv_local.evaluate.plan import F16, Plan, Unit, check_shares, units_of
from capkv_local.evaluate.records import Key, Record, Results, key
from capkv_local.evaluate.retrieval import retrieve
from capkv_local.evaluate.session import F64, EvalSession, Prepared, answer_metrics
from capkv_local.evaluate.tasks import build_cases
from capkv_local.evaluate.tasks.base import Case
from capkv_local.llama import Llama
from capkv_local.llama.streaming import Observe

# Tokens of a continuation that are predicted.
N_NEXT = 96

Progress = Callable[[int, int, str], None]


def run(plan: Plan, results: Results, progress: Progress | None = None) -> None:
    """Measure everything of a plan that `results` does not hold yet.

    Parameters
    ----------
    progress
        Called with (steps done, steps in all, what is being done).

    Raises
    ------
    CapKVError
        A text, task, model or policy cannot be used; what was measured so far is in `results`.
    """
    check_shares(plan)
    done = results.done()
    texts = plan.read_texts()
    n_done = 0
    jobs: list[tuple[Path, int, list[tuple[Case, list[Unit]]]]] = []
    for model in plan.models:
        session = EvalSession(model, n_tokens=64, threads=plan.threads)  # only to count tokens
        try:
            for n_tokens in plan.n_tokens:
                cases = [
                    case
                    for task in plan.tasks
                    for case in build_cases(
                        task, plan.split, texts, session.tokenize, n_tokens, plan.n_cases, plan.seed
                    )
                ]
                jobs.append((model, n_tokens, [(case, units_of(plan, case)) for case in cases]))
        finally:
            session.close()
    n_steps = sum(len(units) for _, _, planned in jobs for _, units in planned)
    if n_steps == 0:
        raise EvaluationError("nothing to measure: no text is long enough, or nothing was asked")

    def tick(n: int, what: str) -> None:
        nonlocal n_done
        n_done += n
        if progress is not None:
            progress(n_done, n_steps, what)

    for model, n_tokens, planned in jobs:
        runner = _Runner(plan, model, n_tokens)
        try:
            for case, units in planned:
                todo = [u for u in units if not runner.is_done(case, u, done)]
                tick(len(units) - len(todo), f"{model.stem}: {case.task}, {case.name}")
                for unit, records in runner.measure(case, todo):
                    results.append(records)
                    tick(1, f"{model.stem}: {case.task}, {unit.method.label}, {unit.share:.4g}")
        finally:
            runner.close()


class _Runner:
    def __init__(self, plan: Plan, model: Path, n_tokens: int) -> None:
        self._plan = plan
        self._model = model
        self._n_tokens = n_tokens
        self._sessions: dict[str, EvalSession] = {}

    def close(self) -> None:
        for session in self._sessions.values():
            session.close()

    def _session(self, kv_type: str) -> EvalSession:
        if kv_type not in self._sessions:
            # The template's tokens and a retrieved text's passage marks come on top.
            n = self._n_tokens + 128
            self._sessions[kv_type] = EvalSession(
                self._model, n_tokens=n, kv_type=kv_type, threads=self._plan.threads
            )
        return self._sessions[kv_type]

    def is_done(self, case: Case, unit: Unit, done: dict[Key, set[str]]) -> bool:
        return all(
            done.get(key(self._record(case, unit, item)), set()) >= _metrics(item)
            for item in unit.items
        )

    def measure(self, case: Case, units: Sequence[Unit]) -> Iterator[tuple[Unit, list[Record]]]:
        """Measure what is asked for on one text."""
        if not units:
            return
        reference = self._session(F16)
        prepared = reference.prepare(case)
        prepared = replace(prepared, continuation=prepared.continuation[: N_NEXT + 1])
        reference.read(prepared)
        items = sorted({item for unit in units for item in unit.items})
        full = {item: _predict(reference, reference.full(), prepared, item) for item in items}
        was_read = {F16}
        for unit in units:
            started = time.perf_counter()
            session = self._session(unit.kv_type)
            if unit.kv_type not in was_read and unit.reading == "one-shot":
                session.read(prepared)
                was_read.add(unit.kv_type)
            llama = self._compress(session, prepared, case, unit)
            n_bytes = kept_bytes(llama)
            left = {item: _predict(session, llama, prepared, item) for item in unit.items}
            seconds = time.perf_counter() - started
            records: list[Record] = []
            for item in unit.items:
                _, wanted = _asked(prepared, item)
                values = answer_metrics(full[item], left[item], wanted)
                if item < 0:
                    values = {
                        "kl": values["kl"],
                        "top1": (_agreement(full[item], left[item]), 1.0),
                        "nll": _negated(values["logprob"]),
                    }
                base = self._record(case, unit, item)
                base = replace(base, kv_bytes=n_bytes, seconds=seconds / len(unit.items))
                records += [
                    replace(base, metric=name, value=value, full=whole)
                    for name, (value, whole) in values.items()
                ]
            yield unit, records

    def _compress(self, session: EvalSession, prepared: Prepared, case: Case, unit: Unit) -> Llama:
        method, n_cells = unit.method, int(unit.share * len(prepared.context))
        if method.is_full:
            return session.full()
        if method.is_oracle:
            given, wanted = _asked(prepared, unit.items[0])
            return session.foreseen(method.allocation, n_cells, [*given, *wanted[:-1]])
        question = prepared.asked[unit.items[0]] if unit.question == "seen" else []
        if method.policy is None:
            passages = retrieve(
                case.context,
                case.questions[unit.items[0]].prompt,
                session.tokenize,
                n_cells - len(prepared.opening),
            )
            return session.read_only(prepared.opening + session.tokenize(passages))
        observe: Observe = "question" if question else method.observe
        if unit.reading == "one-shot":
            return session.one_shot(method.policy, method.allocation, n_cells, observe, question)
        return session.streamed(
            prepared, method.policy, method.allocation, n_cells, observe, question
        )

    def _record(self, case: Case, unit: Unit, item: int) -> Record:
        """A record of an item without its figures."""
        question = case.questions[item] if item >= 0 else None
        method = unit.method
        observe: str = "question" if unit.question == "seen" else method.observe
        if method.is_full or method.is_retrieval:
            observe = ""
        elif method.is_oracle:
            observe = "what comes"
        return Record(
            model=self._model.stem,
            split=self._plan.split,
            task=case.task,
            case=case.name,
            item="" if question is None else question.id,
            kind="continuation" if question is None else question.kind,
            depth=None if question is None else question.depth,
            n_tokens=self._n_tokens,
            method=method.label,
            allocation=method.allocation,
            observe=observe,
            reading=unit.reading,
            question=unit.question,
            kv_type=unit.kv_type,
            share=unit.share,
            kv_bytes=0,
            seed=self._plan.seed,
            metric="",
            value=0.0,
            full=None,
            seconds=0.0,
        )


def kept_bytes(llama: Llama) -> int:
    """Bytes of the rows that are held, with 4 for the position of each."""
    info = llama._require_cache().kv.info()
    row = info.n_bytes_cell / info.n_heads
    return round(info.n_rows * (row + 4))


def _metrics(item: int) -> set[str]:
    return {"kl", "top1", "nll"} if item < 0 else {"kl", "exact", "accuracy", "logprob"}


def _asked(prepared: Prepared, item: int) -> tuple[list[int], list[int]]:
    """Tokens that are given, and those that are predicted."""
    if item < 0:
        return prepared.continuation[:1], prepared.continuation[1:]
    return prepared.asked[item] + prepared.lead[item], prepared.answer[item]


def _predict(session: EvalSession, llama: Llama, prepared: Prepared, item: int) -> F64:
    return session.log_probabilities(llama, *_asked(prepared, item))


def _agreement(full: F64, left: F64) -> float:
    return float((full.argmax(axis=-1) == left.argmax(axis=-1)).mean())


def _negated(pair: tuple[float, float | None]) -> tuple[float, float | None]:
    value, whole = pair
    return -value, None if whole is None else -whole
