"""``DocumentChat``: read documents through a small KV cache, then ask about them."""

from __future__ import annotations

import codecs
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import llama_cpp

from capkv_local import native
from capkv_local.cache import KVCacheStats
from capkv_local.documents import Document
from capkv_local.errors import ContextOverflow
from capkv_local.llama import Budget, Llama, Observe
from capkv_local.models import default_model, fingerprint
from capkv_local.policies import get_policy
from capkv_local.saved import SavedChat
from capkv_local.template import ChatTemplate

# Tokens of the context that a document must leave for the question and its answer.
_REPLY_TOKENS = 256


@dataclass(frozen=True)
class IngestProgress:
    """Where reading is: tokens done and in all, seconds so far, cells and KV bytes used."""

    done: int
    total: int
    seconds: float
    n_cells: int
    kv_bytes: int


@dataclass(frozen=True)
class IngestReport:
    """What was read; ``complete`` is False after Ctrl-C, which keeps what was read so far."""

    tokens: int
    seconds: float
    complete: bool
    n_cells: int
    kv_bytes: int


class DocumentChat(SavedChat):
    """A conversation about documents.

    Parameters
    ----------
    model
        GGUF file; None for :func:`~capkv_local.models.default_model`.
    kv_policy, kv_budget, kv_allocation, kv_observe, probe_stride, n_ctx
        As :class:`~capkv_local.Llama`; ``n_ctx`` None is the context that the model was trained
        with. By default a probe says what stays: reading takes two to three times as long, and
        questions that come later find several times as much (docs/evaluation.md).
    n_threads
        CPU threads; None for all.
    n_gpu_layers
        Layers on the GPU, -1 for all.
    type_k, type_v
        Cache types by ggml name (``"q8_0"``); None is f16.
    seed
        Seed of the sampling; None for a random one.
    verbose
        Show llama.cpp's log.

    Raises
    ------
    CapKVError
        As :class:`~capkv_local.Llama`.
    """

    def __init__(
        self,
        *,
        model: str | Path | None = None,
        kv_policy: str = "capkv",
        kv_budget: Budget | None = None,
        kv_allocation: str | None = None,
        kv_observe: Observe = "probe",
        probe_stride: int = 1,
        n_ctx: int | None = None,
        n_threads: int | None = None,
        n_gpu_layers: int = 0,
        type_k: str | None = None,
        type_v: str | None = None,
        seed: int | None = None,
        verbose: bool = False,
    ) -> None:
        threads = n_threads or os.cpu_count() or 1
        self._types = (type_k, type_v)
        model = model or default_model()
        self._fingerprint = fingerprint(model)  # now: the file may be another one when we save
        self.extra = {}
        self.llama = Llama(
            model,
            n_ctx=n_ctx or 0,
            kv_policy=get_policy(kv_policy),
            kv_budget=kv_budget,
            kv_allocation=kv_allocation,
            kv_observe=kv_observe,
            probe_stride=probe_stride,
            n_threads=threads,
            n_threads_batch=threads,
            n_gpu_layers=n_gpu_layers,
            type_k=_ggml_type(type_k),
            type_v=_ggml_type(type_v),
            verbose=verbose,
            seed=llama_cpp.LLAMA_DEFAULT_SEED if seed is None else seed,
        )
        self._template = ChatTemplate.of(self.llama)
        # Where the conversation stands: before it, in a user message, or behind an answer.
        self._place = "start"
        self._pending = []  # sampled, but not decoded yet

    # -- reading -------------------------------------------------------------------------------

    def ingest(
        self,
        documents: Sequence[Document],
        *,
        question: str | None = None,
        progress: Callable[[IngestProgress], None] | None = None,
    ) -> IngestReport:
        """Read documents into the conversation.

        Parameters
        ----------
        question
            When it is known before reading, its tokens look at every chunk, so that the cells it
            needs are kept (``observe="question"``); a probe knows less and does not look then.
        progress
            Called after each chunk.

        Raises
        ------
        ContextOverflow
            Documents and a reply do not fit the context; nothing is read.
        """
        llama = self.llama
        tokens = self._user_tokens() + self._document_tokens(documents)
        room = llama.n_ctx() - llama.n_tokens - _REPLY_TOKENS
        if len(tokens) > room:
            trained = llama._model.n_ctx_train()
            raise ContextOverflow(
                f"the documents have {len(tokens)} tokens, the context has room for {max(room, 0)} "
                f"of {llama.n_ctx()} (the model was trained with {trained}): use a larger --n-ctx, "
                "a model with a longer context, or less text"
            )
        started = time.perf_counter()
        done_before = llama.n_tokens

        def report(done: int, total: int) -> None:
            if progress is not None:
                stats = llama.kv_stats()
                seconds = time.perf_counter() - started
                progress(IngestProgress(done, total, seconds, stats.n_cells, stats.kv_bytes))

        complete = True
        try:
            if question is None:
                llama.prefill(tokens, progress=report)
            else:
                llama.prefill(
                    tokens,
                    observe="question",
                    question=self._question_tokens(question),
                    progress=report,
                )
        except KeyboardInterrupt:
            complete = False
        read = llama.n_tokens - done_before
        if read:
            self._place, self._pending = "user", []
        stats = llama.kv_stats()
        seconds = time.perf_counter() - started
        return IngestReport(read, seconds, complete, stats.n_cells, stats.kv_bytes)

    def _user_tokens(self) -> list[int]:
        """Tokens that open a user message here."""
        if self._place == "start":
            return list(self._template.first)
        if self._place == "answer":
            return self._pending + self._template.between
        return []

    def _document_tokens(self, documents: Sequence[Document]) -> list[int]:
        # Not special: a document cannot end the user's message.
        text = "".join(f"{document.text.strip()}\n\n" for document in documents)
        return self.llama.tokenize(text.encode(), add_bos=False, special=False)

    def _question_tokens(self, question: str) -> list[int]:
        # A text that ends in a blank line has the question as its last paragraph.
        text = question.strip()
        return self.llama.tokenize(text.encode(), add_bos=False) + self._template.after

    # -- asking --------------------------------------------------------------------------------

    def ask(
        self, question: str, *, max_tokens: int = 512, temperature: float = 0.0
    ) -> Iterator[str]:
        """Answer a question in pieces of text as they are generated.

        Question and answer become part of the conversation. Ctrl-C, or leaving the iterator,
        ends the answer where it is.

        Raises
        ------
        ContextOverflow
            The context is full.
        """
        llama = self.llama
        turn = self._user_tokens() + self._question_tokens(question)
        room = llama.n_ctx() - llama.n_tokens - len(turn)
        if room < 1:
            raise ContextOverflow(
                f"the conversation fills the context of {llama.n_ctx()} tokens: start a new one, "
                "or use a larger --n-ctx"
            )
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        prompt = [*llama.input_ids[: llama.n_tokens].tolist(), *turn]
        n_answer = 0
        try:
            for token in llama.generate(prompt, temp=temperature):
                self._place, self._pending = "answer", [token]
                if llama_cpp.llama_vocab_is_eog(llama._model.vocab, token):
                    self._pending = []  # the template ends the turn itself
                    break
                if piece := decoder.decode(llama.detokenize([token], prev_tokens=turn[-1:])):
                    yield piece
                n_answer += 1
                if n_answer >= min(max_tokens, room):
                    break
            if piece := decoder.decode(b"", final=True):
                yield piece
        finally:
            if llama.n_tokens >= len(prompt):
                self._place = "answer"

    # -- settings and state --------------------------------------------------------------------

    def set_budget(self, value: Budget) -> None:
        """See :meth:`capkv_local.Llama.set_kv_budget`."""
        self.llama.set_kv_budget(value)

    def set_policy(self, name: str) -> None:
        """See :meth:`capkv_local.Llama.set_kv_policy`."""
        self.llama.set_kv_policy(name)

    def set_allocation(self, name: str) -> None:
        """See :meth:`capkv_local.Llama.set_kv_allocation`."""
        self.llama.set_kv_allocation(name)

    def stats(self) -> KVCacheStats:
        """See :meth:`capkv_local.Llama.kv_stats`."""
        return self.llama.kv_stats()

    def close(self) -> None:
        """Free the model."""
        self.llama.close()


def _ggml_type(name: str | None) -> int | None:
    """ggml type of a cache type name.

    Raises
    ------
    UnsupportedModel
        No cache type of that name.
    """
    return None if name is None else native.cache_type(name)
