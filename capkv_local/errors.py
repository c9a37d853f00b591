"""Every error capkv-local raises on purpose: what happened, with which value, what to do.

All derive from :class:`CapKVError`, so ``except CapKVError`` catches them together; those that
replace a ``ValueError`` or ``RuntimeError`` of llama-cpp-python also derive from it, so existing
handlers keep working.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class CapKVError(Exception):
    """Base of all errors of this package."""


class BudgetError(CapKVError, ValueError):
    """A KV budget that cannot be met: too small, too large or unreadable."""


class PolicyError(CapKVError, ValueError):
    """An unknown policy, or a policy that returned unusable scores."""


class ContextWarning(UserWarning):
    """A context longer than the model was trained with."""


class UnsupportedModel(CapKVError):
    """A model, or a setting, whose memory cannot be evicted per head."""


class ModelFileError(CapKVError, ValueError):
    """The model file is missing, damaged or not a GGUF."""


class NativeBuildMissing(CapKVError):
    """The loaded llama.cpp library lacks the eviction functions (a stock build)."""


class ServerError(CapKVError, ConnectionError):
    """An RPC server that cannot be used: its address, out of reach, busy, or of another build."""


class NativeError(CapKVError, RuntimeError):
    """A native call failed for a reason the other errors do not name."""


class OutOfMemory(NativeError, MemoryError):
    """The memory that a cache of this size needs is not there."""


class ContextOverflow(CapKVError, ValueError):
    """More tokens than the logical context holds.

    Attributes
    ----------
    n_read : int
        Tokens that were read before, and that stay; 0 if it was known before reading.
    """

    def __init__(self, message: str, *, n_read: int = 0) -> None:
        super().__init__(message)
        self.n_read = n_read


class StateError(CapKVError, RuntimeError):
    """A saved state that does not fit this model, cache or policy."""


class DocumentError(CapKVError, ValueError):
    """A document that cannot be read as text."""


class ConfigError(CapKVError, ValueError):
    """A configuration file, or an environment variable, that cannot be used."""


class EvaluationError(CapKVError, ValueError):
    """Records, results or settings of an evaluation that cannot be used."""


class CorpusError(CapKVError):
    """The texts of an evaluation cannot be downloaded or read."""


def unknown_name(what: str, name: str, known: Iterable[str]) -> str:
    """Sentence for a name that nothing has: which was perhaps meant, and which there are."""
    known = list(known)
    near = difflib.get_close_matches(name.lower().replace("_", "-"), known, n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'? " if near else ""
    return f"Unknown {what} '{name}': {hint}There are {', '.join(known)}."
