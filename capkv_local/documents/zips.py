"""What docx and epub files have in common: they are zip files, which may be traps."""

from __future__ import annotations

import contextlib
import zipfile
from collections.abc import Iterator
from typing import BinaryIO

from capkv_local.documents.base import MIB, SAVE_AS, short
from capkv_local.errors import DocumentError

# A member with text may unpack to so much: the longest novels have 4 MiB of it. zipfile unpacks
# no more than the size that the file's list says, so that the list can be believed.
LARGEST_MEMBER = 32 * MIB
_LARGEST_LIST = 100_000

_OTHERS = {"xl/": "a spreadsheet", "ppt/": "a presentation", "content.xml": "an OpenDocument file"}


@contextlib.contextmanager
def opened_zip(source: str, file: BinaryIO) -> Iterator[zipfile.ZipFile]:
    """A zip file whose damage is told in one sentence.

    Raises
    ------
    DocumentError
        It is damaged, encrypted, or lists absurdly many members.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            if len(archive.infolist()) > _LARGEST_LIST:
                raise DocumentError(
                    f"'{source}' lists {len(archive.infolist()):,} files, which no document does"
                )
            yield archive
    except DocumentError:
        raise
    # Damage shows as any of these, in the list or while a member is unpacked.
    except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError, RuntimeError) as error:
        raise DocumentError(
            f"'{source}' is a zip file (as .docx and .epub are) that is damaged "
            f"({short(error)}); download or export it again, or {SAVE_AS}"
        ) from error
    except Exception as error:  # zlib.error, struct.error, ...
        if type(error).__module__ in ("zlib", "struct", "_struct", "lzma", "_lzma"):
            raise DocumentError(
                f"'{source}' is damaged ({short(error)}); download or export it again"
            ) from error
        raise


def zip_kind(source: str, file: BinaryIO) -> str:
    """Kind of a document that is a zip file: ``docx`` or ``epub``.

    Raises
    ------
    DocumentError
        It is another kind of zip file, or damaged.
    """
    with opened_zip(source, file) as archive:
        names = archive.namelist()
        if "META-INF/container.xml" in names:
            return "epub"
        if "word/document.xml" in names:
            return "docx"
    for start, what in _OTHERS.items():
        if any(name.startswith(start) for name in names):
            raise DocumentError(f"'{source}' is {what}; {SAVE_AS}")
    raise DocumentError(f"'{source}' is a zip file; unpack it and give the files in it")


def check_member(source: str, info: zipfile.ZipInfo) -> None:
    """Refuse to unpack what is encrypted or absurdly large.

    Raises
    ------
    DocumentError
        It is.
    """
    if info.flag_bits & 1:
        raise DocumentError(f"'{source}' is encrypted; save it without a password")
    if info.file_size > LARGEST_MEMBER:
        raise DocumentError(
            f"'{source}' unpacks '{info.filename}' from {info.compress_size:,} to "
            f"{info.file_size:,} bytes; no more than {LARGEST_MEMBER // MIB} MiB are read of one "
            f"part: {SAVE_AS}"
        )
