"""How a verb fails: one line on standard error and an exit code, whatever happened."""

from __future__ import annotations

import os
import sys
import traceback
from typing import Any, NoReturn

import click
from click.core import ParameterSource

from capkv_local.errors import CapKVError, ConfigError

_DEBUG = "capkv_local.debug"  # key in click's context, shared between the group and its verbs


class GuardedGroup(click.Group):
    """A group that turns every error of a verb into one line and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        tolerant_streams()
        try:
            return super().invoke(ctx)
        except click.BadParameter as error:
            name_variable(error)
            raise
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise  # click prints and exits for these itself
        except KeyboardInterrupt:
            click.echo("\ncapkv: stopped", err=True)
            ctx.exit(130)
        except ConfigError as error:
            _fail(ctx, one_line(error), code=2)
        except CapKVError as error:
            _fail(ctx, one_line(error))
        except MemoryError:
            _fail(ctx, "not enough memory; lower --budget or --n-ctx, or close other programs")
        except Exception as error:
            _fail(ctx, f"internal error: {type(error).__name__}: {one_line(error)} (see --debug)")


def name_variable(error: click.BadParameter) -> None:
    """Say so when a wrong value was not typed, but comes from the environment."""
    ctx, param = error.ctx, error.param
    if ctx is None or param is None or param.name is None or not param.envvar:
        return
    if ctx.get_parameter_source(param.name) is ParameterSource.ENVIRONMENT:
        error.param_hint = f"'{param.opts[0]}' (from {param.envvar})"


def _fail(ctx: click.Context, message: str, code: int = 1) -> NoReturn:
    if ctx.meta.get(_DEBUG):
        traceback.print_exc()
    click.echo(f"capkv: error: {message}", err=True)
    ctx.exit(code)


def one_line(error: BaseException) -> str:
    """Return the message of an error on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def tolerant_streams() -> None:
    """Make odd characters replaceable instead of fatal, and closed streams empty ones."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by the caller, as in `capkv ask ... <&-`
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors="replace")


def _set_debug(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    ctx.meta[_DEBUG] = value


debug_option = click.option(
    "--debug",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_set_debug,
    help="Show the trace of an error.",
)
