"""``python -m capkv_local.cli``."""

from __future__ import annotations

from capkv_local.cli import main

if __name__ == "__main__":
    main(prog_name="capkv")
