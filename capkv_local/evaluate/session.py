"""One model that reads a text, compresses its cache in any way, and is asked what is left.

What a method costs is measured against the same model with the full cache, on the same tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from capkv_local import native
from capkv_local.cache.native_stats import ATTENTION
from capkv_local.evaluate.oracle import Oracle
from capkv_local.evaluate.tasks.base import Case
from capkv_local.llama import CompactedState, Llama
from capkv_local.llama.streaming import Observe
from capkv_local.llama.template import ChatTemplate
from capkv_local.policies import KVStats, Policy
from capkv_local.policies.base import F32, BasePolicy, Reduce

F64 = NDArray[np.float64]

# Tokens of a question, its answer or a continuation that are decoded behind the text.
N_BEHIND = 512
# Policies may look at up to so many of the last queries.
MAX_WINDOW = 256


@dataclass(frozen=True)
class Everything(BasePolicy):
    """Observes what any policy may want, while a text is read without evicting."""

    name: ClassVar[str] = "evaluation"
    needs: ClassVar[frozenset[str]] = frozenset({"queries", "mean_query"})
    n_window: int = MAX_WINDOW

    def score(self, stats: KVStats) -> F32:
        raise NotImplementedError("nothing is evicted while a text is read for evaluation")


@dataclass(frozen=True)
class Prepared:
    """A case in tokens of one model.

    Attributes
    ----------
    opening
        Tokens that open the user's message.
    context
        Tokens that are read: the opening, and the text.
    continuation
        Tokens that follow the text, empty if nothing is predicted.
    asked, lead, answer
        For each question: the tokens that ask it (with the turn's end), those that begin the
        answer, and those that must follow.
    """

    opening: list[int]
    context: list[int]
    continuation: list[int]
    asked: list[list[int]]
    lead: list[list[int]]
    answer: list[list[int]]


class EvalSession:
    """A model for evaluation.

    Parameters
    ----------
    model
        GGUF file.
    n_tokens
        Longest text that is read.
    kv_type
        Type of K and V, a name of :data:`capkv_local.native.CACHE_TYPES`.
    threads
        CPU threads.
    """

    def __init__(
        self, model: Path, *, n_tokens: int, kv_type: str = "f16", threads: int = 2
    ) -> None:
        self._options: dict[str, Any] = {
            "n_ctx": n_tokens + N_BEHIND,
            "n_threads": threads,
            "n_threads_batch": threads,
            "type_k": native.cache_type(kv_type),
            "type_v": native.cache_type(kv_type),
            "verbose": False,
        }
        self.model = model
        self._all = Llama(
            model,
            kv_policy=Everything(),
            kv_budget=n_tokens + N_BEHIND,
            kv_observe="probe",
            **self._options,
        )
        self._streams: dict[bool, Llama] = {}
        self._template = ChatTemplate.of(self._all)
        self._state: CompactedState | None = None
        # What a repetition of the text that was read looked at: the same for all budgets.
        self._repeated: dict[Reduce, F32] = {}

    def close(self) -> None:
        for llama in (self._all, *self._streams.values()):
            llama.close()

    def tokenize(self, text: str) -> list[int]:
        return self._all.tokenize(text.encode(), add_bos=False, special=False)

    def prepare(self, case: Case) -> Prepared:
        """Tokens of a case: the model's own chat template around context, question and answer."""
        first = list(self._template.first)
        text = self.tokenize(case.context + case.continuation)
        n_context = len(self.tokenize(case.context))
        asked, lead, answer = [], [], []
        for question in case.questions:
            asked.append(self.tokenize(f"\n\n{question.prompt}") + list(self._template.after))
            begun = self.tokenize(question.lead)
            whole = self.tokenize(question.lead + question.answer)
            n_same = _n_common(begun, whole)
            lead.append(whole[:n_same])
            answer.append(whole[n_same:])
        return Prepared(
            first,
            first + text[:n_context],
            text[n_context:] if case.continuation else [],
            asked,
            lead,
            answer,
        )

    # -- compressing ---------------------------------------------------------------------------

    def read(self, prepared: Prepared) -> None:
        """Read the context once, without evicting; :meth:`one_shot` starts from there."""
        state = self.read_only(prepared.context).save_state()
        assert isinstance(state, CompactedState)
        self._state = state
        self._repeated.clear()

    def read_only(self, tokens: Sequence[int]) -> Llama:
        """The session with these tokens and no others; :meth:`full` goes back to what was read."""
        llama = self._all
        llama.reset()  # type: ignore[no-untyped-call]
        llama.prefill(tokens, observe="tail")
        return llama

    def full(self) -> Llama:
        """The session with all cells of what was read."""
        assert self._state is not None
        self._all.load_state(self._state)
        return self._all

    def one_shot(
        self,
        policy: Policy,
        allocation: str,
        n_cells: int,
        observe: Observe,
        question: Sequence[int] = (),
    ) -> Llama:
        """Evict once, after everything was read; ``n_cells`` stay per head, on average."""
        llama = self.full()
        cache = llama._require_cache()
        before = cache.policy, cache.allocation, cache.budget
        cache.policy, cache.allocation, cache.budget = policy, allocation, n_cells
        try:
            llama._evict(cache, llama._observers(observe, question), remember=self._repeated)
        finally:
            cache.policy, cache.allocation, cache.budget = before
        return llama

    def foreseen(self, allocation: str, n_cells: int, future: Sequence[int]) -> Llama:
        """Evict once, as who knows the tokens that follow: see :class:`Oracle`."""
        llama = self.full()
        cache = llama._require_cache()
        n_used, n_past = cache.kv.info().n_cells, llama.n_tokens
        try:
            cache.kv.add_attention(ATTENTION["second_moment"], n_past)
            llama._decode_scratch(cache, list(future))
            attention = cache.kv.attention(n_used)
        finally:
            cache.kv.stop_attention()
            llama._ctx.kv_cache_seq_rm(-1, n_past, -1)
        return self.one_shot(Oracle(attention=attention), allocation, n_cells, "tail")

    def streamed(
        self,
        prepared: Prepared,
        policy: Policy,
        allocation: str,
        n_cells: int,
        observe: Observe,
        question: Sequence[int] = (),
    ) -> Llama:
        """Read the context through a cache of ``n_cells`` per head and one batch."""
        probes = observe == "probe"
        llama = self._streams.get(probes)
        if llama is None:
            llama = self._streams[probes] = Llama(
                self.model,
                kv_policy=policy,
                kv_allocation=allocation,
                kv_budget=n_cells,
                kv_observe="probe" if probes else "tail",
                kv_room=0,  # the budget is strict at the end
                **self._options,
            )
        llama.reset()  # type: ignore[no-untyped-call]
        llama.set_kv_policy(policy, allocation)
        llama.set_kv_budget(n_cells)
        llama.prefill(prepared.context, observe=observe, question=question)
        return llama

    # -- asking --------------------------------------------------------------------------------

    def log_probabilities(self, llama: Llama, given: Sequence[int], wanted: Sequence[int]) -> F64:
        """Of each wanted token in turn, behind the cache and ``given``: ``[n_wanted, n_vocab]``.

        One token or more is given. The cache is left as it was.
        """
        tokens = [*given, *wanted[:-1]]
        n_past = llama.n_tokens
        batch = llama._batch
        try:
            batch.set_batch(batch=tokens, n_past=n_past, logits_all=False)
            for i in range(len(given) - 1, len(tokens)):
                batch.batch.logits[i] = True
            llama._ctx.decode(batch)
            shape = (len(wanted), llama.n_vocab())
            logits = np.ctypeslib.as_array(llama._ctx.get_logits(), shape).astype(np.float64)
        finally:
            llama._ctx.kv_cache_seq_rm(-1, n_past, -1)
        logits -= logits.max(axis=-1, keepdims=True)
        logits -= np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        return logits


def _n_common(a: Sequence[int], b: Sequence[int]) -> int:
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    return n


def answer_metrics(
    full: F64, left: F64, wanted: Sequence[int]
) -> dict[str, tuple[float, float | None]]:
    """What is left of the prediction of some tokens: metric -> (value, the same with all cells).

    Parameters
    ----------
    full, left
        Log-probabilities of the full and of the compressed cache, ``[n_wanted, n_vocab]``.
    wanted
        The tokens.
    """
    index = np.arange(len(wanted)), np.asarray(wanted)
    kl = float((np.exp(full) * (full - left)).sum(axis=-1).mean())

    def of(x: F64) -> dict[str, float]:
        right = x.argmax(axis=-1) == index[1]
        return {
            "exact": float(right.all()),
            "accuracy": float(right.mean()),
            "logprob": float(x[index].mean()),
        }

    whole = of(full)
    return {"kl": (kl, None)} | {name: (value, whole[name]) for name, value in of(left).items()}
