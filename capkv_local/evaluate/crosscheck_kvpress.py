"""The other side of the cross-check: what kvpress says about the same tokens, in float32."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from capkv_local.errors import EvaluationError
from capkv_local.evaluate.crosscheck_native import Reading
from capkv_local.policies import get_policy
from capkv_local.policies.base import F32

__all__ = ["KVPRESS_VERSION", "Kvpress", "Theirs", "require"]

KVPRESS_VERSION = "0.5.5"

Theirs = dict[tuple[str, str], F32]
"""Scores by (policy, setting), [n_layer, n_head_kv, n_tokens]."""


def require() -> None:
    """See that kvpress is there, in the version that the policies follow.

    Raises
    ------
    EvaluationError
        It, or what it needs, is missing, or it is another version.
    """
    from importlib import metadata

    fix = 'pip install "capkv-local[kvpress]"'
    try:
        import gguf  # noqa: F401
        import kvpress  # noqa: F401
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise EvaluationError(f"a cross-check needs kvpress ({error}): {fix}") from error
    found = metadata.version("kvpress")
    if found != KVPRESS_VERSION:
        raise EvaluationError(
            f"the policies are compared with kvpress {KVPRESS_VERSION}, this is {found}: {fix}"
        )


class Kvpress:
    """A GGUF that transformers has dequantised to float32, under the presses of kvpress.

    Presses are asked for scores only; nothing is evicted. Layers with sliding windows are left
    out, as kvpress and our cache do.

    Parameters
    ----------
    model
        GGUF file. torch is left with one thread.

    Raises
    ------
    EvaluationError
        transformers cannot read the file.
    """

    def __init__(self, model: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        # With several, torch 2.13 factors batches of matrices, which CapKV has, into nonsense.
        torch.set_num_threads(1)
        self._source = {
            "pretrained_model_name_or_path": str(model.resolve().parent),
            "gguf_file": model.name,
        }
        try:
            with _quiet():
                self._model: Any = AutoModelForCausalLM.from_pretrained(
                    **self._source, dtype=torch.float32
                ).eval()
        except (ValueError, KeyError, NotImplementedError, OSError) as error:
            raise EvaluationError(
                f"transformers cannot read {model.name}, so kvpress has nothing to say about it: "
                f"{error}"
            ) from error
        layers = self._model.model.layers
        self._attention = [
            layer.self_attn for layer in layers if not getattr(layer.self_attn, "is_sliding", False)
        ]
        self._sliding = len(self._attention) < len(layers)
        for module in self._attention:
            module.rotary_emb = self._rotary

    def _rotary(self, x: Any, position_ids: Any) -> Any:
        """RoPE of full-attention layers; presses do not say of which layer they want it."""
        kwargs = {"layer_type": "full_attention"} if self._sliding else {}
        return self._model.model.rotary_emb(x, position_ids, **kwargs)

    def scores(self, reading: Reading) -> Theirs:
        """Scores of all presses on the tokens of a text, without those it has none for."""
        import torch
        from transformers import DynamicCache

        presses = _presses()
        rows: dict[tuple[str, str], list[F32]] = {key: [] for key in presses}

        def ask(module: Any, _: Any, kwargs: dict[str, Any], output: Any) -> None:
            layer = kwargs["past_key_values"].layers[module.layer_idx]
            for key, press in presses.items():
                score = press.score(
                    module, kwargs["hidden_states"], layer.keys, layer.values, None, kwargs
                )
                rows[key].append(_array(score))

        with torch.no_grad():
            cache = DynamicCache(config=self._model.config)
            ids = torch.tensor([reading.tokens])
            with self._hooked(ask):
                self._model.model(input_ids=ids, past_key_values=cache, use_cache=True)
            out = {key: np.stack(layers) for key, layers in rows.items()}
            out["kvzip", "same"] = self._repeat(cache, reading)
            if not self._sliding:  # kvpress refuses models with sliding windows
                out["kvzip", "default"] = self._repeat_by_default(cache, reading)
        return out

    def _repeat(self, cache: Any, reading: Reading) -> F32:
        """KVzip's attention of our pieces, the softmax over all cells and the piece."""
        import torch
        from kvpress import KVzipPress

        n = len(reading.tokens)
        with _quiet():
            press = KVzipPress()
        press.start_idx, press.end_idx = 0, n
        best: dict[int, Any] = {}
        n_queries = 0

        def ask(module: Any, _: Any, kwargs: dict[str, Any], output: Any) -> None:
            keys = kwargs["past_key_values"].layers[module.layer_idx].keys
            attention = press._compute_cross_attention(
                module, kwargs["hidden_states"], keys, kwargs
            )
            # Those who ask for the repetition do not count, only what is repeated.
            score = attention[..., -n_queries:, :n].amax(dim=(-3, -2))
            before = best.get(module.layer_idx, score)
            best[module.layer_idx] = torch.maximum(before, score)

        with self._hooked(ask):
            for piece, n_queries in reading.pieces:  # noqa: B007 (read by the hook)
                self._model.model(
                    input_ids=torch.tensor([piece]), past_key_values=copy.deepcopy(cache)
                )
        return np.stack([_array(best[index]) for index in sorted(best)])

    def _repeat_by_default(self, cache: Any, reading: Reading) -> F32:
        """KVzip as kvpress does it; ``cache`` is left as it was."""
        import torch
        from kvpress import KVzipPress
        from transformers import AutoTokenizer

        with _quiet():
            press = KVzipPress()
            tokenizer = AutoTokenizer.from_pretrained(**self._source)
        # What the press sets up itself if it is told where a tokenizer is, which a GGUF is not.
        press._context_ids = torch.tensor([reading.tokens])
        press._suffix_ids = torch.tensor([reading.after])
        press._cache = cache
        press.prefix_length = reading.n_opening
        press.compress_post = lambda model: None
        press._perform_kvzip_compression(self._model, tokenizer)
        return np.asarray(press.score_val[:, 0].numpy(), np.float32)

    @contextlib.contextmanager
    def _hooked(self, hook: Any) -> Iterator[None]:
        handles = [m.register_forward_hook(hook, with_kwargs=True) for m in self._attention]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _presses() -> dict[tuple[str, str], Any]:
    """Presses with the settings of our policies ("same"), and with their own ("default")."""
    import kvpress

    snapkv: Any = get_policy("snapkv")
    paper: Any = get_policy("capkv-paper")
    expected: Any = get_policy("expected-attention")
    return {
        ("capkv-paper", "same"): kvpress.CapPress(
            tau=paper.tau,
            n_future_positions=paper.n_future,
            n_sink=paper.n_sinks,
            epsilon=paper.epsilon,
        ),
        ("expected-attention", "same"): kvpress.ExpectedAttentionPress(
            n_future_positions=expected.n_future,
            n_sink=expected.n_sinks,
            use_covariance=False,
            use_vnorm=expected.value_norm,
            epsilon=expected.epsilon,
        ),
        ("expected-attention", "default"): kvpress.ExpectedAttentionPress(),
        ("keydiff", "same"): kvpress.KeyDiffPress(),
        ("knorm", "same"): kvpress.KnormPress(),
        ("snapkv", "same"): kvpress.SnapKVPress(
            window_size=snapkv.n_window, kernel_size=snapkv.pool
        ),
        ("snapkv", "default"): kvpress.SnapKVPress(),
        ("tova", "same"): kvpress.TOVAPress(),
    }


def _array(score: Any) -> F32:
    return np.asarray(score[0].numpy(), np.float32)


def _quiet() -> contextlib.AbstractContextManager[Any]:
    """No progress bars of the libraries, and no warning of a press about its own cost."""
    return contextlib.redirect_stderr(io.StringIO())
