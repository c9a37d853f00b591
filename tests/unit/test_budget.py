"""parse_budget: every way to write a budget, and every way to get it wrong."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from capkv_local.budget.parse import parse_budget
from capkv_local.errors import BudgetError

N_CTX, BYTES, MINIMUM = 8192, 23040, 64


def parse(value: object, **changes: int) -> int:
    limits = {"n_ctx": N_CTX, "bytes_per_cell": BYTES, "minimum": MINIMUM, **changes}
    return parse_budget(value, **limits)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("value", "cells"),
    [
        (2048, 2048),
        (np.int64(2048), 2048),
        ("2048", 2048),
        (" 2048 ", 2048),
        (64, 64),
        (8192, 8192),
        (0.25, 2048),
        (1.0, 8192),
        (np.float32(0.5), 4096),
        ("0.25", 2048),
        (".25", 2048),
        ("1.0", 8192),
        ("25%", 2048),
        ("12.5 %", 1024),
        ("100%", 8192),
        ("32MiB", 32 * 2**20 // BYTES),
        ("32 mib", 32 * 2**20 // BYTES),
        ("0.1GB", 10**8 // BYTES),
        ("0.125GiB", 2**27 // BYTES),
        ("46080000B", 2000),
        ("46079999b", 1999),
        ("20000kB", 20_000_000 // BYTES),
    ],
)
def test_forms(value: object, cells: int) -> None:
    assert parse(value) == cells


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (63, "below the 64 cells"),
        (0, "below"),
        (-5, "below"),
        ("1KiB", "is 0 cells, which is below"),
        (8193, "exceeds the context of 8192"),
        ("4TiB", "everything fits"),
        ("9" * 30, "exceeds"),
        (0.0, "no share"),
        (-0.5, "no share"),
        (1.5, "write cells without a point"),
        ("2048.0", "no share"),
        ("101%", "no share"),
        ("0%", "no share"),
        (float("nan"), "no share"),
        (float("inf"), "no share"),
        ("nan", "cannot be read"),
        ("", "cannot be read"),
        ("lots", "cannot be read"),
        ("-1", "cannot be read"),
        ("1e3", "cannot be read|unknown unit"),
        ("1,024", "cannot be read"),
        ("9" * 5000, "cannot be read"),
        ("512M", "unknown unit 'M'"),
        ("5 apples", "unknown unit 'apples'"),
        (True, "is a bool"),
        (None, "is a NoneType"),
        ([1], "is a list"),
        (1j, "is a complex"),
    ],
)
def test_refusals_say_why(value: object, says: str) -> None:
    with pytest.raises(BudgetError, match=says) as caught:
        parse(value)
    assert "kv_budget=" in str(caught.value)


@given(st.integers(MINIMUM, N_CTX), st.integers(1, 2**24))
def test_cells_round_trip(cells: int, bytes_per_cell: int) -> None:
    assert parse(cells) == cells
    assert parse(str(cells)) == cells
    assert parse(f"{cells * bytes_per_cell}B", bytes_per_cell=bytes_per_cell) == cells
    assert parse(cells / N_CTX) == cells


@given(st.integers(1, 100))
def test_decimal_shares_mean_what_they_say(percent: int) -> None:
    """0.29 of 100 is 29 although the binary 0.29 is a little less."""
    assert parse(percent / 100, n_ctx=100, minimum=1) == percent
    assert parse(f"{percent}%", n_ctx=100, minimum=1) == percent


@given(st.one_of(st.text(), st.floats(), st.integers(), st.none(), st.binary()))
def test_anything_else_is_a_budget_error(value: object) -> None:
    try:
        cells = parse(value)
    except BudgetError:
        return
    assert MINIMUM <= cells <= N_CTX
