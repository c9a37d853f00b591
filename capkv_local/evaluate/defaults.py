"""What is measured unless a user says otherwise."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from capkv_local.evaluate.methods import Method, parse_method
from capkv_local.evaluate.plan import Plan
from capkv_local.models import check_model_file, default_model

PEERS_UNSEEN = (
    "capkv+probe",
    "capkv",
    "snapkv",
    "snapkv@adaptive-layer",
    "snapkv@pyramid",
    "snapkv@global+probe",
    "kvzip",
    "capkv-paper",
    "expected-attention",
    "tova",
    "keydiff",
    "knorm",
    "streaming",
    "random",
)
"""What is compared while nobody knows the question; AdaKV and PyramidKV are allocations here."""

PEERS_SEEN = (
    "capkv",
    "snapkv",
    "snapkv@adaptive-layer",
    "tova",
    "streaming",
    "bm25",
)
"""What is compared when the question is observed, or searched for."""

QUICK = ("capkv+probe", "capkv", "snapkv", "kvzip", "streaming")


def make_plan(
    *,
    quick: bool = False,
    models: Sequence[Path] = (),
    methods: Sequence[str] = (),
    threads: int | None = None,
    **settings: Any,
) -> Plan:
    """A plan of what was asked for; what is empty or None is taken from the defaults.

    Raises
    ------
    ModelFileError, EvaluationError, PolicyError, BudgetError
        A model, method or allocation cannot be used.
    """
    models = tuple(models) or (default_model(),)
    for model in models:
        check_model_file(model)
    given = {name: value for name, value in settings.items() if value not in ((), None)}
    if not methods:
        seen_only = given.get("questions") == ("seen",)
        methods = QUICK if quick else PEERS_SEEN if seen_only else PEERS_UNSEEN
    plan = Plan(
        models=models,
        methods=tuple(_unique(methods)),
        threads=threads or os.cpu_count() or 1,
    )
    if quick:
        # Five texts are the fewest on which a difference is ever called one.
        plan = replace(plan, shares=(0.25,), n_tokens=(768,), n_cases=5)
    return replace(plan, **given)


def _unique(methods: Sequence[str]) -> list[Method]:
    return [parse_method(text) for text in dict.fromkeys(methods)]
