"""Stream a long text through a small cache and plot the memory that the process has meanwhile.

Beside it what the same text takes without eviction, which is not run: it is a product.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from matplotlib.figure import Figure

from capkv_local.chat import DocumentChat
from capkv_local.chat.reading import IngestProgress
from capkv_local.documents import Document

TEXT = Path(__file__).resolve().parents[2] / "tests" / "data" / "licence.txt"
MIB = 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench-memory", description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=None, help="one with a long context")
    parser.add_argument("--tokens", type=int, default=30000, help="length of the text, about")
    parser.add_argument("--budget", type=int, default=2048, help="cells per head, on average")
    parser.add_argument("--observe", choices=["tail", "probe"], default="tail")
    parser.add_argument("--out", type=Path, default=Path("memory.svg"), help="[%(default)s]")
    args = parser.parse_args()

    chat = DocumentChat(
        model=args.model,
        kv_budget=args.budget,
        kv_observe=args.observe,
        n_ctx=args.tokens + 2048,
    )
    text = TEXT.read_text()
    n_tokens = len(chat.llama.tokenize(text.encode(), add_bos=False))
    copies, rest = divmod(args.tokens, n_tokens)
    long = text * copies + text[: len(text) * rest // n_tokens]
    steps: list[IngestProgress] = []
    report = chat.ingest([Document(TEXT.name, long, "text")], progress=steps.append)
    per_token = chat.llama._require_cache().kv.info().n_bytes_cell
    chat.close()

    steps = [step for step in steps if step.done]
    half = [step for step in steps if step.done >= report.tokens / 2]
    first, last = half[0], half[-1]
    print(f"{report.tokens:,} tokens in {report.seconds:.0f} s, {args.budget:,} cells per head")
    print(
        f"KV cells: {first.kv_bytes / MIB:.1f} MiB half way, {last.kv_bytes / MIB:.1f} at the end"
    )
    print(
        f"process:  {first.rss_bytes / MIB:.1f} MiB half way, {last.rss_bytes / MIB:.1f} at the end"
    )
    print(f"without eviction: {per_token * report.tokens / MIB:.1f} MiB of KV cells at the end")
    plot(steps, per_token, args.out)
    print(f"plot: {args.out}")


def plot(steps: list[IngestProgress], per_token: float, out: Path) -> None:
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    done = [step.done for step in steps]
    axes.plot(done, [s.rss_bytes / MIB for s in steps], label="process, model and all")
    axes.plot(done, [s.kv_bytes / MIB for s in steps], label="KV cells")
    axes.plot(done, [n * per_token / MIB for n in done], "--", label="KV cells without eviction")
    most = max(step.rss_bytes for step in steps)
    axes.set(xlabel="tokens read", ylabel="MiB", ylim=(0, 1.15 * most / MIB))
    axes.grid(alpha=0.3)
    axes.legend(loc="center right")
    figure.savefig(out)


if __name__ == "__main__":
    main()
