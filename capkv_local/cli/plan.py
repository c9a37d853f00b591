"""``capkv plan``: what fits into the memory that there is, before a model is loaded."""

from __future__ import annotations

import json
import re
import shlex
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from capkv_local.cli.display import columns, size
from capkv_local.cli.guard import debug_option

if TYPE_CHECKING:
    from capkv_local.models.header import ModelHeader
    from capkv_local.plan.advice import Advice, BudgetFit, TypeFit
    from capkv_local.plan.measured import Pair
    from capkv_local.plan.planner import Need


_WIDTH = 90
_MEASURED = (
    "A part of the cells in {type}. Recall in % of the full cache's, measured on two models of "
    "135M and 270M parameters ({source}), is not a promise for this one. Question unknown while "
    "reading: text in the cache at once (chat), streamed through it; question known (ask):"
)


class _Memory(click.ParamType[int]):
    name = "memory"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        from capkv_local.budget.parse import parse_memory
        from capkv_local.errors import BudgetError

        try:
            return parse_memory(str(value))
        except BudgetError as error:
            self.fail(str(error), param, ctx)


class _Tokens(click.ParamType[int]):
    name = "tokens"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        match = re.fullmatch(r"\s*(\d{1,12})\s*([km]?)\s*", str(value), re.ASCII | re.IGNORECASE)
        tokens = int(match[1]) * {"": 1, "k": 1024, "m": 1024**2}[match[2].lower()] if match else 0
        if not 0 < tokens < 2**31:
            self.fail(
                f"{value!r} is no number of tokens: write it like 131072 or 128k.", param, ctx
            )
        return tokens


@dataclass(frozen=True)
class _Task:
    """What was asked: the model (None is the default one), memory and its origin, context."""

    model: Path | None
    memory: int
    memory_text: str
    n_ctx: int
    warnings: Sequence[str]


