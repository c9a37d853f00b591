"""What a developer has configured, and how busy the machine is, must not change a test."""

from __future__ import annotations

import os

from hypothesis import settings

_NEEDED = ("CAPKV_HOME", "CAPKV_LLAMA_DIR", "CAPKV_MODEL", "CAPKV_TEST_DEVICE")

for _name in [name for name in os.environ if name.startswith("CAPKV_")]:
    if _name not in _NEEDED:
        del os.environ[_name]
os.environ["CAPKV_CONFIG"] = os.devnull

settings.register_profile("capkv", deadline=None)
settings.load_profile("capkv")
