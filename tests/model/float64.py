"""A llama in numpy float64 which never evicts a KV cell but masks it, head by head.

The oracle of the ragged cache, independent of llama.cpp: all keys and values stay, and ``held``
says which of them each head still sees. Since tokens are only ever appended, the keys and values
of deeper layers depend on what was held when their token was decoded, as in a cache that forgets.

Everything is float64 but for the roundings that llama.cpp makes on purpose:

- keys and values have the precision of the cache, in the rotated basis of ``llama-kv-cache.cpp``
  (``attn_rot_k``) where it has one; flash attention casts an f32 cache to f16
  (``build_attn_mha`` in ``llama-graph.cpp``);
- queries are converted to what keys are multiplied with (f16 for f16, q8_0 for q8_0 and q4_0),
  unless :data:`N_TILE` or more of them come at once (``ggml-cpu/ops.cpp``, flash_attn_ext);
- values of an f16 cache are summed up in f16, unless :data:`N_TILE` queries come at once. This
  one is modelled on request only (``sum_f16``): it depends on the order of the cells;
- angles of RoPE are float32 products. An angle of 100 is good to 1e-5 then, which decides how
  some thousand numbers a token are rounded.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize, quantize

F64 = npt.NDArray[np.float64]
I32 = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]

# GGML_FA_TILE_Q: from so many queries on, the kernel multiplies f32 matrices
N_TILE = 64

# Largest difference of the logits from llama.cpp's, relative to the largest logit. What is left is
# float32: llama.cpp differs from float64 by 1e-7 to 1e-6, and now and then a number lies so close
# to the middle between two steps of the cache (or of a query, or a sum in f16) that it is rounded
# to the other one. Where none does, the logits agree to 3e-7. One that does is off by a step: 2^-11
# of itself in f16, 2^-8 in bf16, 1/127 of the largest of 32 in q8_0, 1/8 in q4_0; and deeper layers
# have more of them. Twice to five times the worst of 600 decodes each by models of 1 to 3 layers,
# head sizes 32 to 256: 9e-4 (f16, f32), 2.2e-3 (bf16), 8.2e-3 (q8_0), 2.6e-2 (q4_0).
#
# Without `sum_f16`, an f32 or f16 cache is good to this only in decodes of N_TILE tokens (2.7e-3):
# each of n cells rounds the sum to 11 bits, sqrt(n) * 2^-12 is 4e-3 at n = 300 (measured: 9e-3).
TOLERANCE = {"f32": 5e-3, "f16": 5e-3, "bf16": 5e-3, "q8_0": 2e-2, "q4_0": 6e-2}


class Float64Llama:
    """Full forward pass of a GGUF of architecture llama with f32 weights.

    Parameters
    ----------
    path
        The file, as :func:`tests.model.tiny.llama` writes it.
    kv_type
        Type of the cache, for keys and values alike; one of :data:`TOLERANCE`.
    sum_f16
        Also model that values of an f32 or f16 cache are summed up in f16, cell by cell.
    noise
        Relative size of a random error of the queries, keys and values before they are rounded: how
        much a difference of that size, such as float32 makes, grows to.
    """

    def __init__(
        self,
        path: Path,
        kv_type: str = "f32",
        *,
        sum_f16: bool = False,
        noise: float = 0.0,
    ) -> None:
        reader = gguf.GGUFReader(path)
        self.n_layer = int(_meta(reader, "block_count"))
        self.n_head = int(_meta(reader, "attention.head_count"))
        self.n_head_kv = int(_meta(reader, "attention.head_count_kv"))
        self.head_dim = int(_meta(reader, "attention.key_length"))
        self.kv_type = kv_type
        self.sum_f16 = sum_f16 and kv_type in ("f32", "f16")
        self.noise = noise
        self._rng = np.random.default_rng(0)
        self._eps = float(_meta(reader, "attention.layer_norm_rms_epsilon"))
        self._rope_base = float(_meta(reader, "rope.freq_base", 10000.0))
        self._weights = {t.name: t.data.astype(np.float64) for t in reader.tensors}
        self._rotated = kv_type.startswith("q") and self.head_dim % 64 == 0
        # Keys are rotated in the largest blocks, values in blocks of 64.
        self._size_k = self.head_dim & -self.head_dim
        # [n_tokens, n_head_kv, head_dim] of each layer, as the kernel reads them
        self.k = [np.empty((0, self.n_head_kv, self.head_dim))] * self.n_layer
        self.v = list(self.k)
        #: Cells that are not evicted, ``[n_layer, n_head_kv, n_tokens]``.
        self.held: Mask = np.empty((self.n_layer, self.n_head_kv, 0), dtype=np.bool_)

    @property
    def n_tokens(self) -> int:
        return int(self.held.shape[-1])

    def decode(self, tokens: Sequence[int]) -> F64:
        """Append tokens, which every head holds; logits of the last one, ``[n_vocab]``."""
        last: F64 = self.decode_all(tokens)[-1]
        return last

    def decode_all(self, tokens: Sequence[int]) -> F64:
        """As :meth:`decode`; logits of every token, ``[n, n_vocab]``."""
        assert len(tokens) > 0
        n_past, n_new = self.n_tokens, len(tokens)
        new = np.ones((self.n_layer, self.n_head_kv, n_new), dtype=np.bool_)
        self.held = np.concatenate([self.held, new], axis=-1)
        position = np.arange(n_past, n_past + n_new)
        causal = np.arange(n_past + n_new) <= position[:, None]  # [n_new, n_tokens]
        x = self._weights["token_embd.weight"][list(tokens)]  # [n_new, n_embd]
        for i in range(self.n_layer):
            x = x + self._attention(i, self._norm(x, f"blk.{i}.attn_norm"), position, causal)
            x = x + self._ffn(i, self._norm(x, f"blk.{i}.ffn_norm"))
        output = self._weights.get("output.weight", self._weights["token_embd.weight"])
        return _times(self._norm(x, "output_norm"), output)

    def evict(self, keep_tokens: Mask) -> None:
        """Hold nothing but ``keep_tokens[n_layer, n_head_kv, n_tokens]`` of what is held."""
        assert keep_tokens.shape == self.held.shape and not (keep_tokens & ~self.held).any()
        self.held = keep_tokens.copy()

    def truncate(self, n_tokens: int) -> None:
        """Drop all tokens but the first ``n_tokens``."""
        self.held = self.held[..., :n_tokens]
        self.k = [k[:n_tokens] for k in self.k]
        self.v = [v[:n_tokens] for v in self.v]

    def copy(self) -> Float64Llama:
        """Another one that goes on from here on its own; weights are shared."""
        other = copy.copy(self)
        other.k, other.v = list(self.k), list(self.v)
        # _attention() and evict() replace arrays and never write into them.
        other._rng = copy.deepcopy(self._rng)
        return other

    def positions(self) -> I32:
        """As :meth:`capkv_local.native.KVCache.positions`: right-aligned, -1 where absent."""
        n_held = self.held.sum(axis=-1)
        out = np.full((*self.held.shape[:2], n_held.max(initial=0)), -1, dtype=np.int32)
        for head in np.ndindex(*n_held.shape):
            out[head][out.shape[-1] - n_held[head] :] = np.flatnonzero(self.held[head])
        return out

    # -- layers --------------------------------------------------------------------------------

    def _norm(self, x: F64, name: str) -> F64:
        scale = np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + self._eps)
        normed: F64 = x / scale * self._weights[f"{name}.weight"]
        return normed

    def _ffn(self, i: int, x: F64) -> F64:
        gate = _times(x, self._weights[f"blk.{i}.ffn_gate.weight"])
        up = _times(x, self._weights[f"blk.{i}.ffn_up.weight"])
        return _times(gate / (1 + np.exp(-gate)) * up, self._weights[f"blk.{i}.ffn_down.weight"])

    def _attention(self, i: int, x: F64, position: npt.NDArray[np.int64], causal: Mask) -> F64:
        n_new, d = len(x), self.head_dim

        def project(name: str) -> F64:
            rows = _times(x, self._weights[f"blk.{i}.attn_{name}.weight"]).reshape(n_new, -1, d)
            return rows * (1 + self.noise * self._rng.standard_normal(rows.shape))

        q = self._rope(project("q"), position)  # [n_new, n_head, d]
        k = self._rope(project("k"), position)  # [n_new, n_head_kv, d]
        v = project("v")
        if self._rotated:
            q, k, v = hadamard(q, self._size_k), hadamard(k, self._size_k), hadamard(v, 64)
        if n_new < N_TILE or self.kv_type not in ("f32", "f16"):
            q = as_stored(q, "q8_0" if self.kv_type == "q4_0" else self.kv_type)
        self.k[i] = np.concatenate([self.k[i], as_stored(k, self.kv_type)])
        self.v[i] = np.concatenate([self.v[i], as_stored(v, self.kv_type)])

        # Query heads in groups of those that share a KV head.
        q = q.reshape(n_new, self.n_head_kv, -1, d)
        scores = np.einsum("thgd,nhd->thgn", q, self.k[i]) / np.sqrt(d)
        seen = causal[:, None] & self.held[i]  # [n_new, n_head_kv, n_tokens]
        scores = np.where(seen[:, :, None], scores, -np.inf)
        if self.sum_f16 and n_new < N_TILE:
            out = _sum_f16(scores, self.v[i])
        else:
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            weights /= weights.sum(axis=-1, keepdims=True)
            out = np.einsum("thgn,nhd->thgd", weights, self.v[i])
        if self._rotated:
            out = hadamard(out, 64)
        return _times(out.reshape(n_new, -1), self._weights[f"blk.{i}.attn_output.weight"])

    def _rope(self, x: F64, position: npt.NDArray[np.int64]) -> F64:
        """Rotate the pairs (2i, 2i + 1) of ``x[n_new, n_head, d]``."""
        angle = np.empty((len(position), 1, self.head_dim // 2), dtype=np.float32)
        angle[:, :, 0] = position[:, None]
        step = np.float32(self._rope_base) ** np.float32(-2 / self.head_dim)
        for i in range(1, self.head_dim // 2):
            angle[:, :, i] = angle[:, :, i - 1] * step
        turn = np.exp(1j * angle.astype(np.float64))
        turned = (x[..., ::2] + 1j * x[..., 1::2]) * turn
        return np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)


def relative_error(got: F64, expected: F64) -> float:
    """Largest difference of logits, relative to the largest logit: what TOLERANCE is for."""
    return float(np.abs(got - expected).max() / np.abs(expected).max())


def as_stored(rows: F64, kv_type: str) -> F64:
    """``rows[..., d]`` rounded as attention reads them from a cache of ``kv_type``."""
    if kv_type in ("f32", "f16"):
        return rows.astype(np.float16).astype(np.float64)
    kind = GGMLQuantizationType[kv_type.upper()]
    flat = np.ascontiguousarray(rows.reshape(-1, rows.shape[-1]), dtype=np.float32)
    return dequantize(quantize(flat, kind), kind).reshape(rows.shape).astype(np.float64)


def _sum_f16(scores: F64, v: F64) -> F64:
    """Softmax of ``scores[t, h, g, n]`` times ``v[n, h, d]`` as ..._f16_one_chunk() sums it up."""
    order = np.moveaxis(scores, -1, 0)[..., None]  # [n, t, h, g, 1]
    largest = np.maximum.accumulate(order, axis=0)
    with np.errstate(invalid="ignore"):  # -inf - -inf before the first cell that is seen
        weight = np.nan_to_num(np.exp(order - largest), nan=0).astype(np.float32)
        shrink = np.nan_to_num(np.exp(largest[:-1] - largest[1:]), nan=1).astype(np.float32)
    rows = v[:, None, :, None].astype(np.float32)  # [n, 1, h, 1, d]
    out = _f16(weight[0] * rows[0])
    for cell in range(1, len(v)):
        if (shrink[cell - 1] < 1).any():
            out = _f16(out * shrink[cell - 1])
        out = _f16(out + weight[cell] * rows[cell])
    # What was summed up before a larger score came along shrinks with it.
    total = np.exp(order - largest[-1]).sum(axis=0)
    summed: F64 = out / total
    return summed


def _f16(x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    return x.astype(np.float16).astype(np.float32)


def hadamard(x: F64, size: int) -> F64:
    """Blocks of ``x[..., d]`` times the normalised Hadamard matrix of ``size``; its own inverse."""
    out = x.reshape(*x.shape[:-1], -1, size)
    step = 1
    while step < size:
        pairs = out.reshape(*out.shape[:-1], -1, 2, step)
        even, odd = pairs[..., 0, :], pairs[..., 1, :]
        out = np.stack([even + odd, even - odd], axis=-2).reshape(out.shape)
        step *= 2
    rotated: F64 = out.reshape(x.shape) / np.sqrt(size)
    return rotated


def _times(x: F64, weights: F64) -> F64:
    """``x[n, n_in]`` times ``weights[n_out, n_in]``.

    Without BLAS: where another process has the second core, its threads wait for each other longer
    than everything else here takes.
    """
    product: F64 = np.einsum("ni,oi->no", x, weights)
    return product


def _meta(reader: Any, key: str, default: Any = None) -> Any:
    field = reader.get_field(f"llama.{key}")
    return default if field is None else field.contents()
