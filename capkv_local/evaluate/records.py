"""What a run measures: one record per metric, kept as lines of a file that only ever grows.

Runs take hours and get interrupted, so every batch is on the disk when ``append`` returns, and a
line that a killed run left half-written costs that one line.
"""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Iterable
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from capkv_local.errors import EvaluationError

__all__ = ["Key", "Loaded", "Record", "Results", "key", "write_csv"]

Key: TypeAlias = tuple[Any, ...]


@dataclass(frozen=True)
class Record:
    """One measured number, with everything that says what it was measured on.

    Attributes
    ----------
    model : str
        File name of the GGUF without ``.gguf``.
    split : str
        ``"tuning"`` or ``"report"``.
    task, case, item, kind : str
        Task, name of its case, id of the question (``""``: the continuation) and its kind.
    depth : float or None
        Where in the context the evidence stands, 0 to 1.
    n_tokens : int
        Tokens read.
    method, allocation, observe : str
        What was run; ``""`` where a method has no allocation or observes nothing.
    reading : str
        ``"one-shot"`` or ``"streamed"``.
    question : str
        ``"unseen"`` or ``"seen"`` while reading.
    kv_type : str
        Type of the cached rows, e.g. ``"f16"``.
    share : float
        Share of the cells that is kept, 1.0 for the full cache.
    kv_bytes : int
        Bytes of the K and V rows that are kept at the end.
    seed : int
    metric : str
        ``"kl"``, ``"top1"``, ``"nll"``, ``"exact"``, ``"logprob"`` or ``"accuracy"``.
    value : float
        Finite.
    full : float or None
        The same metric with the full f16 cache; None for ``"kl"``.
    seconds : float

    Raises
    ------
    EvaluationError
        If a number is not finite: a mean over it would hide which one it was.
    """

    model: str
    split: str
    task: str
    case: str
    item: str
    kind: str
    depth: float | None
    n_tokens: int
    method: str
    allocation: str
    observe: str
    reading: str
    question: str
    kv_type: str
    share: float
    kv_bytes: int
    seed: int
    metric: str
    value: float
    full: float | None
    seconds: float

    def __post_init__(self) -> None:
        for name in ("depth", "share", "value", "full", "seconds"):
            number = getattr(self, name)
            if number is not None and not math.isfinite(number):
                raise EvaluationError(
                    f"{name}={number} of {self.metric}, {self.method}, {self.task}/{self.case}"
                    f"/{self.item} is not finite; look for the cause before measuring on"
                )


_FIELDS = tuple(field.name for field in fields(Record))
_MEASURED = ("metric", "value", "full", "seconds", "kv_bytes")
_KEY_FIELDS = tuple(name for name in _FIELDS if name not in _MEASURED)
_TYPES: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "float": (float, int),
    "float | None": (float, int, type(None)),
}
_CHECKS = tuple((field.name, _TYPES[str(field.type)]) for field in fields(Record))


def key(record: Record) -> Key:
    """What was run on what: all fields but the measured ones (metric, value, full, cost)."""
    return tuple([getattr(record, name) for name in _KEY_FIELDS])


class Loaded(NamedTuple):
    """What a results file holds.

    Attributes
    ----------
    records
        In the order of the file; of several for one key and metric only the last.
    torn
        Whether a half-written last line was left out. The next append overwrites it.
    """

    records: list[Record]
    torn: bool


