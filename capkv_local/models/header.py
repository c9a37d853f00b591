"""What a model would take, known from the head of its file: nothing of its weights is read.

llama.cpp itself reads the GGUF and "simulates memory allocations" (``no_alloc``, made for its own
fitting of models to devices): the sizes, the kinds of layers and the reason why a model cannot be
evicted are those of a real session, for every architecture.
"""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import llama_cpp
import llama_cpp._internals as internals

from capkv_local import native
from capkv_local.models.file import check_model_file, load_errors

# The one figure that llama.cpp only logs; "CUDA0", say, is no main memory.
_COMPUTE = re.compile(r"(\S+) compute buffer size = +([\d.]+) MiB")
_HOST = ("CPU", "Host")


@dataclass(frozen=True)
class ContextSizes:
    """A context that was not allocated: bytes and shapes of its cache, bytes of its graphs."""

    cache: native.Info
    n_bytes_compute: int


class ModelHeader:
    """A model without its weights, to ask for sizes; closed by ``with`` or :meth:`close`.

    Parameters
    ----------
    path
        A GGUF file, or the first one of several.

    Attributes
    ----------
    name, arch : str
        What the file calls the model, and its architecture.
    n_params, n_bytes : int
        Weights, all files together.
    n_vocab : int
        Tokens that there are.
    n_layer, n_ctx_train : int
        Layers of all kinds; tokens of context that the model was trained with.
    n_swa : int
        Length of its sliding windows in tokens, 0 for none.

    Raises
    ------
    ModelFileError
        Missing, not a GGUF, truncated, damaged, without weights or of an unknown architecture.
    """

    def __init__(self, path: str | Path) -> None:
        check_model_file(path)
        self.path = Path(path)
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.no_alloc = True
        params.load_mode = llama_cpp.LLAMA_LOAD_MODE_NONE  # with memory maps it would abort
        params.n_gpu_layers = 0
        with load_errors(path, quiet=True):
            self._model = internals.LlamaModel(path_model=str(path), params=params, verbose=False)
        handle = self._model.model
        meta = self._model.metadata()
        self.arch = meta.get("general.architecture", "")
        self.name = meta.get("general.name", self.path.stem)
        self.n_vocab = int(self._model.n_vocab())
        self.n_params = int(self._model.n_params())
        self.n_bytes = int(self._model.size())
        self.n_layer = int(llama_cpp.llama_model_n_layer(handle))
        self.n_ctx_train = int(self._model.n_ctx_train())
        self.n_swa = int(llama_cpp.llama_model_n_swa(handle))
        self._sizes: dict[tuple[object, ...], ContextSizes] = {}

    def context(
        self,
        n_cells: int,
        *,
        type_k: str = "f16",
        type_v: str = "f16",
        n_batch: int = 512,
        n_ubatch: int = 512,
        swa_full: bool | None = None,
        n_outputs: int = 0,
    ) -> ContextSizes:
        """Sizes of a context of ``n_cells`` cells with these cache types and batches.

        ``n_outputs`` is how many tokens of a batch have logits; 0: all, which is what llama.cpp
        reserves memory for.

        Raises
        ------
        UnsupportedModel
            The model, or a cache type, cannot be evicted per head.
        """
        key = (n_cells, type_k, type_v, n_batch, n_ubatch, swa_full, n_outputs)
        if key not in self._sizes:
            self._sizes[key] = self._context(*key)
        return self._sizes[key]

    def _context(
        self,
        n_cells: int,
        type_k: str,
        type_v: str,
        n_batch: int,
        n_ubatch: int,
        swa_full: bool | None,
        n_outputs: int,
    ) -> ContextSizes:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = n_cells
        params.n_batch = n_batch
        params.n_ubatch = n_ubatch
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        params.type_k, params.type_v = native.cache_type(type_k), native.cache_type(type_v)
        params.n_outputs_max = n_outputs
        if swa_full is not None:
            params.swa_full = swa_full
        with (
            load_errors(self.path, quiet=True) as log,
            contextlib.closing(
                internals.LlamaContext(model=self._model, params=params, verbose=False)
            ) as context,
        ):
            cache = native.KVCache(context.ctx).info()
        sizes = _COMPUTE.findall("\n".join(log.infos))
        n_mib = sum(float(mib) for name, mib in sizes if any(host in name for host in _HOST))
        return ContextSizes(cache, int(n_mib * 2**20))

    def close(self) -> None:
        """Free what was read."""
        self._model.close()

    def __enter__(self) -> ModelHeader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
