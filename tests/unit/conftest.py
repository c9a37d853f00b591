"""The command line with a stand-in for the model."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
from click.testing import CliRunner, Result

from capkv_local.cli import main
from tests.unit.fake_chat import FakeChat, Run


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeChat]:
    """A fresh stand-in, in the place of capkv_local.chat."""

    class Fake(FakeChat):
        calls: list[tuple[str, Any]] = []  # noqa: RUF012

    module = types.ModuleType("capkv_local.chat")
    module.DocumentChat = Fake  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "capkv_local.chat", module)
    return Fake


@pytest.fixture
def run() -> Run:
    def invoke(*args: str, stdin: str | bytes | None = None) -> Result:
        return CliRunner().invoke(main, args, input=stdin, prog_name="capkv")

    return invoke
