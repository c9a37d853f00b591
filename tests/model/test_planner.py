"""What is planned against what is there: the same bytes, from a model that was really loaded."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp
import pytest

from capkv_local import BudgetError, DocumentChat, Llama, native
from capkv_local.devices import placed
from capkv_local.models.header import ModelHeader
from capkv_local.plan import auto
from capkv_local.plan.memory import SHARE
from capkv_local.plan.planner import STEP, Planner, Settings
from capkv_local.policies import get_policy
from tests.model import tiny

QUIET: dict[str, Any] = {"verbose": False, "n_threads": 1, "n_threads_batch": 1}
Q8, Q4 = native.cache_type("q8_0"), native.cache_type("q4_0")


def gemma3(folder: Path) -> Path:
    return tiny.gemma3(folder / "gemma3.gguf", n_swa=300)


@pytest.mark.parametrize(
    ("policy", "options"),
    [
        ("capkv", {"n_ctx": 4096, "kv_budget": 512, "kv_observe": "probe"}),
        ("capkv", {"n_ctx": 4096, "kv_budget": 256, "type_k": Q8, "type_v": Q4, "n_batch": 128}),
        ("capkv", {"n_ctx": 300, "kv_budget": 256, "n_ubatch": 64, "kv_room": 10}),
        ("capkv", {"n_ctx": 1024, "kv_budget": 1024, "kv_observe": "probe"}),
        ("expected-attention", {"n_ctx": 2048, "kv_budget": 300}),
        ("knorm", {"n_ctx": 2048, "kv_budget": 300, "swa_full": False}),
        ("full", {"n_ctx": 1000}),
    ],
)
@pytest.mark.parametrize("model", [None, gemma3])
def test_kv_bytes_are_those_of_the_session(
    model_path: Path,
    tmp_path: Path,
    model: Callable[[Path], Path] | None,
    policy: str,
    options: dict[str, Any],
) -> None:
    path = model_path if model is None else model(tmp_path)
    budget = options.get("kv_budget", 0)
    with contextlib.closing(Llama(path, kv_policy=policy, **options, **QUIET)) as llama:
        stats = llama.kv_stats()
        probe = llama.kv_observe == "probe"
    asked = {name: value for name, value in options.items() if name in Settings.__annotations__}
    for name in ("type_k", "type_v"):
        asked[name] = native.cache_type_name(options.get(name))
    settings = Settings(**asked).with_policy(get_policy(policy), probe=probe)
    with ModelHeader(path) as header:
        need = Planner(header, settings).need(budget)
        assert need.kv_bytes == stats.kv_bytes
        assert need.observation == stats.observe_bytes
        assert settings.n_cells(budget) == stats.n_cells_max
        assert (need.windows > 0) == (model is not None)


@pytest.mark.parametrize(
    ("n_ctx", "n_ubatch", "cache_type"),
    [(512, 64, "f16"), (512, 512, "q8_0"), (2048, 512, "f16"), (8192, 64, "q4_0")],
)
def test_graphs_are_those_that_llama_cpp_reports(
    model_path: Path, n_ctx: int, n_ubatch: int, cache_type: str
) -> None:
    kind = native.cache_type(cache_type)
    options: dict[str, Any] = {"type_k": kind, "type_v": kind, "flash_attn": True, **QUIET}
    with native.log(quiet=True) as log:
        llama = llama_cpp.Llama(str(model_path), n_ctx=n_ctx, n_ubatch=n_ubatch, **options)
    llama.close()
    reported = re.findall(r"compute buffer size = +([\d.]+) MiB", "\n".join(log.infos))
    with ModelHeader(model_path) as header:
        sizes = header.context(n_ctx, type_k=cache_type, type_v=cache_type, n_ubatch=n_ubatch)
    assert len(reported) == 1
    assert sizes.n_bytes_compute == int(float(reported[0]) * 2**20)


# ---- kv_budget="auto" --------------------------------------------------------------------------


def have(monkeypatch: pytest.MonkeyPatch, n_bytes: int) -> None:
    """A machine on which a session can take ``n_bytes``."""
    monkeypatch.setattr(auto, "available_memory", lambda: int(n_bytes / SHARE) + 1)


def test_auto_takes_the_largest_budget_that_fits(
    monkeypatch: pytest.MonkeyPatch, model_path: Path
) -> None:
    have(monkeypatch, 300 << 20)
    with contextlib.closing(Llama(model_path, n_ctx=8192, kv_budget="auto", **QUIET)) as llama:
        stats = llama.kv_stats()
    settings = Settings(8192).with_policy(get_policy("capkv"), probe=False)
    with ModelHeader(model_path) as header:
        plan = Planner(header, settings, program=0)
        assert plan.need(stats.budget).kv_bytes == stats.kv_bytes
        assert plan.need(stats.budget).total <= 300 << 20 < plan.need(stats.budget + STEP).total
    assert stats.budget % STEP == 0 and 256 <= stats.budget < 8192


def test_auto_takes_no_more_than_the_context(model_path: Path) -> None:
    with contextlib.closing(Llama(model_path, n_ctx=700, kv_budget="auto", **QUIET)) as llama:
        assert llama.kv_stats().budget == 700


def test_auto_in_a_chat(monkeypatch: pytest.MonkeyPatch, model_path: Path) -> None:
    have(monkeypatch, 300 << 20)
    with contextlib.closing(
        DocumentChat(model=model_path, kv_budget="auto", type_k="q8_0", type_v="q8_0", n_threads=1)
    ) as chat:
        before = chat.stats()
        assert before.budget % STEP == 0 and 256 <= before.budget < 8192
        with pytest.raises(BudgetError, match="being loaded"):
            chat.set_budget("auto")
        assert chat.stats() == before


def test_auto_without_the_memory_says_what_is_there(
    monkeypatch: pytest.MonkeyPatch, model_path: Path
) -> None:
    have(monkeypatch, 100 << 20)
    with pytest.raises(BudgetError, match=r"256 cells need .* MiB \(92 for .* and 100 MiB can be"):
        Llama(model_path, n_ctx=8192, kv_budget="auto", **QUIET)


def test_auto_with_layers_on_a_gpu_asks_for_a_number(
    monkeypatch: pytest.MonkeyPatch, model_path: Path
) -> None:
    monkeypatch.setattr(placed, "offload_devices", lambda: ["a GPU"])
    with pytest.raises(BudgetError, match="name a number"):
        Llama(model_path, n_ctx=8192, kv_budget="auto", n_gpu_layers=-1, **QUIET)
