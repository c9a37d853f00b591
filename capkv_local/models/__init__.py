"""Model files: which one to use, what identifies it, and what its header says."""

from __future__ import annotations

from capkv_local.models.file import (
    MODEL_VARIABLE,
    check_model_file,
    default_model,
    fingerprint,
    load_errors,
)

__all__ = ["MODEL_VARIABLE", "check_model_file", "default_model", "fingerprint", "load_errors"]
