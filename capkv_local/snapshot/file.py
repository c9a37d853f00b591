"""A snapshot file: arrays and what is known about them, whole or refused.

Layout: magic with the version, u32 length of the header, the header (zstd over JSON) and its
digest; one zstd frame per array; the digest of all before it. Nothing is used before its digest was
right, and nothing larger is allocated than a file of this size can be about.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import zstandard

from capkv_local.errors import StateError

VERSION = 3  # 2 was not compressed

Array = np.ndarray[Any, Any]

_NAME = b"CAPKV\0"
_MAGIC = _NAME + bytes([VERSION]) + b"\n"
_LENGTH = struct.Struct("<I")
_START = len(_MAGIC) + _LENGTH.size
_DIGEST = hashlib.sha256().digest_size

# Higher levels gain nothing: what is left after the first is noise (docs/snapshots.md).
_LEVEL = 1
_TRIED = 1 << 20  # bytes of an array that say how to store it
_PLANES = (1, 2, 4)
_AT_ONCE = 1 << 15
_DTYPES = ("|u1", "<i4", "<f4")

# Keys with positions do not shrink to a tenth; a header of 64 MiB is a few million sources.
_MAX_HEADER = 64 << 20
_MAX_RATIO = 256
_MAX_SMALL = 64 << 20


def write_snapshot(
    path: str | Path,
    header: Mapping[str, Any],
    arrays: Mapping[str, Array],
    *,
    private: bool = False,
) -> int:
    """Write a snapshot atomically: a crash leaves the old file or the new one.

    Parameters
    ----------
    path
        File to write; its folder must be there. The target of a link is replaced, not the link.
    header
        What JSON can say. ``"arrays"`` is taken.
    arrays
        Arrays of bytes, int32 or float32, any shape.
    private
        Only the user may read the file; otherwise what the umask allows.

    Returns
    -------
    int
        Size of the file in bytes.

    Raises
    ------
    StateError
        The file cannot be written; what was there before is still there.
    """
    frames, listed = [], []
    for name, array in arrays.items():
        frame, n_planes = _compress(array)
        frames.append(frame)
        listed.append([name, array.dtype.str, list(array.shape), n_planes, len(frame)])
    text = json.dumps({**header, "arrays": listed}).encode()
    if len(text) > _MAX_HEADER:
        raise StateError(f"cannot write {path}: its header of {len(text)} bytes is too long")
    head = zstandard.ZstdCompressor().compress(text)
    start = _MAGIC + _LENGTH.pack(len(head)) + head
    whole = hashlib.sha256()

    def write(file: BinaryIO) -> None:
        for part in (start, _digest(start), *frames):
            whole.update(part)
            file.write(part)
        file.write(whole.digest())

    try:
        return _replace(Path(os.path.realpath(path)), write, 0o600 if private else 0o666)
    except OSError as error:
        raise StateError(
            f"cannot write {path}: {error.strerror or error}; name a folder that you may write to "
            "and that has room"
        ) from error


def read_header(path: str | Path) -> dict[str, Any]:
    """Read and check the header only; its ``"arrays"`` say what follows.

    Raises
    ------
    StateError
        As :func:`read_snapshot`; damage behind the header is not seen.
    """
    with _opened(path) as file:
        return _read_start(path, file)[0]


def read_snapshot(path: str | Path) -> tuple[dict[str, Any], dict[str, Array]]:
    """Read what :func:`write_snapshot` wrote.

    Raises
    ------
    StateError
        Missing, not a snapshot, of another version, truncated or damaged.
    """
    with _opened(path) as file:
        header, start = _read_start(path, file)
        try:
            listed = [_Listed(*entry) for entry in header.pop("arrays")]
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged(path, f"its list of arrays cannot be read: {error}") from error
        expected = len(start) + sum(entry.n_stored for entry in listed) + _DIGEST
        size = os.fstat(file.fileno()).st_size
        if size != expected:
            raise _damaged(path, f"it has {size} bytes instead of {expected}")
        # The size is known and there: no header can make this allocate more than the file has.
        rest = file.read(expected - len(start))
    body, end = memoryview(rest)[:-_DIGEST], rest[-_DIGEST:]
    whole = hashlib.sha256(start)
    whole.update(body)
    if whole.digest() != end:
        raise _damaged(path, "its checksum is wrong")
    arrays: dict[str, Array] = {}
    offset = 0
    for entry in listed:
        try:
            arrays[entry.name] = _expand(body[offset : offset + entry.n_stored], entry)
        except (zstandard.ZstdError, ValueError) as error:
            raise _damaged(path, f"{entry.name}: {error}") from error
        offset += entry.n_stored
    return header, arrays


# ---- parts of the file -------------------------------------------------------------------------


class _Listed:
    """One entry of the header's list of arrays, checked.

    Raises
    ------
    ValueError, TypeError
        No array that :func:`write_snapshot` writes has such an entry.
    """

    def __init__(
        self, name: str, dtype: str, shape: list[int], n_planes: int, n_stored: int
    ) -> None:
        numbers = [*shape, n_planes, n_stored]
        if not isinstance(name, str) or dtype not in _DTYPES or n_planes not in _PLANES:
            raise ValueError("unknown kind of array")
        if any(type(number) is not int or number < 0 for number in numbers) or len(shape) > 8:
            raise ValueError("impossible shape")
        self.name, self.dtype, self.shape = name, np.dtype(dtype), tuple(shape)
        self.n_planes, self.n_stored = n_planes, n_stored
        self.n_bytes = math.prod(shape) * self.dtype.itemsize
        if self.n_bytes > max(_MAX_SMALL, _MAX_RATIO * n_stored):
            raise ValueError(f"{n_stored} bytes cannot hold {self.n_bytes}")


def _opened(path: str | Path) -> BinaryIO:
    try:
        return Path(path).open("rb")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise StateError(
            f"cannot read the snapshot {path}: {reason}; check its name and its rights"
        ) from error


def _read_start(path: str | Path, file: BinaryIO) -> tuple[dict[str, Any], bytes]:
    """The header, and all bytes up to the first array."""
    try:
        head = file.read(_START)
        if not head:
            raise _damaged(path, "it is empty")
        if head[: len(_NAME)] != _NAME[: len(head)]:
            raise StateError(
                f"{path} is not a snapshot or session of capkv: give a file that `capkv snapshot` "
                "or /save wrote"
            )
        if len(head) < _START:
            raise _damaged(path, "it ends early")
        if head[: len(_MAGIC)] != _MAGIC and head[len(_NAME)] == VERSION:
            raise _damaged(path, "its line ends were changed")
        if head[: len(_MAGIC)] != _MAGIC:
            raise StateError(
                f"{path} has version {head[len(_NAME)]} of the format, this capkv reads {VERSION}: "
                "read the documents again, or use the capkv that wrote it"
            )
        (length,) = _LENGTH.unpack(head[len(_MAGIC) :])
        if length > min(_MAX_HEADER, os.fstat(file.fileno()).st_size):
            raise _damaged(path, f"a header of {length} bytes does not fit in it")
        head += file.read(length)
        digest = file.read(_DIGEST)
    except OSError as error:
        raise StateError(f"cannot read the snapshot {path}: {error.strerror or error}") from error
    if digest != _digest(head):
        raise _damaged(path, "the checksum of its header is wrong")
    try:
        text = _decompress(head[_START:], _MAX_HEADER)
        header = json.loads(text)
    except (zstandard.ZstdError, ValueError, RecursionError) as error:
        raise _damaged(path, f"its header cannot be read: {error}") from error
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not one")
    return header, head + digest


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def _damaged(path: str | Path, reason: str) -> StateError:
    return StateError(f"{path} is damaged ({reason}): read the documents again")


def _compress(array: Array) -> tuple[bytes, int]:
    """A frame, and how many planes its bytes were sorted into.

    Sorting the bytes of 16-bit numbers by significance saves 7% of an f16 cache; a sample says
    whether it does here.
    """
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    middle = data[max(0, len(data) - _TRIED) // 2 :][:_TRIED]
    compressor = zstandard.ZstdCompressor(level=_LEVEL)
    n_planes = min(_PLANES, key=lambda n: len(compressor.compress(_sorted(middle, n).data)))
    return compressor.compress(_sorted(data, n_planes).data), n_planes


def _sorted(data: Array, n_planes: int) -> Array:
    """First bytes of all groups of ``n_planes``, then the second ones; a rest stays behind."""
    if n_planes == 1:
        return data
    end = len(data) // n_planes * n_planes
    return np.concatenate([*(data[i:end:n_planes] for i in range(n_planes)), data[end:]])


def _expand(frame: memoryview, entry: _Listed) -> Array:
    data = np.frombuffer(_decompress(frame, entry.n_bytes), dtype=np.uint8)
    if len(data) != entry.n_bytes:
        raise ValueError(f"{len(data)} bytes instead of {entry.n_bytes}")
    if entry.n_planes > 1:
        stored, data = data, np.empty_like(data)
        end = len(data) // entry.n_planes * entry.n_planes
        planes = stored[:end].reshape(entry.n_planes, -1)
        groups = data[:end].reshape(-1, entry.n_planes)
        for i in range(0, len(groups), _AT_ONCE):  # what fits a CPU's cache
            for k in range(entry.n_planes):
                groups[i : i + _AT_ONCE, k] = planes[k, i : i + _AT_ONCE]
        data[end:] = stored[end:]
    return data.view(entry.dtype).reshape(entry.shape)


def _decompress(frame: bytes | memoryview, n_most: int) -> bytes:
    """Expand one frame that says itself how much is in it, which is what gets allocated."""
    if zstandard.frame_content_size(frame) > n_most:
        raise ValueError(f"more than {n_most} bytes in it")
    return zstandard.ZstdDecompressor().decompress(
        frame, max_output_size=n_most, allow_extra_data=False
    )


def _replace(path: Path, write: Callable[[BinaryIO], None], mode: int) -> int:
    """Write beside ``path``, then put it there; nothing is left behind when that fails."""
    if path.is_dir():
        raise IsADirectoryError(0, "it is a folder")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    # os.open applies the umask; the modules that make temporary files do not.
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    try:
        with open(os.open(temporary, flags, mode), "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
            size = os.fstat(file.fileno()).st_size
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the new name is on the disk, too
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    return size
