"""Read a text, write a snapshot, open it: seconds of each, and whether the answers are the same.

Both times begin before the model is loaded, so that the ratio is what a user sees.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from capkv_local.chat import DocumentChat
from capkv_local.documents import Document

TEXT = Path(__file__).resolve().parents[2] / "tests" / "data" / "licence.txt"
QUESTION = "Who may copy this licence?"


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench-snapshot", description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=None)
    parser.add_argument("--tokens", type=int, default=4096, help="length of the text")
    parser.add_argument("--budget", type=int, default=1024, help="cells per head, on average")
    parser.add_argument("--observe", nargs="+", default=["tail", "probe"])
    parser.add_argument("--types", nargs="+", default=["f16"], help="of the cache")
    parser.add_argument("--rounds", type=int, default=3, help="of opening")
    args = parser.parse_args()
    for kv_type in args.types:
        for observe in args.observe:
            measure(args, kv_type, observe)


def measure(args: argparse.Namespace, kv_type: str, observe: str) -> None:
    start = time.perf_counter()
    chat = DocumentChat(
        model=args.model,
        kv_budget=args.budget,
        kv_observe=observe,  # type: ignore[arg-type]
        n_ctx=args.tokens + 1024,
        type_k=kv_type,
        type_v=kv_type,
    )
    report = chat.ingest([Document(TEXT.name, text_of(chat, args.tokens), "text")])
    read = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "text.capkv"
        start = time.perf_counter()
        n_bytes = chat.save(file)
        write = time.perf_counter() - start
        answer = "".join(chat.ask(QUESTION, max_tokens=24))
        chat.close()
        opens = []
        for _ in range(args.rounds):
            start = time.perf_counter()
            again = DocumentChat.load(file, model=args.model)
            opens.append(time.perf_counter() - start)
            same = "".join(again.ask(QUESTION, max_tokens=24)) == answer
            again.close()
    print(
        f"{report.tokens} tokens, {args.budget} cells, {kv_type}, {observe}: read {read:.1f} s, "
        f"write {write:.2f} s ({n_bytes / 2**20:.1f} MiB), open {max(opens):.2f} s at most: "
        f"{read / max(opens):.0f}x faster, answer {'the same' if same else 'ANOTHER'}",
        flush=True,
    )


def text_of(chat: DocumentChat, n_tokens: int) -> str:
    llama = chat.llama
    tokens = llama.tokenize(TEXT.read_bytes(), add_bos=False)
    tokens = (tokens * (1 + n_tokens // len(tokens)))[:n_tokens]
    return llama.detokenize(tokens).decode(errors="ignore")


if __name__ == "__main__":
    main()
