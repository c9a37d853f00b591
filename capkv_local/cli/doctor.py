"""``capkv doctor``: what is installed, what is loaded, and what is wrong."""

from __future__ import annotations

import json
import os
import platform
import sys
import textwrap
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import click

from capkv_local import __version__
from capkv_local.cli.common import json_option
from capkv_local.cli.guard import debug_option, one_line
from capkv_local.errors import CapKVError


@click.command("doctor", short_help="Show what is installed and loaded, and what is wrong.")
@json_option
@debug_option
def doctor_command(as_json: bool) -> None:
    """Show the loaded llama.cpp library, its devices and the versions; say what is wrong.

    Exits with 1 when something is wrong: each problem is one line, with what to do.

    \b
    Examples:
      capkv doctor
      capkv doctor --json | jq .devices

    \b
    The JSON object:
      {"library", "patched", "abi", "features", "devices", "system_info",
       "policies", "config", "default_model", "versions": {...},
       "problems": [one sentence each]}
    """
    report = examine()
    if as_json:
        click.echo(json.dumps(report, default=str))
    else:
        click.echo(_render(report))
    if report["problems"]:
        click.get_current_context().exit(1)


def examine() -> dict[str, Any]:
    """Collect everything there is to know; what cannot be found out becomes a problem.

    Returns
    -------
    dict
        ``versions`` (dict), the fields of :func:`capkv_local.devices.doctor.doctor`, ``policies``
        (list of str) and ``problems`` (list of str, empty when all is well).
    """
    problems: list[str] = []
    report: dict[str, Any] = {"versions": {}}
    try:
        from capkv_local.devices.doctor import doctor

        report |= doctor()
    except (CapKVError, ImportError, OSError, RuntimeError) as error:
        problems.append(f"llama.cpp cannot be loaded: {one_line(error)}")
    else:
        problems += report.pop("problems", [])
        if not report.get("patched") and not problems:
            problems.append(
                f"the llama.cpp library {report.get('library')} is a stock build that cannot "
                "evict; install capkv-local's build of llama-cpp-python"
            )
    try:
        from capkv_local.policies import policy_names

        report["policies"] = policy_names()
    except (CapKVError, ImportError) as error:
        problems.append(f"the policies cannot be loaded: {one_line(error)}")
    try:
        from capkv_local.cli.defaults import CONFIG_VARIABLE, config_path, configured_model
        from capkv_local.models import default_model

        report["config"] = os.environ.get(CONFIG_VARIABLE) or str(config_path())
        report["default_model"] = str(configured_model() or default_model())
    except (CapKVError, ImportError) as error:
        problems.append(one_line(error))
    report["versions"] = _versions()  # after the import above, which may tell more
    report["problems"] = problems
    return report


def _versions() -> dict[str, str | None]:
    try:
        llama_cpp: str | None = metadata.version("llama-cpp-python")
    except metadata.PackageNotFoundError:  # used from a source tree, or not there at all
        llama_cpp = getattr(sys.modules.get("llama_cpp"), "__version__", None)
    return {
        "capkv-local": __version__,
        "llama-cpp-python": llama_cpp,
        "python": platform.python_version(),
    }


# ---- rendering ---------------------------------------------------------------------------------

_LABELS = {
    "library": "llama.cpp",
    "abi": "eviction ABI",
    "system_info": "system",
    "default_model": "default model",
    "config": "configuration",
    "cache_dir": "cache folder",
}


def _render(report: Mapping[str, Any]) -> str:
    rows: list[tuple[str, str]] = []
    for key, value in report.items():
        if key == "versions":
            rows += [(name, version or "not installed") for name, version in value.items()]
        elif key != "problems":
            lines = _lines(value)
            rows.append((_LABELS.get(key, key), lines[0]))
            rows += [("", line) for line in lines[1:]]
    width = max(len(name) for name, _ in rows)
    text = [f"{name:<{width}}  {value}" for name, value in rows]
    problems = report["problems"]
    text += ["", *(f"problem: {problem}" for problem in problems)] if problems else ["", "all well"]
    return "\n".join(text)


def _lines(value: Any) -> list[str]:
    """Return a value as one or more lines of text."""
    if value is None:
        return ["none"]
    if isinstance(value, bool):
        return ["yes" if value else "no"]
    if isinstance(value, Mapping) and value.keys() == {"name", "description"}:  # a device
        return [f"{value['name']} ({' '.join(str(value['description']).split())})"]
    if isinstance(value, Mapping):
        value = [f"{name} {item}" for name, item in value.items()]
    if isinstance(value, (list, tuple, set, frozenset)):
        value = ", ".join(_lines(item)[0] for item in value)
    return textwrap.wrap(
        " ".join(str(value).split()), 80, break_long_words=False, break_on_hyphens=False
    ) or ["none"]
