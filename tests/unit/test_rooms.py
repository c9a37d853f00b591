"""The rooms of ``capkv_local`` know only what stands below them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "capkv_local"

# Every room and those that it may import, from the ground up. errors, home and pages stand below.
ROOMS: dict[str, set[str]] = {
    "native": set(),
    "models": {"native"},
    "devices": {"native"},
    "budget": set(),
    "policies": {"budget"},
    "cache": {"native", "budget", "policies"},
    "plan": {"native", "models", "budget", "policies", "cache"},
    "llama": {"native", "models", "devices", "budget", "policies", "cache", "plan"},
    "documents": set(),
    "citations": {"native", "policies", "cache", "llama", "documents"},
    "snapshot": {"native", "models", "budget", "llama", "documents"},
    "chat": {
        *("native", "models", "devices", "policies", "cache", "llama"),
        *("documents", "citations", "snapshot"),
    },
    "inspect": {"native", "cache", "plan", "llama", "documents", "chat"},
    "evaluate": {"native", "models", "budget", "policies", "cache", "llama", "documents"},
    "cli": {
        *("models", "devices", "budget", "policies", "cache", "plan", "documents"),
        *("citations", "snapshot", "chat", "inspect", "evaluate"),
    },
}
TOP = {"errors", "home", "pages"}
# Who may touch these; policies, above all, are functions of arrays.
LIBRARIES = {
    "ctypes": {"native", "devices"},
    "llama_cpp": {"native", "models", "devices", "llama", "chat"},
}


def imports(source: str, package: str = "capkv_local") -> Iterator[tuple[str, ...]]:
    """Names that a module imports, at its top, inside of functions and for its types alike."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = parts[: len(parts) + 1 - node.level] if node.level else []
            base += node.module.split(".") if node.module else []
            yield from ((*base, alias.name) for alias in node.names)


def known(path: Path) -> set[str]:
    """Rooms and modules at the top that a module imports."""
    package = ".".join(path.relative_to(PACKAGE.parent).parent.parts)
    found = (name[1] for name in imports(path.read_text(), package) if name[0] == PACKAGE.name)
    return {name for name in found if name in ROOMS or (PACKAGE / f"{name}.py").exists()}


def modules(room: str) -> list[Path]:
    return sorted((PACKAGE / room).rglob("*.py"))


def test_every_folder_is_a_room_and_every_room_a_folder() -> None:
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} == set(ROOMS)
    assert {path.stem for path in PACKAGE.glob("*.py")} == {"__init__", *TOP}


def test_no_room_may_know_one_that_stands_above_it() -> None:
    names = list(ROOMS)
    for at, (room, below) in enumerate(ROOMS.items()):
        assert below <= set(names[:at]), room


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_knows_what_it_may_and_needs_what_it_knows(room: str) -> None:
    seen: set[str] = set()
    for path in modules(room):
        names = known(path)
        forbidden = names - ROOMS[room] - TOP - {room}
        assert not forbidden, f"{path.relative_to(PACKAGE)} imports {sorted(forbidden)}"
        seen |= names
    assert seen - TOP - {room} == ROOMS[room]


def test_the_map_has_all_rooms_in_this_order() -> None:
    page = (PACKAGE.parent / "docs" / "rooms.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w+)/` \|", page, re.MULTILINE) == list(ROOMS)


def test_the_modules_at_the_top_know_no_room() -> None:
    for name in TOP:
        assert known(PACKAGE / f"{name}.py") <= TOP, name


@pytest.mark.parametrize("library", LIBRARIES)
def test_who_touches_a_library(library: str) -> None:
    for path in PACKAGE.rglob("*.py"):
        if any(name[0] == library for name in imports(path.read_text())):
            assert path.relative_to(PACKAGE).parts[0] in LIBRARIES[library], path


def test_what_is_public_is_where_the_package_says() -> None:
    import capkv_local

    for name in capkv_local.__all__:
        assert getattr(capkv_local, name) is not None, name


@pytest.mark.parametrize(
    ("source", "package", "name"),
    [
        ("import capkv_local.cli.ask", "capkv_local", ("capkv_local", "cli", "ask")),
        ("from capkv_local import cli", "capkv_local", ("capkv_local", "cli")),
        ("def f():\n    from capkv_local.cli import ask", "", ("capkv_local", "cli", "ask")),
        ("if TYPE_CHECKING:\n    from capkv_local import cli", "", ("capkv_local", "cli")),
        ("from . import cli", "capkv_local", ("capkv_local", "cli")),
        ("from ..cli import ask", "capkv_local.native", ("capkv_local", "cli", "ask")),
    ],
)
def test_no_way_to_import_is_overlooked(source: str, package: str, name: tuple[str, ...]) -> None:
    assert list(imports(source, package)) == [name]
