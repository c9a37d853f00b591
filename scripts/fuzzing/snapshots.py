"""Mutate a real snapshot: as a file, and as a hostile file whose checksums are right.

Damaged files must be refused, or be the same as before. Hostile ones are opened in a process of
their own, asked and read on from: refused with an error of ours, or harmless, never a crash.
"""

from __future__ import annotations

import argparse
import collections
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from capkv_local.chat import DocumentChat
from capkv_local.documents import Document
from capkv_local.errors import CapKVError, StateError
from capkv_local.snapshot import Array, read_snapshot, write_snapshot

TEXT = "The access code of the harbour gate is 48213. It changes every month. " * 8
SETTINGS = {"kv_budget": 64, "n_ctx": 1024, "kv_observe": "tail"}
NUMBERS = (0, 1, -1, 2**31 - 1, 2**32 - 1, 2**63)
HOSTILE_MEMORY = 16 << 30  # bytes that a process may map before it counts as broken


def main() -> None:
    parser = argparse.ArgumentParser(prog="fuzz-snapshots", description=__doc__)
    parser.add_argument("--files", type=int, default=10_000, help="damaged files")
    parser.add_argument("--payloads", type=int, default=300, help="hostile files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker is not None:
        open_hostile(args.file, args.seed, range(args.worker, args.payloads))
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "whole.capkv"
        write_real(file)
        bad = damaged(file, args.seed, args.files)
        bad += hostile(file, args.seed, args.payloads)
    if bad:
        sys.exit("\n".join(bad))


def write_real(file: Path) -> None:
    chat = DocumentChat(**SETTINGS)  # type: ignore[arg-type]
    chat.ingest([Document("harbour.txt", TEXT, "text")])
    "".join(chat.ask("What is the code?", max_tokens=2))
    chat.save(file)
    chat.close()


# ---- damage ------------------------------------------------------------------------------------


def damaged(file: Path, seed: int, n: int) -> list[str]:
    """Read ``n`` mutated files; what went wrong."""
    whole = file.read_bytes()
    header, arrays = read_snapshot(file)
    mutated = file.with_name("mutated.capkv")
    refused, same, bad = 0, 0, []
    start = time.perf_counter()
    for i in range(n):
        data = damage(random.Random(f"{seed}/{i}"), whole)
        mutated.write_bytes(data)
        try:
            read = read_snapshot(mutated)
        except StateError:
            refused += 1
        except Exception as error:
            bad.append(f"file {i}: {type(error).__name__}: {error}")
        else:
            if read[0] == header and all(map(np.array_equal, read[1].values(), arrays.values())):
                same += 1
            else:
                bad.append(f"file {i}: read as something else")
    seconds = time.perf_counter() - start
    print(
        f"{n} damaged files of {len(whole)} bytes in {seconds:.0f} s: {refused} refused, {same} "
        f"the same, {len(bad)} wrong; peak memory {peak_mib():.0f} MiB",
        flush=True,
    )
    return bad


def damage(rng: random.Random, data: bytes) -> bytes:
    """One or several of the things that happen to files."""
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        # The start is small, and all decisions are made there.
        end = rng.choice((16, 600, len(data)))
        i = rng.randrange(min(end, len(data)) or 1)
        n = rng.choice((1, 2, 4, 16, 4096))
        kind = rng.randrange(8)
        if kind == 0 and data:
            data = data[:i] + bytes([data[i] ^ 1 << rng.randrange(8)]) + data[i + 1 :]
        elif kind == 1:
            data = data[:i]
        elif kind == 2:
            data = data[:i] + data[i + n :]
        elif kind == 3:
            data = data[:i] + rng.randbytes(n) + data[i:]
        elif kind == 4:
            data = data[:i] + rng.randbytes(n) + data[i + n :]
        elif kind == 5:
            data = data[:i] + bytes(n) + data[i + n :]
        elif kind == 6:
            data += rng.randbytes(n)
        else:
            j = rng.randrange(len(data) or 1)
            data = data[:i] + data[j : j + n] + data[i + n :]
    return data


# ---- hostility ---------------------------------------------------------------------------------


def hostile(file: Path, seed: int, n: int) -> list[str]:
    """Open ``n`` files with right checksums and wrong content; what went wrong."""
    counts: collections.Counter[str] = collections.Counter()
    bad, done = [], 0
    while done < n:
        command = [sys.executable, __file__, "--worker", str(done), "--payloads", str(n)]
        command += ["--seed", str(seed), "--file", str(file)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as worker:
            assert worker.stdout is not None
            for line in worker.stdout:
                number, verdict, detail = line.rstrip("\n").split("\t")
                counts[verdict] += 1
                if verdict == "failed later":  # in words of ours: fine, but look at them
                    print(f"hostile {number}: {detail}")
                elif verdict not in ("refused", "harmless"):
                    bad.append(f"hostile {number}: {verdict} {detail}")
                done = int(number) + 1
        if done < n:
            what = next(mutants(file, seed, range(done, n)))[1]
            bad.append(f"hostile {done}: the process ended with {worker.returncode}: {what}")
            counts["crashed"] += 1
            done += 1
    print(f"{n} hostile files: " + ", ".join(f"{k} {v}" for k, v in sorted(counts.items())))
    return bad


def open_hostile(file: Path, seed: int, numbers: range) -> None:
    """The worker: one line for every file that did not end it."""
    limit_memory()
    mutated = file.with_name("hostile.capkv")
    for i, what, header, arrays in mutants(file, seed, numbers):
        write_snapshot(mutated, header, arrays)
        verdict, detail = "refused", what
        chat = None
        try:
            chat = DocumentChat.load(mutated)
            verdict = "failed later"
            "".join(chat.ask("What is the code?", max_tokens=3))
            chat.ingest([Document("more.txt", TEXT, "text")])
            chat.set_budget(48)
            "".join(chat.ask("Again?", max_tokens=2))
            verdict = "harmless"
        except CapKVError as error:
            detail = f"{what}: {error}"
        except BaseException as error:
            verdict, detail = type(error).__name__, f"{what}: {error}"
        finally:
            if chat is not None:
                chat.close()
        print(i, verdict, " ".join(detail.split()), sep="\t", flush=True)


def mutants(
    file: Path, seed: int, numbers: range
) -> Iterator[tuple[int, str, dict[str, Any], dict[str, Array]]]:
    """Number, what was changed, header and arrays of hostile snapshots."""
    whole_header, whole_arrays = read_snapshot(file)
    for i in numbers:
        rng = random.Random(f"{seed}/hostile/{i}")
        header, arrays = dict(whole_header), dict(whole_arrays)
        kind = rng.choice(("state",) * 6 + ("header", "tokens", "carried"))
        if kind == "header":
            what = change_header(rng, header)
        elif kind == "tokens":
            what = change_tokens(rng, arrays)
        elif kind == "carried":
            what = change_carried(rng, arrays)
        else:
            what = change_state(rng, arrays)
        yield i, what, header, arrays


def change_header(rng: random.Random, header: dict[str, Any]) -> str:
    name = rng.choice(sorted(header))
    value: Any = rng.choice((None, "", "x", [], [-1], [10**9], {}, 0.5, True, *NUMBERS))
    if rng.random() < 0.1:
        del header[name]
        return f"without {name}"
    header[name] = value
    return f"{name}={value!r}"


def change_tokens(rng: random.Random, arrays: dict[str, Array]) -> str:
    tokens = arrays["input_ids"].copy()
    token = rng.choice((-1, 10**9, 49151, 49152, 0))
    tokens[rng.randrange(len(tokens))] = token
    n = rng.choice((len(tokens), len(tokens), 1, 0))
    arrays["input_ids"] = tokens[:n]
    return f"token {token}, {n} tokens"


def change_carried(rng: random.Random, arrays: dict[str, Array]) -> str:
    carried = arrays["carried"].copy()
    shape = rng.choice((carried.shape, (1, 1, 1), (30, 3), (30, 3, 0), (3, 30, 5), (30, 3, 4000)))
    value = rng.choice((float("nan"), float("inf"), -1e38, 0.0))
    carried = np.full(shape, value, np.float32) if shape != carried.shape else carried
    carried.reshape(-1)[:5] = value
    arrays["carried"] = carried
    return f"carried {shape} with {value}"


def change_state(rng: random.Random, arrays: dict[str, Array]) -> str:
    state = bytearray(arrays["llama_state"].tobytes())
    # Counts, positions and types stand before the rows, and between those of the layers.
    at = rng.randrange(rng.choice((32, 256, 4096, 65536, len(state))))
    kind = rng.choice(("number", "number", "byte", "cut", "insert", "zero", "noise", "nan"))
    n = rng.choice((4, 64, 4096, 65536))
    if kind == "number":
        state[at : at + 4] = (rng.choice((*NUMBERS, rng.randrange(2**12))) % 2**32).to_bytes(
            4, "little"
        )
    elif kind == "byte":
        state[at] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del state[at : rng.choice((at + n, len(state)))]
    elif kind == "insert":
        state[at:at] = rng.randbytes(n)
    elif kind == "zero":
        state[at : at + n] = bytes(len(state[at : at + n]))
    elif kind == "noise":
        state[at : at + n] = rng.randbytes(len(state[at : at + n]))
    else:
        at = len(state) // 2
        state[at : at + 65536] = b"\xff\x7f" * (len(state[at : at + 65536]) // 2)
    arrays["llama_state"] = np.frombuffer(bytes(state), np.uint8)
    return f"state: {kind} at {at} of {len(state)}"


# ---- memory ------------------------------------------------------------------------------------


def limit_memory() -> None:
    try:
        import resource
    except ImportError:  # Windows
        return
    resource.setrlimit(resource.RLIMIT_AS, (HOSTILE_MEMORY, HOSTILE_MEMORY))


def peak_mib() -> float:
    try:
        import resource
    except ImportError:
        return float("nan")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


if __name__ == "__main__":
    main()
