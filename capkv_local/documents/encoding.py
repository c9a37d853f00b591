"""Bytes to text, block by block, in an encoding that is detected.

What can be told of the first block decides (a file of up to 4 MiB is one block); while a text is
plain ASCII nothing is decided yet. What comes later must fit, or is refused with its place: a
text that goes wrong in the middle is never passed on as if it were right.
"""

from __future__ import annotations

import codecs
import contextlib
import io
from collections.abc import Iterable, Iterator

from capkv_local.errors import DocumentError

# Longest first: the UTF-32 mark begins with the UTF-16 one.
BYTE_ORDER_MARKS = (
    (b"\xff\xfe\0\0", "utf-32"),
    (b"\0\0\xfe\xff", "utf-32"),
    (b"\xef\xbb\xbf", "utf-8-sig"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
)
_CONTROLS = bytes([*range(1, 9), *range(14, 27), *range(28, 32), 127])
_CHUNK = 1 << 14  # characters that are passed on at once
_SAMPLE = 1 << 18  # bytes that a detector looks at: enough, and no wait for big files
# What Western European text has beyond ASCII; ¹, ž, ð, þ and ý would be bytes of other alphabets.
_WESTERN = frozenset(
    "àáâãäåæçèéêëìíîïñòóôõöøùúûüÿßœÀÁÂÃÄÅÆÇÈÉÊËÌÍÎÏÑÒÓÔÕÖØÙÚÛÜŒ"
    "\u00a0\u00ad«»\u2018\u2019“”„\u201a…\u2013—•€£§©®™°±µ·½¼¾²³ºª¿¡\u00b4"
)


def decoded(source: str, blocks: Iterable[tuple[bytes, bool]]) -> Iterator[tuple[str, int]]:
    """Decode blocks of bytes; lines end in ``\\n``.

    Parameters
    ----------
    source
        How messages call the text.
    blocks
        Bytes, and whether they are the last.

    Yields
    ------
    tuple of str and int
        Text, and the bytes that are decoded so far.

    Raises
    ------
    DocumentError
        Binary, in no encoding that is known, or in another one than its beginning.
    """
    lines = io.IncrementalNewlineDecoder(None, translate=True)
    encoding: str | None = None
    decoder: codecs.IncrementalDecoder | None = None
    n_bytes = 0
    for data, last in blocks:
        if n_bytes == 0:
            encoding = marked(data)
            if encoding is not None:
                decoder = codecs.getincrementaldecoder(encoding)()  # strict: the mark promises
        if encoding is None or encoding not in _MARKED:
            refuse_binary(source, data)
        if decoder is None:
            if data.isascii():
                text = data.decode("ascii")
            else:
                encoding = _detect(source, data, last)
                decoder = codecs.getincrementaldecoder(encoding)(errors="replace")
                text = decoder.decode(data, last)
        else:
            try:
                text = decoder.decode(data, last)
            except UnicodeDecodeError as error:
                raise DocumentError(
                    f"'{source}' says it is {encoding} but is not (byte "
                    f"{n_bytes + error.start}); save it again as UTF-8 text"
                ) from None
            if _mostly_broken(text, data):
                raise DocumentError(
                    f"'{source}' is {encoding} at its start, but not behind byte {n_bytes}; save "
                    "it again as UTF-8 text"
                )
        text = lines.decode(text, final=last).replace("\0", "")
        if n_bytes == 0:
            text = text.removeprefix("\ufeff")
        for i in range(0, len(text), _CHUNK):
            chunk = text[i : i + _CHUNK]
            yield chunk, n_bytes + len(data) * (i + len(chunk)) // len(text)
        n_bytes += len(data)


def marked(data: bytes) -> str | None:
    """Encoding that a byte order mark names; None without one."""
    return next((name for mark, name in BYTE_ORDER_MARKS if data.startswith(mark)), None)


_MARKED = {name for _, name in BYTE_ORDER_MARKS}


def refuse_binary(source: str, data: bytes) -> None:
    """Refuse what is no text.

    Raises
    ------
    DocumentError
        There are NUL bytes, or many control bytes.
    """
    if b"\0" in data:
        raise DocumentError(f"'{source}' is binary (it has NUL bytes); save it as UTF-8 text")
    # Compressed or encrypted data without a NUL still has about 10% control bytes; text has none.
    controls = len(data) - len(data.translate(None, _CONTROLS))
    if controls > 0.02 * len(data):
        raise DocumentError(
            f"'{source}' is binary ({controls / len(data):.0%} control bytes); "
            "save it as UTF-8 text"
        )


def _detect(source: str, data: bytes, last: bool) -> str:
    """Encoding of text that is not ASCII; its end may cut a character unless it is the ``last``."""
    with contextlib.suppress(UnicodeDecodeError):
        codecs.getincrementaldecoder("utf-8")().decode(data, last)
        return "utf-8"
    # UTF-8 with a few broken bytes: any other reading breaks all the rest.
    if not _mostly_broken(data.decode("utf-8", errors="replace"), data):
        return "utf-8"
    # Detectors take short Western text for Arabic or Chinese, so it is recognised here.
    with contextlib.suppress(UnicodeDecodeError):
        text = data.decode("cp1252")
        other = set(text) - _ASCII
        if _n_other(text) < 0.4 * len(text) and _WESTERN.issuperset(other):
            return "cp1252"
    from charset_normalizer import from_bytes

    # Cut at a line end, so that no character of several bytes is cut in two.
    sample = data if len(data) <= _SAMPLE else data[:_SAMPLE].rpartition(b"\n")[0] + b"\n"
    best = from_bytes(sample, cp_exclusion=["utf_16", "utf_16_be", "utf_16_le", "utf_7"]).best()
    if best is None:
        raise DocumentError(
            f"'{source}' is in no text encoding that can be recognised; save it as UTF-8 text"
        )
    return str(best.encoding)


_ASCII = frozenset(map(chr, range(128)))


def _mostly_broken(text: str, data: bytes) -> bool:
    """Whether a tenth of what is not ASCII could not be decoded."""
    n_broken = text.count("\ufffd") - data.count("\ufffd".encode())
    return n_broken > 0 and 10 * n_broken >= _n_other(text)


def _n_other(text: str) -> int:
    return len(text) - len(text.encode("ascii", "ignore"))
