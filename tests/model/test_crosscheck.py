"""The cross-check with kvpress: its measures, its tables and, where torch is, its verdict."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from capkv_local.errors import EvaluationError
from capkv_local.evaluate import crosscheck as module
from capkv_local.evaluate.crosscheck import PAIRS, Agreement, Pair, crosscheck, spearman
from tests.model.conftest import TEXT

SAME = [pair for pair in PAIRS if pair.setting == "same"]
DEFAULT = [pair for pair in PAIRS if pair.setting == "default"]


@pytest.fixture(scope="module")
def agreements(model_path: Path) -> dict[Pair, Agreement]:
    """One text of the default model, long enough for more than one piece of a repetition."""
    for name in ("torch", "transformers", "gguf", "kvpress"):
        pytest.importorskip(name)
    found = crosscheck(model_path, [TEXT.read_text(encoding="utf-8")], n_tokens=600)
    return {agreement.pair: agreement for agreement in found}


@pytest.mark.torch
@pytest.mark.slow
@pytest.mark.parametrize("pair", SAME, ids=lambda pair: pair.policy)
def test_with_the_same_settings_every_head_ranks_the_cells_alike(
    agreements: dict[Pair, Agreement], pair: Pair
) -> None:
    found = agreements[pair]
    assert found.n_tokens == 600
    # Measured: rho 0.9995 and above (knorm; the others 0.9999), differences up to 0.007.
    assert found.rho_min >= 0.99
    assert found.kept_min >= 0.95
    assert found.difference < 0.05


@pytest.mark.torch
@pytest.mark.slow
@pytest.mark.parametrize("pair", DEFAULT, ids=lambda pair: pair.policy)
def test_the_notes_are_of_differences_that_are_there(
    agreements: dict[Pair, Agreement], pair: Pair
) -> None:
    found = agreements[pair]
    assert 0.5 < found.rho_median < 0.99


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kvpress", None)
    with pytest.raises(EvaluationError, match=r'pip install "capkv-local\[kvpress\]"'):
        crosscheck(Path("model.gguf"), ["text"])


def test_ranks_of_equal_values_are_shared() -> None:
    assert spearman(np.array([1.0, 2, 3, 4]), np.array([1.0, 8, 27, 64])) == pytest.approx(1)
    assert spearman(np.array([1.0, 2, 3, 4]), np.array([4.0, 3, 2, 1])) == pytest.approx(-1)
    # By hand: ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4.
    assert spearman(np.array([1.0, 2, 2, 3]), np.array([1.0, 2, 3, 4])) == pytest.approx(
        4.5 / np.sqrt(4.5 * 5)
    )


def test_only_contested_cells_count() -> None:
    rng = np.random.default_rng(0)
    theirs = rng.normal(size=(2, 3, 100)).astype(np.float32)
    ours = theirs.copy()
    ours[..., :4] += 7
    ours[..., -32:] = 0
    assert module.agreement(ours, theirs, slice(4, -32)) == pytest.approx((1, 1, 1, 0))
    ours[1, 2] *= -1
    median, least, kept, difference = module.agreement(ours, theirs, slice(4, -32))
    assert (median, least, kept) == pytest.approx((1, -1, 0))
    assert difference == pytest.approx(2)


def test_tables_show_the_worst_of_all_texts() -> None:
    pair = PAIRS[0]
    found = [
        Agreement("tiny", 0, 512, pair, 1.0, 0.9991, 0.99, 0.001),
        Agreement("tiny", 1, 700, pair, 0.9999, 0.9973, 0.98, 0.004),
    ]
    row = "| capkv-paper | here | 1.0000 | 0.9973 | 98.0% | 0.004 | all settings are equal |"
    assert row in module.markdown(found)
    assert "### tiny, 2 texts, up to 700 tokens" in module.markdown(found)
    console = Console(file=io.StringIO(), width=120)
    module.print_agreements(found, console)
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert "tiny, 2 texts" in printed
    assert "0.9973" in printed
    assert "capkv-paper, set as here: all settings are equal" in printed
