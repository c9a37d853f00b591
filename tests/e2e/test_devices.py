"""The real model through the command line, with the cache in the memory of a device."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.test_ask import FACTS, TEXT, capkv
from tests.e2e.test_cli import HARBOUR, QUESTION
from tests.model.device import Places

FACT = FACTS[0]


@pytest.fixture(scope="module")
def on_device() -> Iterator[list[str]]:
    """Options of the command line."""
    places = Places()
    options = places.one().options
    servers = options.get("rpc_servers")
    yield ["--rpc", ",".join(servers)] if servers else ["--gpu-layers", "-1"]
    places.close()


def test_a_planted_fact_is_answered(tmp_path: Path, on_device: list[str]) -> None:
    """About 700 tokens, of which an eviction leaves 256 per head."""
    document = tmp_path / "text.txt"
    document.write_text(f"{TEXT[:1200]}\n\n{FACT.sentence}\n\n{TEXT[1200:3200]}")
    options = ["--n-ctx", "2048", "--max-tokens", "20", "--seed", "1", "--json"]
    small = ["--budget", "256", "--room", "256"]  # the room of a device would hold it all
    run = capkv("ask", str(document), FACT.question, *small, *options, *on_device)
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    assert FACT.answer in result["answer"]
    assert result["kv"]["evictions"] >= 1 and result["kv"]["cells"] < result["tokens"] - 100


def test_a_snapshot_goes_to_a_machine_without_the_device(
    tmp_path: Path, on_device: list[str]
) -> None:
    book = tmp_path / "book.capkv"
    small = ["--budget", "128", "--n-ctx", "1024"]
    run = capkv("snapshot", str(HARBOUR), "-o", str(book), *small, *on_device)
    assert run.returncode == 0, run.stderr
    for options in (on_device, []):
        run = capkv("ask", str(book), QUESTION, "--max-tokens", "40", *options)
        assert run.returncode == 0 and "48213" in run.stdout, run.stderr
