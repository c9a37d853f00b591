"""What scripts/check-sanitizers reads from reports, and what it says when there is no compiler."""

from __future__ import annotations

from pathlib import Path

import pytest

from lib.errors import SetupError
from lib.sanitizers import find_runtimes, findings, require_canary, sanitizer_env

UNDEFINED = """\
/src/ggml/src/ggml.cpp:12:3: runtime error: left shift of negative value -1
    #0 0x7f in ggml_new_graph /src/ggml/src/ggml.cpp:12
/src/src/llama-kv-pool-move.cpp:40:9: runtime error: load of misaligned address 0x5 for type 'int'
    #0 0x7f in compact /src/src/llama-kv-pool-move.cpp:40
/src/src/llama-kv-pool-move.cpp:40:9: runtime error: load of misaligned address 0x5 for type 'int'
/src/src/llama-kv-cache.cpp:7:1: runtime error: signed integer overflow
"""

ADDRESS = """\
=================================================================
==77==ERROR: AddressSanitizer: heap-buffer-overflow on address 0x60 at pc 0x7f bp 0x7f sp 0x7f
READ of size 4 at 0x60 thread T0
    #0 0x7f in memcpy (/lib/libasan.so.8+0x1)
    #1 0x7f in row {file}:93
    #2 0x7f in llama_decode /src/src/llama-context.cpp:3

0x60 is located 0 bytes to the right of 16-byte region
allocated by thread T0 here:
    #1 0x7f in resize /src/src/llama-kv-evict.cpp:9
"""


def test_reports_are_ours_or_not() -> None:
    ours, theirs = findings([UNDEFINED, ADDRESS.format(file="/src/src/llama-kv-score.cpp")])
    assert ours == {
        "llama-kv-pool-move.cpp:40: load of misaligned address 0x5 for type 'int'": 2,
        "llama-kv-score.cpp: heap-buffer-overflow": 1,
    }
    assert list(theirs) == [
        "ggml.cpp:12: left shift of negative value -1",
        "llama-kv-cache.cpp:7: signed integer overflow",
    ]


def test_an_access_by_others_to_what_we_allocated_is_not_ours() -> None:
    assert findings([ADDRESS.format(file="/src/ggml/src/ggml-backend.cpp")]) == (
        {},
        {"ggml-backend.cpp: heap-buffer-overflow": 1},
    )
    assert findings([]) == ({}, {})


def test_a_compiler_without_sanitizers(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match=r"need g\+\+"):
        find_runtimes({"PATH": str(tmp_path)})
    compiler = tmp_path / "g++"
    compiler.write_text("#!/bin/sh\necho Copyright Free Software Foundation\n")
    compiler.chmod(0o755)
    with pytest.raises(SetupError, match="install libasan and libubsan"):
        find_runtimes({"PATH": str(tmp_path)})


def test_reports_go_into_a_folder(tmp_path: Path) -> None:
    env = sanitizer_env([Path("a.so"), Path("b.so")], tmp_path)
    assert env["LD_PRELOAD"] == "a.so:b.so"
    assert f"log_path={tmp_path / 'address'}" in env["ASAN_OPTIONS"]


def test_a_mistake_that_nobody_notices_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="did not notice a write behind a buffer: quiet"):
        require_canary(["/bin/sh", "-c", "echo quiet"], {}, tmp_path)
    report = tmp_path / "report"
    report.write_text(ADDRESS.format(file="/src/src/llama-kv-evict.cpp"))
    require_canary(["/bin/sh", "-c", "exit 1"], {}, tmp_path)
    assert not report.exists()