class Results:
    """A file of records, one JSON object per line, for one writer at a time.

    Parameters
    ----------
    path
        The file; it and its folder are made by the first append.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._ready = False  # the end of the file is known to be a place to write at

    def read(self) -> Loaded:
        """Read all records; a file that is not there has none.

        Raises
        ------
        EvaluationError
            The file cannot be read or is not a file of records; names the line.
        """
        *lines, last = self._bytes().split(b"\n")
        records = [self._parsed(line, n) for n, line in enumerate(lines, 1) if line.strip()]
        torn = False
        if last.strip():
            torn = _is_torn(last)
            if not torn:
                records.append(self._parsed(last, len(lines) + 1))
        # A run that goes on may measure an item again of which only some metrics were written.
        latest = {(*key(record), record.metric): record for record in records}
        return Loaded(list(latest.values()), torn)

    def done(self) -> dict[Key, set[str]]:
        """Return the metrics that each key has, to go on with an interrupted run.

        Raises
        ------
        EvaluationError
            As :meth:`read`.
        """
        done: dict[Key, set[str]] = {}
        for record in self.read().records:
            done.setdefault(key(record), set()).add(record.metric)
        return done

    def append(self, records: Iterable[Record]) -> None:
        """Write records at the end of the file; they are on the disk when this returns.

        Raises
        ------
        EvaluationError
            The file cannot be written, or is not a file of records: it is left as it is then.
        """
        data = b"".join(_line(record) for record in records)
        if not data:
            return
        if not self._ready:
            self._repair()
        self._ready = False  # until all of it is written
        try:
            with self.path.open("ab") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise self._unusable("written", error) from error
        self._ready = True

    def write_csv(self, path: str | Path) -> None:
        """Write all records as a CSV file, see :func:`write_csv`."""
        write_csv(self.read().records, path)

    def _bytes(self) -> bytes:
        try:
            return self.path.read_bytes()
        except FileNotFoundError:
            return b""
        except OSError as error:
            raise self._unusable("read", error) from error

    def _repair(self) -> None:
        """Make the end of the file a place where a new line can start."""
        torn = self.read().torn
        data = self._bytes()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if torn:
                os.truncate(self.path, data.rfind(b"\n") + 1)
            elif data and not data.endswith(b"\n"):
                with self.path.open("ab") as file:
                    file.write(b"\n")
        except OSError as error:
            raise self._unusable("written", error) from error

    def _parsed(self, line: bytes, number: int) -> Record:
        try:
            return _record(line)
        except ValueError as error:
            raise EvaluationError(
                f"line {number} of '{self.path}' is no evaluation record ({error}); "
                "give the results.jsonl of a run, or another name for a new one"
            ) from None

    def _unusable(self, what: str, error: OSError) -> EvaluationError:
        reason = error.strerror or str(error)
        return EvaluationError(f"'{self.path}' cannot be {what} ({reason}); check name and rights")


def write_csv(records: Iterable[Record], path: str | Path) -> None:
    """Write records as a CSV file with a header; None becomes an empty field.

    Raises
    ------
    EvaluationError
        The file cannot be written.
    """
    try:
        with Path(path).open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(_FIELDS)
            writer.writerows(map(astuple, records))
    except OSError as error:
        reason = error.strerror or str(error)
        raise EvaluationError(f"'{path}' cannot be written ({reason}); check it") from error


def _line(record: Record) -> bytes:
    row = {name: getattr(record, name) for name in _FIELDS}
    return json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def _record(line: bytes) -> Record:
    """Make a record of a line; raise ValueError (JSON and UTF-8 errors are such) if it is none."""
    row = json.loads(line)
    if not isinstance(row, dict):
        raise ValueError("not an object")
    if row.keys() != set(_FIELDS):
        wrong = sorted(row.keys() ^ set(_FIELDS))
        raise ValueError(f"missing or unknown: {', '.join(wrong[:5])}")
    for name, types in _CHECKS:
        if not isinstance(row[name], types) or isinstance(row[name], bool):
            raise ValueError(f"{name}={row[name]!r} has the wrong type")
    return Record(**row)


def _is_torn(last: bytes) -> bool:
    """Whether a line without an end is what a killed run leaves.

    Anything else is somebody's file, which must not be cut.
    """
    try:
        json.loads(last)
    except ValueError:
        start = b'{"model": "'
        return last.startswith(start) or start.startswith(last) or not last.strip(b"\0")
    return False
