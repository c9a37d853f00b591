"""KL to the full cache after one eviction, for policies and allocations at the same bytes.

Each document: 2048 tokens are read, the policy keeps a share of the cells once, and the next 96
tokens are predicted (teacher-forced) from what is left. KL is the mean of KL(full || evicted) over
those tokens, in nats; top-1 is how often both name the same token. All rows see the same cells and
the same queries.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from capkv_local import Llama
from capkv_local.models import default_model
from capkv_local.policies import Policy, get_policy

# Disjoint: what was looked at while constants were chosen, and what is reported.
TUNING = [
    "vendor/llama.cpp/docs/build.md",
    "vendor/llama.cpp/docs/backend/SYCL.md",
    "vendor/llama.cpp/tools/completion/README.md",
    "vendor/llama.cpp/docs/function-calling.md",
    "vendor/llama.cpp/docs/multimodal/MobileVLM.md",
    "vendor/llama.cpp/grammars/README.md",
    "vendor/llama.cpp/examples/model-conversion/README.md",
    "vendor/llama.cpp/tools/server/README-dev.md",
]
REPORT = [
    "README.md",
    "vendor/llama.cpp/tools/server/README.md",
    "vendor/llama.cpp/docs/backend/OPENVINO.md",
    "vendor/llama.cpp/docs/autoparser.md",
    "vendor/llama.cpp/docs/speculative.md",
    "vendor/llama.cpp/tools/llama-bench/README.md",
    "vendor/llama.cpp/tools/perplexity/README.md",
    "vendor/llama.cpp/docs/backend/snapdragon/README.md",
    "vendor/llama.cpp/docs/multi-gpu.md",
    "vendor/llama.cpp/docs/development/HOWTO-add-model.md",
]
N_READ, N_NEXT, N_WINDOW = 2048, 96, 64

# Name, policy, allocations. A large noise ranks by relevance alone.
WINDOW = {"consensus": 0.0, "noise": 1e4}
ROWS: list[tuple[str, Policy, tuple[str, ...]]] = [
    ("streaming", get_policy("streaming"), ("uniform",)),
    ("random", get_policy("random"), ("uniform",)),
    ("snapkv", get_policy("snapkv"), ("uniform", "pyramid", "adaptive-layer", "global")),
    ("window E[a²]", get_policy("capkv", **WINDOW), ("uniform", "adaptive-layer", "global")),
    (
        "window E[a²], recent 128",
        get_policy("capkv", n_window=64, n_recent=128, **WINDOW),
        ("uniform", "global"),
    ),
    ("capkv", get_policy("capkv"), ("uniform", "pyramid", "adaptive-layer", "global")),
]

Results = dict[tuple[str, str, float], list[tuple[float, float]]]


class Bench:
    """One session whose cache holds all of a document, so that it can be evicted again."""

    def __init__(self, model: Path, threads: int) -> None:
        n_ctx = N_READ + N_NEXT
        self.llama = Llama(
            model,
            n_ctx=n_ctx,
            # Never full while it reads: every eviction is one of ours.
            kv_policy=get_policy("snapkv", n_window=N_WINDOW),
            kv_budget=n_ctx,
            n_threads=threads,
            n_threads_batch=threads,
            verbose=False,
        )
        self.cache = self.llama._cache

    def read(self, text: str) -> list[int]:
        tokens = self.llama.tokenize(text.encode(), add_bos=False)[: N_READ + N_NEXT]
        if len(tokens) < N_READ + N_NEXT:
            raise SystemExit(f"only {len(tokens)} tokens: take a longer document")
        self.llama.reset()
        self.llama.prefill(tokens[:N_READ])
        self.state = self.llama.save_state()
        return tokens

    def evict(self, policy: Policy, allocation: str, n_cells: int) -> None:
        """Start from the whole document again and keep ``n_cells`` per head."""
        before = self.cache.policy, self.cache.allocation, self.cache.budget
        self.llama.load_state(self.state)
        self.cache.policy, self.cache.allocation, self.cache.budget = policy, allocation, n_cells
        self.cache.apply(*self.cache.choose(n_tokens=N_READ, n_cells=N_READ))
        self.cache.policy, self.cache.allocation, self.cache.budget = before

    def log_probabilities(self, tokens: list[int]) -> np.ndarray[Any, Any]:
        """Of every next token, ``[n_tokens, n_vocab]``, float64."""
        llama, n = self.llama, len(tokens)
        llama._batch.set_batch(batch=tokens, n_past=N_READ, logits_all=True)
        llama._ctx.decode(llama._batch)
        shape = (n, llama.n_vocab())
        logits = np.ctypeslib.as_array(llama._ctx.get_logits(), shape).astype(np.float64)
        logits -= logits.max(axis=-1, keepdims=True)
        logits -= np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        return logits


def measure(bench: Bench, texts: list[Path], shares: list[float]) -> Results:
    results: Results = defaultdict(list)
    for path in texts:
        tokens = bench.read(path.read_text(encoding="utf-8"))
        full = bench.log_probabilities(tokens[N_READ:])
        for name, policy, allocations in ROWS:
            for allocation in allocations:
                for share in shares:
                    bench.evict(policy, allocation, int(share * N_READ))
                    left = bench.log_probabilities(tokens[N_READ:])
                    kl = float((np.exp(full) * (full - left)).sum(axis=-1).mean())
                    top = float((full.argmax(axis=-1) == left.argmax(axis=-1)).mean())
                    results[name, allocation, share].append((kl, top))
        print(f"{path.parent.name}/{path.name}", file=sys.stderr)
    return results


def interval(values: np.ndarray[Any, Any], seed: int = 0) -> tuple[float, float]:
    """95% bootstrap interval of the mean over documents."""
    rng = np.random.default_rng(seed)
    means = rng.choice(values, (10_000, len(values))).mean(axis=-1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench-allocation", description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=Path, required=True, help=argparse.SUPPRESS)
    parser.add_argument("--set", choices=["tuning", "report"], default="report")
    parser.add_argument("--model", type=Path, default=None)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.25, 0.5], metavar="SHARE")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, default=None, help="also write all figures there")
    args = parser.parse_args()

    model = args.model or default_model()
    documents = TUNING if args.set == "tuning" else REPORT
    results = measure(Bench(model, args.threads), [args.texts / d for d in documents], args.shares)
    if args.json:
        listed = [[*key, values] for key, values in results.items()]
        args.json.write_text(json.dumps({"documents": documents, "results": listed}))

    print(
        f"{Path(model).name}, {len(documents)} {args.set} documents, {N_READ} tokens, next {N_NEXT}"
    )
    print("KL: mean [95% interval over documents], geometric mean; x: uniform / this, paired\n")
    for share in args.shares:
        print(f"{share:.1%} of the cells")
        for (name, allocation, at), pairs in results.items():
            if at != share:
                continue
            kl, top = np.array(pairs).T
            uniform = np.array(results[name, "uniform", share])[:, 0]
            low, high = interval(kl)
            geometric = np.exp(np.log(kl).mean())
            print(
                f"  {name:26}{allocation:16}KL {kl.mean():.4f} [{low:.4f}, {high:.4f}]  "
                f"geometric {geometric:.4f}  top-1 {top.mean():.3f}  "
                f"x {uniform.mean() / kl.mean():.2f} "
                f"(geometric {np.exp(np.log(uniform / kl).mean()):.2f})"
            )


if __name__ == "__main__":
    main()
