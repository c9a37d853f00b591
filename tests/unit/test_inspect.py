"""What is shown of what survived: passages, levels, the strip and the page, without a model."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from capkv_local.cli import main
from capkv_local.documents.sources import Place, Source
from capkv_local.inspect import (
    Attention,
    Survival,
    levels,
    passages,
    print_strip,
    render_page,
)
from capkv_local.inspect.collect import N_LEVELS, by_token
from capkv_local.inspect.strip import legend

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"


def survival(n_tokens: int = 200, *, seed: int = 0, pieces: list[str] | None = None) -> Survival:
    """Two layers of three heads that hold a third of a text of two sources, and the sinks."""
    random = np.random.default_rng(seed)
    held = random.random((2, 3, n_tokens)) < 0.3
    held[..., :2] = held[..., -1:] = True
    relevance = np.where(held, random.random(held.shape), 0).astype(np.float32)
    half = n_tokens // 2
    sources: list[Source | None] = [Source("a.txt", Place("line", 1, 9))] * half
    sources += [Source("b & c.txt", Place("page", 3, 3))] * (n_tokens - half)
    return Survival(
        model="model",
        policy="capkv",
        allocation="global",
        budget=64,
        kv_bytes=1 << 20,
        kv_bytes_full=4 << 20,
        pieces=pieces or [f" w{i}" + "." * (i % 10 == 9) for i in range(n_tokens)],
        sources=sources,
        held=held,
        relevance=relevance,
        n_sinks=2,
    )


def data_of(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert found
    data: dict[str, Any] = json.loads(found[1])
    return data


def attention_of(s: Survival) -> Attention:
    full = np.random.default_rng(1).random(s.held.shape).astype(np.float32)
    return Attention("What?", s, np.where(s.held, full, np.float32(0)), full)


@given(st.integers(1, 300), st.integers(0, 3))
def test_passages_cover_every_token_once_and_have_one_source(n_tokens: int, seed: int) -> None:
    s = survival(n_tokens, seed=seed)
    found = passages(s)
    assert [t for p in found for t in range(p.first, p.last + 1)] == list(range(n_tokens))
    assert all(len(set(s.sources[p.tokens])) == 1 for p in found)


def test_values_of_cells_go_where_their_tokens_are() -> None:
    positions = np.array([[[-1, 0, 3], [1, 2, 5]]], np.int32)
    values = np.array([[[9, 1, 2], [3, 4, 9]]], np.float32)
    assert by_token(values, positions, 4).tolist() == [[[1, 0, 0, 2], [0, 3, 4, 0]]]


def test_levels_go_up_from_no_head_to_all_and_have_a_name_each() -> None:
    found = levels(np.arange(91) / 90)
    assert (found[0], found[-1]) == (0, N_LEVELS - 1)
    assert (np.diff(found) >= 0).all() and set(found.tolist()) == set(range(N_LEVELS))
    assert (found[1:-1] > 0).all() and (found[1:-1] < N_LEVELS - 1).all()
    assert len(legend()) == N_LEVELS


@pytest.mark.parametrize("fancy", [False, True])
def test_the_strip_is_plain_unless_asked_for_colours(
    fancy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    out, s = io.StringIO(), survival()
    print_strip(s, attention_of(s), file=out, fancy=fancy)
    text = out.getvalue()
    assert "200 tokens" in text and "b & c.txt, p. 3" in text and "Lost most" in text
    assert ("\x1b[" in text) == fancy
    if not fancy:
        assert text.isascii()
        strip = re.findall(r"^ *\d+ ([.1-8]+)$", text, re.M)
        assert sum(map(len, strip)) == 200
        shares = levels(s.share).tolist()
        assert "".join(strip) == "".join(str(level or ".") for level in shares)


def test_the_page_has_the_cells_of_every_head() -> None:
    s = survival(77)
    data = data_of(render_page(s))
    assert data["shape"] == [2, 3, 77] and data["pieces"] == s.pieces
    bits = np.frombuffer(base64.b64decode(data["held"]), np.uint8).reshape(2, 3, -1)
    assert np.array_equal(np.unpackbits(bits, axis=-1, count=77, bitorder="little"), s.held)
    ranks = np.frombuffer(base64.b64decode(data["rank"]), np.uint8)
    assert ranks.size == s.held.sum() and ranks.max() < 100
    names = [data["names"][i] for _, i in data["sources"]]
    assert names == ["a.txt, lines 1-9", "b & c.txt, p. 3"]


def test_the_page_loads_nothing_and_runs_nothing_of_the_text() -> None:
    s = survival(40, pieces=[HOSTILE] * 40)
    page = render_page(s, attention_of(s), title=HOSTILE)
    assert "<img" not in page and "alert(1)</script>" not in page
    assert page.count("</script>") == 2  # its data and its own script
    assert not re.search(r"<[^>]*\s(src|href)\s*=|url\(|https?:|@import|fetch\(", page)
    assert data_of(page)["pieces"][0] == HOSTILE


def test_a_large_page_stays_small() -> None:
    s = survival(8000)
    held = np.random.default_rng(0).random((30, 3, 8000)) < 0.14
    big = Survival(**{**vars(s), "held": held, "relevance": held.astype(np.float32)})
    assert len(render_page(big)) < 1_000_000


def test_what_is_lost_is_what_no_cell_holds() -> None:
    s = survival()
    attention = attention_of(s)
    assert attention.full is not None and attention.lost_share is not None
    text, gone = attention.full[..., 2:], ~s.held[..., 2:]
    assert attention.lost_share == pytest.approx(text[gone].sum() / text.sum(), rel=1e-4)
    assert attention.lost_by_head is not None
    assert attention.lost_by_head[1, 2] == pytest.approx(
        text[1, 2][gone[1, 2]].sum() / text[1, 2].sum(), rel=1e-4
    )
    assert s.n_held[attention.worst_tokens()].max() < s.n_heads
    unknown = Attention("What?", s, attention.kept, None, "no memory")
    assert unknown.lost_share is None and not unknown.lost.any()
    page = render_page(s, unknown)
    assert "no memory" in page and 'id="lost"' not in page and "not known" in page


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["gone.txt"], 1, "gone.txt"),
        (["a.txt", "-o", "nowhere/page.html"], 1, "no folder 'nowhere'"),
        (["a.txt", "-o", "."], 1, "folder"),
        (["a.txt", "-o", "page.pdf"], 1, ".html"),
        (["a.html", "-o", "a.html"], 1, "what is to be read"),
        (["a.txt", "--question", " "], 2, "the question is empty"),
    ],
)
def test_wrong_usage_is_told_before_a_model_loads(
    arguments: list[str],
    code: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "a.html"):
        Path(name).write_text("Some text.")
    result = CliRunner().invoke(main, ["inspect", *arguments])
    assert result.exit_code == code and message in result.output
