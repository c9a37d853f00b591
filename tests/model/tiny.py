"""Tiny GGUFs with random weights: every architecture that a test needs, in milliseconds.

Sizes are as small as llama.cpp accepts. The vocabulary is llama.cpp's own dummy one, so that tests
work with token numbers below :data:`N_VOCAB`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import gguf
import numpy as np

N_VOCAB = 64
N_EMBD = 64
N_FF = 64
N_CTX = 4096

Value = bool | int | float | str | list[int] | list[bool]
# Shapes as llama.cpp writes them: the row length first.
Shapes = dict[str, tuple[int, ...]]


def write(
    path: Path, arch: str, meta: Mapping[str, Value], shapes: Shapes, *, seed: int = 0
) -> Path:
    """Write a GGUF of architecture ``arch`` with f32 weights drawn from ``seed``.

    Parameters
    ----------
    path
        File to write.
    arch
        ``general.architecture``; also the prefix of the keys in ``meta``.
    meta
        Hyperparameters; a key that begins with ``tokenizer.`` gets no prefix.
    shapes
        Tensor name to shape, row length first. Norms are near 1, ``ssm_a`` is negative.
    """
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, arch)
    common: dict[str, Value] = {
        "vocab_size": N_VOCAB,
        "context_length": N_CTX,
        "embedding_length": N_EMBD,
        "feed_forward_length": N_FF,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "attention.layer_norm_epsilon": 1e-5,
    }
    for key, value in {**common, **meta}.items():
        _add(writer, key if key.startswith("tokenizer.") else f"{arch}.{key}", value)
    writer.add_tokenizer_model("test")
    writer.add_token_list([f"tok_{i}" for i in range(N_VOCAB)])
    writer.add_token_scores([0.0] * N_VOCAB)
    for name, shape in shapes.items():
        writer.add_tensor(name, _weights(rng, name, shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, key: str, value: Value) -> None:
    # bool is an int
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _weights(
    rng: np.random.Generator, name: str, shape: Sequence[int]
) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    weights = rng.standard_normal(tuple(reversed(shape))).astype(np.float32)
    if "norm" in name and name.endswith("weight"):
        return 1 + np.float32(0.1) * weights
    if name.endswith("bias"):
        return np.float32(0.1) * weights
    if "ssm_a" in name:
        return -np.abs(weights)
    if name.startswith("token_embd"):
        return weights
    # Sharper than usual, so that attention is far from uniform.
    return weights * np.float32(1.5 / np.sqrt(shape[0]))


def _outside() -> Shapes:
    return {"token_embd.weight": (N_EMBD, N_VOCAB), "output_norm.weight": (N_EMBD,)}


def _attention(p: str, head_dim: int, n_head: int, n_head_kv: int) -> Shapes:
    return {
        f"{p}.attn_norm.weight": (N_EMBD,),
        f"{p}.attn_q.weight": (N_EMBD, head_dim * n_head),
        f"{p}.attn_k.weight": (N_EMBD, head_dim * n_head_kv),
        f"{p}.attn_v.weight": (N_EMBD, head_dim * n_head_kv),
        f"{p}.attn_output.weight": (head_dim * n_head, N_EMBD),
    }


def _ffn(p: str) -> Shapes:
    return {
        f"{p}.ffn_norm.weight": (N_EMBD,),
        f"{p}.ffn_gate.weight": (N_EMBD, N_FF),
        f"{p}.ffn_up.weight": (N_EMBD, N_FF),
        f"{p}.ffn_down.weight": (N_FF, N_EMBD),
    }


def _heads(head_dim: int, n_head: int, n_head_kv: int | list[int]) -> dict[str, Value]:
    return {
        "attention.head_count": n_head,
        "attention.head_count_kv": n_head_kv,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "rope.dimension_count": head_dim,
    }


# -- plain caches --------------------------------------------------------------------------------


def llama(
    path: Path, *, head_dim: int = 32, n_head: int = 4, n_head_kv: int = 2, n_layer: int = 2
) -> Path:
    shapes = _outside()
    for i in range(n_layer):
        shapes |= _attention(f"blk.{i}", head_dim, n_head, n_head_kv) | _ffn(f"blk.{i}")
    meta = {"block_count": n_layer, **_heads(head_dim, n_head, n_head_kv)}
    return write(path, "llama", meta, shapes)


def gemma3(path: Path, *, n_layer: int = 4, n_swa: int = 32, head_dim: int = 32) -> Path:
    """Every other layer, from the second on, has full attention; the others a sliding window."""
    shapes = _outside()
    for i in range(n_layer):
        p = f"blk.{i}"
        shapes |= _attention(p, head_dim, 4, 2) | _ffn(p)
        shapes |= {f"{p}.attn_{x}_norm.weight": (head_dim,) for x in "qk"}
        shapes |= {f"{p}.post_{x}_norm.weight": (N_EMBD,) for x in ("attention", "ffw")}
    meta: dict[str, Value] = {
        "block_count": n_layer,
        "attention.sliding_window": n_swa,
        "attention.sliding_window_pattern": 2,
        **_heads(head_dim, 4, 2),
    }
    return write(path, "gemma3", meta, shapes)


def deepseek2(path: Path, *, mla: bool = True) -> Path:
    """Multi-head latent attention; without ``mla`` the older form with plain keys and values.

    Keys of the plain form (48) are longer than its values (32).
    """
    n_head, rope, nope, value, rank, n_layer = 2, 16, 32, 32, 64, 2
    shapes = _outside()
    for i in range(n_layer):
        p = f"blk.{i}"
        shapes |= _ffn(p)
        shapes |= {
            f"{p}.attn_norm.weight": (N_EMBD,),
            f"{p}.attn_q_a.weight": (N_EMBD, rank),
            f"{p}.attn_q_a_norm.weight": (rank,),
            f"{p}.attn_q_b.weight": (rank, n_head * (nope + rope)),
            f"{p}.attn_kv_a_mqa.weight": (N_EMBD, rank + rope),
            f"{p}.attn_kv_a_norm.weight": (rank,),
            f"{p}.attn_output.weight": (n_head * value, N_EMBD),
        }
        if mla:
            shapes[f"{p}.attn_k_b.weight"] = (nope, rank, n_head)
            shapes[f"{p}.attn_v_b.weight"] = (rank, value, n_head)
        else:
            shapes[f"{p}.attn_kv_b.weight"] = (rank, n_head * (nope + value))
    meta: dict[str, Value] = {
        "block_count": n_layer,
        "leading_dense_block_count": n_layer,
        "attention.head_count": n_head,
        "attention.head_count_kv": 1 if mla else n_head,
        "attention.key_length": rank + rope if mla else nope + rope,
        "attention.value_length": rank if mla else value,
        "attention.q_lora_rank": rank,
        "attention.kv_lora_rank": rank,
        "rope.dimension_count": rope,
        "expert_feed_forward_length": N_FF,
        "expert_shared_count": 1,
    }
    if mla:
        meta |= {"attention.key_length_mla": nope + rope, "attention.value_length_mla": value}
    return write(path, "deepseek2", meta, shapes)


def deci(path: Path) -> Path:
    """Two KV heads in the first layer, one in the second."""
    n_head_kv = [2, 1]
    shapes = _outside()
    for i, n in enumerate(n_head_kv):
        shapes |= _attention(f"blk.{i}", 32, 4, n) | _ffn(f"blk.{i}")
    return write(path, "deci", {"block_count": 2, **_heads(32, 4, n_head_kv)}, shapes)


def openelm(path: Path) -> Path:
    """Heads of queries and of keys differ between layers."""
    head_dim, n_head, n_head_kv = 32, [2, 4], [1, 2]
    shapes = _outside()
    for i in range(2):
        p = f"blk.{i}"
        shapes |= _ffn(p)
        shapes |= {
            f"{p}.attn_norm.weight": (N_EMBD,),
            f"{p}.attn_qkv.weight": (N_EMBD, head_dim * (n_head[i] + 2 * n_head_kv[i])),
            f"{p}.attn_q_norm.weight": (head_dim,),
            f"{p}.attn_k_norm.weight": (head_dim,),
            f"{p}.attn_output.weight": (head_dim * n_head[i], N_EMBD),
        }
    meta = {"block_count": 2, **_heads(head_dim, 1, n_head_kv), "attention.head_count": n_head}
    return write(path, "openelm", meta, shapes)


def qwen2vl(path: Path) -> Path:
    """M-RoPE: positions have several components."""
    shapes = _outside()
    for i in range(2):
        shapes |= _attention(f"blk.{i}", 32, 2, 2) | _ffn(f"blk.{i}")
    meta: dict[str, Value] = {"block_count": 2, **_heads(32, 2, 2)}
    meta["rope.dimension_sections"] = [4, 6, 6, 0]
    return write(path, "qwen2vl", meta, shapes)


def mpt(path: Path) -> Path:
    """ALiBi."""
    shapes = _outside()
    for i in range(2):
        p = f"blk.{i}"
        shapes |= _ffn(p)
        del shapes[f"{p}.ffn_gate.weight"]
        shapes |= {
            f"{p}.attn_norm.weight": (N_EMBD,),
            f"{p}.attn_qkv.weight": (N_EMBD, 3 * N_EMBD),
            f"{p}.attn_output.weight": (N_EMBD, N_EMBD),
        }
    meta: dict[str, Value] = {
        "block_count": 2,
        "attention.head_count": 2,
        "attention.max_alibi_bias": 8.0,
    }
    return write(path, "mpt", meta, shapes)


def grok(path: Path) -> Path:
    """llama.cpp switches flash attention off for it."""
    shapes = _outside()
    n_expert = 2
    for i in range(2):
        p = f"blk.{i}"
        shapes |= _attention(p, 32, 2, 2)
        shapes |= {
            f"{p}.attn_output_norm.weight": (N_EMBD,),
            f"{p}.ffn_norm.weight": (N_EMBD,),
            f"{p}.layer_output_norm.weight": (N_EMBD,),
            f"{p}.ffn_gate_inp.weight": (N_EMBD, n_expert),
            f"{p}.ffn_gate_exps.weight": (N_EMBD, N_FF, n_expert),
            f"{p}.ffn_down_exps.weight": (N_FF, N_EMBD, n_expert),
            f"{p}.ffn_up_exps.weight": (N_EMBD, N_FF, n_expert),
        }
    meta: dict[str, Value] = {
        "block_count": 2,
        "expert_count": n_expert,
        "expert_used_count": n_expert,
        "expert_feed_forward_length": N_FF,
        **_heads(32, 2, 2),
    }
    return write(path, "grok", meta, shapes)


# -- other memories ------------------------------------------------------------------------------


def _mamba_layer(p: str, *, norms: bool) -> Shapes:
    inner, state, rank = 2 * N_EMBD, 16, 4
    shapes: Shapes = {
        f"{p}.attn_norm.weight": (N_EMBD,),
        f"{p}.ssm_in.weight": (N_EMBD, 2 * inner),
        f"{p}.ssm_conv1d.weight": (4, inner),
        f"{p}.ssm_conv1d.bias": (inner,),
        f"{p}.ssm_x.weight": (inner, rank + 2 * state),
        f"{p}.ssm_dt.weight": (rank, inner),
        f"{p}.ssm_dt.bias": (inner,),
        f"{p}.ssm_a": (state, inner),
        f"{p}.ssm_d": (inner,),
        f"{p}.ssm_out.weight": (inner, N_EMBD),
    }
    if norms:
        for name, size in (("dt", rank), ("b", state), ("c", state)):
            shapes[f"{p}.ssm_{name}_norm.weight"] = (size,)
    return shapes


_MAMBA: dict[str, Value] = {
    "block_count": 2,
    "ssm.conv_kernel": 4,
    "ssm.inner_size": 2 * N_EMBD,
    "ssm.state_size": 16,
    "ssm.time_step_rank": 4,
}


def mamba(path: Path) -> Path:
    shapes = _outside()
    for i in range(2):
        shapes |= _mamba_layer(f"blk.{i}", norms=False)
    meta: dict[str, Value] = {**_MAMBA, "attention.head_count": 0, "feed_forward_length": 0}
    return write(path, "mamba", meta, shapes)


def jamba(path: Path) -> Path:
    """One layer of Mamba, one of attention."""
    shapes = _outside() | _mamba_layer("blk.0", norms=True) | _ffn("blk.0")
    shapes |= _attention("blk.1", 32, 2, 2) | _ffn("blk.1")
    meta: dict[str, Value] = {**_MAMBA, "attention.head_count": 2}
    meta["attention.head_count_kv"] = [0, 2]
    return write(path, "jamba", meta, shapes)


def bert(path: Path) -> Path:
    """An encoder: attention in both directions, no cache."""
    shapes: Shapes = {
        "token_embd.weight": (N_EMBD, N_VOCAB),
        "position_embd.weight": (N_EMBD, 512),
        "token_types.weight": (N_EMBD, 2),
        "token_embd_norm.weight": (N_EMBD,),
        "token_embd_norm.bias": (N_EMBD,),
    }
    for i in range(2):
        p = f"blk.{i}"
        shapes |= _attention(p, 32, 2, 2) | _ffn(p)
        for name in ("attn_norm", "ffn_norm", "ffn_gate"):
            del shapes[f"{p}.{name}.weight"]
        for name in ("attn_output_norm", "layer_output_norm"):
            shapes |= {f"{p}.{name}.{x}": (N_EMBD,) for x in ("weight", "bias")}
    meta: dict[str, Value] = {
        "block_count": 2,
        "context_length": 512,
        "attention.head_count": 2,
        "attention.causal": False,
        "tokenizer.ggml.token_type_count": 2,
    }
    return write(path, "bert", meta, shapes)


def t5(path: Path) -> Path:
    """An encoder and a decoder, with a bias that depends on the distance."""
    shapes: Shapes = {
        "token_embd.weight": (N_EMBD, N_VOCAB),
        "enc.output_norm.weight": (N_EMBD,),
        "dec.output_norm.weight": (N_EMBD,),
    }
    for side in ("enc", "dec"):
        for i in range(2):
            p = f"{side}.blk.{i}"
            for kind in ("attn", "cross_attn") if side == "dec" else ("attn",):
                shapes[f"{p}.{kind}_norm.weight"] = (N_EMBD,)
                shapes |= {f"{p}.{kind}_{x}.weight": (N_EMBD, N_EMBD) for x in "qkvo"}
            shapes[f"{p}.attn_rel_b.weight"] = (2, 8)
            shapes |= _ffn(p)
    meta: dict[str, Value] = {
        "block_count": 2,
        "attention.head_count": 2,
        "attention.relative_buckets_count": 8,
        "decoder_start_token_id": 0,
    }
    return write(path, "t5", meta, shapes)


Builder = Callable[[Path], Path]
