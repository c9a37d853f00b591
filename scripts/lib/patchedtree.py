"""The sources of the patched llama.cpp, for who reads a few of its files and builds nothing."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from . import gitseries
from .config import cache_root
from .errors import SetupError
from .lock import Lock
from .patchset import Tree, apply_series
from .series import load_series


def patched_tree(env: Mapping[str, str] = os.environ) -> Tree:
    """Return the work tree that ``CAPKV_LLAMA_DIR`` names, or the pinned base with our series.

    Nothing is written.
    """
    if named := env.get("CAPKV_LLAMA_DIR"):
        if not Path(named, "src", "llama.cpp").is_file():
            raise SetupError(f"CAPKV_LLAMA_DIR={named} is not a llama.cpp tree")
        return Tree(Path(named))
    series, root = load_series(), cache_root(env)
    with Lock(root / "lock") as lock:
        base = gitseries.require_base(root, series, lock.fd)
    tree, _ = apply_series(base / "vendor" / "llama.cpp", series.patches)
    return tree


def read_files(tree: Tree, names: Iterable[str]) -> dict[str, str]:
    """Return the text of files of a tree by their path in it.

    Raises
    ------
    SetupError
        When one is not there.
    """
    texts = {}
    for name in names:
        text = tree.read(name)
        if text is None:
            raise SetupError(f"{tree.root} with the patches has no {name}")
        texts[name] = text
    return texts


def names_below(tree: Tree, folder: str, suffixes: tuple[str, ...]) -> list[str]:
    """Return the paths of all files with these endings in a folder of a tree, and below it."""
    there = (p.relative_to(tree.root).as_posix() for p in (tree.root / folder).rglob("*"))
    changed = (name for name, text in tree.changes.items() if text is not None)
    inside = {name for name in (*there, *changed) if name.startswith(f"{folder}/")}
    return sorted(name for name in inside if name.endswith(suffixes))
