"""What the verbs share: the model options, and opening files and sessions."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from capkv_local.cli import display
from capkv_local.cli.guard import debug_option, one_line
from capkv_local.cli.names import complete_allocations, complete_files, complete_policies
from capkv_local.errors import CapKVError, ContextOverflow, ContextWarning

if TYPE_CHECKING:
    from capkv_local.chat import DocumentChat, IngestProgress, IngestReport
    from capkv_local.documents import DocumentStream

CONTEXT_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
CACHE_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")
SESSION_SUFFIX = ".capkv"
# Fields of ModelOptions that matter here and now only: a saved session has none of them.
MACHINE_OPTIONS = ("n_threads", "n_gpu_layers", "rpc_servers", "verbose")


# ---- options -----------------------------------------------------------------------------------


def budget_value(text: str) -> int | float | str:
    """Read a budget as typed: ``2048`` is cells, ``0.25`` a fraction, anything else a size.

    What it means, and whether it can be met, is decided where the model is known.
    """
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text.strip()


@dataclass(frozen=True)
class ModelOptions:
    """The options of ``chat`` and ``ask`` that reach :class:`DocumentChat`; None = its default."""

    model: Path | None = None
    kv_policy: str | None = None
    kv_budget: int | float | str | None = None
    kv_allocation: str | None = None
    kv_observe: str | None = None
    probe_stride: int | None = None
    n_ctx: int | None = None
    kv_room: int | None = None
    n_threads: int | None = None
    n_gpu_layers: int | None = None
    rpc_servers: str | None = None
    type_k: str | None = None
    type_v: str | None = None
    seed: int | None = None
    verbose: bool = False

    def reading(self) -> dict[str, Any]:
        """Return what was given of that which changes how a text is read."""
        here = ("model", "seed", *MACHINE_OPTIONS)
        return {name: value for name, value in self.keywords().items() if name not in here}

    def keywords(self) -> dict[str, Any]:
        """Return only what was given, so that defaults are kept in one place."""
        return {name: value for name, value in asdict(self).items() if value is not None}


_CACHE_TYPE = click.Choice(CACHE_TYPES, case_sensitive=False)
_TYPES_HELP = f"one of {', '.join(CACHE_TYPES)}. [default: f16]"
json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object instead of text."
)
files_argument = click.argument(
    "files", nargs=-1, required=True, metavar="FILE...", shell_complete=complete_files
)
max_tokens_option = click.option(
    "--max-tokens",
    type=click.IntRange(min=1),
    default=512,
    show_default=True,
    metavar="N",
    help="Longest answer.",
)
_OPTIONS: tuple[Callable[[Callable[..., Any]], Callable[..., Any]], ...] = (
    click.option(
        "--model",
        type=click.Path(path_type=Path),
        help="A model in a GGUF file. [default: the one `capkv doctor` shows]",
    ),
    click.option(
        "--policy",
        "kv_policy",
        metavar="NAME",
        shell_complete=complete_policies,
        help="What decides which cells stay; `capkv doctor` lists them. [default: capkv]",
    ),
    click.option(
        "--budget",
        "kv_budget",
        type=budget_value,
        metavar="N|0.25|512MiB|auto",
        help="KV cells to keep per head, on average: a count, a fraction of --n-ctx (0.25 or "
        "25%), a memory size (512MiB), or as many as the free memory holds (auto). "
        "[default: 2048]",
    ),
    click.option(
        "--allocation",
        "kv_allocation",
        metavar="NAME",
        shell_complete=complete_allocations,
        help="How heads share the budget: uniform, pyramid, adaptive-layer or global. "
        "[default: what suits the policy]",
    ),
    click.option(
        "--observe",
        "kv_observe",
        type=click.Choice(("tail", "probe")),
        help="What decides which cells matter: a probe, which repeats what is read for questions "
        "to come and takes two to three times as long; or the tail of what is read, with ask the "
        "question. [default: probe, ask tail]",
    ),
    click.option(
        "--probe-stride",
        type=click.IntRange(1, 16),
        metavar="N",
        help="Let the probe repeat every N-th token only: it takes an N-th of the time and loses "
        "some details (docs/evaluation.md). [default: 1]",
    ),
    click.option(
        "--n-ctx",
        type=click.IntRange(min=1),
        metavar="N",
        help="Tokens that document and conversation may have together. "
        "[default: what the model was trained with]",
    ),
    click.option(
        "--room",
        "kv_room",
        type=click.IntRange(min=0),
        metavar="N",
        help="Cells for the conversation beside a batch's (512), which serve it, too: for longer "
        "questions, and to keep more of what was said. [default: 256, with layers on GPUs "
        "or servers 1792]",
    ),
    click.option(
        "--threads",
        "n_threads",
        type=click.IntRange(min=1),
        metavar="N",
        help="CPU threads. [default: all]",
    ),
    click.option(
        "--gpu-layers",
        "n_gpu_layers",
        type=click.IntRange(min=-1),
        metavar="N",
        help="Layers to run on GPUs and servers; -1 is all. [default: 0, with --rpc -1]",
    ),
    click.option(
        "--rpc",
        "rpc_servers",
        metavar="HOST:PORT,...",
        help="Run layers on the devices of these machines, where `capkv rpc-server` runs.",
    ),
    click.option("--type-k", type=_CACHE_TYPE, metavar="TYPE", help=f"Cached keys: {_TYPES_HELP}"),
    click.option(
        "--type-v", type=_CACHE_TYPE, metavar="TYPE", help=f"Cached values: {_TYPES_HELP}"
    ),
    click.option(
        "--seed",
        type=click.IntRange(min=0),
        metavar="N",
        help="Seed for sampling. [default: random]",
    ),
    click.option(
        "-v", "--verbose", is_flag=True, help="Show what llama.cpp logs, on standard error."
    ),
    debug_option,
)


def model_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the model options to a verb, which gets them as one argument, ``options``."""

    @functools.wraps(command)
    def collected(**params: Any) -> Any:
        options = ModelOptions(**{f.name: params.pop(f.name) for f in fields(ModelOptions)})
        return command(options=options, **params)

    decorated: Callable[..., Any] = collected
    for option in reversed(_OPTIONS):
        decorated = option(decorated)
    return decorated


