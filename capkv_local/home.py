"""Where capkv-local keeps files of its own."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path


def home(env: Mapping[str, str] = os.environ) -> Path:
    """``$CAPKV_HOME``, or ``capkv-local`` among the user's caches."""
    if env.get("CAPKV_HOME"):
        return Path(env["CAPKV_HOME"]).expanduser().absolute()
    if env.get("XDG_CACHE_HOME"):
        return Path(env["XDG_CACHE_HOME"]).absolute() / "capkv-local"
    caches = Path("Library", "Caches") if sys.platform == "darwin" else Path(".cache")
    return Path.home() / caches / "capkv-local"
