"""Snapshot files: what is written comes back, and whatever else is there is refused."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from capkv_local.errors import StateError
from capkv_local.snapshot import VERSION, read_header, read_snapshot, write_snapshot

HEADER = {"name": "a book", "extra": {"sources": [[0, "page 1"]]}}
fast = settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])


def arrays() -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(0)
    return {
        "tokens": np.arange(100, dtype=np.int32),
        "state": rng.normal(size=1000).astype(np.float16).view(np.uint8),
        "carried": rng.random((2, 3, 50), dtype=np.float32),
        "none": np.empty((0, 3), dtype=np.float32),
    }


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "book.capkv"
    write_snapshot(path, HEADER, arrays())
    return path


def same(path: Path) -> bool:
    header, read = read_snapshot(path)
    return header == HEADER and all(
        read[name].dtype == array.dtype and np.array_equal(read[name], array)
        for name, array in arrays().items()
    )


# ---- what is written comes back ----------------------------------------------------------------


def test_what_was_written_comes_back(file: Path) -> None:
    assert same(file)
    header = read_header(file)
    assert header["name"] == "a book"
    assert [entry[0] for entry in header["arrays"]] == list(arrays())


@fast
@given(
    array=st.one_of(
        hnp.arrays(np.uint8, hnp.array_shapes(min_dims=1, max_dims=1, min_side=0, max_side=50)),
        hnp.arrays(np.int32, hnp.array_shapes(max_dims=4, min_side=0, max_side=6)),
        hnp.arrays(np.float32, hnp.array_shapes(max_dims=3, max_side=6)),
    )
)
def test_every_array_comes_back_bit_for_bit(array: np.ndarray[Any, Any], tmp_path: Path) -> None:
    path = tmp_path / "a.capkv"
    write_snapshot(path, {}, {"array": array})
    read = read_snapshot(path)[1]["array"]
    assert (read.dtype, read.shape) == (array.dtype, array.shape)
    assert read.tobytes() == array.tobytes()


def test_halves_are_stored_smaller_than_zstd_alone_does(tmp_path: Path) -> None:
    state = np.random.default_rng(1).normal(size=200_000).astype(np.float16).view(np.uint8)
    size = write_snapshot(tmp_path / "a.capkv", {}, {"state": state})
    assert size < 0.97 * len(zstandard.ZstdCompressor(level=1).compress(state.data))


# ---- whatever else is there is refused ---------------------------------------------------------

Mutation = Callable[[bytes], bytes]


@st.composite
def mutations(draw: st.DrawFn) -> Mutation:
    """One thing that disks, transfers and editors do to a file."""
    at, n = draw(st.floats(0, 1)), draw(st.integers(1, 64))
    junk = draw(st.binary(min_size=1, max_size=64))
    kind = draw(st.sampled_from(("flip", "cut", "lose", "insert", "overwrite", "zero", "append")))

    def mutate(data: bytes) -> bytes:
        i = min(int(at * len(data)), len(data) - 1)
        if kind == "flip":
            return data[:i] + bytes([data[i] ^ (1 << n % 8)]) + data[i + 1 :]
        return {
            "cut": data[:i],
            "lose": data[:i] + data[i + n :],
            "insert": data[:i] + junk + data[i:],
            "overwrite": data[:i] + junk + data[i + len(junk) :],
            "zero": data[:i] + bytes(n) + data[i + n :],
            "append": data + junk,
        }[kind]

    return mutate


@settings(fast, max_examples=400)
@given(mutate=mutations())
def test_a_mutated_file_is_refused_or_the_same(mutate: Mutation, file: Path) -> None:
    whole = file.read_bytes()
    file.write_bytes(mutate(whole))
    try:
        assert same(file)
    except StateError as error:
        assert str(file) in str(error)
    finally:
        file.write_bytes(whole)


def test_every_single_wrong_byte_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a.capkv"
    write_snapshot(path, {}, {"tokens": np.arange(5, dtype=np.int32)})
    whole = path.read_bytes()
    for i in range(len(whole)):
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 0x10]) + whole[i + 1 :])
        with pytest.raises(StateError):
            read_snapshot(path)


def seal(header: Any, frames: bytes = b"", *, text: bytes | None = None) -> bytes:
    """A file with right checksums, whatever is in it."""
    head = zstandard.ZstdCompressor().compress(
        json.dumps(header).encode() if text is None else text
    )
    start = b"CAPKV\0" + bytes([VERSION]) + b"\n" + struct.pack("<I", len(head)) + head
    whole = start + hashlib.sha256(start).digest() + frames
    return whole + hashlib.sha256(whole).digest()


ZEROS = zstandard.ZstdCompressor().compress(bytes(64))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is empty"),
        (b"CAPKV", "it ends early"),
        (b"%PDF-1.7 and more", "not a snapshot"),
        (b"CAPKV\0\x02\n" + bytes(100), f"version 2 of the format, this capkv reads {VERSION}"),
        (b"CAPKV\0\x07\n" + bytes(100), "version 7 of the format"),
        (b"CAPKV\0\x03\n\xff\xff\xff\xff" + bytes(100), "does not fit in it"),
        (b"CAPKV\0\x03\r\n" + bytes(100), "line ends"),
        (seal([]), "its header is not one"),
        (seal({}), "its list of arrays cannot be read"),
        (seal({"arrays": 3}), "its list of arrays cannot be read"),
        (seal({"arrays": [["a", "|u1", [1 << 40], 1, 10]]}, bytes(10)), "cannot hold"),
        (seal({"arrays": [["a", "|O", [1], 1, 10]]}, bytes(10)), "unknown kind"),
        (seal({"arrays": [["a", "|u1", [-1], 1, 10]]}, bytes(10)), "impossible shape"),
        (seal({"arrays": [["a", "|u1", [True], 1, 10]]}, bytes(10)), "impossible shape"),
        (seal({"arrays": [["a", "|u1", [10], 1, 10]]}, bytes(10)), "a: "),
        (seal({"arrays": [["a", "|u1", [63], 1, len(ZEROS)]]}, ZEROS), "a: more than 63 bytes"),
        (seal({"arrays": [["a", "|u1", [65], 1, len(ZEROS)]]}, ZEROS), "64 bytes instead of 65"),
        (seal({"arrays": [["a", "|u1", [64], 1, 1 << 50]]}, ZEROS), "instead of"),
        (seal({"arrays": [["a", "|u1", [64], 1, len(ZEROS) + 1]]}, ZEROS + b"x"), "a: "),
        (seal(None, text=b"{not json"), "its header cannot be read"),
        (seal(None, text=b"[" * 100_000), "its header cannot be read"),
        (seal(None, text=bytes(65 << 20)), "its header cannot be read"),
    ],
)
def test_what_is_no_snapshot_is_refused_with_the_reason(
    content: bytes, reason: str, tmp_path: Path
) -> None:
    path = tmp_path / "book.capkv"
    path.write_bytes(content)
    with pytest.raises(StateError, match=r"read|give") as caught:
        read_snapshot(path)
    assert reason in str(caught.value) and str(path) in str(caught.value)


def test_no_file_a_folder_and_no_rights_are_refused(tmp_path: Path, file: Path) -> None:
    with pytest.raises(StateError, match="No such file"):
        read_snapshot(tmp_path / "gone.capkv")
    with pytest.raises(StateError, match=r"directory|denied"):
        read_snapshot(tmp_path)
    with pytest.raises(StateError, match="null"):
        read_snapshot("a\0b")
    if sys.platform != "win32" and os.geteuid():
        file.chmod(0)
        with pytest.raises(StateError, match="rights"):
            read_snapshot(file)


# ---- writing -----------------------------------------------------------------------------------


def test_what_cannot_be_written_leaves_all_as_it_was(file: Path, tmp_path: Path) -> None:
    with pytest.raises(StateError, match="No such file"):
        write_snapshot(tmp_path / "gone" / "a.capkv", {}, {})
    with pytest.raises(StateError, match="folder"):
        write_snapshot(tmp_path, {}, {})
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


@pytest.mark.skipif(sys.platform == "win32", reason="limits of POSIX")
def test_a_full_disk_leaves_the_old_file_and_no_other(file: Path) -> None:
    import resource
    import signal

    before = file.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
    try:
        with pytest.raises(StateError, match=r"cannot write .*room"):
            write_snapshot(file, HEADER, arrays())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.skipif(sys.platform == "win32", reason="rights of POSIX")
def test_rights_follow_the_umask_unless_private(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_snapshot(tmp_path / "shared", {}, {})
        write_snapshot(tmp_path / "private", {}, {}, private=True)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "shared").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "private").stat().st_mode) == 0o600


def test_the_target_of_a_link_is_replaced(file: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.capkv"
    link.symlink_to(file)
    write_snapshot(link, {"new": True}, {})
    assert link.is_symlink() and read_header(file)["new"] is True
