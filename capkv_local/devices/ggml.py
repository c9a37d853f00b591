"""Devices beside the CPU: those of this machine, and those of RPC servers, by their ggml handles.

Mirrors what of ``ggml-backend.h`` and ``ggml-rpc.h`` is needed. Whatever is wrong with a server has
to be found before it gets here (:mod:`capkv_local.devices.rpc`): ggml ends the program then.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from capkv_local import native
from capkv_local.errors import NativeBuildMissing

Kind = Literal["cpu", "gpu", "igpu", "accel", "meta"]

_KINDS: tuple[Kind, ...] = ("cpu", "gpu", "igpu", "accel", "meta")  # ggml_backend_dev_type
_POINTER, _SIZE, _TEXT = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p
# library, name, result, arguments
_FUNCTIONS: tuple[tuple[str, str, Any, list[Any]], ...] = (
    ("ggml", "ggml_backend_dev_count", _SIZE, []),
    ("ggml", "ggml_backend_dev_get", _POINTER, [_SIZE]),
    ("ggml", "ggml_backend_reg_by_name", _POINTER, [_TEXT]),
    ("ggml-base", "ggml_backend_dev_get_props", None, [_POINTER, _POINTER]),
    ("ggml-base", "ggml_backend_reg_get_proc_address", _POINTER, [_POINTER, _TEXT]),
    ("ggml-base", "ggml_backend_reg_dev_count", _SIZE, [_POINTER]),
    ("ggml-base", "ggml_backend_reg_dev_get", _POINTER, [_POINTER, _SIZE]),
    ("ggml-base", "ggml_set_abort_callback", _POINTER, [_POINTER]),
)
_ADD_SERVER = ctypes.CFUNCTYPE(_POINTER, _TEXT)
_START_SERVER = ctypes.CFUNCTYPE(None, _TEXT, _TEXT, _SIZE, _SIZE, _POINTER)
_ABORT_CALLBACK = ctypes.CFUNCTYPE(None, _TEXT)


class _Props(ctypes.Structure):
    _fields_ = [
        ("name", _TEXT),
        ("description", _TEXT),
        ("memory_free", _SIZE),
        ("memory_total", _SIZE),
        ("type", ctypes.c_int),
        ("device_id", _TEXT),
        ("caps", ctypes.c_bool * 5),
    ]


@dataclass(frozen=True)
class Device:
    """One device: what ggml says of it.

    Attributes
    ----------
    handle
        ``ggml_backend_dev_t``, valid as long as the program runs.
    n_bytes_free, n_bytes
        Its memory; 0 where a device does not tell.
    device_id
        Where it is plugged in, the same for a device that two backends see; None if unknown.
    """

    handle: int
    name: str
    description: str
    kind: Kind
    n_bytes_free: int
    n_bytes: int
    device_id: str | None


def local_devices() -> list[Device]:
    """The devices of this machine, the CPU among them.

    Raises
    ------
    NativeBuildMissing
        The library does not export the list.
    """
    f = _functions()
    count = f["ggml_backend_dev_count"]()
    return [_device(f["ggml_backend_dev_get"](i)) for i in range(count)]


def offload_devices() -> list[Device]:
    """The devices of this machine that llama.cpp gives layers to if none are named.

    GPUs, each once; integrated ones where there are no others.
    """
    try:
        devices = local_devices()
    except NativeBuildMissing:
        return []
    gpus: list[Device] = []
    for device in devices:
        known = {gpu.device_id for gpu in gpus if gpu.device_id is not None}
        if device.kind == "gpu" and device.device_id not in known:
            gpus.append(device)
    return gpus or [device for device in devices if device.kind == "igpu"]


def server_devices(endpoint: str) -> list[Device]:
    """The devices of an RPC server, which has to be there: ``HOST:PORT``.

    Raises
    ------
    NativeBuildMissing
        The library was built without RPC.
    """
    f = _functions()
    reg = _ADD_SERVER(_rpc("ggml_backend_rpc_add_server"))(endpoint.encode())
    count = f["ggml_backend_reg_dev_count"](reg) if reg else 0
    return [_device(f["ggml_backend_reg_dev_get"](reg, i)) for i in range(count)]


def serve(endpoint: str, devices: Sequence[Device], n_threads: int, cache: str | None) -> None:
    """Serve devices until the program is ended; returns only if it cannot.

    Parameters
    ----------
    endpoint
        ``ADDRESS:PORT`` to listen on, the address in numbers.
    n_threads
        Threads of the CPU, if it is among the devices.
    cache
        Folder for the weights that are received, so that they are sent once; None: no cache.
    """
    folder = None if cache is None else cache.encode()
    start = _START_SERVER(_rpc("ggml_backend_rpc_start_server"))
    start(endpoint.encode(), folder, n_threads, len(devices), handles(devices))


def handles(devices: Sequence[Device]) -> Any:
    """What ``llama_model_params.devices`` points to; must live as long as the model loads."""
    return (_POINTER * (len(devices) + 1))(*(device.handle for device in devices), None)


_on_abort: Any = None  # ggml keeps no reference


def on_abort(tell: Callable[[str], None]) -> None:
    """Have ``tell`` called with the reason before ggml ends the program."""
    global _on_abort
    callback = _ABORT_CALLBACK(lambda text: tell(text.decode(errors="replace").strip()))
    _functions()["ggml_set_abort_callback"](ctypes.cast(callback, _POINTER))
    _on_abort = callback


def _rpc(name: str) -> int:
    f = _functions()
    reg = f["ggml_backend_reg_by_name"](b"RPC")
    address = f["ggml_backend_reg_get_proc_address"](reg, name.encode()) if reg else None
    if not address:
        raise NativeBuildMissing(
            f"{native.library_path()} was built without RPC: take -DGGML_RPC=OFF out of CMAKE_ARGS "
            "and rebuild with scripts/build"
        )
    return int(address)


def _device(handle: int) -> Device:
    props = _Props()
    _functions()["ggml_backend_dev_get_props"](handle, ctypes.byref(props))
    return Device(
        handle=handle,
        name=props.name.decode(errors="replace"),
        description=" ".join((props.description or b"").decode(errors="replace").split()),
        kind=_KINDS[props.type],
        n_bytes_free=props.memory_free,
        n_bytes=props.memory_total,
        device_id=props.device_id.decode() if props.device_id else None,
    )


@functools.cache
def _functions() -> dict[str, Any]:
    functions: dict[str, Any] = {}
    try:
        for library, name, result, arguments in _FUNCTIONS:
            function = getattr(native.library(library), name)
            function.restype, function.argtypes = result, arguments
            functions[name] = function
    except (OSError, AttributeError) as error:
        raise NativeBuildMissing(
            f"{native.library_path()} does not say which devices there are ({error}): "
            "build with scripts/build"
        ) from error
    return functions
