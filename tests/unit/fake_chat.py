"""A stand-in for DocumentChat, for tests of the command line without a model."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from click.testing import Result

from capkv_local.citations import Citation
from capkv_local.documents.sources import Place
from capkv_local.errors import BudgetError, ModelFileError, PolicyError

Run = Callable[..., Result]


class FakeChat:
    """What the commands need of DocumentChat, with a note of every call."""

    calls: list[tuple[str, Any]]
    interrupt_ingest_at: int | None = None  # tokens after which Ctrl-C comes
    interrupt_answer = False

    def __init__(self, **keywords: Any) -> None:
        self.calls.append(("open", keywords))
        if str(keywords.get("model", "")).startswith("missing"):
            raise ModelFileError("there is no model 'missing.gguf'; check --model")
        if keywords.get("model") == Path("broken.gguf"):
            raise ZeroDivisionError("oops")
        self.llama = types.SimpleNamespace(model_path="/models/small.gguf")
        self.policy, self.budget, self.allocation = "capkv", 2048, "global"
        self.extra: dict[str, Any] = {}

    @classmethod
    def load(cls, path: Path, **keywords: Any) -> FakeChat:
        cls.calls.append(("load", path))
        return cls(**keywords)

    def ingest(
        self, documents: Any, *, question: str | None = None, progress: Any = None
    ) -> types.SimpleNamespace:
        self.calls.append(("ingest", [d.name for d in documents]))
        self.calls.append(("question", question))
        total = 1000
        for done in range(0, total + 1, 100):
            state = {"n_cells": min(done, 64), "kv_bytes": min(done, 64) * 1024}
            if done == self.interrupt_ingest_at:
                return types.SimpleNamespace(tokens=done, seconds=1.0, complete=False, **state)
            if progress is not None and done:
                seconds = done / 100
                counted = {"done": done, "total": total, "estimated": False}
                progress(
                    types.SimpleNamespace(seconds=seconds, rss_bytes=1 << 30, **counted, **state)
                )
        return types.SimpleNamespace(tokens=total, seconds=10.0, complete=True, **state)

    def ask(self, question: str, *, max_tokens: int = 512) -> Iterator[str]:
        self.calls.append(("ask", (question, max_tokens)))
        yield from ("\n The", " code ", "is 48", "213.", " \n")
        if self.interrupt_answer:
            raise KeyboardInterrupt

    def set_budget(self, value: Any) -> None:
        if not isinstance(value, int):
            raise BudgetError(f"the budget {value!r} cannot\nbe read; give cells")
        self.budget = value

    def set_policy(self, name: str) -> None:
        if name != "knorm":
            raise PolicyError(f"there is no policy {name!r}; did you mean 'knorm'?")
        self.policy = name

    def set_allocation(self, name: str) -> None:
        self.allocation = name

    keep_turns = True

    def set_keep_turns(self, keep: bool) -> None:
        self.calls.append(("keep", keep))
        self.keep_turns = keep

    cite = False

    def set_cite(self, cite: bool) -> None:
        self.cite = cite

    stands_out = True

    def citations(self) -> list[Citation]:
        if not self.stands_out:
            return []
        return [Citation("a\x1b[2J.pdf", Place("page", 3, 3), 0.5, "The code is 48213.")]

    def forget(self) -> None:
        self.calls.append(("forget", None))

    def stats(self) -> types.SimpleNamespace:
        return types.SimpleNamespace(
            policy=self.policy,
            allocation=self.allocation,
            budget=self.budget,
            n_tokens=1000,
            n_cells=64,
            n_cells_max=576,
            n_cells_range=(30, 120),
            kv_bytes=65536,
            kv_bytes_full=1024000,
            observe_bytes=2048,
            n_protected=900,
            n_cells_protected=50,
            n_cells_conversation=526,
            copy_bytes=4096,
            evictions=3,
            cells_evicted=936,
            t_score_s=0.1,
            t_select_s=0.2,
            t_evict_s=0.3,
            t_decode_s=4.0,
        )

    def save(self, path: Path) -> int:
        return Path(path).write_bytes(b"session")

    def close(self) -> None:
        self.calls.append(("close", None))
