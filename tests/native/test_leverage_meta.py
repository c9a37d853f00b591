"""``ggml_leverage_score`` with its heads shared out over devices (split mode "tensor").

The meta backend has to know along which axis each operator can be cut. Here it cuts for two devices
that are both the CPU.
"""

from __future__ import annotations

import ctypes as ct
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as GGMLType

from lib.tools import c_compiler

from . import ggml
from .ggml import F32, U8
from .leverage import random_cache, random_weights

_POINTER, _I64 = ct.c_void_p, ct.c_int64


class Shares(ct.Structure):
    _fields_ = (("n_head_kv", _I64 * 2), ("n_group", _I64))


@pytest.fixture(scope="module")
def split(built: None, tmp_path_factory: pytest.TempPathFactory) -> Any:
    compiler = c_compiler()
    if compiler is None:
        pytest.fail("no C compiler found; install gcc")
    library = tmp_path_factory.mktemp("meta") / "split.so"
    source = Path(__file__).parent / "meta" / "split.c"
    command = [compiler, "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", str(source)]
    subprocess.run([*command, str(ggml.library_file("ggml-base")), "-o", str(library)], check=True)
    return ct.CDLL(str(library)).split


def on_two(split: Any, cache: U8, kind: str, d: int, w: F32 | None, heads: Any) -> F32:
    """Scores [n_head_kv, n_kv], with so many KV heads on each device; (0, 0): all on both."""
    c = ggml.load()
    n_kv, n_head_kv, _ = cache.shape
    shares = Shares((_I64 * 2)(*heads), 1 if w is None else len(w) // n_head_kv)
    cpu = c["ggml_backend_dev_by_type"](0)
    device = c["ggml_backend_meta_device"](
        (_POINTER * 2)(cpu, cpu), 2, ct.cast(split, _POINTER), ct.addressof(shares)
    )
    backend = c["ggml_backend_dev_init"](device, None)
    ctx = ggml.context()
    u = c["ggml_new_tensor_3d"](ctx, GGMLType[kind].value, d, n_head_kv, n_kv)
    c["ggml_set_name"](u, b"u")
    inputs: list[tuple[int, U8 | F32]] = [(u, cache)]
    weights = None
    if w is not None:
        weights = c["ggml_new_tensor_2d"](ctx, GGMLType.F32.value, n_kv, len(w))
        c["ggml_set_name"](weights, b"w")
        inputs.append((weights, w))
    buffer = c["ggml_backend_alloc_ctx_tensors"](ctx, backend)
    assert buffer
    # In a buffer for computing, or we would be asked how the result is cut, and not the operator.
    out = c["ggml_leverage_score"](ctx, u, weights, 2.0, 0.5)
    graph = c["ggml_new_graph"](ctx)
    c["ggml_build_forward_expand"](graph, out)
    allocator = c["ggml_gallocr_new"](c["ggml_backend_get_default_buffer_type"](backend))
    assert c["ggml_gallocr_alloc_graph"](allocator, graph)
    for tensor, array in inputs:
        ggml.set_tensor(tensor, array)
    assert c["ggml_backend_graph_compute"](backend, graph) == 0
    result = np.empty((n_head_kv, n_kv), np.float32)
    c["ggml_backend_tensor_get"](out, result.ctypes.data, 0, result.nbytes)
    c["ggml_gallocr_free"](allocator)
    c["ggml_backend_buffer_free"](buffer)
    c["ggml_free"](ctx)
    c["ggml_backend_free"](backend)
    return result


@pytest.mark.parametrize("heads", [(0, 0), (2, 2), (3, 1)], ids=["both", "equal", "unequal"])
@pytest.mark.parametrize("group", [0, 1, 3])
@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
def test_heads_on_two_devices(split: Any, kind: str, group: int, heads: tuple[int, int]) -> None:
    cache = random_cache(1, 77, 4, 64, kind)
    w = random_weights(2, 4 * group, 77) if group else None
    got = on_two(split, cache, kind, 64, w, heads)
    expected = ggml.leverage_score(cache, kind, 64, weights=w, scale=2.0, noise=0.5)
    # The same kernel on the same heads.
    np.testing.assert_array_equal(got, expected)
