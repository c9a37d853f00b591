"""Packing the Python half of the sdist and the libraries we compiled into one wheel."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sysconfig
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from .errors import SetupError

_LIBRARY = re.compile(r".+\.(so|dylib|metal|metallib)")


def wheel_name(version: str) -> str:
    """Return the file name: any Python 3, this platform."""
    return f"llama_cpp_python-{version}-{_tag()}.whl"


def pack(
    sdist: Path, libraries: Path, version: str, about: Mapping[str, object], out: Path
) -> None:
    """Write the wheel.

    Parameters
    ----------
    sdist : the unpacked archive: ``llama_cpp/`` and ``PKG-INFO`` are taken from it.
    libraries : a directory; every shared library in it goes to ``llama_cpp/lib``.
    about : put beside the libraries as ``capkv-build.json``, so that a build can be identified.
    """
    info = f"llama_cpp_python-{version}.dist-info"
    stage = out.with_suffix(".part")
    records = []
    with zipfile.ZipFile(stage, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, data in _members(sdist, libraries, version, about, info):
            entry = zipfile.ZipInfo(name)  # its fixed date makes equal builds equal files
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = (0o755 if "/lib/" in name else 0o644) << 16
            archive.writestr(entry, data)
            digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            records.append(f"{name},sha256={digest},{len(data)}\n")
        archive.writestr(f"{info}/RECORD", "".join(records) + f"{info}/RECORD,,\n")
    stage.replace(out)


def _members(
    sdist: Path, libraries: Path, version: str, about: Mapping[str, object], info: str
) -> Iterator[tuple[str, bytes]]:
    stock = version.partition("+")[0]
    package = sdist / "llama_cpp"
    for path in sorted(package.rglob("*")):
        if path.is_file() and "lib" not in path.relative_to(package).parts:
            data = path.read_bytes()
            if path == package / "__init__.py":
                data = _replace(data, f'__version__ = "{stock}"', f'__version__ = "{version}"')
            yield f"llama_cpp/{path.relative_to(package).as_posix()}", data
    found = [path for path in sorted(libraries.iterdir()) if _LIBRARY.fullmatch(path.name)]
    if not any(path.stem == "libllama" for path in found):
        raise SetupError(f"the build left no libllama in {libraries}")
    for path in found:
        yield f"llama_cpp/lib/{path.name}", path.read_bytes()
    yield "llama_cpp/lib/capkv-build.json", json.dumps(about, indent=1, sort_keys=True).encode()
    metadata = (sdist / "PKG-INFO").read_bytes()
    yield f"{info}/METADATA", _replace(metadata, f"Version: {stock}\n", f"Version: {version}\n")
    yield f"{info}/licenses/LICENSE.md", (sdist / "LICENSE.md").read_bytes()
    wheel = f"Wheel-Version: 1.0\nGenerator: capkv\nRoot-Is-Purelib: false\nTag: {_tag()}\n"
    yield f"{info}/WHEEL", wheel.encode()


def _replace(data: bytes, old: str, new: str) -> bytes:
    if old.encode() not in data:
        raise SetupError(f"the sdist does not say {old!r}: is patches/series right?")
    return data.replace(old.encode(), new.encode(), 1)


def _tag() -> str:
    platform = re.sub(r"[^A-Za-z0-9]", "_", sysconfig.get_platform())
    return f"py3-none-{platform}"
