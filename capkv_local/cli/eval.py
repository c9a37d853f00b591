"""``capkv eval``: how much is lost, measured against the full cache and against other methods."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from capkv_local.cli.common import CACHE_TYPES, json_option
from capkv_local.cli.display import step_progress
from capkv_local.cli.guard import debug_option

if TYPE_CHECKING:
    from capkv_local.evaluate.plan import Plan

TASKS = ("continuation", "facts", "quote", "lookup", "qa")


@click.command("eval", short_help="Measure what policies lose, against the full cache.")
@click.option(
    "--model",
    "models",
    type=click.Path(path_type=Path),
    multiple=True,
    help="GGUF file; repeat for more. [default: the one `capkv doctor` shows]",
)
@click.option("--quick", is_flag=True, help="A small table in under 5 minutes on two cores.")
@click.option(
    "--method",
    "methods",
    multiple=True,
    metavar="NAME",
    help="policy, policy:field=value,..., either with @allocation and +probe behind it; bm25; or "
    "oracle, which knows what comes and bounds them all; repeat for more. "
    "[default: capkv and its peers]",
)
@click.option(
    "--share",
    "shares",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    metavar="0.25",
    multiple=True,
    help="Share of the cells to keep; repeat for more. [default: 0.5 0.25 0.125]",
)
@click.option(
    "--task",
    "tasks",
    type=click.Choice(TASKS),
    multiple=True,
    help="What is measured; repeat for more. [default: continuation facts]",
)
@click.option(
    "--tokens",
    "n_tokens",
    type=click.IntRange(min=256),
    metavar="N",
    multiple=True,
    help="Length of the texts; repeat for more. [default: 2048]",
)
@click.option(
    "--reading",
    "readings",
    type=click.Choice(("one-shot", "streamed")),
    multiple=True,
    help="Evict once, or read through the small cache; repeat for both. [default: one-shot]",
)
@click.option(
    "--question",
    "questions",
    type=click.Choice(("unseen", "seen")),
    multiple=True,
    help="Is the question known while reading? Repeat for both. [default: unseen]",
)
@click.option(
    "--kv-type",
    "kv_types",
    type=click.Choice(CACHE_TYPES, case_sensitive=False),
    multiple=True,
    help="Type of K and V; repeat for more. [default: f16]",
)
@click.option(
    "--cases",
    "n_cases",
    type=click.IntRange(min=1),
    metavar="N",
    help="Texts per task. [default: 8]",
)
@click.option(
    "--split",
    type=click.Choice(("report", "tuning")),
    default="report",
    show_default=True,
    help="Publish the one, choose settings on the other; they share no text.",
)
@click.option(
    "--texts",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Folder of your own .txt, .md and .rst files. [default: texts that are downloaded once]",
)
@click.option(
    "--kvpress",
    is_flag=True,
    help="Instead, compare our policies with kvpress's, score by score on the same weights "
    "(needs capkv-local[kvpress]).",
)
@click.option(
    "--seed",
    type=int,
    metavar="N",
    default=0,
    show_default=True,
    help="Of what is cut and planted.",
)
@click.option(
    "--threads", type=click.IntRange(min=1), metavar="N", help="CPU threads. [default: all]"
)
@click.option(
    "--out",
    "-o",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("capkv-eval"),
    show_default=True,
    help="Folder of results and report; a run that was stopped goes on there.",
)
@json_option
@debug_option
def eval_command(quick: bool, kvpress: bool, out: Path, as_json: bool, **settings: Any) -> None:
    """Compress the cache of real texts in many ways and measure what is left.

    KL is between the predictions of the full and of the small cache, over the text that follows
    and over the answers (0: nothing lost). Recall is how many planted facts greedy decoding
    still says word for word. 95% intervals are over texts.

    Everything measured is kept in the folder; the same command again goes on where it stopped,
    another one adds to it. It holds results.jsonl, results.csv, report.html and figures/.

    \b
    Examples:
      capkv eval --quick
      capkv eval --method capkv --method snapkv --method capkv:noise=0.1+probe
      capkv eval --question seen --method capkv --method bm25 --task qa
      capkv eval --kv-type f16 --kv-type q4_0 --method full --method capkv
      capkv eval --quick --json | jq -r .report

    \b
    The JSON object:
      {"results": path of the .jsonl with all numbers, "csv": path,
       "report": path, "tables" as printed: [{"title", "label", "columns",
       "sections": [{"heading", "rows"}]}]}; with --kvpress {"agreements": [...]}
    """
    from capkv_local.evaluate.defaults import make_plan
    from capkv_local.evaluate.records import Results
    from capkv_local.evaluate.report import write_report
    from capkv_local.evaluate.report.table import print_tables, tables
    from capkv_local.evaluate.run import run

    plan = make_plan(quick=quick, **settings)
    if kvpress:
        _check_with_kvpress(plan, as_json)
        return
    results = Results(out / "results.jsonl")
    with step_progress() as progress:
        run(plan, results, progress)
    page = write_report(results.path, out)
    records = results.read().records
    if as_json:
        files = {"results": results.path, "csv": out / "results.csv", "report": page}
        click.echo(json.dumps({**files, "tables": tables(records)}, default=str))
        return
    print_tables(records)
    click.echo(f"report: {page}", err=True)


def _check_with_kvpress(plan: Plan, as_json: bool) -> None:
    from capkv_local.evaluate.crosscheck import crosscheck, print_agreements

    texts = plan.read_texts()
    # Two texts of different kinds: scores are compared, not qualities.
    chosen = [text.text for text in (texts[0], texts[-1])]
    found = [
        agreement
        for model in plan.models
        for agreement in crosscheck(model, chosen, threads=plan.threads)
    ]
    if as_json:
        click.echo(json.dumps({"agreements": [asdict(one) for one in found]}, default=str))
    else:
        print_agreements(found)
