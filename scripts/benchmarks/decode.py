"""Prefill and decode speed of a compacted cache against the stock one.

Three sessions of one model run side by side and take turns, so that a machine whose speed drifts
slows all of them: stock at the full length, stock at as many tokens as the budget has cells, and
the compacted cache at the full length. What counts are the ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import llama_cpp

from capkv_local import Llama
from capkv_local.models import default_model

TEXT = Path(__file__).resolve().parents[2] / "tests" / "data" / "licence.txt"


def long_text(llama: Llama, n_tokens: int) -> list[int]:
    tokens = llama.tokenize(TEXT.read_bytes(), add_bos=False)
    return (tokens * (1 + n_tokens // len(tokens)))[:n_tokens]


def wait(llama: Llama) -> None:
    """See a device finish: it may go on computing while Python goes on."""
    llama_cpp.llama_synchronize(llama._ctx.ctx)


def prefill_in_turns(ours: Llama, stock: Llama, tokens: list[int]) -> tuple[float, float]:
    """Seconds of both for the same text, chunk by chunk in turn."""
    times = {"ours": 0.0, "stock": 0.0}
    done_stock = 0
    mark = time.perf_counter()

    def turn(done: int, total: int) -> None:
        nonlocal mark, done_stock
        wait(ours)
        times["ours"] += time.perf_counter() - mark
        start = time.perf_counter()
        stock.eval(tokens[done_stock:done])
        wait(stock)
        times["stock"] += time.perf_counter() - start
        done_stock = done
        mark = time.perf_counter()

    ours.prefill(tokens, progress=turn)
    wait(ours)
    times["ours"] += time.perf_counter() - mark  # the last eviction
    return times["ours"], times["stock"]


def decode_rate(llama: Llama, n: int) -> float:
    """Tokens per second over ``n`` greedy tokens."""
    wait(llama)
    start = time.perf_counter()
    for _ in range(n):
        llama.eval([llama.sample(temp=0.0)])
    wait(llama)
    return n / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=None)
    parser.add_argument("--tokens", type=int, default=7900, help="logical length")
    parser.add_argument("--budget", type=int, default=1024, help="cells")
    parser.add_argument("--policy", default="capkv")
    parser.add_argument("--allocation", default=None, help="default: what suits the policy")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--gpu-layers", type=int, default=None, help="-1: all")
    parser.add_argument("--rpc", default=None, metavar="HOST:PORT,...", help="RPC servers")
    parser.add_argument("--rounds", type=int, default=6, help="decode rounds of each session")
    parser.add_argument("--decode", type=int, default=16, help="tokens per round")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()

    n_new = args.rounds * args.decode + 1
    settings = {
        "n_threads": args.threads,
        "n_threads_batch": args.threads,
        "flash_attn": True,
        "verbose": False,
        "n_gpu_layers": args.gpu_layers,
        "rpc_servers": args.rpc,
    }
    model = args.model or default_model()
    n_ctx = args.tokens + n_new
    full = Llama(model, kv_policy=None, n_ctx=n_ctx, **settings)
    short = Llama(model, kv_policy=None, n_ctx=args.budget + n_new, **settings)
    ours = Llama(
        model,
        kv_policy=args.policy,
        kv_budget=args.budget,
        kv_allocation=args.allocation,
        n_ctx=n_ctx,
        **settings,
    )

    tokens = long_text(full, args.tokens)
    t_ours, t_full = prefill_in_turns(ours, full, tokens)
    short.eval(tokens[-args.budget :])
    stats = ours.kv_stats()

    rates: dict[str, list[float]] = {"ours": [], "short": [], "full": []}
    for round_ in range(args.rounds):
        turns = [("ours", ours), ("short", short), ("full", full)]
        for name, llama in turns if round_ % 2 == 0 else reversed(turns):
            rates[name].append(decode_rate(llama, args.decode))

    def ratio(a: str, b: str) -> float:
        return statistics.median(x / y for x, y in zip(rates[a], rates[b], strict=True))

    result = {
        "model": Path(model).name,
        "policy": args.policy,
        "allocation": stats.allocation,
        "tokens": args.tokens,
        "budget": args.budget,
        "threads": args.threads,
        "gpu_layers": args.gpu_layers,
        "rpc": args.rpc,
        "prefill_ours_s": round(t_ours, 2),
        "prefill_stock_s": round(t_full, 2),
        "prefill_ratio": round(t_full / t_ours, 3),
        "score_select_evict_share": round(
            (stats.t_score_s + stats.t_select_s + stats.t_evict_s) / t_ours, 4
        ),
        "score_share": round(stats.t_score_s / t_ours, 4),
        "evictions": stats.evictions,
        "decode_tokens_per_s": {k: round(statistics.median(v), 2) for k, v in rates.items()},
        "decode_ratio_to_stock_short": round(ratio("ours", "short"), 3),
        "decode_ratio_to_stock_full": round(ratio("ours", "full"), 3),
        # No cache of so many cells decodes faster than stock at so many tokens.
        "decode_ratio_bound": round(ratio("short", "full"), 3),
        "kv_MiB": round(stats.kv_bytes / 2**20, 1),
        "kv_MiB_full": round(stats.kv_bytes_full / 2**20, 1),
    }
    if args.json:
        print(json.dumps(result))
        return
    policy = f"{args.policy}, {stats.allocation}"
    place = f", {args.gpu_layers} layers on GPUs" if args.gpu_layers else ""
    place += f", layers at {args.rpc}" if args.rpc else ""
    print(f"{result['model']}, {args.threads} threads{place}, policy {policy}")
    print(f"{args.tokens} tokens, {args.budget} cells; ratios from one run, taking turns\n")
    rows = [
        (
            "prefill",
            f"{t_ours:.1f} s against {t_full:.1f} s",
            f"{result['prefill_ratio']:.2f}x stock",
        ),
        (
            "  scoring and evicting",
            f"{stats.evictions} evictions",
            f"{100 * result['score_select_evict_share']:.1f}% of prefill",
        ),
        (
            "decode",
            f"{result['decode_tokens_per_s']['ours']} tokens/s, "
            f"stock {result['decode_tokens_per_s']['full']}",
            f"{result['decode_ratio_to_stock_full']:.2f}x stock at {args.tokens}",
        ),
        (
            "",
            f"stock {result['decode_tokens_per_s']['short']}",
            f"{result['decode_ratio_to_stock_short']:.3f}x stock at {args.budget}",
        ),
        (
            "",
            f"a cache of {args.budget} cells can reach",
            f"{result['decode_ratio_bound']:.2f}x stock at {args.tokens}",
        ),
        (
            "KV memory",
            f"{result['kv_MiB']} MiB against {result['kv_MiB_full']} MiB",
            f"{result['kv_MiB_full'] / result['kv_MiB']:.1f}x less",
        ),
    ]
    for name, figures, verdict in rows:
        print(f"{name:24}{figures:38}{verdict}")


if __name__ == "__main__":
    main()
