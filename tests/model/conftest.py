"""The real default model, loaded once per set of options."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from capkv_local import Llama
from capkv_local.models import default_model
from capkv_local.policies import get_policy

TEXT = Path(__file__).parent.parent / "data" / "licence.txt"


@pytest.fixture(scope="session")
def model_path() -> Path:
    return default_model()


def decode(llama: Any, tokens: Sequence[int], n_past: int) -> np.ndarray[Any, Any]:
    """Decode at once, past the loop that evicts; logits of every token, ``[n, n_vocab]``."""
    llama._batch.set_batch(batch=tokens, n_past=n_past, logits_all=True)
    llama._ctx.decode(llama._batch)
    logits = np.ctypeslib.as_array(llama._ctx.get_logits(), (len(tokens), llama.n_vocab()))
    return logits.astype(np.float64)


def observe_of(policy: str) -> str:
    """What a policy cannot do without."""
    return "probe" if "probe" in get_policy(policy).needs else "tail"


def recent_of(policy: str, observe: str) -> int:
    """Last tokens that every head keeps: with a probe, half of them are enough for capkv."""
    return 16 if (policy, observe) == ("capkv", "probe") else 32


class Models:
    """Opens models; the latest of each set of options is kept and handed out reset."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._open: dict[str, Llama] = {}

    def __call__(self, **options: Any) -> Llama:
        key = repr(sorted(options.items()))
        if key not in self._open:
            if len(self._open) >= 4:
                self._open.pop(next(iter(self._open))).close()
            settings = {"n_threads": 2, "n_threads_batch": 2, "verbose": False, "n_ctx": 2048}
            self._open[key] = Llama(self.path, **{**settings, **options})
        llama = self._open[key]
        llama.reset()
        return llama

    def close(self) -> None:
        for llama in self._open.values():
            llama.close()


@pytest.fixture(scope="session")
def models(model_path: Path) -> Iterator[Models]:
    opened = Models(model_path)
    yield opened
    opened.close()


@pytest.fixture(scope="session")
def tokens(models: Models) -> list[int]:
    """A long real text."""
    return models(n_ctx=512, kv_policy=None).tokenize(TEXT.read_bytes(), add_bos=False)


Make = Callable[..., Path]
Load = Callable[..., Any]


@pytest.fixture(scope="session")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """``make(builder, **options)``: path of a tiny model, written once."""
    folder = tmp_path_factory.mktemp("tiny")
    written: dict[str, Path] = {}

    def build(builder: Callable[..., Path], **options: Any) -> Path:
        name = "-".join([builder.__name__, *(f"{k}{v}" for k, v in options.items())])
        if name not in written:
            written[name] = builder(folder / f"{name}.gguf", **options)
        return written[name]

    return build


@pytest.fixture
def load() -> Iterator[Load]:
    """``load(path, **options)``: a :class:`Llama` that is closed after the test."""
    opened: list[Llama] = []

    def open_model(path: Path, **options: Any) -> Llama:
        opened.append(Llama(path, **options))
        return opened[-1]

    yield open_model
    for llama in opened:
        llama.close()
