"""A whole session, on the CPU or with all of it on the Metal backend of the tests.

python -m tests.native.metal_session TYPE POSITIONS.npy [LIBRARY]

Writes the positions that are held after a few evictions, and prints how many Metal kernels ran.
"""

from __future__ import annotations

import ctypes as ct
import os
import sys
import tempfile
from pathlib import Path

import numpy as np

from tests.model import tiny

from . import ggml


def load_backend(library: Path) -> ct.CDLL:
    """Make the backend known to llama.cpp; what it has no kernel for, it runs on the CPU."""
    folder = ggml.library_folder()
    assert folder is not None
    os.environ["GGML_BACKEND_PATH"] = str(library)
    registry = ct.CDLL(str(folder / "libggml.so"))
    registry.ggml_backend_load_all()
    by_name = registry.ggml_backend_init_by_name
    by_name.restype, by_name.argtypes = ct.c_void_p, [ct.c_char_p, ct.c_char_p]
    backend = ct.CDLL(str(library))
    backend.metal_set_cpu.argtypes = [ct.c_void_p]
    backend.metal_set_cpu(by_name(b"CPU", None))
    return backend


def main(kind: int, target: Path, library: Path | None) -> None:
    backend = load_backend(library) if library else None
    from capkv_local import Llama  # after the backend, which llama.cpp looks for once

    with tempfile.TemporaryDirectory() as folder:
        model = tiny.llama(Path(folder) / "tiny.gguf", head_dim=64, n_layer=3)
        llm = Llama(
            str(model),
            n_ctx=2048,
            n_batch=128,
            kv_policy="capkv",
            kv_budget=200,
            kv_room=64,
            type_k=kind,
            type_v=kind,
            n_gpu_layers=-1 if backend else 0,
            verbose=False,
        )
        llm.eval(np.random.default_rng(0).integers(0, tiny.N_VOCAB, 900).tolist())
        np.save(target, llm.kv_positions())
        llm.close()
    print(backend.metal_n_dispatch() if backend else 0)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]) if len(sys.argv) > 3 else None)
