"""A mistake that the sanitizers have to find: our library writes behind the end of a buffer.

Ends with an error of AddressSanitizer, or prints that nobody noticed.
"""

from __future__ import annotations

import ctypes
from typing import Any

import llama_cpp
import numpy as np

from capkv_local import Llama
from capkv_local.models import default_model


def main() -> None:
    options: dict[str, Any] = {"n_ctx": 256, "n_batch": 64, "n_threads": 1, "n_threads_batch": 1}
    llama = Llama(default_model(), kv_budget=64, verbose=False, **options)
    llama.eval(llama.tokenize(b"A few words are enough."))
    cache: Any = llama._cache
    positions = cache.kv.positions()
    short = np.zeros(positions.size - 1, np.int32)
    function = ctypes.CDLL(llama_cpp.llama_cpp._lib._name).llama_memory_evict_positions
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
    function(llama.ctx, short.ctypes.data, positions.size)
    print("nobody noticed", flush=True)


if __name__ == "__main__":
    main()
