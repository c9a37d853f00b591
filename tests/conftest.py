"""What a developer has configured must not change a test."""

from __future__ import annotations

import os

_NEEDED = ("CAPKV_HOME", "CAPKV_LLAMA_DIR", "CAPKV_MODEL", "CAPKV_TEST_DEVICE")

for _name in [name for name in os.environ if name.startswith("CAPKV_")]:
    if _name not in _NEEDED:
        del os.environ[_name]
os.environ["CAPKV_CONFIG"] = os.devnull