# ---- files and sessions ------------------------------------------------------------------------


@dataclass(frozen=True)
class Sources:
    """The files of a command line: documents to read, and the saved session they continue."""

    session: Path | None
    documents: tuple[DocumentStream, ...]
    names: tuple[str, ...]  # of documents and folders

    @property
    def title(self) -> str:
        """Their names, for a line on the screen."""
        names = [self.session.name] if self.session else []
        names += self.names
        return ", ".join(names if len(names) <= 3 else [*names[:2], f"{len(names) - 2} more"])


def read_sources(files: Sequence[str]) -> Sources:
    """Open all files before a model loads, so that a wrong name fails at once.

    What is left out of a folder is said on standard error.

    Parameters
    ----------
    files : sequence of str
        Documents, folders of them, ``-`` for standard input, and at most one saved session
        (``*.capkv``).

    Raises
    ------
    click.UsageError
        More than one saved session, or ``-`` twice.
    DocumentError
        A file that is missing or has no text.
    """
    sessions = [file for file in files if file.lower().endswith(SESSION_SUFFIX)]
    if len(sessions) > 1:
        raise click.UsageError(f"only one saved session can be opened, not {len(sessions)}")
    if list(files).count("-") > 1:
        raise click.UsageError("standard input (-) can be read only once")
    session = Path(sessions[0]) if sessions else None
    if session is not None and not session.is_file():
        raise CapKVError(f"there is no saved session '{session}'; check the name and the folder")

    from capkv_local.documents import open_document, read_documents

    documents: list[DocumentStream] = []
    names: list[str] = []
    for file in files:
        if file in sessions:
            continue
        if file != "-" and Path(file).is_dir():
            folder = read_documents(file)
            documents += folder.documents
            names.append(f"{folder.path.name} ({display.count(len(folder.documents), 'file')})")
            if folder.summary:
                click.echo(folder.summary, err=True)
        else:
            documents.append(open_document(file))
            names.append(documents[-1].name)
    return Sources(session, tuple(documents), tuple(names))


def session_path(path: Path) -> Path:
    """Where a session is saved: its ending is how a session is known.

    Raises
    ------
    CapKVError
        A folder.
    """
    path = path.expanduser()
    if path.suffix.lower() == SESSION_SUFFIX:
        return path
    if not path.name or path.is_dir():
        raise CapKVError(f"'{path}' is a folder; name a file in it, e.g. {path / 'book.capkv'}")
    return path.with_name(path.name + SESSION_SUFFIX)


def open_chat(sources: Sources, options: ModelOptions) -> DocumentChat:
    """Load the model, and the saved session if there is one."""
    from capkv_local.chat import DocumentChat
    from capkv_local.devices.rpc import exit_on_loss

    exit_on_loss()
    with _warnings_told(), display.waiting("loading the model"):
        if sources.session is not None:
            from capkv_local.cli.defaults import for_session

            return DocumentChat.load(sources.session, **for_session(options).keywords())
        return DocumentChat(**options.keywords())


@contextlib.contextmanager
def _warnings_told() -> Iterator[None]:
    """Show warnings as sentences, once, behind what is done inside."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", ContextWarning)
        yield
    for warning in caught:
        click.echo(f"warning: {warning.message}", err=True)


def ingest(
    session: DocumentChat,
    sources: Sources,
    *,
    question: str | None = None,
    quiet: bool = False,
    keep_part: bool = False,
) -> IngestReport | None:
    """Read the documents, if there are any, with progress and a closing line on standard error.

    Parameters
    ----------
    session : DocumentChat
        What reads them.
    sources : Sources
        What to read.
    question : str, optional
        The question, when it is known before reading.
    quiet : bool
        Show nothing.
    keep_part : bool
        Whether what was read before Ctrl-C, or before the context was full, is kept and told,
        instead of the exception being raised.

    Returns
    -------
    IngestReport or None
        None when there was nothing to read, or more than the context holds.

    Raises
    ------
    KeyboardInterrupt
        Ctrl-C without `keep_part`, or before anything was read.
    ContextOverflow
        Too long, without `keep_part`, or known before anything was read.
    """
    if not sources.documents:
        return None
    last: IngestProgress | None = None
    try:
        with display.ingest_progress(quiet=quiet) as show:

            def progress(now: IngestProgress) -> None:
                nonlocal last
                last = now
                show(now)

            report = session.ingest(sources.documents, question=question, progress=progress)
    except ContextOverflow as error:
        if not (keep_part and error.n_read):
            raise
        click.echo(f"{one_line(error)}; answers know only what was read", err=True)
        return None
    finally:
        for note in (note for document in sources.documents for note in document.notes):
            click.echo(note, err=True)
    session.extra["documents"] = [*session.extra.get("documents", []), *sources.names]
    if not report.complete and not (keep_part and report.tokens):
        raise KeyboardInterrupt
    if not quiet:
        click.echo(display.report_text(sources.title, report), err=True)
    if not report.complete:
        of = f" of {'~' if last.estimated else ''}{last.total:,}" if last and last.total else ""
        click.echo(
            f"stopped after {report.tokens:,}{of} tokens: answers know only this part", err=True
        )
    return report
