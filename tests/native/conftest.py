"""What there is to test: the built libraries, and the Metal backend compiled for the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from . import ggml, metal


@pytest.fixture(scope="session")
def built() -> None:
    """Skip where nothing is built."""
    try:
        ggml.load()
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def backend() -> metal.Metal:
    """Skip where the Metal backend cannot be compiled for the CPU."""
    try:
        return metal.backend()
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def simt_folder(built: None, request: pytest.FixtureRequest) -> Path:
    """Where what :mod:`simt` compiles is kept from one run to the next."""
    cache = request.config.cache
    assert cache is not None
    return cache.mkdir("simt")
