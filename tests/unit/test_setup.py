"""The set-up scripts without a network and without a build: keys, lock, series, patches, tools."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import stat
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from lib import checks, config, keys, native, progress, run, sdist, tools, venv, wheel
from lib.errors import SetupError
from lib.lock import Lock
from lib.patchset import apply_series, parse_patch
from lib.series import Patch, Series, load_series

HEADER = f"sdist x-1.0.tar.gz\nsha256 {'0' * 64}\nupstream {'a' * 40}\nversion 1.0+t1\n"
PATCH = """\
From 0000000000000000000000000000000000000000 Mon Sep 17 00:00:00 2001
Subject: [PATCH] change, add, delete

diff --git a/src/old.c b/src/old.c
index 1111111..2222222 100644
--- a/src/old.c
+++ b/src/old.c
@@ -1,4 +1,5 @@ context
 one
-two
+zwei
+zwei und halb
 three
 four
diff --git a/src/new.c b/src/new.c
new file mode 100644
index 0000000..3333333
--- /dev/null
+++ b/src/new.c
@@ -0,0 +1,2 @@
+first
+last
\\ No newline at end of file
diff --git a/gone.c b/gone.c
deleted file mode 100644
index 4444444..0000000
--- a/gone.c
+++ /dev/null
@@ -1 +0,0 @@
-bye
"""


@pytest.fixture
def patches(tmp_path: Path) -> Path:
    directory = tmp_path / "patches"
    directory.mkdir()
    (directory / "0001-a.patch").write_text(PATCH)
    (directory / "series").write_text(HEADER + "test-op SOME_OP\n0001-a.patch  because of this\n")
    return directory


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    (root / "src").mkdir(parents=True)
    (root / "src" / "old.c").write_text("one\ntwo\nthree\nfour\n")
    (root / "gone.c").write_text("bye\n")
    return root


class TestSeries:
    def test_reads_header_order_and_reason(self, patches: Path) -> None:
        series = load_series(patches)
        assert series.version == "1.0+t1"
        assert series.requirement == "llama-cpp-python==1.0"
        assert series.test_ops == ("SOME_OP",)
        assert [(p.name, p.why) for p in series.patches] == [("0001-a.patch", "because of this")]

    @pytest.mark.parametrize(
        ("text", "complaint"),
        [
            ("", "lacks: sdist, sha256, upstream, version"),
            (HEADER + "nonsense here\n0001-a.patch x\n", "line 5"),
            (HEADER + "version 2.0\n0001-a.patch x\n", "line 5"),
            (HEADER + "0001-a.patch x\n0001-a.patch y\n", "lists twice 0001-a.patch"),
            (HEADER + "0001-a.patch x\n0002-b.patch y\n", "no 0002-b.patch"),
            (HEADER, "does not list 0001-a.patch"),
        ],
    )
    def test_refuses(self, patches: Path, text: str, complaint: str) -> None:
        (patches / "series").write_text(text)
        with pytest.raises(SetupError, match=complaint):
            load_series(patches)

    def test_ours_agrees_with_pyproject(self) -> None:
        pinned = f'"llama-cpp-python=={load_series().version}"'
        assert pinned in (config.ROOT / "pyproject.toml").read_text()


class TestKeys:
    def test_changes_with_every_input(self, patches: Path) -> None:
        series = load_series(patches)
        inputs: dict[str, object] = {"cmake_args": [], "compilers": ["gcc 12"]}
        made = [
            keys.build_key(series, inputs),
            keys.build_key(dataclasses.replace(series, sha256="1" * 64), inputs),
            keys.build_key(dataclasses.replace(series, patches=()), inputs),
            keys.build_key(series, {**inputs, "cmake_args": ["-DGGML_CUDA=ON"]}),
            keys.build_key(series, {**inputs, "compilers": ["gcc 13"]}),
        ]
        (patches / "0001-a.patch").write_text(PATCH.replace("zwei", "deux"))
        made.append(keys.build_key(series, inputs))
        assert len(set(made)) == len(made)

    def test_patches_keep_the_build_tree(self, patches: Path) -> None:
        series = load_series(patches)
        bare = dataclasses.replace(series, patches=())
        assert keys.tree_key(series, {}) == keys.tree_key(bare, {})
        assert keys.tree_key(series, {}) != keys.tree_key(series, {"cmake_args": ["-DX=1"]})

    def test_environment_counts(self) -> None:
        env = {"PATH": os.environ["PATH"]}
        plain = keys.compile_inputs(env)
        assert plain == keys.compile_inputs({**env, "EDITOR": "vi"})
        assert plain != keys.compile_inputs({**env, "CMAKE_ARGS": "-DGGML_VULKAN=ON"})
        assert plain != keys.compile_inputs({**env, "CXXFLAGS": "-O1"})

    def test_cmake_args_are_split_like_a_shell(self) -> None:
        args = keys.cmake_args({"CMAKE_ARGS": "-DA=1 -DB='x y'"})
        assert args == ["-DA=1", "-DB=x y"]
        with pytest.raises(SetupError, match="CMAKE_ARGS"):
            keys.cmake_args({"CMAKE_ARGS": "-DB='x"})


class TestPatchset:
    def apply(self, tree: Path, *texts: str) -> int:
        made = []
        for number, text in enumerate(texts, start=1):
            path = tree.parent / f"{number:04}-p.patch"
            path.write_text(text)
            made.append(Patch(path, ""))
        result, already = apply_series(tree, made)
        result.write()
        return already

    def test_changes_adds_and_deletes(self, tree: Path) -> None:
        assert self.apply(tree, PATCH) == 0
        assert (tree / "src/old.c").read_text() == "one\nzwei\nzwei und halb\nthree\nfour\n"
        assert (tree / "src/new.c").read_text() == "first\nlast"
        assert not (tree / "gone.c").exists()

    def test_is_idempotent_and_continues(self, tree: Path) -> None:
        second = (
            "diff --git a/src/new.c b/src/new.c\n--- a/src/new.c\n+++ b/src/new.c\n"
            "@@ -1,2 +1,2 @@\n first\n-last\n\\ No newline at end of file\n+end\n"
        )
        assert self.apply(tree, PATCH) == 0
        assert self.apply(tree, PATCH, second) == 1
        assert self.apply(tree, PATCH, second) == 2
        assert (tree / "src/new.c").read_text() == "first\nend\n"

    def test_follows_moved_lines(self, tree: Path) -> None:
        (tree / "src/old.c").write_text("zero\n" * 9 + "one\ntwo\nthree\nfour\n")
        self.apply(tree, PATCH)
        assert "one\nzwei\n" in (tree / "src/old.c").read_text()

    def test_failure_names_the_file_and_changes_nothing(self, tree: Path) -> None:
        (tree / "gone.c").write_text("other\n")
        with pytest.raises(SetupError, match=r"0001-p.patch .* gone.c.*regenerate against"):
            self.apply(tree, PATCH)
        assert (tree / "src/old.c").read_text() == "one\ntwo\nthree\nfour\n"
        assert not (tree / "src/new.c").exists()

    def test_keeps_odd_bytes(self, tree: Path) -> None:
        (tree / "src/old.c").write_bytes(b"one\r\x0c\ntwo\n\xff\xe2\x80\xa8\r\nfour\n")
        patch = tree.parent / "0001-p.patch"
        patch.write_bytes(
            b"diff --git a/src/old.c b/src/old.c\n--- a/src/old.c\n+++ b/src/old.c\n"
            b"@@ -1,3 +1,3 @@\n one\r\x0c\n-two\n+zwei\n \xff\xe2\x80\xa8\r\n"
        )
        apply_series(tree, [Patch(patch, "")])[0].write()
        data = (tree / "src/old.c").read_bytes()
        assert data == b"one\r\x0c\nzwei\n\xff\xe2\x80\xa8\r\nfour\n"

    @pytest.mark.parametrize(
        ("text", "complaint"),
        [
            ("diff --git a/a b/a\nrename from a\n", "not supported"),
            ("diff --git a/../a b/../a\n", "unusable line"),
            ("diff --git a/a b/a\n@@ -1,2 +1,2 @@\n x\n", "end of file"),
            ("diff --git a/a b/a\n@@ -1,2 +1,2 @@\n x\nzzz\n", "damaged hunk"),
        ],
    )
    def test_refuses(self, text: str, complaint: str) -> None:
        with pytest.raises(SetupError, match=complaint):
            parse_patch(text, "0001-p.patch")


class TestLock:
    HOLD = (
        "import sys, time; sys.path.insert(0, sys.argv[1]); from pathlib import Path\n"
        "from lib.lock import Lock\n"
        "with Lock(Path(sys.argv[2])): print('held', flush=True); time.sleep(float(sys.argv[3]))\n"
    )

    def hold(self, path: Path, seconds: float) -> subprocess.Popen[str]:
        scripts = str(config.ROOT / "scripts")
        command = [sys.executable, "-c", self.HOLD, scripts, str(path), str(seconds)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        return process

    def test_second_waits_and_says_so(self, tmp_path: Path) -> None:
        holder = self.hold(tmp_path / "lock", 0.6)
        said = io.StringIO()
        with Lock(tmp_path / "lock", said):
            assert holder.wait(timeout=5) == 0
        assert f"(process {holder.pid}) is at work; waiting" in said.getvalue()

    def test_killed_holder_leaves_no_lock(self, tmp_path: Path) -> None:
        holder = self.hold(tmp_path / "lock", 60)
        holder.kill()
        holder.wait()
        started = time.monotonic()
        with Lock(tmp_path / "lock", io.StringIO()):
            assert time.monotonic() - started < 5

    def test_child_keeps_it(self, tmp_path: Path) -> None:
        with Lock(tmp_path / "lock") as lock:
            child = subprocess.Popen(["sleep", "0.6"], pass_fds=(lock.fd,))
        with Lock(tmp_path / "lock", io.StringIO()):
            assert child.wait(timeout=0.5) == 0


class TestTools:
    def test_missing_tools_name_their_package(self, tmp_path: Path, monkeypatch) -> None:
        monkeypatch.setattr(sys, "platform", "linux")
        env = {"PATH": str(tmp_path)}

        def put(name: str, says: str) -> None:
            (tmp_path / name).write_text(f"#!/bin/sh\necho '{says}'\n")
            (tmp_path / name).chmod(stat.S_IRWXU)

        with pytest.raises(SetupError, match=r"no C\+\+ compiler found.*apt-get install g\+\+"):
            tools.require_compiler_and_cmake(env)
        put("c++", "c++ 12")
        put("cc", "cc 12")
        with pytest.raises(SetupError, match=r"CMake not found.*apt-get install cmake"):
            tools.require_compiler_and_cmake(env)
        put("cmake", "cmake version 3.10.2")
        with pytest.raises(SetupError, match=r"CMake 3.10 is too old, 3.18 is needed"):
            tools.require_compiler_and_cmake(env)
        put("cmake", "cmake version 3.25.1")
        tools.require_compiler_and_cmake(env)

    def test_missing_venv_names_its_package(self, monkeypatch) -> None:
        monkeypatch.setattr(sys, "platform", "linux")
        monkeypatch.setattr(tools.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(SetupError, match="apt-get install python3-venv"):
            tools.require_venv()

    def test_macos_is_told_its_own(self, monkeypatch, tmp_path: Path) -> None:
        monkeypatch.setattr(sys, "platform", "darwin")
        with pytest.raises(SetupError, match="xcode-select --install"):
            tools.require_compiler_and_cmake({"PATH": str(tmp_path)})


class TestRun:
    def test_failure_shows_the_cause_and_the_log(self, tmp_path: Path) -> None:
        code = "print('noise\\n' * 100); print('FAILED: a.o\\nthe cause'); raise SystemExit(3)"
        log = tmp_path / "logs" / "x.log"
        with pytest.raises(SetupError) as caught:
            run.run_logged([sys.executable, "-c", code], log=log, tick=lambda *_: None)
        message = str(caught.value)
        assert "exit 3" in message and str(log) in message and "the cause" in message
        assert "noise" not in message.split("ends with")[1]
        assert "noise" in log.read_text()

    def test_progress_is_parsed(self, tmp_path: Path) -> None:
        seen = []
        run.run_logged(
            [sys.executable, "-c", "print('[1/4] Building\\n[4/4] Linking')"],
            log=tmp_path / "x.log",
            tick=lambda *state: seen.append(state),
            parse=native.ninja_progress,
        )
        assert (1.0, "4 of 4") in seen

    def test_progress_is_plain_when_not_a_terminal(self) -> None:
        out = io.StringIO()
        shown = progress.Progress([("Compiling", 3), ("Packing", 1)], out)
        with shown.step("Compiling") as tick:
            tick(0.5, "2 of 4")
        with shown.step("Packing"):
            pass
        shown.finish("Ready")
        assert "\r" not in out.getvalue() and "\x1b" not in out.getvalue()
        assert "[ 75%  0:00] Compiling: done in 0:00\n" in out.getvalue()
        assert out.getvalue().endswith("Ready (0:00)\n")


class TestVenv:
    def test_half_made_is_never_taken(self, tmp_path: Path) -> None:
        environment = venv.Venv(tmp_path, "k")
        assert not environment.holds("runtime")
        environment.begin()
        environment.commit("runtime")
        assert environment.holds("runtime") and not environment.holds("runtime", "dev-1")
        environment.begin()  # killed here
        assert not environment.holds("runtime")
        environment.commit("dev-1")
        assert environment.holds("runtime", "dev-1")
        (environment.path / "ready.json").write_text("[trunc")
        assert not environment.holds("runtime")

    def test_unused_for_a_month_is_removed(self, tmp_path: Path) -> None:
        for name, age in (("old", 31), ("new", 1)):
            directory = tmp_path / "venvs" / name
            directory.mkdir(parents=True)
            venv.mark_used(directory)
            then = time.time() - age * 86400
            os.utime(directory / ".used", (then, then))
        venv.remove_unused(tmp_path)
        assert [path.name for path in (tmp_path / "venvs").iterdir()] == ["new"]


def series_of(**changes: str) -> Series:
    base = Series("x-1.0.tar.gz", "0" * 64, "a" * 40, "1.0+t1", ("SOME_OP",), ())
    return dataclasses.replace(base, **changes)


def test_a_wrong_archive_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x-1.0.tar.gz").write_bytes(b"something else")
    with pytest.raises(SetupError, match="the series pins 000"):
        sdist.verify(tmp_path / "x-1.0.tar.gz", series_of())


def test_sources_keep_their_time_unless_changed(tmp_path: Path, patches: Path) -> None:
    base = tmp_path / "base"
    pristine = base / "vendor" / "llama.cpp"
    for name in ("src/old.c", "src/same.c", "tests/test-backend-ops.cpp", "docs/big.md"):
        (pristine / name).parent.mkdir(parents=True, exist_ok=True)
        (pristine / name).write_text("one\ntwo\nthree\nfour\n")
    (pristine / "gone.c").write_text("bye\n")
    patched = native.NativeBuild(tmp_path, load_series(patches), "tree", "key")
    stock = dataclasses.replace(patched, series=dataclasses.replace(patched.series, patches=()))
    native.patched_sources(stock, base)
    for path in patched.source_dir.rglob("*.c"):
        os.utime(path, (1, 1))
    native.patched_sources(patched, base)
    assert (patched.source_dir / "src/same.c").stat().st_mtime == 1
    assert (patched.source_dir / "src/old.c").stat().st_mtime > 1
    assert (patched.source_dir / "src/new.c").is_file()
    assert not (patched.source_dir / "docs").exists()
    native.patched_sources(stock, base)
    assert not (patched.source_dir / "src/new.c").exists()
    assert (patched.source_dir / "src/old.c").stat().st_mtime > 1  # newer than its objects


def test_wheel_is_ours(tmp_path: Path) -> None:
    package = tmp_path / "sdist" / "llama_cpp"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text('__version__ = "1.0"\n')
    (tmp_path / "sdist" / "PKG-INFO").write_text("Name: llama_cpp_python\nVersion: 1.0\n")
    (tmp_path / "sdist" / "LICENSE.md").write_text("MIT\n")
    libraries = tmp_path / "bin"
    libraries.mkdir()
    out = tmp_path / wheel.wheel_name("1.0+t1")
    with pytest.raises(SetupError, match="no libllama"):
        wheel.pack(tmp_path / "sdist", libraries, "1.0+t1", {}, out)
    assert not out.exists()
    for name in ("libllama.so", "libggml-cuda.so", "test-backend-ops"):
        (libraries / name).write_bytes(b"elf")
    wheel.pack(tmp_path / "sdist", libraries, "1.0+t1", {"key": "k"}, out)
    with zipfile.ZipFile(out) as archive:
        names = set(archive.namelist())
        assert {"llama_cpp/lib/libllama.so", "llama_cpp/lib/libggml-cuda.so"} <= names
        assert "llama_cpp/lib/test-backend-ops" not in names
        assert archive.read("llama_cpp/__init__.py") == b'__version__ = "1.0+t1"\n'
        assert json.loads(archive.read("llama_cpp/lib/capkv-build.json")) == {"key": "k"}
        metadata = archive.read("llama_cpp_python-1.0+t1.dist-info/METADATA")
        assert b"Version: 1.0+t1\n" in metadata
        record = archive.read("llama_cpp_python-1.0+t1.dist-info/RECORD").decode()
        assert {line.split(",")[0] for line in record.splitlines()} == names


def test_an_unknown_operator_is_a_failure(tmp_path: Path) -> None:
    assert checks.count_passed("  12/12 tests passed\n", "OP", tmp_path) == 12
    with pytest.raises(SetupError, match="knows no case of OP"):
        checks.count_passed("  0/0 tests passed\nOK\n", "OP", tmp_path)


def test_cache_root_follows_the_environment(monkeypatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    assert config.cache_root({"CAPKV_HOME": "/a"}) == Path("/a")
    assert config.cache_root({"XDG_CACHE_HOME": "/b"}) == Path("/b/capkv-local")
    assert config.cache_root({}) == Path.home() / ".cache" / "capkv-local"
