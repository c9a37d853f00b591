"""``DocumentChat``: read documents through a small KV cache, then ask about them."""

from __future__ import annotations

import codecs
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import llama_cpp

from capkv_local import native
from capkv_local.cache.stats import KVCacheStats
from capkv_local.chat.reading import IngestProgress, IngestReport, Meter, Reading
from capkv_local.chat.tokenise import Vocabulary
from capkv_local.chat.turns import TurnsChat
from capkv_local.citations.cited_chat import CitedChat
from capkv_local.citations.evidence import Attended, check_observed
from capkv_local.devices.rpc import Servers
from capkv_local.documents import Document, DocumentStream
from capkv_local.documents.sources import SourceMap
from capkv_local.errors import ContextOverflow
from capkv_local.llama import Budget, Llama, Observe
from capkv_local.llama.template import ChatTemplate
from capkv_local.models import default_model, fingerprint
from capkv_local.policies import get_policy
from capkv_local.snapshot.saved_chat import SavedChat

# Tokens of the context that a document must leave for the question and its answer.
_REPLY_TOKENS = 256


class DocumentChat(TurnsChat, SavedChat, CitedChat):
    """A conversation about documents.

    Parameters
    ----------
    model
        GGUF file; None for :func:`~capkv_local.models.default_model`.
    kv_policy, kv_budget, kv_allocation, kv_observe, probe_stride, n_ctx
        As :class:`~capkv_local.Llama`; ``n_ctx`` None is the context that the model was trained
        with. By default a probe says what stays: reading takes two to three times as long, and
        questions that come later find several times as much (docs/evaluation.md).
    kv_room
        Cells for the conversation beside those of the document; a batch's cells serve it, too.
        Default: as :class:`~capkv_local.Llama`.
    keep_turns
        Whether questions and answers stay in the conversation, see :meth:`ask`.
    n_threads
        CPU threads; None for all.
    n_gpu_layers, rpc_servers
        Layers on other devices than the CPU, as :class:`~capkv_local.devices.placed.PlacedLlama`.
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
        kv_room: int | None = None,
        keep_turns: bool = True,
        n_threads: int | None = None,
        n_gpu_layers: int | None = None,
        rpc_servers: Servers | None = None,
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
            kv_room=kv_room,
            n_threads=threads,
            n_threads_batch=threads,
            n_gpu_layers=n_gpu_layers,
            rpc_servers=rpc_servers,
            type_k=_ggml_type(type_k),
            type_v=_ggml_type(type_v),
            verbose=verbose,
            seed=llama_cpp.LLAMA_DEFAULT_SEED if seed is None else seed,
        )
        self._template = ChatTemplate.of(self.llama)
        # Where the conversation stands: before it, in a user message, or behind an answer.
        self._place = "start"
        self._pending = []  # sampled, but not decoded yet
        self._sources = SourceMap()  # which document each token is of
        self._keep_turns = keep_turns

    # -- reading -------------------------------------------------------------------------------

    def ingest(
        self,
        documents: Sequence[Document | DocumentStream],
        *,
        question: str | None = None,
        progress: Callable[[IngestProgress], None] | None = None,
    ) -> IngestReport:
        """Read documents into the conversation; a document may be larger than memory.

        What was read is protected: the conversation about it takes no cell from it. In the middle
        of a conversation, the turns so far and earlier documents share the budget with what is
        read now, and are protected with it.

        Parameters
        ----------
        question
            When it is known before reading, its tokens look at every chunk, so that the cells it
            needs are kept (``observe="question"``); a probe knows less and does not look then.
        progress
            Called while tokens are counted, and after each chunk.

        Raises
        ------
        ContextOverflow
            Documents and a reply do not fit the context. Nothing is read, unless a pipe is among
            them (or over a million tokens): then what fits has been read and stays, as
            ``n_read`` says.
        DocumentError
            A document turns out to be damaged; what was read before stays.
        """
        llama = self.llama
        opening = self._user_tokens()
        n_before = llama.n_tokens
        room = llama.n_ctx() - n_before - _REPLY_TOKENS
        reading = Reading(documents, Vocabulary(llama), opening)
        reading.ahead(room + 1, Meter(llama, reading, progress))
        total = reading.total or 0
        # Of more than could be counted there is an estimate, which may be wrong.
        if reading.n_tokens > room or total > 2 * room:
            about = "" if reading.complete else "about "
            raise self._overflow(f"the documents have {about}{total} tokens", room)
        looks: dict[str, Any] = {}
        if question is not None:
            looks = {"observe": "question", "question": self._question_tokens(question)}
        meter, complete = Meter(llama, reading, progress), True
        try:
            with llama.unprotected():
                for tokens, last in reading.pieces():
                    left = max(0, room - meter.n_read)
                    fits = len(tokens) <= left
                    llama.prefill(tokens[:left], progress=meter, more=fits and not last, **looks)
                    if not fits:
                        n_read = meter.n_read
                        what = f"the documents have more than the {n_read} tokens that were read"
                        raise self._overflow(what, room, n_read)
        except KeyboardInterrupt:
            complete = False
        finally:
            if meter.n_read:
                llama.protect()
                self._place, self._pending = "user", []
                reading.note_sources(self._sources, n_before, llama.n_tokens)
        stats = llama.kv_stats()
        return IngestReport(meter.n_read, meter.seconds, complete, stats.n_cells, stats.kv_bytes)

    def _user_tokens(self) -> list[int]:
        """Tokens that open a user message here."""
        if self._place == "start":
            return list(self._template.first)
        if self._place == "answer":
            return self._pending + self._template.between
        return []

    def _overflow(self, what: str, room: int, n_read: int = 0) -> ContextOverflow:
        n_ctx, trained = self.llama.n_ctx(), self.llama._model.n_ctx_train()
        return ContextOverflow(
            f"{what}, the context has room for {max(room, 0)} of {n_ctx} (the model was trained "
            f"with {trained}): use a larger --n-ctx, a model with a longer context, or less text",
            n_read=n_read,
        )

    def _question_tokens(self, question: str) -> list[int]:
        # A text that ends in a blank line has the question as its last paragraph.
        text = question.strip()
        return self.llama.tokenize(text.encode(), add_bos=False) + self._template.after

    # -- asking --------------------------------------------------------------------------------

    def ask(
        self, question: str, *, max_tokens: int = 512, temperature: float = 0.0
    ) -> Iterator[str]:
        """Answer a question in pieces of text as they are generated.

        Question and answer become part of the conversation; with ``keep_turns=False`` they are
        dropped afterwards, and the next question meets the same cells. Ctrl-C, or leaving the
        iterator, ends the answer where it is. The oldest turns are dropped when the context is
        full.

        Raises
        ------
        ContextOverflow
            The context has no room for the question behind the document.
        BudgetError
            The conversation's cells do not hold the question.
        PolicyError
            Answers are cited, and the policy (since then another) observes no queries.
        """
        llama = self.llama
        self._citations = None
        if self._cite:
            check_observed(llama)
        turn = self._begin_turn(question, min(max_tokens, _REPLY_TOKENS))
        room = llama.n_ctx() - llama.n_tokens - len(turn)
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        prompt = [*llama.input_ids[: llama.n_tokens].tolist(), *turn]
        n_answer = 0
        n_between = len(self._template.after)
        attended = Attended(llama, len(prompt), n_between) if self._cite else None
        try:
            for token in llama.generate(prompt, temp=temperature):
                if attended is not None:
                    attended.look()
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
            if attended is not None:
                attended.look(last=True)
                self._note_citations(attended.evidence)
        finally:
            if attended is not None:
                attended.close()
            if llama.n_tokens >= len(prompt):
                self._place = "answer"
            if not self._keep_turns:
                self.forget()

    def _begin_turn(self, question: str, n_reply: int) -> list[int]:
        """Tokens of a question here, after seeing to their room and that of ``n_reply`` more."""
        llama = self.llama
        if not self._keep_turns:
            self.forget()
        asked = self._question_tokens(question)
        n_ctx, n_document = llama.n_ctx(), llama.n_protected
        if n_document + len(asked) >= n_ctx:
            raise ContextOverflow(
                f"a question of {len(asked)} tokens does not fit into the context of {n_ctx}, "
                f"behind {n_document} that were read: use a larger --n-ctx or a shorter question"
            )
        turn = self._user_tokens() + asked
        if len(turn) <= llama.n_turn_max and llama.n_tokens + len(turn) + n_reply > n_ctx:
            with self._turns_aside(len(turn)):
                pass
            turn = self._user_tokens() + asked
        if llama.n_tokens + len(turn) >= n_ctx and not n_document:
            raise ContextOverflow(
                f"the conversation fills the context of {n_ctx} tokens: start a new one, or use a "
                "larger --n-ctx"
            )
        llama.begin_turn(len(turn))
        return turn

    # -- settings and state --------------------------------------------------------------------

    def set_budget(self, value: Budget) -> None:
        """See :meth:`capkv_local.Llama.set_kv_budget`; a smaller one evicts from the document."""
        if self.llama.kv_cells(value) >= self.stats().budget:
            self.llama.set_kv_budget(value)
            return
        with self._turns_aside():
            self.llama.set_kv_budget(value)

    def set_policy(self, name: str) -> None:
        """See :meth:`capkv_local.Llama.set_kv_policy`."""
        policy = get_policy(name)
        with self._turns_aside():
            self.llama.set_kv_policy(policy)

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
