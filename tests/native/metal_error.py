"""Errors of the Metal kernel and the CPU's op against float64: python -m tests.native.metal_error

Per head size, cells and noise the worst of three draws: the condition number, the largest error
relative to the score (a tenth of it absolute, as ``check`` measures), how much of the tolerance of
``check`` that is, and the NMSE, of which test-backend-ops allows 1e-7.
"""

from __future__ import annotations

from . import ggml, metal
from .ggml import F32, F64
from .leverage import expected, random_cache, random_weights


def errors(got: F32, want: F64, condition: float) -> tuple[float, float, float]:
    tolerance = min(1e-6 + 1e-7 * condition, 1e-2)
    relative = float((abs(got - want) / (abs(want) + 0.1)).max())
    nmse = float(((got - want) ** 2).sum() / (want**2).sum())
    return relative, relative / tolerance, nmse


def main() -> None:
    backend = metal.backend()
    columns = f"{'error':>8} {'of it':>6} {'NMSE':>7}"
    print(f"{'d':>4} {'cells':>6} {'noise':>5} {'condition':>9} | Metal {columns} | CPU {columns}")
    for d in (64, 128, 256):
        for n_kv in (1, d // 2, d - 1, d, d + 5, 2 * d, 8192):
            for noise in (0.0, 1.0):
                rows = []
                for seed in range(3):
                    cache = random_cache(seed, n_kv, 1, d, "F32")
                    w = random_weights(seed, 1, n_kv) + (n_kv == 1)
                    want, condition = expected(ggml.dequantize(cache, "F32"), w, noise=noise)
                    results = (
                        backend.leverage_score(cache, "F32", d, weights=w, noise=noise),
                        ggml.leverage_score(cache, "F32", d, weights=w, noise=noise),
                    )
                    parts = [e for got in results for e in errors(got, want, condition)]
                    rows.append((condition, *parts))
                worst = [max(column) for column in zip(*rows, strict=True)]
                sides = " | ".join(
                    f"{worst[i]:14.1e} {worst[i + 1]:6.2f} {worst[i + 2]:7.0e}" for i in (1, 4)
                )
                print(f"{d:4} {n_kv:6} {noise:5.0f} {worst[0]:9.1e} | {sides}")


if __name__ == "__main__":
    main()
