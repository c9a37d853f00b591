"""``capkv config``: which defaults are in force, and where each comes from."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from capkv_local.cli.common import json_option
from capkv_local.cli.defaults import CONFIG_VARIABLE, config_path, parameters, variable
from capkv_local.cli.display import columns
from capkv_local.cli.guard import debug_option, name_variable


def config_command(chat: click.Command) -> click.Command:
    """Make ``capkv config``, which shows the options of ``chat``: they are all there are."""

    @click.command("config", short_help="Show the options in force, and where each comes from.")
    @json_option
    @click.option(
        "--config",
        type=click.Path(path_type=Path),
        metavar="FILE.toml",
        envvar=CONFIG_VARIABLE,
        help="Show this configuration file.",
    )
    @debug_option
    def command(as_json: bool, config: Path | None) -> None:
        """Show which defaults are in force for `capkv chat`, and where each comes from.

          What is typed comes first, then the environment (--n-ctx: CAPKV_N_CTX), then the
          configuration file, a TOML file of the options' names without dashes in front.

          \b
          A configuration file:
            model = "~/models/qwen3-8b-q4_k_m.gguf"
            budget = 4096          # or 0.25, "512MiB", "auto"
            type-k = "q8_0"
            type-v = "q8_0"
            history = true         # keep what is asked in capkv chat, on the disk

          \b
          Examples:
            capkv config
            capkv config --json | jq .options.budget
            CAPKV_BUDGET=1024 capkv config --config other.toml

          \b
          The JSON object:
            {"file", "exists", "options": {name: {"value", "from"}}}, where from is
        "environment", "file" or "built in"
        """
        path = config or config_path()
        rows = _in_force(chat, config)
        if as_json:
            about = {"file": str(path), "exists": path.exists()}
            click.echo(json.dumps({**about, "options": rows}))
            return
        click.echo(f"file  {path}{'' if path.exists() else ' (there is none)'}\n")
        lines = [(key, _text(row["value"]), _where(key, row["from"])) for key, row in rows.items()]
        click.echo("\n".join(columns(lines)))

    return command


def _in_force(chat: click.Command, path: Path | None) -> dict[str, dict[str, Any]]:
    arguments = ["FILE"] if path is None else ["--config", str(path), "FILE"]
    try:
        ctx = chat.make_context("chat", arguments)
    except click.BadParameter as error:
        name_variable(error)
        error.ctx = click.get_current_context()  # nobody called chat
        raise
    names = {ParameterSource.ENVIRONMENT: "environment", ParameterSource.DEFAULT_MAP: "file"}
    rows: dict[str, dict[str, Any]] = {}
    for key, param in parameters(chat):
        value = ctx.params[str(param.name)]
        origin = ctx.get_parameter_source(str(param.name))
        source = names.get(origin, "built in") if origin else "built in"
        if source == "built in" and not isinstance(value, (bool, int)):
            value = _built_in(param)
        rows[key] = {"value": str(value) if isinstance(value, Path) else value, "from": source}
    return rows


def _built_in(param: click.Parameter) -> str | None:
    """What the help says: the value itself is known to the library only."""
    found = re.search(r"\[default: (.*?)\]", str(getattr(param, "help", "")))
    return found[1] if found else None


def _where(key: str, source: str) -> str:
    return {"environment": variable(key), "file": "file"}.get(source, "")


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "-" if value is None else str(value)