@click.command("plan", short_help="Show what fits into memory: context, cache type, budget.")
@click.argument("model", required=False, type=click.Path(path_type=Path), metavar="[MODEL.gguf]")
@click.option(
    "--memory",
    type=_Memory(),
    metavar="8GiB",
    help="Memory for all of it, weights included. [default: four fifths of what is available now]",
)
@click.option(
    "--context",
    "n_ctx",
    type=_Tokens(),
    metavar="128k",
    help="Tokens that document and conversation have together; k is 1,024. "
    "[default: what the model was trained with]",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, sizes in bytes.")
@debug_option
def plan_command(model: Path | None, memory: int | None, n_ctx: int | None, as_json: bool) -> None:
    """Say what MODEL.gguf takes for a long context, and which command fits into the memory.

    Only the head of the file is read, no weights. Without MODEL.gguf it is the default model.
    The plan is for the main memory: layers on a GPU are not planned. Exits with 1 when
    nothing fits.

    \b
    Examples:
      capkv plan model.gguf
      capkv plan model.gguf --memory 8GiB --context 128k
      capkv plan model.gguf --memory 8GiB --json | jq .take.command

    \b
    The JSON object, sizes in bytes by what they are for:
      {"model": {...}, "memory", "context", "warnings": [...],
       "types": [{"type", "bytes_per_token", "whole", "largest_context",
       "largest_budget"}], "budgets_type",
       "budgets": [{"budget", "need", "fits", "measured"}],
       "take": {"type", "budget" (null: all), "need", "command"} or null,
       "least": the smallest cache that there is}
    """
    from capkv_local.errors import BudgetError
    from capkv_local.models import default_model
    from capkv_local.models.header import ModelHeader
    from capkv_local.plan.advice import advise

    with ModelHeader(model or default_model()) as header:
        task = _task(header, model, memory, n_ctx)
        advice = advise(header, task.n_ctx, task.memory)
        for warning in task.warnings:
            click.echo(f"warning: {warning}", err=True)
        if as_json:
            click.echo(json.dumps(_as_json(header, task, advice)))
        else:
            click.echo(_render(header, task, advice))
    if advice.choice is None:
        raise BudgetError(_too_small(task, advice))


def _task(header: ModelHeader, model: Path | None, memory: int | None, n_ctx: int | None) -> _Task:
    from capkv_local.plan.memory import SHARE, available_memory

    warnings = []
    if n_ctx is not None and n_ctx > header.n_ctx_train:
        warnings.append(
            f"the model was trained for {header.n_ctx_train:,} tokens: beyond them its answers "
            "get worse, whatever is kept"
        )
    if memory is not None:
        text = size(memory)
    else:
        available = available_memory()
        memory = int(SHARE * available)
        text = f"{size(memory)}, {SHARE:.0%} of the {size(available)} that are available now"
    return _Task(model, memory, text, n_ctx or header.n_ctx_train, warnings)


def _command(task: _Task, options: Sequence[str]) -> list[str]:
    model = [] if task.model is None else ["--model", str(task.model)]
    return ["capkv", "chat", *model, *options]


def _too_small(task: _Task, advice: Advice) -> str:
    least = advice.least.need
    fits = max((t.largest_context or 0 for t in advice.types), default=0)
    smaller = f"--context {fits}, " if fits else ""
    return (
        f"it does not fit into {size(task.memory)}: weights take {size(least.weights)}, and with "
        f"the smallest cache ({advice.least.budget} cells in {advice.least.type}) all takes "
        f"{size(least.total)}; what would do: {smaller}--memory {-(-least.total // 2**20)}MiB, "
        "or a smaller model"
    )


# ---- rendering ---------------------------------------------------------------------------------


def _render(header: ModelHeader, task: _Task, advice: Advice) -> str:
    from capkv_local.plan.measured import SOURCE

    head = {
        "model": f"{header.name} ({header.arch}), {header.n_params / 1e9:.2f}B parameters, "
        f"{header.n_layer} layers, trained for {header.n_ctx_train:,} tokens",
        "memory": task.memory_text,
        "weights": size(header.n_bytes),
    }
    if windows := advice.types[0].whole.windows:
        head["windows"] = (
            f"{size(windows)} in {advice.types[0].type} for the layers that see the last "
            f"{header.n_swa:,} tokens only, whatever the context"
        )
    lines = [f"{name:<9}{value}" for name, value in head.items()]
    lines += ["", "All cells, and what fits:", *_indented(_type_rows(task, advice.types))]
    if advice.budgets:
        lines += [
            "",
            *textwrap.wrap(_MEASURED.format(type=advice.table_type, source=SOURCE), _WIDTH),
            *_indented(_budget_rows(task, advice.budgets)),
        ]
    if (choice := advice.choice) is not None:
        what = "All cells fit" if choice.budget is None else f"{choice.budget:,} cells fit"
        what += f" in {choice.type}, {size(choice.need.total)} together: {_parts(choice.need)}."
        lines += [
            "",
            *textwrap.wrap(what, _WIDTH),
            "",
            f"  {shlex.join(_command(task, choice.options()))} FILE",
        ]
    return "\n".join(lines)


def _type_rows(task: _Task, fits: Sequence[TypeFit]) -> list[list[str]]:
    rows = [["cache", "a token", f"{task.n_ctx:,} tokens", "context that fits", "budget that fits"]]
    for fit in fits:
        whole = "-" if fit.largest_context is None else f"{fit.largest_context:,} tokens"
        part = "-" if fit.largest_budget is None else f"{fit.largest_budget:,} cells"
        kv = fit.whole.kv_bytes
        rows.append([fit.type, size(fit.bytes_per_token), size(kv), whole, part])
    return rows


def _budget_rows(task: _Task, fits: Sequence[BudgetFit]) -> list[list[str]]:
    rows = [["share", "budget", "all memory", "fits", "chat", "streamed", "ask"]]
    for fit in fits:
        measured = fit.measured
        rows.append(
            [
                f"{fit.budget / task.n_ctx:.1%}",
                f"{fit.budget:,}",
                size(fit.need.total),
                "yes" if fit.fits else "no",
                _pair(measured.chat if measured else None),
                _pair(measured.streamed if measured else None),
                _pair(measured.ask if measured else None),
            ]
        )
    return rows


def _pair(pair: Pair | None) -> str:
    return "-" if pair is None else " / ".join(f"{value:g}" for value in pair)


def _parts(need: Need) -> str:
    names = {
        "kv": "KV cells",
        "windows": "sliding windows",
        "observation": "observed queries",
        "compute": "graphs",
        "deciding": "policy",
    }
    parts = [(names.get(name, name), value) for name, value in asdict(need).items() if value]
    return ", ".join(f"{name} {size(value)}" for name, value in parts)


def _indented(rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"  {line}" for line in columns(rows, right=True)]


def _as_json(header: ModelHeader, task: _Task, advice: Advice) -> dict[str, Any]:
    def bytes_of(need: Need) -> dict[str, int]:
        return {**asdict(need), "total": need.total}

    choice = advice.choice
    return {
        "model": {
            "path": str(header.path),
            "name": header.name,
            "architecture": header.arch,
            "parameters": header.n_params,
            "weights": header.n_bytes,
            "layers": header.n_layer,
            "trained_context": header.n_ctx_train,
            "sliding_window": header.n_swa,
            **advice.shape,
        },
        "memory": task.memory,
        "context": task.n_ctx,
        "warnings": list(task.warnings),
        "types": [{**asdict(t), "whole": bytes_of(t.whole)} for t in advice.types],
        "budgets_type": advice.table_type,
        "budgets": [{**asdict(b), "need": bytes_of(b.need)} for b in advice.budgets],
        "take": None
        if choice is None
        else {
            "type": choice.type,
            "budget": choice.budget,
            "need": bytes_of(choice.need),
            "command": [*_command(task, choice.options()), "FILE"],
        },
        "least": {**asdict(advice.least), "need": bytes_of(advice.least.need)},
    }
