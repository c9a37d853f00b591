"""Where the layers of a model are: on the CPU, on GPUs, on RPC servers."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Mapping
from typing import Any

import llama_cpp

from capkv_local.devices import rpc
from capkv_local.devices.ggml import handles, offload_devices
from capkv_local.errors import UnsupportedModel


def offloads(settings: Mapping[str, Any]) -> bool:
    """Whether layers go to other devices than the CPU, with these arguments of a model."""
    servers = settings.get("rpc_servers")
    n_gpu_layers = _layers(settings.get("n_gpu_layers"), servers)
    return n_gpu_layers != 0 and bool(servers or offload_devices())


def _layers(n_gpu_layers: int | None, servers: rpc.Servers | None) -> int:
    if n_gpu_layers is None:
        return -1 if servers else 0  # who names servers wants them used
    return n_gpu_layers


class PlacedLlama(llama_cpp.Llama):
    """:class:`llama_cpp.Llama` that can have layers on RPC servers.

    Parameters
    ----------
    n_gpu_layers
        Layers on other devices than the CPU, -1: all. By default all with ``rpc_servers``, else 0.
    rpc_servers
        ``"HOST:PORT[,HOST:PORT...]"`` or a sequence of such. Their devices come before the GPUs of
        this machine, also in ``tensor_split``.

    Raises
    ------
    ServerError
        A server is out of reach, busy, or of another build.
    UnsupportedModel
        A ``split_mode`` that servers do not have.
    """

    # Of the class: __del__ of the parent closes also what was never made.
    _servers: contextlib.ExitStack | None = None
    _devices: Any = None
    rpc_servers: rpc.Servers | None = None

    def __init__(
        self,
        model_path: str,
        *,
        n_gpu_layers: int | None = None,
        rpc_servers: rpc.Servers | None = None,
        **kwargs: Any,
    ) -> None:
        if rpc_servers:
            if kwargs.get("split_mode") == llama_cpp.LLAMA_SPLIT_MODE_ROW:
                raise UnsupportedModel(
                    "split_mode=LLAMA_SPLIT_MODE_ROW needs parts of matrices on each device, and "
                    "RPC servers hold whole ones: leave split_mode out (whole layers)"
                )
            self.rpc_servers = rpc_servers
            self._servers = contextlib.ExitStack()
            theirs = self._servers.enter_context(rpc.connected(rpc_servers))
            self._devices = handles([*theirs, *offload_devices()])
        super().__init__(model_path, n_gpu_layers=_layers(n_gpu_layers, rpc_servers), **kwargs)

    # llama-cpp-python makes the parameters and loads the model in one go: what it has no argument
    # for can only be put in between.
    @property
    def model_params(self) -> Any:
        return self._model_params

    @model_params.setter
    def model_params(self, params: Any) -> None:
        if self._devices is not None:
            params.devices = ctypes.addressof(self._devices)
        self._model_params = params

    def close(self) -> None:
        super().close()
        if self._servers is not None:
            self._servers.close()
