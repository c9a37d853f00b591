"""A session whose model and cache are on the Metal backend keeps the cells that the CPU keeps."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as GGMLType

from . import metal_build

ROOT = Path(__file__).parents[2]


def held(kind: str, target: Path, *library: Path) -> tuple[set[tuple[int, ...]], int]:
    """(layer, head, position) of every cell, and how many kernels ran; in a process of its own."""
    arguments = [str(GGMLType[kind].value), str(target), *map(str, library)]
    command = [sys.executable, "-m", "tests.native.metal_session", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    positions = np.load(target)
    layer, head, cell = np.nonzero(positions >= 0)
    cells = zip(layer, head, positions[layer, head, cell], strict=True)
    return {tuple(map(int, found)) for found in cells}, int(done.stdout.split()[-1])


@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
def test_the_same_cells_stay(kind: str, tmp_path: Path) -> None:
    try:
        library = metal_build.build(metal_build.sources())
    except FileNotFoundError as error:
        pytest.skip(str(error))
    cpu, none = held(kind, tmp_path / "cpu.npy")
    metal, n_dispatch = held(kind, tmp_path / "metal.npy", library)
    assert none == 0
    assert n_dispatch >= 3 * 4  # three passes, four evictions
    assert len(metal) == len(cpu) == 3 * 2 * 200
    # Scores differ in their last digits, so that of two as good as equal the other may stay.
    assert len(cpu - metal) <= len(cpu) // 100
