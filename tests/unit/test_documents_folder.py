"""Folders: what is read, in which order, and what is left out and told."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import capkv_local.documents.folder as folder_module
from capkv_local.documents import read_documents
from capkv_local.errors import DocumentError

DATA = Path(__file__).parent.parent / "data"


def tree(root: Path, **files: str | bytes) -> Path:
    """Files by name, with / written as two underlines."""
    for name, content in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        data = content.encode() if isinstance(content, str) else content
        path.write_bytes(data)
    return root


def names(root: Path) -> list[str]:
    found = read_documents(root)
    return [document.name.removeprefix(f"{root.name}/") for document in found.documents]


def test_files_before_subfolders_both_by_name(tmp_path: Path) -> None:
    tree(tmp_path, **{"b.py": "b", "a__z.txt": "z", "a__b__c.md": "c", "Z.txt": "z", "c__d.h": "d"})
    assert names(tmp_path) == ["Z.txt", "b.py", "a/z.txt", "a/b/c.md", "c/d.h"]


def test_documents_know_where_they_are(tmp_path: Path) -> None:
    root = tree(tmp_path / "src", **{"a__b.py": "def f():\n    pass\n"})
    (stream,) = read_documents(root).documents
    assert (stream.name, stream.heading) == ("src/a/b.py", "File: src/a/b.py")
    document = stream.read()
    assert document.text == "def f():\n    pass\n"
    assert str(document.source(12)) == "src/a/b.py, lines 1-2"


def test_what_is_left_out_is_told_by_reason(tmp_path: Path) -> None:
    files: dict[str, str | bytes] = {
        "a.txt": "a",
        ".env": "secret",
        ".hidden__a.txt": "a",
        "node_modules__x__index.js": "x",
        "my_env__pyvenv.cfg": "x",
        "logo.png": b"\x89PNG....",
        "data.bin": b"\0\1",
        "data2.bin": b"\0\1",
        "data3.bin": b"\0\1",
        "data4.bin": b"\0\1",
        "empty.txt": "",
        "big.csv": "1,2,3\n" * 800_000,
        "scan.pdf": (DATA / "scanned.pdf").read_bytes(),
        "secret.pdf": (DATA / "encrypted.pdf").read_bytes(),
    }
    root = tree(tmp_path / "src", **files)
    found = read_documents(root)
    assert [document.name for document in found.documents] == ["src/a.txt"]
    assert found.skipped == {
        "hidden": [".env", ".hidden"],
        "over 4 MiB": ["big.csv"],
        "binary": ["data.bin", "data2.bin", "data3.bin", "data4.bin"],
        "empty": ["empty.txt"],
        "images": ["logo.png"],
        "without text (scans, perhaps)": ["scan.pdf"],
        "encrypted": ["secret.pdf"],
        "folders of dependencies": ["my_env", "node_modules"],
    }
    assert found.summary.startswith("skipped in src: hidden: .env, .hidden; over 4 MiB: big.csv;")
    assert "binary: 4 (data.bin, data2.bin, data3.bin, ...)" in found.summary


def test_gitignore(tmp_path: Path) -> None:
    tree(
        tmp_path,
        **{
            ".gitignore": "*.log\nbuild/\n/top.txt\n!keep.log\n",
            "a.log": "a",
            "keep.log": "k",
            "top.txt": "t",
            "build__x.txt": "x",
            "sub__top.txt": "t",
            "sub__b.log": "b",
            "sub__.gitignore": "!b.log\nlocal.txt\n",
            "sub__local.txt": "l",
            "sub__build": "a file of that name",
        },
    )
    assert names(tmp_path) == ["keep.log", "sub/b.log", "sub/build", "sub/top.txt"]
    skipped = read_documents(tmp_path).skipped["ignored by .gitignore"]
    assert skipped == ["a.log", "top.txt", "build", "sub/local.txt"]


def test_rules_of_the_repository_count_unless_they_leave_out_the_folder(tmp_path: Path) -> None:
    tree(
        tmp_path,
        **{".gitignore": "*.log\nout/\n", "src__a.log": "a", "src__b.txt": "b", "out__c.log": "c"},
    )
    assert names(tmp_path / "src") == ["a.log", "b.txt"]  # no repository: rules above do not count
    (tmp_path / ".git").mkdir()
    assert names(tmp_path / "src") == ["b.txt"]
    assert names(tmp_path / "out") == ["c.log"]


def test_links(tmp_path: Path) -> None:
    root = tree(tmp_path / "src", **{"a.txt": "a", "sub__b.txt": "b"})
    outside = tree(tmp_path / "other", **{"c.txt": "c"})
    (root / "sub" / "loop").symlink_to(root)
    (root / "self").symlink_to("self")
    (root / "twice.txt").symlink_to(root / "a.txt")
    (root / "c.txt").symlink_to(outside / "c.txt")
    (root / "gone.txt").symlink_to(tmp_path / "gone.txt")
    assert names(root) == ["a.txt", "c.txt", "sub/b.txt"]
    assert read_documents(root).skipped == {
        "not regular files": ["gone.txt", "self"],
        "links to files in it": ["twice.txt"],
        "links to folders": ["sub/loop"],
    }


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_in_a_folder_is_not_waited_for(tmp_path: Path) -> None:
    tree(tmp_path, **{"a.txt": "a"})
    os.mkfifo(tmp_path / "pipe")
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.skipif(os.name == "nt", reason="names are Unicode there")
def test_a_name_that_is_not_unicode(tmp_path: Path) -> None:
    with open(os.fsencode(tmp_path) + b"/caf\xe9.txt", "w") as file:
        file.write("x")
    (document,) = read_documents(tmp_path).documents
    assert document.name.endswith("caf?.txt") and document.read().text == "x"


def test_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DocumentError, match="there is no file"):
        read_documents(tmp_path / "gone")
    with pytest.raises(DocumentError, match="has no documents in it; give"):
        read_documents(tmp_path)
    tree(tmp_path, **{"a.bin": b"\0"})
    with pytest.raises(DocumentError, match=r"no documents in it \(skipped in .*: binary: a.bin"):
        read_documents(tmp_path)
    tree(tmp_path, **{"a.txt": "a", "b.txt": "b"})
    monkeypatch.setattr(folder_module, "_MOST_FILES", 1)
    with pytest.raises(DocumentError, match="more than 1 files; give the subfolders"):
        read_documents(tmp_path)
