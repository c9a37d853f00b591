"""Where the verbs' options come from: command line, environment, one TOML file, built in.

``configurable`` gives a verb's options their environment variables and has click take defaults from
the file.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from capkv_local.cli.common import MACHINE_OPTIONS, ModelOptions, budget_value
from capkv_local.errors import ConfigError, unknown_name

CONFIG_VARIABLE = "CAPKV_CONFIG"
KEYS = (
    "model",
    "policy",
    "budget",
    "allocation",
    "observe",
    "probe-stride",
    "n-ctx",
    "room",
    "threads",
    "gpu-layers",
    "rpc",
    "type-k",
    "type-v",
    "seed",
    "max-tokens",
    "forget",
    "cache",
    "history",
    "verbose",
)
_CHOSEN = (ParameterSource.COMMANDLINE, ParameterSource.PROMPT)

Verb = TypeVar("Verb", bound=click.Command)


def config_path() -> Path:
    """The file that is read when none is named."""
    return Path(click.get_app_dir("capkv-local")) / "config.toml"


def variable(key: str) -> str:
    """Environment variable of a key.

    Examples
    --------
    >>> variable("n-ctx")
    'CAPKV_N_CTX'
    """
    return f"CAPKV_{key.upper().replace('-', '_')}"


def configurable(command: Verb, keys: tuple[str, ...] = KEYS) -> Verb:
    """Let the environment and the configuration file set the options of a verb.

    Parameters
    ----------
    command
        The verb; gets ``--config``.
    keys
        Those of :data:`KEYS` that mean the same here; what the verb does not have is ignored.
    """
    for key, param in parameters(command):
        if key in keys and not param.multiple:
            param.envvar = variable(key)

    def load(ctx: click.Context, param: click.Parameter, path: Path | None) -> None:
        if not ctx.resilient_parsing:
            ctx.default_map = _defaults(command, keys, path)

    command.params.append(
        click.Option(
            ["--config"],
            type=click.Path(path_type=Path),
            metavar="FILE.toml",
            envvar=CONFIG_VARIABLE,
            is_eager=True,  # before the options whose defaults it sets, after --help
            expose_value=False,
            callback=load,
            help="File with defaults for these options; `capkv config` shows them.",
        )
    )
    return command


def for_session(options: ModelOptions) -> ModelOptions:
    """Options for opening a saved session: its own settings, but for what was typed.

    A session is bound to model, context and cache types, which defaults must not contradict.
    """
    ctx = click.get_current_context(silent=True)
    if ctx is None:
        return options
    values = {
        name: value
        for name, value in options.keywords().items()
        if name in MACHINE_OPTIONS or ctx.get_parameter_source(name) in _CHOSEN
    }
    return ModelOptions(**values)


# ---- the file ----------------------------------------------------------------------------------


def read_config(path: Path | None) -> dict[str, Any]:
    """Keys and values of a configuration file; of the usual one, if there is one, with None.

    Raises
    ------
    ConfigError
        Missing, unreadable, no TOML, or with an unknown key.
    """
    usual = path is None
    path = path or config_path()
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        if usual:
            return {}
        raise ConfigError(
            f"there is no configuration file {path}; check --config and {CONFIG_VARIABLE}"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(f"the configuration {path} cannot be read: {reason}") from error
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is no TOML: {error}") from error
    for key in values:
        if key not in KEYS:
            raise ConfigError(f"{path}: {unknown_name('key', key, KEYS)}")
    return values


def _defaults(command: click.Command, keys: tuple[str, ...], path: Path | None) -> dict[str, Any]:
    """The file's values as defaults of a verb's parameters.

    Raises
    ------
    ConfigError
        As :func:`read_config`, or a value that its option does not take.
    """
    values = read_config(path)
    defaults: dict[str, Any] = {}
    for key, param in parameters(command):
        if key not in values or key not in keys or param.name is None:
            continue
        value = values[key]
        try:
            _check(param, value)
        except click.BadParameter as error:
            raise ConfigError(
                f"{path or config_path()}: {key} = {value!r}: {error.message}"
            ) from error
        if key == "model":
            value = str(_beside(path, value))
        if not param.multiple:
            # A budget of 0.25 must not become a number of cells: as it would be typed.
            defaults[param.name] = value if isinstance(value, bool) else str(value)
        elif not os.environ.get(variable(key)):
            defaults[param.name] = [value]
    return defaults


def configured_model() -> Path | None:
    """The model that environment or configuration file name, if any.

    Raises
    ------
    ConfigError
        As :func:`read_config`, or the model is no text.
    """
    if named := os.environ.get(variable("model")):
        return Path(named)
    path = Path(os.environ[CONFIG_VARIABLE]) if os.environ.get(CONFIG_VARIABLE) else None
    model = read_config(path).get("model")
    if model is not None and not isinstance(model, str):
        raise ConfigError(f"{path or config_path()}: model = {model!r}: it must be a text.")
    return None if model is None else _beside(path, model)


def _beside(path: Path | None, model: str) -> Path:
    """A model's path, which is relative to the file that names it."""
    return (path or config_path()).parent / Path(model).expanduser()


def _check(param: click.Parameter, value: Any) -> None:
    kinds: dict[str, tuple[type, ...]] = {
        "true or false": (bool,),
        "a whole number": (int,),
        "a number or a text": (int, float, str),
        "a text": (str,),
    }
    if isinstance(param.type, click.types.BoolParamType):
        kind = "true or false"
    elif isinstance(param.type, click.types.IntParamType):
        kind = "a whole number"
    elif getattr(param.type, "func", None) is budget_value:
        kind = "a number or a text"
    else:
        kind = "a text"
    if not isinstance(value, kinds[kind]) or (isinstance(value, bool) and kind[0] != "t"):
        raise click.BadParameter(f"it must be {kind}.")
    if kind != "true or false":
        param.type.convert(str(value), param, None)


def parameters(command: click.Command) -> Iterator[tuple[str, click.Parameter]]:
    """Keys of the parameters that can be configured, as they are typed."""
    for param in command.params:
        names = [name.removeprefix("--") for name in param.opts]
        if key := next((name for name in names if name in KEYS), None):
            yield key, param
