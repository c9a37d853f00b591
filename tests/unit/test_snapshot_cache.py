"""Kept readings: one per model, text and settings; private, limited, listed, deleted."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

import numpy as np
import pytest

from capkv_local.documents import Document
from capkv_local.errors import CapKVError, StateError
from capkv_local.snapshot import write_snapshot
from capkv_local.snapshot.cache import SnapshotCache

BOOK = Document("book.txt", "Once upon a time.", "text")


class Chat:
    """What can be saved, as large as asked."""

    def __init__(self, n_bytes: int = 10_000) -> None:
        self.n_bytes = n_bytes

    def save(self, path: Path, *, private: bool = False) -> int:
        noise = np.random.default_rng(0).integers(0, 256, self.n_bytes, dtype=np.uint8)
        header = {"model": "/m/small.gguf", "n_tokens": 7, "extra": {"documents": ["book.txt"]}}
        return write_snapshot(path, header, {"state": noise}, private=private)


def cache(folder: Path, limit: str = "5GiB") -> SnapshotCache:
    return SnapshotCache({"CAPKV_HOME": str(folder), "CAPKV_CACHE_SIZE": limit})


def store(kept: SnapshotCache, name: str, age: float = 0, n_bytes: int = 10_000) -> Path:
    path = kept.folder / f"{name}.capkv"
    kept.store(path, Chat(n_bytes))  # type: ignore[arg-type]
    os.utime(path, (1e9 - age, 1e9 - age))
    return path


def test_the_same_reading_has_the_same_place_and_no_other_has(tmp_path: Path) -> None:
    kept = cache(tmp_path)
    places = [
        kept.path("model", [BOOK], {"kv_budget": 64}),
        kept.path("other", [BOOK], {"kv_budget": 64}),
        kept.path("model", [BOOK], {"kv_budget": "25%"}),
        kept.path("model", [BOOK], {}),
        kept.path("model", [BOOK, BOOK], {"kv_budget": 64}),
        kept.path("model", [Document("book.txt", "Once", "text")], {"kv_budget": 64}),
        kept.path("model", [Document("b.txt", BOOK.text, "text")], {"kv_budget": 64}),
    ]
    assert len(set(places)) == len(places)
    assert kept.path("model", [BOOK], {"kv_budget": 64}) == places[0]
    assert places[0].parent == tmp_path / "snapshots"


@pytest.mark.skipif(sys.platform == "win32", reason="rights of POSIX")
def test_files_are_the_users_alone(tmp_path: Path) -> None:
    kept = cache(tmp_path)
    path = store(kept, "aa")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(kept.folder.stat().st_mode) == 0o700


def test_what_was_used_longest_ago_goes_first(tmp_path: Path) -> None:
    kept = cache(tmp_path, "25KB")
    store(kept, "oldest", 300)
    store(kept, "older", 200)
    kept.used(kept.folder / "oldest.capkv")  # now the youngest
    store(kept, "new")
    assert {entry.name for entry in kept.entries()} == {"oldest", "new"}


def test_larger_than_the_limit_is_not_kept_and_evicts_nothing(tmp_path: Path) -> None:
    kept = cache(tmp_path, "25KB")
    store(kept, "small")
    with pytest.raises(StateError, match="CAPKV_CACHE_SIZE"):
        store(kept, "large", n_bytes=30_000)
    assert [entry.name for entry in kept.entries()] == ["small"]


def test_what_a_dead_run_left_is_cleaned_up(tmp_path: Path) -> None:
    kept = cache(tmp_path)
    store(kept, "one")
    old, young = kept.folder / ".x.capkv.1.tmp", kept.folder / ".x.capkv.2.tmp"
    old.touch()
    os.utime(old, (0, 0))
    young.touch()
    store(kept, "two")
    assert not old.exists() and young.exists()
    assert len(kept.clear()) == 2
    assert not any(kept.folder.iterdir())


def test_entries_show_damage_and_come_by_last_use(tmp_path: Path) -> None:
    kept = cache(tmp_path)
    assert kept.entries() == []
    store(kept, "old", 100)
    store(kept, "new").write_bytes(b"CAPKV")
    new, old = kept.entries()
    assert (new.name, new.header, new.n_bytes) == ("new", None, 5)
    assert old.header is not None and old.header["extra"]["documents"] == ["book.txt"]


def test_removing_by_name_or_its_beginning(tmp_path: Path) -> None:
    kept = cache(tmp_path)
    with pytest.raises(CapKVError, match="nothing is kept"):
        kept.remove(["aa"])
    for name in ("aabb", "aacc", "dddd"):
        store(kept, name)
    for wrong in ("aa", "", "../aabb", "eeee"):
        with pytest.raises(CapKVError, match="There are"):
            kept.remove(["dddd", wrong])
    assert len(kept.entries()) == 3  # a wrong name, and none goes
    assert [entry.name for entry in kept.remove(["aab", "dddd.capkv"])] == ["aabb", "dddd"]
    assert [entry.name for entry in kept.entries()] == ["aacc"]


@pytest.mark.parametrize("limit", ["lots", "5 GiX", "-1"])
def test_a_limit_that_is_no_size_is_refused(tmp_path: Path, limit: str) -> None:
    with pytest.raises(CapKVError, match="CAPKV_CACHE_SIZE"):
        cache(tmp_path, limit)


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    kept = cache(tmp_path / "file")
    with pytest.raises(StateError, match="CAPKV_HOME"):
        kept.store(kept.path("m", [BOOK], {}), Chat())  # type: ignore[arg-type]
    assert kept.entries() == []
