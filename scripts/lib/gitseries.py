"""The series as git sees it: commits on a tree whose tag ``base`` is the pinned llama.cpp."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from . import sdist
from .config import PATCHES, cache_root
from .errors import SetupError
from .lock import Lock
from .patchset import apply_series, parse_patch
from .progress import Progress
from .series import Patch, Series, load_series

_IDENTITY = ("-c", "user.name=capkv-local", "-c", "user.email=capkv-local@localhost")
# One set of options, so that a refresh without a change changes no byte, on any machine.
_FORMAT = (
    *("--zero-commit", "--no-signature", "--no-renames", "--no-stat", "-N", "--full-index"),
    *("--no-encode-email-headers", "--diff-algorithm=myers", "--unified=3", "--no-attach"),
    *("--src-prefix=a/", "--dst-prefix=b/", "--no-base", "--no-color", "--no-ext-diff"),
)


def apply(directory: Path) -> str:
    """Apply the series to a llama.cpp tree or an unpacked sdist; returns a sentence for the user.

    Raises
    ------
    SetupError
        When a patch does not fit; the tree is then unchanged.
    """
    inner = directory / "vendor" / "llama.cpp"
    root = inner if inner.is_dir() else directory
    if not (root / "src" / "llama.cpp").is_file():
        raise SetupError(f"{directory} is neither a llama.cpp tree nor an unpacked sdist")
    series = load_series()
    tree, already = apply_series(root, series.patches)
    tree.write()
    done = len(series.patches) - already
    return f"{done} patches applied to {root}, {already} were there already"


def refresh(worktree: Path) -> str:
    """Write ``patches/`` anew from ``base..HEAD`` of a git work tree."""
    series = load_series()
    if _git(worktree, "status", "--porcelain", "--untracked-files=no").strip():
        raise SetupError(f"{worktree} has changes that are not committed; commit or drop them")
    with tempfile.TemporaryDirectory() as stage:
        _git(worktree, "format-patch", *_FORMAT, "-o", stage, "base..HEAD")
        fresh = sorted(Path(stage).glob("*.patch"))
        whys = {patch.name: patch.why for patch in series.patches}
        lines = [f"{path.name}  {whys.get(path.name) or _subject(path)}" for path in fresh]
        for patch in series.patches:
            patch.path.unlink(missing_ok=True)
        for path in fresh:
            shutil.copyfile(path, PATCHES / path.name)
    _write_order(PATCHES / "series", lines)
    return f"{len(lines)} patches written to {PATCHES}"


def check() -> str:
    """Prove that our own applier and ``git am`` make the same tree from base and series."""
    started = time.monotonic()
    series = load_series()
    root = cache_root()
    with Lock(root / "lock") as lock:
        base = require_base(root, series, lock.fd)
        if shutil.which("git") is None:
            apply_series(base, series.patches)
            return f"patches: {len(series.patches)} apply (git not found: not compared with git am)"
        repository = base_repository(root, series, base)
    with tempfile.TemporaryDirectory() as stage:
        ours, theirs = Path(stage, "ours"), Path(stage, "theirs")
        touched = {c.path for p in series.patches for c in parse_patch(p.text(), p.name)}
        for tree in (ours, theirs):
            clone_base(repository, tree, only=touched)
        tree_changes, already = apply_series(ours, series.patches)
        if already:
            raise SetupError("the pinned base holds patches of the series already: is base right?")
        tree_changes.write()
        _git(ours, "add", "--sparse", "-A", "-f")
        am(theirs, series.patches)
        mine = _git(ours, "write-tree").strip()
        git_made = _git(theirs, "rev-parse", "HEAD^{tree}").strip()
        if mine != git_made:
            _git(ours, "fetch", "-q", str(theirs), "HEAD")
            names = _git(ours, "diff", "--cached", "--name-only", "FETCH_HEAD").split()
            raise SetupError(f"git am makes another tree than scripts/patches apply: {names[:5]}")
    seconds = time.monotonic() - started
    return f"patches: {len(series.patches)} apply, tree {mine[:12]}, as git am ({seconds:.1f} s)"


def require_base(root: Path, series: Series, lock_fd: int) -> Path:
    """Return the unpacked archive, fetched if need be; the caller holds the lock."""
    if sdist.base_path(root, series).is_dir():
        return sdist.base_path(root, series)
    if not sdist.sdist_path(root, series).is_file():
        if importlib.util.find_spec("pip") is None:  # Debian's Python comes without
            raise SetupError("the pinned sdist is not there yet: run scripts/build first")
        name = series.sdist.removesuffix(".tar.gz")
        with Progress([(f"Downloading {name}", 10)]).step(f"Downloading {name}") as tick:
            python = Path(sys.executable)
            sdist.download(root, series, python, tick=tick, keep_fd=lock_fd)
    return sdist.unpack(root, series)


def base_repository(root: Path, series: Series, base: Path) -> Path:
    """Return a git repository of the pristine llama.cpp, made once; the caller holds the lock."""
    target = root / "base" / f"{series.base_id}.git"
    if target.is_dir():
        return target
    stage = root / "tmp" / "base.git"
    shutil.rmtree(stage, ignore_errors=True)
    stage.parent.mkdir(parents=True, exist_ok=True)
    _git(root, "init", "-q", "--bare", "-b", "master", str(stage))
    where = (f"--git-dir={stage}", f"--work-tree={base / 'vendor' / 'llama.cpp'}")
    _git(root, *where, "add", "-A", "-f")
    message = f"llama.cpp {series.upstream[:12]} as in {series.sdist}"
    fixed = {
        "GIT_AUTHOR_DATE": "2000-01-01T00:00:00Z",
        "GIT_COMMITTER_DATE": "2000-01-01T00:00:00Z",
    }
    _git(root, *where, *_IDENTITY, "commit", "-q", "-m", message, env=fixed)
    _git(root, *where, "tag", "base")
    stage.replace(target)
    return target


def clone_base(repository: Path, target: Path, only: Iterable[str] | None = None) -> None:
    """Check the pristine tree out into a new work tree that has the tag ``base``.

    Parameters
    ----------
    only : files to check out; the others stay in the index alone, which is ten times faster.
    """
    sparse = () if only is None else ("--no-checkout",)
    _git(repository, "clone", "-q", *sparse, str(repository), str(target))
    if only is not None:
        patterns = [f"/{path}" for path in sorted(only)]
        _git(target, "sparse-checkout", "set", "--no-cone", *(patterns or ["/LICENSE"]))
        _git(target, "checkout", "-q")


def am(tree: Path, patches: tuple[Patch, ...]) -> None:
    """Commit the series with ``git am``."""
    for patch in patches:
        try:
            _git(tree, *_IDENTITY, "am", "-q", "--keep-cr", "--whitespace=nowarn", str(patch.path))
        except SetupError as error:
            raise SetupError(
                f"{patch.name} does not apply with git am: regenerate against the pinned version "
                f"with scripts/patches refresh\n{error}"
            ) from error


def _subject(path: Path) -> str:
    match = re.search(
        r"^Subject: (?:\[PATCH[^\]]*\] )?(.*)$", path.read_text("utf-8"), re.MULTILINE
    )
    return match[1] if match else ""


def _write_order(path: Path, lines: list[str]) -> None:
    kept = [
        line
        for line in path.read_text(encoding="utf-8").splitlines()
        if not re.match(r"\d{4}-\S+\.patch", line)
    ]
    stage = path.with_suffix(".part")
    stage.write_text("\n".join([*kept, *lines]) + "\n", encoding="utf-8")
    stage.replace(path)


def _git(cwd: Path, *args: str, env: dict[str, str] | None = None) -> str:
    """Run git unaffected by the user's configuration; returns its output."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    clean |= {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1", "LC_ALL": "C"}
    options = ("-c", "core.autocrlf=false", "-c", "core.quotepath=false", "-c", "gc.auto=0")
    # A cache made by another user (CI, containers) is still our own.
    command = ["git", "-c", "safe.directory=*", *options, *args]
    try:
        done = subprocess.run(
            command, cwd=cwd, env={**clean, **(env or {})}, capture_output=True, check=False
        )
    except FileNotFoundError as error:
        raise SetupError(f"git is needed for this: install the package git ({error})") from error
    if done.returncode != 0:
        said = (done.stdout + done.stderr).decode("utf-8", "replace").strip()
        raise SetupError(f"git {' '.join(args[:3])} failed in {cwd}: {said}")
    return done.stdout.decode("utf-8", "replace")
