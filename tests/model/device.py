"""The device that the device tests run on: ``CAPKV_TEST_DEVICE``.

- not set, or ``rpc``: RPC servers of this machine that serve its CPU. Its memory is not ours, so
  that everything takes the way it takes on a GPU, and the arithmetic is that of the CPU.
- ``gpu``: the GPUs of this machine.
- ``HOST:PORT[,HOST:PORT]``: RPC servers that run already.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pytest

from capkv_local.devices import rpc
from capkv_local.devices.ggml import offload_devices
from tests.model.server import server

VARIABLE = "CAPKV_TEST_DEVICE"


@dataclass(frozen=True)
class Place:
    """Where layers are put.

    Attributes
    ----------
    options
        Arguments of :class:`~capkv_local.Llama`.
    drift
        How far, as a share of the largest, a logit or statistic may be from the CPU's when both
        have decoded for themselves.
    """

    name: str
    options: dict[str, Any]
    drift: float


# The same kernels on the same numbers. Not zero: a server may have another number of threads.
_DRIFT_CPU = 1e-5
# Other kernels; products of f16 are summed up in f16 by some. A wrong cell or head is off by 1.
_DRIFT_GPU = 5e-2


class Places:
    """Starts what is needed, once."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._servers: list[str] = []
        self.asked = os.environ.get(VARIABLE) or "rpc"

    def close(self) -> None:
        self._stack.close()

    def one(self) -> Place:
        """All layers on one device, or on all that there are."""
        if self.asked == "gpu":
            self._gpus(1)
            return Place("gpu", {"n_gpu_layers": -1}, _DRIFT_GPU)
        return self._rpc(self._endpoints(1))

    def two(self) -> Place:
        """Layers on two devices, half of them each."""
        halves = {"tensor_split": [0.5, 0.5]}
        if self.asked == "gpu":
            self._gpus(2)
            return Place("gpus", {"n_gpu_layers": -1, **halves}, _DRIFT_GPU)
        place = self._rpc(self._endpoints(2))
        return Place(place.name, {**place.options, **halves}, place.drift)

    def _rpc(self, endpoints: Sequence[str]) -> Place:
        drift = _DRIFT_CPU if self.asked == "rpc" else _DRIFT_GPU
        return Place(",".join(endpoints), {"rpc_servers": list(endpoints)}, drift)

    def _endpoints(self, n: int) -> list[str]:
        if self.asked != "rpc":
            named = rpc.endpoints(self.asked)
            if len(named) < n:
                pytest.skip(f"{VARIABLE} names one server, this needs {n}")
            return named[:n]
        while len(self._servers) < n:
            self._servers.append(self._stack.enter_context(server()).endpoint)
        return self._servers[:n]

    def _gpus(self, n: int) -> None:
        found = [device.name for device in offload_devices()]
        if not found:
            pytest.fail(f"{VARIABLE}=gpu, but llama.cpp sees no GPU: is it built for one?")
        if len(found) < n:
            pytest.skip(f"there is one GPU ({found[0]}), this needs {n}")
