"""A run of the evaluation whose results are known: what reports and statistics are tested on."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from capkv_local.evaluate.records import Record


def record(**changed: Any) -> Record:
    """Return a record of capkv's KL on one case, with some fields changed."""
    fields: dict[str, Any] = dict(
        model="tiny", split="report", task="continuation", case="a", item="", kind="continuation",
        depth=None, n_tokens=2048, method="capkv", allocation="global", observe="tail",
        reading="streamed", question="unseen", kv_type="f16", share=0.25, kv_bytes=1 << 20,
        seed=0, metric="kl", value=0.1, full=None, seconds=1.0,
    )  # fmt: skip
    return Record(**fields | changed)


def fact(case: str, item: str, value: float, **changed: Any) -> Record:
    """Return the record of one question about a fact."""
    fields: dict[str, Any] = dict(
        task="facts", case=case, item=item, kind="single", depth=0.5, metric="exact",
        value=value, full=1.0,
    )  # fmt: skip
    return record(**fields | changed)


# KL of each method relative to capkv's; keydiff wins at 5%, and only there.
METHODS = {"capkv": 1.0, "snapkv": 1.5, "keydiff": 2.5, "capkv:noise=1": 1.0}


def synthetic(n_cases: int = 8, *, readings: tuple[str, ...] = ("streamed",)) -> list[Record]:
    """Return a run of a few methods whose differences are known."""
    rng = np.random.default_rng(7)
    records = []
    for case in (f"doc-{i}" for i in range(n_cases)):
        hard = math.exp(rng.normal(0, 0.5))
        for reading in readings:
            for method, factor in METHODS.items():
                for share in (0.05, 0.25):
                    wins = (method, share) == ("keydiff", 0.05)
                    how = dict(case=case, method=method, share=share, reading=reading)
                    kl = (
                        0.02
                        / share
                        * hard
                        * (0.5 if wins else factor)
                        * math.exp(rng.normal(0, 0.01))
                    )
                    records.append(record(**how, value=kl))
                    records.append(record(**how, metric="top1", value=math.exp(-kl), full=1.0))
                    for i in range(3):
                        said = float(rng.random() < math.exp(-kl))
                        depth = i / 2
                        records.append(fact(item=str(i), value=said, depth=depth, **how))  # type: ignore[arg-type]
                        logprob = dict(metric="logprob", value=-kl, full=-0.1, depth=depth)
                        records.append(fact(item=str(i), **how, **logprob))  # type: ignore[arg-type]
            for kv_type, kl in (("f16", 0.0), ("q8_0", 0.002)):
                how = dict(case=case, method="full", allocation="", observe="", share=1.0)
                how |= dict(reading=reading, kv_type=kv_type)
                records.append(record(**how, value=kl))
                records.append(fact(item="0", value=1.0, **how))  # type: ignore[arg-type]
    return records
