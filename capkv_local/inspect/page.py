"""What survived, as one page that needs nothing but itself."""

from __future__ import annotations

import base64
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from capkv_local import __version__
from capkv_local.errors import CapKVError
from capkv_local.inspect.collect import EDGES, Passage, Survival, ranked
from capkv_local.inspect.question import Attention
from capkv_local.inspect.strip import legend, question_summary
from capkv_local.pages import render

_N_PASSAGES = 10


def write_page(
    path: str | Path, survival: Survival, attention: Attention | None = None, *, title: str = ""
) -> int:
    """Write :func:`render_page` to a file; returns its bytes.

    Raises
    ------
    CapKVError
        The file cannot be written.
    """
    data = render_page(survival, attention, title=title).encode("utf-8", "replace")
    try:
        return Path(path).write_bytes(data)
    except OSError as error:
        reason = error.strerror or str(error)
        raise CapKVError(f"'{path}' cannot be written ({reason}); name another with -o") from error


def render_page(survival: Survival, attention: Attention | None = None, *, title: str = "") -> str:
    """Return the page as HTML that loads nothing.

    Parameters
    ----------
    survival
    attention
        That of a question, to show what it would lose.
    title
        Names of the documents.
    """
    best = ranked(survival)
    worst = best[_N_PASSAGES:][-_N_PASSAGES:][::-1]
    return render(
        Path(__file__).with_name("page.html.j2"),
        title=title or "a text",
        facts=_facts(survival),
        legend=legend(),
        data=_data(survival, attention),
        n_layer=survival.held.shape[0],
        n_head=survival.held.shape[1],
        best=[_row(survival, p) for p in best[:_N_PASSAGES]],
        worst=[_row(survival, p) for p in worst],
        asked=None if attention is None else _asked(survival, attention),
        version=__version__,
    )


def _facts(survival: Survival) -> list[tuple[str, str]]:
    s = survival
    cells = f"{s.cells.mean():,.0f} ({s.share.mean():.1%}), {s.cells.min():,} to {s.cells.max():,}"
    gone = f"{s.n_gone:,} ({s.n_gone / s.n_tokens:.1%})"
    memory = f"{s.kv_bytes / 2**20:,.1f} MiB"
    if 0 < s.kv_bytes < s.kv_bytes_full:
        memory += f" instead of {s.kv_bytes_full / 2**20:,.1f} MiB for its context"
    return [
        ("model", f"{s.model}, {s.held.shape[0]} layers of {s.held.shape[1]} KV heads"),
        ("policy", s.policy + (f", {s.allocation} allocation" if s.allocation else "")),
        ("tokens", f"{s.n_tokens:,}, of which no head holds {gone}"),
        ("cells per head", cells),
        ("KV memory", memory),
    ]


def _data(survival: Survival, attention: Attention | None) -> dict[str, Any]:
    """What the script of the page works with; arrays as base64.

    ``held`` has one bit per token, head by head, each head from a new byte. ``rank`` has a byte
    per held token, head by head: in how many percent of the head's cells the policy found less.
    """
    names: dict[str, int] = {}
    sources = []
    first = 0
    for source, run in groupby(survival.sources):
        name = "" if source is None else str(source)
        sources.append([first, names.setdefault(name, len(names))])
        first += sum(1 for _ in run)
    data = {
        "shape": list(survival.held.shape),
        "edges": list(EDGES),
        "pieces": list(survival.pieces),
        "names": list(names),
        "sources": sources,
        "held": _base64(np.packbits(survival.held, axis=-1, bitorder="little")),
        "rank": None if survival.relevance is None else _base64(_ranks(survival)),
        "attended": None,
        "lost": None,
        "lostByHead": None,
    }
    if attention is not None:
        data["attended"] = _base64(attention.attended.astype("<f4"))
        if attention.lost_by_head is not None:
            data["lost"] = _base64(attention.lost.astype("<f4"))
            data["lostByHead"] = _base64(attention.lost_by_head.astype("<f4"))
    return data


def _ranks(survival: Survival) -> npt.NDArray[np.uint8]:
    """Percent of a head's held tokens with a lower relevance, one after the other."""
    assert survival.relevance is not None
    heads = zip(
        survival.held.reshape(survival.n_heads, -1),
        survival.relevance.reshape(survival.n_heads, -1),
        strict=True,
    )
    ranks = []
    for held, relevance in heads:
        values = relevance[held]
        below = np.searchsorted(np.sort(values), values)
        ranks.append((100 * below // max(1, values.size)).astype(np.uint8))
    return np.concatenate(ranks)


def _base64(array: npt.NDArray[Any]) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


def _row(survival: Survival, passage: Passage, value: float | None = None) -> dict[str, Any]:
    return {
        "first": passage.first,
        "last": passage.last,
        "number": f"{passage.share(survival):.0%}" if value is None else f"{value:.1%}",
        "held": f"{passage.share(survival):.0%}",
        "source": str(passage.source or "no document"),
        "text": passage.text(survival, 240),
    }


def _asked(survival: Survival, attention: Attention) -> dict[str, Any]:
    compared = attention.full is not None
    total = float(attention.attended.sum()) or 1.0
    return {
        "question": attention.question,
        "summary": question_summary(attention),
        "compared": compared,
        "tokens": [
            {
                "first": token,
                "text": survival.pieces[token].strip() or repr(survival.pieces[token]),
                "around": "".join(survival.pieces[max(0, token - 8) : token + 9]),
                "source": str(survival.sources[token] or "no document"),
                "held": f"{survival.n_held[token]} of {survival.n_heads}",
                "attended": f"{attention.attended[token] / total:.2%}",
                "lost": f"{attention.lost[token] / total:.2%}" if compared else "not known",
            }
            for token in attention.worst_tokens()
        ],
        "passages": [
            _row(survival, p, float(attention.at_stake[p.tokens].sum()) / total)
            for p in attention.worst_passages()
        ],
    }
