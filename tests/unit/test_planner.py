"""What fits, from the head of a model alone: files without weights, llama.cpp's own sizes."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import psutil
import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

from capkv_local.budget.parse import parse_budget, parse_memory
from capkv_local.cli import main
from capkv_local.errors import BudgetError
from capkv_local.models.header import ModelHeader
from capkv_local.plan.memory import available_memory
from capkv_local.plan.planner import STEP, Planner, Settings
from capkv_local.policies import get_policy
from tests.model import sparse, tiny

GIB = 2**30

Plan = Callable[..., Result]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("heads")


@pytest.fixture(scope="module")
def large(folder: Path) -> tuple[Path, int]:
    """An 8B model and the bytes of its weights."""
    path = folder / "8b.gguf"
    return path, sparse.llama_8b(path)


@pytest.fixture(scope="module")
def small(folder: Path) -> Path:
    return tiny.llama(folder / "small.gguf")


@pytest.fixture(scope="module")
def planner(small: Path) -> Iterator[Planner]:
    chat = Settings(4096).with_policy(get_policy("capkv"), probe=True)
    with ModelHeader(small) as header:
        yield Planner(header, chat, program=0)


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch) -> Plan:
    class Small(psutil.Process):
        """The program as it is when it only plans: behind other tests this one is larger."""

        def memory_info(self) -> Any:
            return super().memory_info()._replace(rss=100 << 20)

    monkeypatch.setattr(psutil, "Process", Small)

    def invoke(*args: str | Path) -> Result:
        return CliRunner().invoke(main, ["plan", *map(str, args)], prog_name="capkv")

    return invoke


def as_json(result: Result) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(result.stdout)
    return report


# ---- sizes -------------------------------------------------------------------------------------


def test_the_head_of_a_large_model_says_it_all(large: tuple[Path, int]) -> None:
    path, n_bytes = large
    assert path.stat().st_blocks * 512 < n_bytes // 100  # there are no weights to read
    with ModelHeader(path) as header:
        assert header.n_bytes == n_bytes
        assert (header.n_layer, header.n_ctx_train, header.n_swa) == (32, 131072, 0)
        sizes = {
            name: Planner(header, Settings(8192, type_k=name, type_v=name)).bytes_per_cell
            for name in ("f16", "q8_0", "q4_0")
        }
    n_rows = 32 * 8 * 2  # layers, heads, K and V
    assert sizes == {"f16": n_rows * 256, "q8_0": n_rows * 136, "q4_0": n_rows * 72}


def test_sliding_windows_cost_the_same_whatever_the_context(folder: Path) -> None:
    with ModelHeader(tiny.gemma3(folder / "gemma3.gguf", n_swa=512)) as header:
        needs = [Planner(header, Settings(n)).need(n) for n in (4096, 65536)]
    assert needs[0].windows == needs[1].windows > 0
    assert needs[1].kv == 16 * needs[0].kv


def test_all_files_of_a_split_model_count(folder: Path, small: Path) -> None:
    with ModelHeader(small) as header:
        n_bytes = header.n_bytes
    reader = gguf.GGUFReader(small)
    writer = gguf.GGUFWriter(folder / "split.gguf", "llama", split_max_tensors=8)
    for field in reader.fields.values():
        if field.name.startswith(("llama.", "tokenizer.")):
            kind = field.types[0]
            sub = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), kind, sub_type=sub)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data.copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    first = min(folder.glob("split-*.gguf"))
    with ModelHeader(first) as header:
        assert header.n_bytes == n_bytes > first.stat().st_size - small.stat().st_size // 3


@given(memory=st.integers(0, 32 << 20))
@settings(max_examples=30)
def test_the_largest_budget_fits_and_one_step_more_does_not(planner: Planner, memory: int) -> None:
    budget = planner.largest_budget(memory)
    if budget is None:
        assert planner.need(planner.least_budget).total > memory
        return
    assert budget % STEP == 0 and budget <= 4096
    assert planner.need(budget).total <= memory
    assert budget == 4096 or planner.need(budget + STEP).total > memory


@given(memory=st.integers(0, 16 << 20))
@settings(max_examples=20)
def test_the_largest_context_fits_and_one_step_more_does_not(planner: Planner, memory: int) -> None:
    def total(n: int) -> int:
        return planner.whole(n).need(n).total

    n_ctx = planner.largest_context(memory)
    if n_ctx is None:
        assert total(STEP) > memory
    else:
        assert total(n_ctx) <= memory
        assert n_ctx == 4096 or total(n_ctx + STEP) > memory


def test_a_huge_context_costs_no_memory_to_plan(planner: Planner) -> None:
    huge = planner.using(n_ctx=2**31 - 1)
    budget = huge.largest_budget(2**42)
    assert budget is not None and huge.need(budget).total <= 2**42
    # What is not asked is what llama.cpp would say.
    few, many = 2**15, 2**17
    said = [planner.header.context(n, n_outputs=1).n_bytes_compute for n in (few, many)]
    told = [planner.whole(n).need(n).compute for n in (few, many)]
    assert told[1] - told[0] == said[1] - said[0] > 0


def test_a_policy_that_keeps_much_has_a_larger_least_budget(small: Path) -> None:
    policy = get_policy("capkv", n_recent=500)
    with ModelHeader(small) as header:
        settings = Settings(4096).with_policy(policy, probe=False)
        planner = Planner(header, settings, program=0)
        assert planner.least_budget == 2 * STEP
        assert planner.using(n_ctx=100).largest_budget(GIB) == 100


# ---- the command -------------------------------------------------------------------------------


def test_a_plan_for_a_large_model(plan: Plan, large: tuple[Path, int]) -> None:
    path, n_bytes = large
    args = (path, "--memory", "8GiB", "--context", "128k")
    report = as_json(plan(*args, "--json"))
    assert (report["context"], report["memory"]) == (131072, 8 * GIB)
    take = report["take"]
    assert take["need"]["weights"] == n_bytes
    assert take["need"]["total"] <= 8 * GIB < take["need"]["total"] + 256 * 1024**2
    budget = take["budget"]
    assert take["command"] == [
        *("capkv", "chat", "--model", str(path), "--n-ctx", "131072", "--budget", str(budget)),
        *("--type-k", "q8_0", "--type-v", "q8_0", "FILE"),
    ]
    assert [b["budget"] for b in report["budgets"]] == [65536, 32768, 16384]
    assert [b["fits"] for b in report["budgets"]] == [
        b["budget"] <= budget for b in report["budgets"]
    ]

    result = plan(*args)
    assert result.exit_code == 0 and result.stderr == ""
    assert "q8_0" in result.stdout and "not a promise" in result.stdout
    # The bytes of a token, those of the context, and the command as one would paste it.
    assert re.search(r"f16 +128\.0 KiB +16\.0 GiB", result.stdout)
    assert " ".join(take["command"]) in result.stdout


def test_all_cells_are_taken_where_they_fit(plan: Plan, small: Path) -> None:
    report = as_json(plan(small, "--memory", "1GiB", "--json"))
    take = report["take"]
    assert (take["type"], take["budget"]) == ("f16", None)
    assert take["command"][4:-1] == ["--n-ctx", "4096", "--policy", "full"]
    assert take["need"]["observation"] == take["need"]["deciding"] == 0


def test_without_memory_the_machine_is_asked(plan: Plan, small: Path) -> None:
    result = plan(small)
    assert result.exit_code == 0
    assert "80% of the" in result.stdout and "available now" in result.stdout


def test_a_context_beyond_the_trained_one_is_a_warning(plan: Plan, small: Path) -> None:
    result = plan(small, "--context", "8k")
    assert result.exit_code == 0
    assert result.stderr.startswith("warning: the model was trained for 4,096 tokens")
    assert "--n-ctx 8192" in result.stdout


@pytest.mark.parametrize("way", ["--memory", "--context"])
def test_too_little_memory_fails_and_says_what_would_do(
    plan: Plan, large: tuple[Path, int], way: str
) -> None:
    memory = "4GiB" if way == "--memory" else "4500MiB"
    result = plan(large[0], "--memory", memory, "--context", "32k")
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1 and "does not fit" in result.stderr
    if way == "--memory":
        asked = re.search(r"--memory (\d+MiB)", result.stderr)
        assert asked is not None
        assert plan(large[0], "--memory", asked[1], "--context", "32k").exit_code == 0
    assert as_json(plan(large[0], "--memory", memory, "--json"))["take"] is None


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (tiny.mamba, "recurrent"),
        (tiny.jamba, "recurrent"),
        (tiny.deepseek2, "MLA"),
        (tiny.mpt, "ALiBi"),
        (tiny.qwen2vl, "M-RoPE"),
        (tiny.bert, "encoder"),
        (tiny.t5, "encoder"),
        (tiny.deci, "heads differ"),
        (tiny.grok, "flash attention"),
    ],
)
def test_models_that_cannot_be_evicted_are_refused(
    plan: Plan, tmp_path: Path, build: Callable[[Path], Path], reason: str
) -> None:
    result = plan(build(tmp_path / "model.gguf"), "--memory", "8GiB")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.count("\n") == 1 and reason in result.stderr


# ---- bad input ---------------------------------------------------------------------------------


def _cut(small: Path, path: Path, n_bytes: int) -> Path:
    shutil.copy(small, path)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - n_bytes if n_bytes < 0 else n_bytes)
    return path


def _vocabulary(path: Path) -> Path:
    meta: dict[str, tiny.Value] = {"block_count": 2, "attention.head_count": 2}
    return tiny.write(path, "llama", meta, {})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda small, path: path, "no model file"),
        (lambda small, path: path.parent, "is a folder"),
        (lambda small, path: _write(path, b""), "is empty"),
        (lambda small, path: _write(path, b"%PDF-1.7"), "not a GGUF"),
        (lambda small, path: _write(path, b"GGUF"), "truncated"),
        (lambda small, path: _cut(small, path, 700), "truncated"),
        (lambda small, path: _cut(small, path, 100_000), "incomplete"),
        (lambda small, path: _vocabulary(path), "token_embd"),
    ],
)
def test_bad_files_are_one_line_and_exit_1(
    plan: Plan, small: Path, tmp_path: Path, make: Callable[[Path, Path], Path], message: str
) -> None:
    result = plan(make(small, tmp_path / "model.gguf"))
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("capkv: error: ") and result.stderr.count("\n") == 1
    assert message in result.stderr


def _write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    "args",
    [
        ("--memory", "0"),
        ("--memory", "0GiB"),
        ("--memory", "8"),
        ("--memory", "plenty"),
        ("--memory", "-1GiB"),
        ("--memory", "8GiX"),
        ("--context", "0"),
        ("--context", "-1"),
        ("--context", "12.5k"),
        ("--context", "many"),
        ("--context", "9999999m"),
        ("--budget", "2048"),
    ],
)
def test_wrong_usage_exits_2(plan: Plan, small: Path, args: tuple[str, ...]) -> None:
    result = plan(small, *args)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Error: " in result.stderr


@given(st.integers(1, 2**50), st.sampled_from(["B", "KiB", "MiB", "GiB", "kb", "MB", "gb"]))
def test_memory_is_what_a_budget_in_bytes_means(number: int, unit: str) -> None:
    text = f"{number}{unit}"
    assert parse_memory(text) == parse_budget(text, n_ctx=2**99, bytes_per_cell=1, minimum=1)


def test_auto_is_no_budget_for_a_loaded_model() -> None:
    with pytest.raises(BudgetError, match="being loaded"):
        parse_budget("auto", n_ctx=1024, bytes_per_cell=1, minimum=1)


# ---- the machine -------------------------------------------------------------------------------


def test_a_container_has_its_own_limit(tmp_path: Path) -> None:
    (tmp_path / "memory.current").write_text("300000\n")
    (tmp_path / "memory.stat").write_text("anon 100000\ninactive_file 150000\nactive_file 50000\n")
    (tmp_path / "memory.max").write_text("1000000\n")
    assert available_memory(tmp_path) == 900_000
    (tmp_path / "memory.max").write_text("50000\n")
    assert available_memory(tmp_path) == 0
    (tmp_path / "memory.max").write_text("max\n")
    assert available_memory(tmp_path) > 1_000_000
    assert available_memory(tmp_path / "nothing") > 1_000_000
