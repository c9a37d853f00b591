"""What a probe costs: a text read without one, with one, and by the stock cache, in turns."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from decode import long_text

from capkv_local import Llama
from capkv_local.models import default_model


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench-decode --probe", description=__doc__)
    parser.add_argument("--model", type=Path, default=None)
    parser.add_argument("--tokens", type=int, default=4096, help="length of the text")
    parser.add_argument("--budget", type=int, default=1024, help="cells per head, on average")
    parser.add_argument("--policy", default="capkv")
    parser.add_argument("--stride", type=int, default=2, help="of the second probe")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()

    common = {
        "n_ctx": args.tokens + 1,
        "n_threads": args.threads,
        "n_threads_batch": args.threads,
        "verbose": False,
    }
    small = {"kv_policy": args.policy, "kv_budget": args.budget}
    settings = {
        "stock": {"kv_policy": None, "flash_attn": True},
        "tail": small,
        "probe": {**small, "kv_observe": "probe"},
        f"probe, stride {args.stride}": {
            **small,
            "kv_observe": "probe",
            "probe_stride": args.stride,
        },
    }
    model = args.model or default_model()
    sessions = {name: Llama(model, **common, **options) for name, options in settings.items()}
    tokens = long_text(sessions["tail"], args.tokens)
    seconds: dict[str, list[float]] = {name: [] for name in sessions}
    for _ in range(args.rounds):
        for name, llama in sessions.items():
            llama.reset()
            start = time.perf_counter()
            llama.eval(tokens)
            seconds[name].append(time.perf_counter() - start)
    tail, stock = (statistics.median(seconds[name]) for name in ("tail", "stock"))
    print(f"{Path(model).name}, {args.tokens} tokens, {args.budget} cells, {args.policy}")
    for name, llama in sessions.items():
        middle = statistics.median(seconds[name])
        stats = llama.kv_stats()
        print(
            f"  {name:18} {middle:6.1f} s   {middle / tail:.2f} x tail   "
            f"{middle / stock:.2f} x stock   KV {stats.kv_bytes / 2**20:.1f} MiB, "
            f"observation {stats.observe_bytes / 2**20:.1f} MiB"
        )
        if name.startswith("probe"):
            more = middle - tail
            print(
                f"  {'':18} {more:6.1f} s more: {more / tail:.2f} prefills of tail, "
                f"{more / stock:.2f} of stock"
            )


if __name__ == "__main__":
    main()
