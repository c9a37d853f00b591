"""What is compared: policies with fields, allocations and observers, retrieval and the oracle."""

from __future__ import annotations

import re
from ast import literal_eval
from dataclasses import dataclass
from typing import Any, Literal

from capkv_local.budget.allocate import get_allocator
from capkv_local.errors import EvaluationError
from capkv_local.evaluate.oracle import Oracle
from capkv_local.policies import Policy, get_policy

_FORM = re.compile(r"([a-z0-9-]+)(?::([^@+]+))?(?:@([a-z-]+))?(?:\+([a-z]+))?")

RETRIEVAL = "bm25"
ORACLE = "oracle"
FULL = "full"


@dataclass(frozen=True)
class Method:
    """One way to make the cache smaller.

    Attributes
    ----------
    label
        As the user wrote it.
    policy
        None for retrieval.
    allocation
        How heads share the budget; empty where nothing is evicted.
    observe
        ``"tail"`` or ``"probe"``: what is observed while the question is not known.
    """

    label: str
    policy: Policy | None
    allocation: str
    observe: Literal["tail", "probe"]

    @property
    def is_full(self) -> bool:
        return self.label == FULL

    @property
    def is_retrieval(self) -> bool:
        return self.policy is None

    @property
    def is_oracle(self) -> bool:
        """Whether it knows what comes: a bound for all others."""
        return isinstance(self.policy, Oracle)


def parse_method(text: str) -> Method:
    """Read ``policy[:field=value,...][@allocation][+probe|+tail]``, ``full``, ``bm25`` or
    ``oracle[@allocation]``.

    Raises
    ------
    EvaluationError
        Not of this form.
    PolicyError, BudgetError
        No such policy, field or allocation.

    Examples
    --------
    >>> parse_method("snapkv:pool=15@global+probe").allocation
    'global'
    """
    match = _FORM.fullmatch(text.strip())
    if match is None:
        raise EvaluationError(
            f"'{text}' is no method: write policy[:field=value,...][@allocation][+probe], "
            "'full', 'bm25' or 'oracle'"
        )
    name, fields, allocation, observe = match.groups()
    if name in (RETRIEVAL, ORACLE) and (fields or observe):
        raise EvaluationError(f"'{text}': '{name}' has no fields and observes nothing")
    if name == RETRIEVAL:
        if allocation:
            raise EvaluationError(f"'{text}': '{name}' has no cells to allocate")
        return Method(text, None, "", "tail")
    policy = Oracle() if name == ORACLE else get_policy(name, **_fields(text, fields))
    allocation = allocation or str(getattr(policy, "allocation", "uniform"))
    get_allocator(allocation)
    needs_probe = "probe" in policy.needs
    observe = observe or ("probe" if needs_probe else "tail")
    if observe not in ("tail", "probe"):
        raise EvaluationError(f"'{text}' observes '{observe}': write +probe or +tail")
    if needs_probe and observe == "tail":
        raise EvaluationError(f"'{text}': policy '{name}' needs +probe")
    allocation = "" if name == FULL else allocation
    return Method(text, policy, allocation, "probe" if observe == "probe" else "tail")


def _fields(text: str, fields: str | None) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for field in (fields or "").split(","):
        if not field:
            continue
        name, equals, value = field.partition("=")
        if not equals:
            raise EvaluationError(f"'{text}': write fields as name=value, not '{field}'")
        try:
            values[name.strip()] = literal_eval(value)
        except (ValueError, SyntaxError):
            values[name.strip()] = value.strip()  # a word
    return values
