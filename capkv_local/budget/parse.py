"""What a user writes as a KV budget, turned into cells per head."""

from __future__ import annotations

import math
import numbers
import re
from fractions import Fraction

from capkv_local.errors import BudgetError

_UNITS = {"b": 1}
for _power, _prefix in enumerate("kmgt", start=1):
    _UNITS[f"{_prefix}b"] = 1000**_power
    _UNITS[f"{_prefix}ib"] = 1024**_power

_TEXT = re.compile(
    r"\s*(\d{1,30}(?:\.\d{0,30})?|\.\d{1,30})\s*([a-z%]*)\s*", re.ASCII | re.IGNORECASE
)
AUTO = "auto"
_FORMS = "cells (2048), a share of the context (0.25 or '25%') or memory ('512MiB', '1.5GB')"


def parse_budget(
    value: int | float | str,
    *,
    n_ctx: int,
    bytes_per_cell: int,
    minimum: int,
) -> int:
    """Cells per head, on average over all heads, that `value` asks for.

    Parameters
    ----------
    value
        int, or digits: cells. float in (0, 1], or a number with a point, or ``"25%"``: share of
        `n_ctx`. ``"512MiB"``, ``"1.5GB"``: memory, MiB = 2^20 and MB = 10^6 bytes, any case.
        Shares and memory are rounded down to whole cells.
    n_ctx
        Logical context, the largest sensible budget.
    bytes_per_cell
        Bytes of K and V of one cell, all layers and heads together.
    minimum
        Fewest cells that work, e.g. sinks + recent window + 1.

    Raises
    ------
    BudgetError
        Below `minimum`, above `n_ctx`, not a number, or unreadable.

    Examples
    --------
    >>> parse_budget("25%", n_ctx=8192, bytes_per_cell=23040, minimum=64)
    2048
    >>> parse_budget("32MiB", n_ctx=8192, bytes_per_cell=23040, minimum=64)
    1456
    """
    cells = _cells(value, n_ctx=n_ctx, bytes_per_cell=bytes_per_cell)
    asked = f"kv_budget={value!r}" + ("" if cells == value else f" is {cells} cells, which")
    if cells < minimum:
        raise BudgetError(
            f"{asked} is below the {minimum} cells that sinks, recent window and one more need: "
            f"ask for at least {minimum} ({minimum * bytes_per_cell / 2**20:.1f}MiB)."
        )
    if cells > n_ctx:
        raise BudgetError(
            f"{asked} exceeds the context of {n_ctx} cells "
            f"({n_ctx * bytes_per_cell / 2**20:.1f}MiB): everything fits, so use kv_budget=1.0 "
            "or kv_policy=None, or raise n_ctx."
        )
    return cells


def parse_size(text: str) -> int | None:
    """Bytes of a size such as ``"5GiB"``, ``"1.5GB"`` or plain bytes; None if it is none.

    Examples
    --------
    >>> parse_size("1.5KiB"), parse_size("100"), parse_size("much")
    (1536, 100, None)
    """
    match = _TEXT.fullmatch(text)
    n_unit = _UNITS.get(match[2].lower() or "b") if match else None
    return None if match is None or n_unit is None else int(Fraction(match[1]) * n_unit)


def is_auto(value: object) -> bool:
    """Whether a budget is left to the planner."""
    return isinstance(value, str) and value.strip().lower() == AUTO


def parse_memory(text: str) -> int:
    """Bytes that a size with its unit means.

    Raises
    ------
    BudgetError
        No number, no unit, an unknown one, or nothing.

    Examples
    --------
    >>> parse_memory("8GiB"), parse_memory("1.5 GB")
    (8589934592, 1500000000)
    """
    n_bytes = None if text.strip()[-1:].isdigit() else parse_size(text)
    if n_bytes is None:
        raise BudgetError(f"{text!r} is no amount of memory: write it like 8GiB, 512MiB or 1.5GB.")
    if n_bytes == 0:
        raise BudgetError(f"{text!r} is no memory at all: write it like 8GiB, 512MiB or 1.5GB.")
    return n_bytes


def _cells(value: object, *, n_ctx: int, bytes_per_cell: int) -> int:
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        return _share(float(value), repr(float(value)), n_ctx)
    if not isinstance(value, str):
        raise BudgetError(f"kv_budget={value!r} is a {type(value).__name__}: give {_FORMS}.")
    if is_auto(value):
        raise BudgetError(
            f"kv_budget={value!r} is for a model that is being loaded: give {_FORMS}."
        )
    match = _TEXT.fullmatch(value)
    if match is None:
        raise BudgetError(f"kv_budget={value!r} cannot be read: give {_FORMS}.")
    number, unit = Fraction(match[1]), match[2].lower()
    if unit == "%":
        return _share(float(number / 100), repr(value), n_ctx)
    if unit in _UNITS:
        return int(number * _UNITS[unit] // bytes_per_cell)
    if unit:
        known = "B, KB, MB, GB, TB, KiB, MiB, GiB, TiB or %"
        raise BudgetError(f"kv_budget={value!r} has the unknown unit '{match[2]}': use {known}.")
    return _share(float(number), repr(value), n_ctx) if "." in match[1] else int(number)


def _share(share: float, shown: str, n_ctx: int) -> int:
    if math.isnan(share) or not 0 < share <= 1:
        raise BudgetError(
            f"kv_budget={shown} is no share of the context: a share lies above 0 and at most at "
            "1 (100%); write cells without a point (2048)."
        )
    # Through the decimal form: 0.29 of 100 is 29, which binary floats make 28.999...
    return int(Fraction(repr(share)) * n_ctx)
