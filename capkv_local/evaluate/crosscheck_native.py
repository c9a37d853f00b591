"""Our side of the cross-check: the policies' scores on the native cache, as close as it comes to
float32.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capkv_local import native
from capkv_local.cache.native_stats import NativeStats
from capkv_local.errors import EvaluationError
from capkv_local.evaluate.session import Everything
from capkv_local.llama import Llama
from capkv_local.llama.template import ChatTemplate
from capkv_local.policies import get_policy
from capkv_local.policies.base import F32, Reduce

__all__ = ["Reading", "read_texts", "write_float32"]


@dataclass(frozen=True)
class Reading:
    """One text as our side read it.

    Attributes
    ----------
    tokens
        All tokens, those that open a user's message first.
    n_opening
        How many do that.
    after
        Tokens that end the user's message and begin the answer.
    pieces
        How ``kvzip`` repeats the text: tokens to decode, and how many of the last ones observe.
    scores
        By policy, float32 [n_layer, n_head_kv, n_tokens].
    """

    tokens: list[int]
    n_opening: int
    after: list[int]
    pieces: list[tuple[list[int], int]]
    scores: dict[str, F32]


def read_texts(
    model: Path, texts: Sequence[str], policies: Iterable[str], *, n_tokens: int, threads: int
) -> list[Reading]:
    """Read every text up to ``n_tokens`` tokens and score its cells by every policy.

    The weights are dequantised first: llama.cpp rounds activations before it multiplies them
    with quantised weights, and kvpress would be compared with that.

    Raises
    ------
    EvaluationError
        No room for the float32 copy of the model.
    """
    names = list(policies)
    with tempfile.TemporaryDirectory(prefix="capkv-crosscheck-") as folder:
        copy = Path(folder) / "float32.gguf"
        write_float32(model, copy)
        llama = Llama(
            copy,
            n_ctx=n_tokens,
            kv_policy=Everything(),
            kv_budget=n_tokens,
            kv_observe="probe",
            type_k=native.cache_type("f32"),
            type_v=native.cache_type("f32"),
            n_threads=threads,
            n_threads_batch=threads,
            verbose=False,
        )
        try:
            template = ChatTemplate.of(llama)
            return [_read(llama, template, text, names, n_tokens) for text in texts]
        finally:
            llama.close()


def _read(
    llama: Llama, template: ChatTemplate, text: str, policies: list[str], n_tokens: int
) -> Reading:
    read = llama.tokenize(text.encode(), add_bos=False, special=False)
    tokens = [*template.first, *read][:n_tokens]
    llama.reset()  # type: ignore[no-untyped-call]
    llama.prefill(tokens, observe="tail")
    cache, probe, n = llama._require_cache(), llama._probe, len(tokens)
    assert probe is not None

    def repeat(reduce: Reduce) -> F32:
        return llama._repeat(cache, probe, n, reduce)

    scores = {}
    for name in policies:
        policy = get_policy(name)
        stats = NativeStats(
            cache.kv,
            n_cells=n,
            n_tokens=n,
            n_queries=min(policy.n_window, cache.policy.n_window),
            carried=None,
            repeat=repeat,
        )
        scores[name] = policy.score(stats)
    pieces = list(probe.pieces(tokens, 0))
    return Reading(tokens, len(template.first), list(template.after), pieces, scores)


def write_float32(source: Path, target: Path) -> None:
    """Write the same model with every tensor dequantised to float32.

    Raises
    ------
    EvaluationError
        ``target`` cannot be written.
    """
    from gguf import GGUFReader, GGUFValueType, GGUFWriter, quants

    reader = GGUFReader(source)
    writer = GGUFWriter(target, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        value: Any = 0 if name == "general.file_type" else field.contents()  # 0: all float32
        kind = field.types[0]
        sub_type = field.types[-1] if kind == GGUFValueType.ARRAY else None
        writer.add_key_value(name, value, kind, sub_type=sub_type)
    n_bytes = 0
    for tensor in reader.tensors:
        data: NDArray[np.float32] = quants.dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, data)
        n_bytes += data.nbytes
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    except OSError as error:
        raise EvaluationError(
            f"no float32 copy of {source.name} ({n_bytes / 1e6:.0f} MB) in '{target.parent}' "
            f"({error.strerror}): name another folder with TMPDIR"
        ) from error
    finally:
        writer.close()
