"""The part of :class:`~capkv_local.chat.DocumentChat` that says where an answer comes from."""

from __future__ import annotations

from typing import TYPE_CHECKING

from capkv_local.citations.evidence import check_observed
from capkv_local.citations.passages import Citation, Evidence, cite_passages
from capkv_local.documents.sources import SourceMap
from capkv_local.errors import StateError

if TYPE_CHECKING:
    from capkv_local.llama import Llama


class CitedChat:
    """A chat whose answers name the passages that they looked at."""

    llama: Llama
    _sources: SourceMap
    _cite: bool = False
    _citations: list[Citation] | None = None  # None: the last answer was not cited

    @property
    def cite(self) -> bool:
        """Whether answers are cited."""
        return self._cite

    def set_cite(self, cite: bool) -> None:
        """Cite answers from now on, or do not; answers and cells are the same either way.

        Raises
        ------
        PolicyError
            The policy observes no queries, and there is no probe; nothing changes.
        """
        if cite:
            check_observed(self.llama)
        self._cite = cite

    def citations(self) -> list[Citation]:
        """The passages that the last answer looked at most, the strongest first.

        Empty if none stands out, which is what an answer that does not come from one place in the
        documents should give (docs/citations.md says how often it does).

        Raises
        ------
        StateError
            Answers are not cited, or the last one has not come to its end.
        """
        if self._citations is None:
            raise StateError("there is no cited answer: set_cite(True), then read one to its end")
        return list(self._citations)

    def _note_citations(self, evidence: Evidence) -> None:
        self._citations = cite_passages(evidence, self._sources, self._text)

    def _text(self, tokens: range) -> str:
        ids = self.llama.input_ids[tokens.start : tokens.stop].tolist()
        return self.llama.detokenize(ids).decode(errors="ignore")
