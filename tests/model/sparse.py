"""Heads of large GGUFs: all that is written of the weights is where they would be."""

from __future__ import annotations

import os
from pathlib import Path

import gguf
import numpy as np

from tests.model.tiny import Shapes

# Q4_K: 256 weights in 144 bytes.
_BLOCK, _BLOCK_BYTES = 256, 144
_ALIGNMENT = 32


def llama_8b(path: Path, *, n_vocab: int = 128256, n_ctx: int = 131072) -> int:
    """The shapes of an 8B model in Q4_K, a sparse file; returns the bytes of its weights."""
    n_embd, n_ff, n_layer, n_head, n_head_kv, head_dim = 4096, 14336, 32, 32, 8, 128
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in {
        "vocab_size": n_vocab,
        "context_length": n_ctx,
        "embedding_length": n_embd,
        "feed_forward_length": n_ff,
        "block_count": n_layer,
        "attention.head_count": n_head,
        "attention.head_count_kv": n_head_kv,
        "rope.dimension_count": head_dim,
    }.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    # As large as a real one is, which is most of what has to be read.
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list([f"token{i}" for i in range(n_vocab)])
    writer.add_token_types([1] * n_vocab)
    writer.add_token_merges([f"a{i} b{i}" for i in range(2 * n_vocab)])

    shapes: Shapes = {
        "token_embd.weight": (n_embd, n_vocab),
        "output_norm.weight": (n_embd,),
        "output.weight": (n_embd, n_vocab),
    }
    for i in range(n_layer):
        p = f"blk.{i}"
        shapes |= {
            f"{p}.attn_norm.weight": (n_embd,),
            f"{p}.attn_q.weight": (n_embd, n_head * head_dim),
            f"{p}.attn_k.weight": (n_embd, n_head_kv * head_dim),
            f"{p}.attn_v.weight": (n_embd, n_head_kv * head_dim),
            f"{p}.attn_output.weight": (n_head * head_dim, n_embd),
            f"{p}.ffn_norm.weight": (n_embd,),
            f"{p}.ffn_gate.weight": (n_embd, n_ff),
            f"{p}.ffn_up.weight": (n_embd, n_ff),
            f"{p}.ffn_down.weight": (n_ff, n_embd),
        }
    total = sum(_add(writer, name, shape) for name, shape in shapes.items())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    n_head_bytes = -(-path.stat().st_size // _ALIGNMENT) * _ALIGNMENT
    os.truncate(path, n_head_bytes + total)
    return total


def _add(writer: gguf.GGUFWriter, name: str, shape: tuple[int, ...]) -> int:
    """Announce a tensor: vectors in f32, matrices in Q4_K; returns its bytes."""
    rows, n_row = shape[:0:-1], shape[0]
    if not rows:
        writer.add_tensor_info(name, [n_row], np.dtype(np.float32), 4 * n_row)
        return 4 * n_row
    n_row_bytes = n_row // _BLOCK * _BLOCK_BYTES
    n_bytes = int(np.prod(rows)) * n_row_bytes
    writer.add_tensor_info(
        name,
        [*rows, n_row_bytes],
        np.dtype(np.uint8),
        n_bytes,
        raw_dtype=gguf.GGMLQuantizationType.Q4_K,
    )
    return n_bytes
