"""Documents to tokens with their sources, no more of them at a time than is needed.

A context has room for so many tokens, so that it takes only these (and one more) to know whether
documents fit: they are tokenised ahead, however long the documents are. Of a pipe it is not known
when it ends, nor is it worth while to hold millions of tokens: then they come as they are decoded.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import psutil

from capkv_local.chat.tokenise import Tokeniser, Vocabulary
from capkv_local.documents import Document, DocumentStream
from capkv_local.documents.sources import Place, Source, SourceMap
from capkv_local.llama import Llama

# Tokens that are held at most; few models have been trained with longer contexts.
_MOST_AHEAD = 1 << 20
# Tokens that are decoded before more are made: a few batches.
_PIECE = 2048


@dataclass(frozen=True)
class IngestProgress:
    """Where reading is.

    Attributes
    ----------
    done, total
        Tokens read, and in all; None if that cannot be told. With nothing done yet, tokens are
        being counted, and ``total`` is how many there are so far.
    seconds
        So far.
    n_cells, kv_bytes
        Cells per head that are held, and their memory.
    estimated
        Whether ``total`` is an estimate.
    rss_bytes
        Memory that the process has now, with the model in it; not what is on a GPU.
    """

    done: int
    total: int | None
    seconds: float
    n_cells: int
    kv_bytes: int
    estimated: bool = False
    rss_bytes: int = 0


@dataclass(frozen=True)
class IngestReport:
    """What was read; ``complete`` is False after Ctrl-C, which keeps what was read so far."""

    tokens: int
    seconds: float
    complete: bool
    n_cells: int
    kv_bytes: int


@dataclass(frozen=True)
class _Mark:
    source: Source
    n_bytes: int  # of all documents, that are done behind the part


class Reading:
    """The tokens of documents, in order.

    Parameters
    ----------
    documents
        What to read; blank lines go between them.
    vocabulary
        Of the model.
    opening
        Tokens that go before them.

    Attributes
    ----------
    n_tokens
        Tokens so far.
    complete
        Whether these are all.
    sources
        Where each source starts: number of tokens before it, and the source.
    """

    def __init__(
        self,
        documents: Sequence[Document | DocumentStream],
        vocabulary: Vocabulary,
        opening: Sequence[int] = (),
    ) -> None:
        self._documents = documents
        self._blocks = Tokeniser[_Mark](vocabulary.tokenize, vocabulary.sizes).blocks(self._texts())
        self._held = array("i", opening)  # not decoded yet
        self._n_bytes = 0
        sizes = [document.n_bytes for document in documents]
        self._n_bytes_all = None if None in sizes else sum(size or 0 for size in sizes)
        self.n_tokens = len(opening)
        self.complete = False
        self.sources: list[tuple[int, Source]] = []

    @property
    def total(self) -> int | None:
        """Tokens in all; an estimate by the bytes until complete, None if nothing tells."""
        if self.complete:
            return self.n_tokens
        if self._n_bytes_all is None or self._n_bytes == 0:
            return None
        return max(self.n_tokens, self.n_tokens * self._n_bytes_all // self._n_bytes)

    def ahead(self, n_tokens: int, progress: Callable[[int, int], None]) -> None:
        """Make tokens until there are so many, or all; none if a pipe is among the documents.

        Raises
        ------
        DocumentError
            A document cannot be read on.
        """
        if self._n_bytes_all is None:
            return
        while self.n_tokens < min(n_tokens, _MOST_AHEAD) and self._more():
            progress(0, self.n_tokens)

    def pieces(self) -> Iterator[tuple[list[int], bool]]:
        """All tokens, and whether these are the last.

        Raises
        ------
        DocumentError
            A document cannot be read on.
        """
        while True:
            while len(self._held) < _PIECE and self._more():
                pass
            piece, self._held = self._held, array("i")
            # What comes next must be there to know whether there is any.
            self._more()
            yield piece.tolist(), self.complete and not self._held
            if self.complete and not self._held:
                return

    def note_sources(self, sources: SourceMap, n_before: int, n_now: int) -> None:
        """Note what was read as tokens ``n_before`` to ``n_now`` of a conversation."""
        sources.mark(n_before, None)
        for index, source in self.sources:
            if n_before + index < n_now:
                sources.mark(n_before + index, source)
        sources.mark(n_now, None)

    def _more(self) -> bool:
        block = next(self._blocks, None)
        if block is None:
            self.complete = True
            return False
        self.sources += [(self.n_tokens + i, mark.source) for i, mark in block.marks]
        if block.marks:
            self._n_bytes = block.marks[-1][1].n_bytes
        self._held.extend(block.tokens)
        self.n_tokens += len(block.tokens)
        return True

    def _texts(self) -> Iterator[tuple[str, _Mark]]:
        """Texts without the white space around them, a blank line behind each."""
        n_before = 0
        for document in self._documents:
            mark: _Mark | None = None
            space = ""  # that is text only if more text follows
            for part in document.parts():
                text = part.text if mark else part.text.lstrip()
                body = text.rstrip()
                if body:
                    if mark:
                        yield space, mark
                    elif document.heading:
                        body = f"{document.heading}\n\n{body}"
                    mark = self._mark(document, part.place, n_before + part.n_bytes)
                    yield body, mark
                    space = ""
                space += text[len(text.rstrip()) :]
            if mark:
                yield "\n\n", mark
            n_before += document.n_bytes or 0

    def _mark(self, document: Document | DocumentStream, place: Place, n_bytes: int) -> _Mark:
        return _Mark(Source(document.name, place), n_bytes)


class Meter:
    """Says how reading goes on: to be called after each step."""

    def __init__(
        self, llama: Llama, reading: Reading, progress: Callable[[IngestProgress], None] | None
    ) -> None:
        self._llama, self._reading, self._progress = llama, reading, progress
        self._n_before = llama.n_tokens
        self._process = psutil.Process()
        self._start = time.perf_counter()

    @property
    def n_read(self) -> int:
        """Tokens that are decoded."""
        return self._llama.n_tokens - self._n_before

    @property
    def seconds(self) -> float:
        """Time since the start."""
        return time.perf_counter() - self._start

    def __call__(self, done: int, total: int) -> None:
        if self._progress is None:
            return
        stats, n_read = self._llama.kv_stats(), self.n_read
        self._progress(
            IngestProgress(
                done=n_read,
                total=self._reading.total if n_read else self._reading.n_tokens,
                seconds=self.seconds,
                n_cells=stats.n_cells,
                kv_bytes=stats.kv_bytes,
                estimated=not self._reading.complete,
                rss_bytes=self._process.memory_info().rss,
            )
        )
