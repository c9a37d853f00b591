"""Options from the command line, the environment and the configuration file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from capkv_local.cli.defaults import KEYS, variable
from tests.unit.fake_chat import FakeChat, Run

TXT = str(Path(__file__).parent.parent / "data" / "harbour.txt")


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "config.toml"
    monkeypatch.setenv("CAPKV_CONFIG", str(path))
    return path


def opened(fake: type[FakeChat]) -> dict[str, Any]:
    return dict(fake.calls)["open"]  # type: ignore[no-any-return]


@pytest.mark.parametrize("verb", ["ask", "chat", "snapshot"])
def test_command_line_before_environment_before_file(
    fake: type[FakeChat],
    run: Run,
    config: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    verb: str,
) -> None:
    config.write_text("n-ctx = 111\nthreads = 1\nroom = 11\ncache = false\n")
    monkeypatch.setenv("CAPKV_N_CTX", "222")
    monkeypatch.setenv("CAPKV_THREADS", "2")
    output = ["-o", str(tmp_path / "out.capkv")] if verb == "snapshot" else []
    question = ["why?"] if verb == "ask" else []
    result = run(verb, TXT, *question, *output, "--n-ctx", "333", stdin="")
    assert result.exit_code == 0, result.output
    given = opened(fake)
    assert (given["n_ctx"], given["n_threads"], given["kv_room"]) == (333, 2, 11)


@pytest.mark.parametrize(
    ("text", "value"), [("0.25", 0.25), ("2048", 2048), ('"512MiB"', "512MiB"), ("1.0", 1.0)]
)
def test_a_budget_in_the_file_means_what_it_means_when_typed(
    fake: type[FakeChat], run: Run, config: Path, text: str, value: Any
) -> None:
    config.write_text(f"budget = {text}\n")
    assert run("ask", TXT, "why?").exit_code == 0
    assert opened(fake)["kv_budget"] == value
    assert type(opened(fake)["kv_budget"]) is type(value)


def test_a_model_in_the_file_lies_beside_it(fake: type[FakeChat], run: Run, config: Path) -> None:
    config.write_text('model = "small.gguf"\n')
    run("ask", TXT, "why?")
    assert opened(fake)["model"] == config.parent / "small.gguf"


def test_defaults_leave_a_saved_session_as_it_is(
    fake: type[FakeChat], run: Run, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.write_text('type-k = "q8_0"\nbudget = 512\nthreads = 3\nmodel = "other.gguf"\n')
    monkeypatch.setenv("CAPKV_N_CTX", "4096")
    session = tmp_path / "s.capkv"
    session.touch()
    assert run("ask", str(session), "why?", "--policy", "knorm").exit_code == 0
    expected = {"kv_policy": "knorm", "n_threads": 3, "verbose": False}
    assert opened(fake) == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("bugdet = 5", "Unknown key 'bugdet': did you mean 'budget'?"),
        ("n_ctx = 5", "did you mean 'n-ctx'?"),
        ("[chat]\nbudget = 5", "Unknown key 'chat'"),
        ('n-ctx = "4096"', "n-ctx = '4096': it must be a whole number."),
        ("n-ctx = 0", "n-ctx = 0: 0 is not in the range x>=1."),
        ("threads = true", "threads = True: it must be a whole number."),
        ("cache = 1", "cache = 1: it must be true or false."),
        ('type-k = "q9"', "type-k = 'q9': 'q9' is not one of"),
        ("model = 3", "model = 3: it must be a text."),
        ("budget = [1]", "budget = [1]: it must be a number or a text."),
        ("budget = ", "is no TOML: "),
        (b"\xff", "it is not UTF-8"),
        (None, "there is no configuration file"),
    ],
)
def test_a_wrong_file_is_one_line_and_exits_2(
    fake: type[FakeChat], run: Run, config: Path, text: str | bytes | None, words: str
) -> None:
    if text is not None:
        config.write_bytes(text if isinstance(text, bytes) else text.encode())
    result = run("chat", TXT)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("capkv: error: ") and result.stderr.count("\n") == 1
    assert words in result.stderr and str(config) in result.stderr
    assert not fake.calls
    assert run("chat", "--help").exit_code == 0  # help helps, whatever is configured


def test_a_wrong_variable_is_named(
    fake: type[FakeChat], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CAPKV_N_CTX", "many")
    result = run("ask", TXT, "why?")
    assert result.exit_code == 2
    assert "CAPKV_N_CTX" in result.stderr and "'many'" in result.stderr
    assert not fake.calls
    shown = run("config")
    assert shown.exit_code == 2
    assert "Usage: capkv config" in shown.stderr and "CAPKV_N_CTX" in shown.stderr


def test_doctor_shows_the_model_and_what_is_wrong(run: Run, config: Path) -> None:
    config.write_text('model = "small.gguf"\n')
    report = json.loads(run("doctor", "--json").stdout)
    assert report["config"] == str(config)
    assert report["default_model"] == str(config.parent / "small.gguf")
    config.write_text("modle = 1\n")
    result = run("doctor", "--json")
    assert result.exit_code == 1
    assert "Unknown key 'modle'" in json.loads(result.stdout)["problems"][-1]


def test_config_says_what_is_in_force_and_where_from(
    run: Run, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.write_text('budget = 0.5\ntype-k = "q8_0"\n')
    monkeypatch.setenv("CAPKV_TYPE_K", "q4_0")
    report = json.loads(run("config", "--json").stdout)
    assert (report["file"], report["exists"]) == (str(config), True)
    options = report["options"]
    assert set(options) == set(KEYS)
    assert options["budget"] == {"value": 0.5, "from": "file"}
    assert options["type-k"] == {"value": "q4_0", "from": "environment"}
    assert options["policy"] == {"value": "capkv", "from": "built in"}
    rows = [line.split() for line in run("config").stdout.splitlines()]
    assert ["budget", "0.5", "file"] in rows
    assert ["type-k", "q4_0", "CAPKV_TYPE_K"] in rows
    assert ["history", "no"] in rows


def test_every_key_is_documented() -> None:
    page = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text()
    for key in KEYS:
        assert f"`{key}`" in page and f"`{variable(key)}`" in page
