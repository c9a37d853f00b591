"""A chat on disk: one file, checked as a whole before anything of it is used.

Layout: magic, u64 length of the header, header (JSON), then the arrays that it lists, then the
SHA-256 of all before it.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from capkv_local.errors import StateError

_MAGIC = b"CAPKV\x00\x02\n"
_DIGEST = hashlib.sha256().digest_size

Arrays = dict[str, np.ndarray[Any, Any]]


def write_session(path: str | Path, header: dict[str, Any], arrays: Arrays) -> None:
    """Write a session atomically: a crash leaves the old file or the new one.

    Raises
    ------
    StateError
        The file cannot be written.
    """
    path = Path(path)
    listed = [[name, a.dtype.str, list(a.shape)] for name, a in arrays.items()]
    text = json.dumps({**header, "arrays": listed}).encode()
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as file:
            temporary = Path(file.name)
            digest = hashlib.sha256()
            for part in (
                _MAGIC + struct.pack("<Q", len(text)) + text,
                *(np.ascontiguousarray(a).tobytes() for a in arrays.values()),
            ):
                digest.update(part)
                file.write(part)
            file.write(digest.digest())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise StateError(f"cannot write {path}: {error.strerror}") from error
    try:
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise StateError(f"cannot write {path}: {error.strerror}") from error


def read_session(path: str | Path) -> tuple[dict[str, Any], Arrays]:
    """Read what :func:`write_session` wrote.

    Raises
    ------
    StateError
        Missing, not a session, of another version, or damaged.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise StateError(f"cannot read the session {path}: {error.strerror}") from error
    if data[:5] != _MAGIC[:5]:
        raise StateError(f"{path} is not a session saved by capkv")
    if data[: len(_MAGIC)] != _MAGIC:
        raise StateError(f"{path} was saved by another version of capkv: read the document again")
    if len(data) < len(_MAGIC) + 8 + _DIGEST or (
        hashlib.sha256(data[:-_DIGEST]).digest() != data[-_DIGEST:]
    ):
        raise StateError(f"{path} is damaged (its checksum is wrong): read the document again")
    start = len(_MAGIC) + 8
    (length,) = struct.unpack("<Q", data[len(_MAGIC) : start])
    header: dict[str, Any] = json.loads(data[start : start + length])
    offset = start + length
    arrays: Arrays = {}
    for name, dtype, shape in header.pop("arrays"):
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        arrays[name] = np.frombuffer(data[offset : offset + size], dtype=dtype).reshape(shape)
        offset += size
    return header, arrays
