"""Decode speed and memory of heads of unequal length against heads of equal length.

Both caches have the same bytes and read the same text with the same policy; only the allocation
differs. They take turns, so that a machine whose speed drifts slows both.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from decode import decode_rate, long_text

from capkv_local import Llama
from capkv_local.models import default_model
from capkv_local.native import CACHE_TYPES, cache_type


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="bench-decode --ragged", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--model", type=Path, default=None)
    parser.add_argument("--tokens", type=int, default=4096, help="logical length")
    parser.add_argument("--budget", type=int, default=1024, help="cells per head, on average")
    parser.add_argument("--policy", default="capkv")
    parser.add_argument("--allocation", default="global", help="what is compared with uniform")
    parser.add_argument("--type", default="f16", choices=CACHE_TYPES, help="type of the cache")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=8, help="decode rounds of each session")
    parser.add_argument("--decode", type=int, default=16, help="tokens per round")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()

    model = args.model or default_model()
    n_new = args.rounds * args.decode + 1
    kind = cache_type(args.type)
    sessions = {
        allocation: Llama(
            model,
            n_ctx=args.tokens + n_new,
            kv_policy=args.policy,
            kv_budget=args.budget,
            kv_allocation=allocation,
            n_threads=args.threads,
            n_threads_batch=args.threads,
            type_k=kind,
            type_v=kind,
            verbose=False,
        )
        for allocation in ("uniform", args.allocation)
    }
    memory = {}
    for allocation, llama in sessions.items():
        llama.prefill(long_text(llama, args.tokens))
        info = llama._cache.kv.info()
        # Rows that are held, and those at the end of every head that new tokens take.
        n_rows = info.n_rows + info.n_heads * info.n_free
        memory[allocation] = {
            "rows": n_rows,
            "kv_bytes": info.n_bytes_kv,
            "over_rows": info.n_bytes_kv / (n_rows * info.n_bytes_cell / info.n_heads) - 1,
            "cells_range": llama.kv_stats().n_cells_range,
        }

    rates: dict[str, list[float]] = {name: [] for name in sessions}
    for round_ in range(args.rounds):
        turns = list(sessions.items())
        for name, llama in turns if round_ % 2 == 0 else reversed(turns):
            rates[name].append(decode_rate(llama, args.decode))
    ratio = statistics.median(
        x / y for x, y in zip(rates[args.allocation], rates["uniform"], strict=True)
    )
    result = {
        "model": Path(model).name,
        "policy": args.policy,
        "allocation": args.allocation,
        "type": args.type,
        "tokens": args.tokens,
        "budget": args.budget,
        "threads": args.threads,
        "decode_tokens_per_s": {k: round(statistics.median(v), 2) for k, v in rates.items()},
        "decode_ratio_to_uniform": round(ratio, 3),
        "memory": memory,
    }
    if args.json:
        print(json.dumps(result))
        return
    print(f"{result['model']}, {args.threads} threads, policy {args.policy}, cache {args.type}")
    print(f"{args.tokens} tokens, {args.budget} cells per head on average\n")
    for name in sessions:
        fewest, most = memory[name]["cells_range"]
        print(
            f"{name:16}{fewest:6} to {most:5} cells, {memory[name]['kv_bytes'] / 2**20:7.2f} MiB, "
            f"{100 * memory[name]['over_rows']:5.2f}% over the sum of rows, "
            f"{result['decode_tokens_per_s'][name]:6.1f} tokens/s"
        )
    print(f"\ndecode {ratio:.3f}x uniform at the same bytes (median of pairs)")


if __name__ == "__main__":
    main()
