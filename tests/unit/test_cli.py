"""The command line, with a stand-in for the model: what it prints, passes on and exits with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from capkv_local.cli import chat as chat_verb
from capkv_local.cli.common import budget_value
from capkv_local.cli.display import count, duration, progress_text, size, stream_answer
from capkv_local.errors import NativeBuildMissing
from tests.unit.fake_chat import FakeChat, Run

DATA = Path(__file__).parent.parent / "data"
TXT, PDF = str(DATA / "harbour.txt"), str(DATA / "harbour.pdf")


# ---- the group ---------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["chat", "ask", "plan", "doctor"])
def test_help_has_an_example(run: Run, verb: str) -> None:
    result = run(verb, "--help")
    assert result.exit_code == 0
    assert f"Examples:\n    capkv {verb}" in result.stdout


def test_version(run: Run) -> None:
    from capkv_local import __version__

    assert run("--version").stdout == f"capkv {__version__}\n"


def test_runs_as_a_module_and_loads_nothing_heavy() -> None:
    code = (
        "import sys, capkv_local.cli.__main__\n"
        "heavy = {'numpy', 'rich', 'prompt_toolkit', 'pypdfium2', 'bs4', 'llama_cpp',"
        " 'charset_normalizer'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
    done = subprocess.run(
        [sys.executable, "-m", "capkv_local.cli", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("Usage: capkv [OPTIONS]")


# ---- failures ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "args",
    [
        ("chat",),
        ("ask", TXT),
        ("nothing",),
        ("ask", TXT, PDF),  # the question was forgotten
        ("ask", TXT, " "),
        ("ask", "-", "-", "why?"),
        ("ask", "a.capkv", "b.capkv", "why?"),
        ("chat", TXT, "--n-ctx", "many"),
        ("chat", TXT, "--type-k", "q9"),
    ],
)
def test_wrong_usage_exits_2(fake: type[FakeChat], run: Run, args: tuple[str, ...]) -> None:
    result = run(*args)
    assert result.exit_code == 2
    assert "Error: " in result.stderr
    assert not fake.calls


@pytest.mark.parametrize("verb", ["chat", "ask"])
def test_failure_is_one_line_and_exits_1(fake: type[FakeChat], run: Run, verb: str) -> None:
    question = ["why?"] if verb == "ask" else []
    result = run(verb, "nowhere.txt", *question)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("capkv: error: there is no file 'nowhere.txt'")
    assert result.stderr.count("\n") == 1
    assert not fake.calls  # no model was loaded for nothing

    result = run(verb, TXT, *question, "--model", "missing.gguf")
    assert result.exit_code == 1
    assert result.stderr == "capkv: error: there is no model 'missing.gguf'; check --model\n"


def test_unexpected_error_is_one_line_too_and_debug_shows_the_trace(
    fake: type[FakeChat], run: Run
) -> None:
    result = run("ask", TXT, "why?", "--model", "broken.gguf")
    assert result.exit_code == 1
    assert result.stderr == "capkv: error: internal error: ZeroDivisionError: oops (see --debug)\n"
    result = run("ask", TXT, "why?", "--model", "broken.gguf", "--debug")
    assert result.exit_code == 1
    assert "Traceback" in result.stderr and 'ZeroDivisionError("oops")' in result.stderr


def test_missing_session(fake: type[FakeChat], run: Run) -> None:
    result = run("chat", "gone.capkv")
    assert result.exit_code == 1
    assert "no saved session 'gone.capkv'" in result.stderr


# ---- options -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2048", 2048),
        ("0.25", 0.25),
        ("1.0", 1.0),
        ("512MiB", "512MiB"),
        (" 25% ", "25%"),
        ("auto", "auto"),
        ("x", "x"),
    ],
)
def test_budget_value(text: str, value: float | str) -> None:
    parsed = budget_value(text)
    assert parsed == value
    assert type(parsed) is type(value)


def test_options_reach_the_session(fake: type[FakeChat], run: Run) -> None:
    run("ask", TXT, "why?")
    # Defaults are DocumentChat's, but for the probe: the question is known.
    assert fake.calls[0] == ("open", {"verbose": False, "kv_observe": "tail"})
    fake.calls.clear()
    options = "--model m.gguf --policy knorm --budget 25% --n-ctx 999 --threads 3 --gpu-layers -1"
    options += " --room 512 --rpc desk:50052,10.0.0.2"
    more = "--type-k Q8_0 --type-v f16 --seed 7 --allocation uniform --observe probe -v"
    run("ask", TXT, "why?", *options.split(), *more.split())
    expected = {
        "model": Path("m.gguf"),
        "kv_observe": "probe",
        "kv_policy": "knorm",
        "kv_budget": "25%",
        "kv_allocation": "uniform",
        "n_ctx": 999,
        "kv_room": 512,
        "n_threads": 3,
        "n_gpu_layers": -1,
        "rpc_servers": "desk:50052,10.0.0.2",
        "type_k": "q8_0",
        "type_v": "f16",
        "seed": 7,
        "verbose": True,
    }
    assert fake.calls[0] == ("open", expected)


# ---- ask ---------------------------------------------------------------------------------------


def test_ask_prints_the_answer_only(fake: type[FakeChat], run: Run) -> None:
    result = run("ask", TXT, PDF, "What is the code?", "--max-tokens", "9")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "The code is 48213.\n", "")
    assert fake.calls[1:] == [
        ("ingest", ["harbour.txt", "harbour.pdf"]),
        ("question", "What is the code?"),
        ("ask", ("What is the code?", 9)),
        ("close", None),
    ]


def test_ask_reads_standard_input(fake: type[FakeChat], run: Run) -> None:
    assert run("ask", "-", "why?", stdin="a document").exit_code == 0
    assert ("ingest", ["stdin"]) in fake.calls
    result = run("ask", "-", "why?", stdin=b"\0\1\2")
    assert result.exit_code == 1 and "'stdin' is binary" in result.stderr


def test_ask_json(fake: type[FakeChat], run: Run) -> None:
    result = run("ask", TXT, "why?", "--json")
    answer = json.loads(result.stdout)
    keys = ["answer", "model", "policy", "allocation", "budget", "tokens", "seconds", "kv"]
    assert list(answer) == keys
    assert answer["answer"] == "The code is 48213."
    assert answer["model"] == "/models/small.gguf"
    assert (answer["policy"], answer["budget"], answer["tokens"]) == ("capkv", 2048, 1000)
    assert answer["seconds"].keys() >= {"load", "read", "answer", "decode", "score", "evict"}
    assert answer["kv"]["cells"] == 64 and answer["kv"]["bytes_full"] == 1024000


def test_ask_cites_beside_the_answer(fake: type[FakeChat], run: Run) -> None:
    result = run("ask", TXT, "why?", "--cite")
    assert (result.exit_code, result.stdout) == (0, "The code is 48213.\n")
    # What a document is called must not move the cursor either.
    assert result.stderr == '[1] a[2J.pdf, p. 3: "The code is 48213."\n'
    citations = json.loads(run("ask", TXT, "why?", "--cite", "--json").stdout)["citations"]
    assert [(c["page"], c["share"]) for c in citations] == [([3, 3], 0.5)]
    fake.stands_out = False
    assert run("ask", TXT, "why?", "--cite").stderr == "(no passage stands out)\n"
    assert json.loads(run("ask", TXT, "why?", "--cite", "--json").stdout)["citations"] == []


def test_chat_cites_when_told_to(fake: type[FakeChat], run: Run) -> None:
    result = run("chat", TXT, stdin="why?\n/cite on\nwhy?\n/cite off\nwhy?\n")
    assert result.stderr.count("[1]") == 1
    assert "cite: on" in result.stdout and "cite: off" in result.stdout
    assert run("chat", TXT, "--cite", stdin="why?\nwhy?\n").stderr.count("[1]") == 2


def test_ask_continues_a_session(fake: type[FakeChat], run: Run, tmp_path: Path) -> None:
    session = tmp_path / "s.capkv"
    session.touch()
    assert run("ask", str(session), "why?").exit_code == 0
    assert fake.calls[0] == ("load", session)
    assert "ingest" not in dict(fake.calls)


@pytest.mark.parametrize("during", ["ingest", "answer"])
def test_ask_stopped_exits_130(fake: type[FakeChat], run: Run, during: str) -> None:
    fake.interrupt_ingest_at = 300 if during == "ingest" else None
    fake.interrupt_answer = during == "answer"
    result = run("ask", TXT, "why?", "--json")
    assert (result.exit_code, result.stdout) == (130, "")
    assert result.stderr.endswith("capkv: stopped\n")
    assert fake.calls[-1] == ("close", None)


# ---- chat --------------------------------------------------------------------------------------


def test_chat_answers_lines_from_a_pipe(fake: type[FakeChat], run: Run) -> None:
    result = run("chat", TXT, stdin="first?\n\n  second?  \n")
    assert result.exit_code == 0
    assert result.stdout == 2 * "The code is 48213.\n\n"
    asked = [value for name, value in fake.calls if name == "ask"]
    assert asked == [("first?", 512), ("second?", 512)]
    assert ("question", None) in fake.calls
    lines = result.stderr.splitlines()
    assert lines[0] == "reading: 100/1,000 tokens, 100/s, 9.0 s left, KV 64.0 KiB, RAM 1.0 GiB"
    assert lines[-1].startswith("read harbour.txt: 1,000 tokens in 10 s, 100/s; 64 cells kept")


def test_chat_can_drop_every_turn(fake: type[FakeChat], run: Run) -> None:
    result = run("chat", TXT, "--forget", stdin="why?\n")
    assert result.exit_code == 0 and "48213" in result.stdout
    assert ("keep", False) in fake.calls


def test_chat_keeps_what_was_read_before_ctrl_c(fake: type[FakeChat], run: Run) -> None:
    fake.interrupt_ingest_at = 400
    result = run("chat", TXT, stdin="why?\n")
    assert result.exit_code == 0
    assert "stopped after 400 of 1,000 tokens: answers know only this part" in result.stderr
    assert "48213" in result.stdout


def test_chat_stopped_before_anything_was_read(fake: type[FakeChat], run: Run) -> None:
    fake.interrupt_ingest_at = 0
    assert run("chat", TXT, stdin="why?\n").exit_code == 130


def test_chat_ctrl_c_stops_the_answer_only(fake: type[FakeChat], run: Run) -> None:
    fake.interrupt_answer = True
    result = run("chat", TXT, stdin="one?\ntwo?\n")
    assert result.exit_code == 0
    assert result.stderr.count("(stopped)") == 2


def test_chat_commands(fake: type[FakeChat], run: Run, tmp_path: Path) -> None:
    target = tmp_path / "my session"
    lines = ["/stats", "/budget 64", "/policy knorm", "/allocation uniform", f"/save {target}"]
    lines += ["/keep", "/keep off", "/keep on", "/forget", "/help", "/quit", "why?"]
    result = run("chat", TXT, stdin="\n".join(lines))
    assert result.exit_code == 0
    assert "KV memory     64.0 KiB, 94% less than the 1000.0 KiB without eviction" in result.stdout
    assert "evictions     3 (936 cells evicted)" in result.stdout
    assert "64 of 576 per head (30 to 120)" in result.stdout
    assert "document      50 of them, of 900 tokens" in result.stdout
    assert "conversation  14 of 526 beside the document" in result.stdout
    assert "copy          4.0 KiB, to go back to the document alone" in result.stdout
    assert result.stdout.count("keep: on, ") == 2 and "keep: off, " in result.stdout
    assert [call for call in fake.calls if call[0] in ("keep", "forget")] == [
        ("keep", False),
        ("keep", True),
        ("forget", None),
    ]
    assert "budget: 64 cells per head, global" in result.stdout
    assert "allocation: uniform" in result.stdout
    assert "policy: knorm" in result.stdout
    saved = tmp_path / "my session.capkv"  # the ending is added: chat knows sessions by it
    assert saved.read_bytes() == b"session"
    assert f"go on with: capkv chat '{saved}'" in result.stdout
    assert "/budget N" in result.stdout
    assert "ask" not in dict(fake.calls)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/stat", "there is no command /stat; did you mean /stats?"),
        ("/quti", "did you mean /quit?"),
        ("/", "there is no command /; did you mean"),
        ("/budget lots", "error: the budget 'lots' cannot be read; give cells\n"),
        ("/policy norm", "did you mean 'knorm'?"),
        ("/save", "/save needs a file name"),
        ("/save .", "is a folder; name a file in it"),
        ("/keep maybe", "error: /keep maybe: it is either on or off\n"),
        ("/cite maybe", "error: /cite maybe: it is either on or off\n"),
    ],
)
def test_chat_goes_on_after_a_wrong_command(
    fake: type[FakeChat], run: Run, line: str, words: str
) -> None:
    result = run("chat", TXT, stdin=f"{line}\nwhy?\n")
    assert words in result.stderr
    assert "48213" in result.stdout
    assert result.exit_code == 1  # a script learns that something failed


def test_chat_opens_a_session_and_reads_more(
    fake: type[FakeChat], run: Run, tmp_path: Path
) -> None:
    session = tmp_path / "s.capkv"
    session.touch()
    run("chat", TXT, str(session), stdin="why?\n")
    assert fake.calls[0] == ("load", session)
    assert ("ingest", ["harbour.txt"]) in fake.calls


@pytest.mark.parametrize(
    ("lines", "n_asked"),
    [
        (["why?", KeyboardInterrupt, KeyboardInterrupt, "never read"], 1),
        (["why?", KeyboardInterrupt, "why?", KeyboardInterrupt, EOFError], 2),
    ],
)
def test_ctrl_c_twice_at_the_prompt_quits(
    fake: type[FakeChat], capsys: pytest.CaptureFixture[str], lines: list[Any], n_asked: int
) -> None:
    queue = iter(lines)

    def read_line() -> str:
        line = next(queue)
        if isinstance(line, str):
            return line
        raise line

    chat_verb.Conversation(fake(), read_line).run(interactive=True)
    assert [name for name, _ in fake.calls].count("ask") == n_asked
    assert "Ctrl-C again" in capsys.readouterr().err


# ---- doctor ------------------------------------------------------------------------------------


def fake_doctor(monkeypatch: pytest.MonkeyPatch, answer: dict[str, Any] | Exception) -> None:
    def doctor() -> dict[str, Any]:
        if isinstance(answer, Exception):
            raise answer
        return answer

    module = types.ModuleType("capkv_local.devices.doctor")
    module.doctor = doctor  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "capkv_local.devices.doctor", module)
    monkeypatch.setattr("capkv_local.devices.doctor", module, raising=False)


NATIVE = {
    "library": "/lib/libllama.so",
    "abi": 1,
    "features": ["evict", "observe"],
    "devices": [{"name": "CPU", "description": "Some processor"}],
    "system_info": "CPU : AVX2 = 1 |",
    "patched": True,
    "problems": [],
}


def test_doctor_all_well(monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    fake_doctor(monkeypatch, NATIVE)
    result = run("doctor")
    assert result.exit_code == 0
    rows = dict(line.split(maxsplit=1) for line in result.stdout.splitlines() if "  " in line)
    assert rows["llama.cpp"] == "/lib/libllama.so"
    assert rows["features"] == "evict, observe"
    assert rows["devices"] == "CPU (Some processor)"
    assert "knorm" in result.stdout
    assert result.stdout.endswith("\nall well\n")

    report = json.loads(run("doctor", "--json").stdout)
    assert report["problems"] == []
    assert report["versions"].keys() == {"capkv-local", "llama-cpp-python", "python"}
    assert report["devices"] == NATIVE["devices"]


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (
            NATIVE | {"patched": False, "problems": ["it lacks llama_memory_evict"]},
            "it lacks llama_memory_evict",
        ),
        (NATIVE | {"patched": False}, "/lib/libllama.so is a stock build that cannot evict"),
        (NativeBuildMissing("it lacks\nthe functions"), "cannot be loaded: it lacks the functions"),
        (ModuleNotFoundError("No module named 'llama_cpp'"), "No module named 'llama_cpp'"),
        (OSError("libllama.so: wrong ELF class"), "wrong ELF class"),
    ],
)
def test_doctor_says_what_is_wrong(
    monkeypatch: pytest.MonkeyPatch, run: Run, answer: Any, words: str
) -> None:
    fake_doctor(monkeypatch, answer)
    result = run("doctor")
    assert result.exit_code == 1
    (problem,) = [line for line in result.stdout.splitlines() if line.startswith("problem: ")]
    assert words in problem
    result = run("doctor", "--json")
    assert result.exit_code == 1
    assert words in json.loads(result.stdout)["problems"][0]


# ---- display -----------------------------------------------------------------------------------


def test_numbers() -> None:
    assert (count(1, "cell"), count(2048, "cell")) == ("1 cell", "2,048 cells")
    sizes = [0, 1023, 1024, 56 << 20, (1 << 30) - 1, 3 << 40]
    assert [size(n) for n in sizes] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "56.0 MiB",
        "1.0 GiB",
        "3072.0 GiB",
    ]
    times = [0, 0.84, 9.97, 59.4, 59.6, 136, 3599.7, 3720]
    assert [duration(s) for s in times] == [
        "0.0 s",
        "0.8 s",
        "10 s",
        "59 s",
        "1 min 00 s",
        "2 min 16 s",
        "1 h 00 min",
        "1 h 02 min",
    ]


@pytest.mark.parametrize(
    ("done", "total", "estimated", "shown"),
    [
        (0, 1234, True, "counting: 1,234 tokens so far, RAM 2.0 MiB"),
        (500, 1000, False, "500/1,000 tokens, 50/s, 10 s left, KV 1.0 KiB, RAM 2.0 MiB"),
        (500, 1000, True, "500/~1,000 tokens, 50/s, ~10 s left, KV 1.0 KiB, RAM 2.0 MiB"),
        (500, None, True, "500 tokens, 50/s, KV 1.0 KiB, RAM 2.0 MiB"),  # a pipe
    ],
)
def test_progress(done: int, total: int | None, estimated: bool, shown: str) -> None:
    state = {"seconds": 10.0, "n_cells": 64, "kv_bytes": 1024, "rss_bytes": 2 << 20}
    progress = types.SimpleNamespace(done=done, total=total, estimated=estimated, **state)
    assert progress_text(progress) == shown  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("pieces", "shown"),
    [
        ([], "\n"),
        ([" ", "\n"], "\n"),
        (["\n\n a", " ", "\n", "b ", " "], "a \nb\n"),
        (["\x1b[31mred\x1b[0m\tx\r\x07\x9b"], "[31mred[0m\tx\n"),  # a terminal must not obey it
    ],
)
def test_stream_answer(capsys: pytest.CaptureFixture[str], pieces: list[str], shown: str) -> None:
    assert stream_answer(pieces) == "".join(pieces).strip()
    assert capsys.readouterr().out == shown


def test_answer_survives_a_narrow_encoding() -> None:
    code = (
        "from capkv_local.cli.guard import tolerant_streams\n"
        "from capkv_local.cli.display import stream_answer\n"
        "tolerant_streams(); stream_answer(['5 \\u20ac'])"
    )
    environment = os.environ | {"PYTHONIOENCODING": "latin-1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, env=environment, check=True
    )
    assert done.stdout.strip() == b"5 ?"


@pytest.mark.parametrize(
    ("n_tokens", "evictions", "text"),
    [
        (900, 0, "evictions    none since it was opened"),
        (64, 0, "evictions    0 (0 cells evicted)"),
    ],
)
def test_stats_of_an_opened_session(n_tokens: int, evictions: int, text: str) -> None:
    from capkv_local.cache.stats import KVCacheStats
    from capkv_local.cli.display import stats_text

    stats = KVCacheStats(
        "capkv", "global", 64, n_tokens, 64, 576, (30, 120), 65536, 1024000, evictions=evictions
    )
    assert text in stats_text(stats).splitlines()
