"""llama.cpp's log: silent unless asked for, and the cause of a failure is told either way."""

from __future__ import annotations

from pathlib import Path

import pytest

from capkv_local import Llama, ModelFileError
from tests.model import tiny


@pytest.mark.parametrize("verbose", [False, True])
def test_warnings_are_shown_if_verbose_only(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], verbose: bool
) -> None:
    # llama.cpp warns about the windows of this model each time it makes a context.
    model = tiny.gemma3(tmp_path / "gemma3.gguf")
    capfd.readouterr()
    llama = Llama(
        model, n_ctx=512, n_batch=64, kv_budget=64, kv_room=64, n_threads=1, verbose=verbose
    )
    llama.prefill([1 + i % (tiny.N_VOCAB - 1) for i in range(300)])
    llama.close()
    out, err = capfd.readouterr()
    assert ("full-size SWA cache" in err) is verbose
    assert verbose or (out, err) == ("", "")


def test_a_failure_to_load_is_told_but_not_logged(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = tiny.llama(tmp_path / "llama.gguf")
    data = model.read_bytes()
    model.write_bytes(data[: len(data) // 2])
    capfd.readouterr()
    with pytest.raises(ModelFileError, match="not within the file bounds"):
        Llama(model, n_ctx=512, verbose=False)
    assert capfd.readouterr().err == ""
